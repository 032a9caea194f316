"""What is outside of a run's process and could fail: its folder, its checkpoint, its dataset. All is checked first."""

import sys
from pathlib import Path

from diffmoe_ep.checkpoint.same_run import check_continues, check_same_data
from diffmoe_ep.checkpoint.store import latest
from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.captions import CaptionSpec, check_text
from diffmoe_ep.data.index import MemberSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.picture import check_pictures
from diffmoe_ep.sampling.sample import check_sampling
from diffmoe_ep.train.run_folder import RunFolder


def prepare(config: Config, mesh: Mesh) -> tuple[BatchSource, Path | None]:
    """Find the checkpoint to resume from, which the first rank looks for, and open the dataset on every rank; all agree
    before they go on; collective.

    Raises ConfigError on every rank if any of them cannot write the folder, go on from the checkpoint, or read the
    data; of several mistakes, a changed key is named before what is wrong with the data.
    """
    run = RunFolder(Path(config.folder))
    mesh.agree(run.problem())
    checkpoint = mesh.same(latest(run.checkpoints) if mesh.is_first else None)
    assert checkpoint is None or isinstance(checkpoint, Path)
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
        check_sampling(config, config.sample.grid_size)
