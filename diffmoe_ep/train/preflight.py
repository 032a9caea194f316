"""What is outside of a run's process and could fail: its folder, its checkpoint, its dataset. All is checked first."""

import os
import secrets
import sys
import time
from pathlib import Path

from diffmoe_ep.checkpoint.same_run import check_continues, check_same_data
from diffmoe_ep.checkpoint.sound import newest_sound, set_aside
from diffmoe_ep.checkpoint.store import latest
from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.index import MemberSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.picture import check_pictures
from diffmoe_ep.sampling.prompts import grid_prompts
from diffmoe_ep.sampling.sample import check_sampling
from diffmoe_ep.train.boards import check_boards
from diffmoe_ep.train.engine import settings
from diffmoe_ep.train.run_folder import RunFolder


def prepare(config: Config, mesh: Mesh) -> tuple[BatchSource, Path | None]:
    """Find the checkpoint to resume from, which the first rank looks for, and open the dataset on every rank; all agree
    before they go on; collective.

    Raises ConfigError on every rank if any of them cannot write the folder, go on from the checkpoint, or read the
    data; of several mistakes, a changed key is named before what is wrong with the data.
    """
    mesh.agree(RunFolder(Path(config.folder)).problem())
    check_shared(Path(config.folder), mesh)
    checkpoint = find_checkpoint(config, mesh)
    problem: str | None = None
    dataset: BatchSource | None = None
    try:
        if checkpoint is not None and config.resume == "never":
            raise ConfigError(
                f"{config.folder} holds the checkpoint {checkpoint.name} and resume is never; "
                "set resume=auto or give another folder"
            )
        if checkpoint is not None:
            check_continues(checkpoint, config)
        if mesh.is_first:
            check_boards(config)
        settings(config, mesh)
        dataset = open_data(config)
        if checkpoint is not None:
            check_same_data(checkpoint, config, dataset.fingerprint)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: the others must hear of it before they wait
        problem = str(error)
    mesh.agree(problem)
    assert dataset is not None
    for damage in dataset.problems if mesh.is_first else ():
        print(f"{damage}; its bad samples will be replaced", file=sys.stderr, flush=True)
    return dataset, checkpoint


def check_shared(folder: Path, mesh: Mesh) -> None:
    """Raise ConfigError, on every rank alike, unless the first rank of every host sees in the run folder what the first
    of all wrote there, and that one what they wrote; collective.
    """
    hosts = gather_objects(mesh.host, mesh.world)
    speakers = [hosts.index(host) for host in dict.fromkeys(hosts)]  # the first rank of each host
    if len(speakers) == 1:
        return
    token = mesh.same(secrets.token_hex(8) if mesh.is_first else None)
    probes = {rank: folder / f".shared-{token}-{rank}" for rank in speakers}
    problem = None
    try:
        if mesh.rank in probes:
            probes[mesh.rank].touch()
    except OSError as error:
        problem = f"folder {folder} cannot be written ({error.strerror}); give another with folder=..."
    mesh.agree(problem)  # all have written
    if mesh.rank in probes:
        unseen = [rank for rank in (speakers if mesh.is_first else [0]) if not _appears(probes[rank])]
        if unseen:
            problem = (
                f"folder {folder} is not shared: {mesh.host} does not see there what "
                f"{', '.join(hosts[rank] for rank in unseen)} wrote; give one with folder=... on a file system that "
                "all hosts see"
            )
    gather_objects(None, mesh.world)  # all have looked
    if mesh.rank in probes:
        probes[mesh.rank].unlink(missing_ok=True)
    mesh.agree(problem)


def _appears(path: Path, seconds: float = 5.0) -> bool:
    """Whether a file is there, or comes within some seconds, as names do on a network disk."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(path.parent)  # lets a network disk look anew
        time.sleep(0.1)
    return True


def find_checkpoint(config: Config, mesh: Mesh) -> Path | None:
    """The newest sound checkpoint of the run; damaged newer ones are told and set aside; collective."""
    root = RunFolder(Path(config.folder)).checkpoints
    if config.resume == "never":
        checkpoint = mesh.same(latest(root) if mesh.is_first else None)
        assert checkpoint is None or isinstance(checkpoint, Path)
        return checkpoint
    sound, damage = newest_sound(root, mesh)
    problem = None
    if damage and mesh.is_first:
        try:
            aside = set_aside(list(damage))
        except OSError as error:
            problem = f"the damaged checkpoints in {root} cannot be renamed ({error}); move them out of it"
        else:
            for text, place in zip(damage.values(), aside, strict=True):
                print(f"{text}; it is kept as {place.name}", file=sys.stderr)
            print(f"the run goes on from {sound}, the newest sound one", file=sys.stderr, flush=True)
    mesh.agree(problem)
    return sound


def open_data(config: Config) -> BatchSource:
    """Open the dataset that the config names and check that it fits the model; ConfigError or DataError if not."""
    data, plain = config.data, config.data.plain
    dataset: BatchSource
    if data.mode == "resampled":
        spec = MemberSpec(
            plain.kind, plain.label, plain.array, plain.scale, plain.shift, config.model.num_classes, name="plain"
        )
        dataset = PlainTars.open(data.folder, spec, Access.of(data), config.model.condition, plain.shuffle)
    else:
        dataset = Mixture.open(data)
    check_data(config, dataset)
    return dataset


def check_data(config: Config, dataset: BatchSource) -> None:
    """Raise ConfigError unless the data fit the model."""
    manifest, model, names = dataset.manifest, config.model, ", ".join(dataset.names)
    check_text(dataset, CaptionSpec.of(model, config.text))
    if manifest.shape != (model.in_channels, model.input_size, model.input_size):
        raise ConfigError(
            f"the data in {names} are of shape {manifest.shape}, but the model's input is ({model.in_channels}, "
            f"{model.input_size}, {model.input_size}); "
            f"set model.in_channels={manifest.shape[0]} model.input_size={manifest.shape[1]}"
        )
    if model.condition == "class" and manifest.num_classes != model.num_classes:
        raise ConfigError(
            f"the data in {names} have {manifest.num_classes} classes, but model.num_classes is {model.num_classes}; "
            f"set model.num_classes={manifest.num_classes}"
        )
    if config.sample.grid_every:
        check_pictures(DataInfo.of(manifest), config.sample.vae)
        check_sampling(config, len(grid_prompts(config.sample)) or config.sample.grid_size)
