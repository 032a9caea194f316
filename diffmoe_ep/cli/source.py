"""What verbs that draw from a trained model have in common: where it is, how it is loaded, and what is written."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.cli.options import overrides, positional
from diffmoe_ep.config import Config, ConfigError, SampleConfig, override, to_tree

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from diffmoe_ep.data.info import DataInfo
    from diffmoe_ep.evaluate.capacity.sample_fn import SampleFn
    from diffmoe_ep.model.dit import DiT
    from diffmoe_ep.parallel.mesh import Mesh
    from diffmoe_ep.sampling.prompts import Prompts
    from diffmoe_ep.sampling.sample import Samples


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is drawn from, and how."""

    path: Path = positional("run folder, one checkpoint in it, or an imported or exported folder")
    overrides: tuple[str, ...] = overrides("sample.steps=50 sample.selection=count parallel.expert_parallel=2 seed=3")


@dataclass(frozen=True)
class Source:
    """What samples are drawn from."""

    checkpoint: Path
    config: Config
    """The run's, with the command's overrides."""
    data_info: "DataInfo"
    """Of the data that it was trained on."""

    @property
    def seed(self) -> int:
        """Of the samples' first noise."""
        return self.config.seed


def source_of(options: SourceOptions, samples: int) -> Source:
    """Find the checkpoint and check everything that follows from it; parallel.expert_parallel is 1 unless an override
    says otherwise.
    """
    from diffmoe_ep.checkpoint.load import config_of, data_info_of, resolve_model_path
    from diffmoe_ep.parallel.mesh import launched_world
    from diffmoe_ep.sampling.sample import check_sampling

    checkpoint = resolve_model_path(options.path)
    config = override(config_of(checkpoint), ["parallel.expert_parallel=1", *options.overrides])
    world, expert = launched_world(), config.parallel.expert_parallel
    if samples < 1:
        raise ConfigError(f"--samples is {samples}; it must be at least 1")
    if world % expert:
        started = f"{world} process{'es were' if world > 1 else ' was'} started"
        raise ConfigError(
            f"parallel.expert_parallel is {expert} and {started}; start a multiple of parallel.expert_parallel, or "
            "leave it at 1"
        )
    check_sampling(config, samples)
    return Source(checkpoint, config, data_info_of(checkpoint))


def load_source(source: Source) -> "tuple[DiT, Mesh]":
    """Load the checkpoint over all launched ranks."""
    mesh = _mesh(source)
    return _load(source, mesh), mesh


def _mesh(source: Source) -> "Mesh":
    from diffmoe_ep.parallel.mesh import init_mesh

    parallel = source.config.parallel
    return init_mesh(parallel.expert_parallel, 1, parallel.timeout_minutes)


def _load(source: Source, mesh: "Mesh") -> "DiT":
    from diffmoe_ep.checkpoint.load import load_sharded

    return load_sharded(source.checkpoint, source.config.sample.weights, source.config, mesh)


def encoded(source: Source, mesh: "Mesh", words: Sequence[str]) -> "Prompts":
    """Prompts with their features, the same bits on every rank: the first one encodes, and says on standard error what
    is empty or cut.
    """
    from diffmoe_ep.sampling.prompts import Prompts, encode, load_encoder

    found, problem = None, None
    if mesh.is_first:
        try:
            found, said = encode(
                load_encoder(source.config, source.data_info, mesh.device), words, source.config.model.text_length
            )
            for line in said:
                print(f"diffmoe: {line}", file=sys.stderr)
        except ValueError as error:  # ConfigError: agreed over all ranks
            problem = str(error)
    mesh.agree(problem)
    shared = mesh.same(found)
    assert isinstance(shared, Prompts)
    return shared


def bar_for(mesh: "Mesh", title: str) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(unit="step", desc=title, disable=not (mesh.is_first and sys.stderr.isatty()))


def sample_all(source: Source, asked: "Tensor | Sequence[str]", negative: str | None = None) -> "Samples | None":
    """Load the checkpoint and draw a sample for each label or prompt; the first rank gets them. Sample n of prompts has
    seed + n.
    """
    from diffmoe_ep.sampling.decode import load_decoder
    from diffmoe_ep.sampling.prompts import Prompts
    from diffmoe_ep.sampling.sample import sample

    mesh = _mesh(source)
    conditions: Tensor | Prompts
    away = None
    if isinstance(asked, Sequence):
        prompts = encoded(source, mesh, [*asked, *([negative] if negative is not None else [])])
        conditions, away = (
            prompts.part(0, len(asked)),
            prompts.part(len(asked), len(prompts)) if negative is not None else None,
        )
    else:
        conditions = asked
    seed = range(source.seed, source.seed + len(asked)) if isinstance(asked, Sequence) else source.seed
    decode = load_decoder(source.config.sample, source.data_info, mesh)
    model = _load(source, mesh)
    with bar_for(mesh, f"{len(asked)} samples") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        objective = source.config.train.objective
        return sample(
            model,
            conditions,
            source.config.sample,
            mesh,
            seed=seed,
            negative=away,
            objective=objective,
            decode=decode,
            progress=show,
        )


def sample_fn(source: Source, model: "DiT", mesh: "Mesh") -> "SampleFn":
    """Returns a function that samples from the loaded model with any sampling settings."""
    from diffmoe_ep.sampling.decode import load_decoder
    from diffmoe_ep.sampling.sample import sample

    decode = load_decoder(source.config.sample, source.data_info, mesh)

    def sample_with(
        conditions: "Tensor | Prompts", config: SampleConfig, progress: Callable[[int, int], None] | None
    ) -> "Samples | None":
        return sample(
            model, conditions, config, mesh, seed=source.seed, objective=source.config.train.objective, decode=decode,
            progress=progress,
        )  # fmt: skip

    return sample_with


def out_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be made ({error.strerror}); give a folder that can be written"
        ) from error
    return path


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of class numbers such as 0,1,2") from None


def images(source: Source, drawn: "Samples", negative: str | None) -> dict[str, Any]:
    """The prompt and seed of each image: with its prompt and seed alone it can be drawn again."""
    images = [{"prompt": text, "seed": source.seed + number} for number, text in enumerate(drawn.prompts)]
    return {**protocol(source), "negative": negative, "images": images}


def protocol(source: Source) -> dict[str, Any]:
    return {"checkpoint": str(source.checkpoint), "seed": source.seed, "sample": to_tree(source.config.sample)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
