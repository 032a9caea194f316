"""Verbs that draw from a trained model: sample, evaluate."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.config import Config, ConfigError, SampleConfig, override, to_tree

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from diffmoe_ep.evaluate.capacity import Drawer
    from diffmoe_ep.evaluate.draw import Drawn
    from diffmoe_ep.model.dit import DiT
    from diffmoe_ep.parallel.mesh import Mesh


def add(verbs: Any) -> None:
    """Declare sample and evaluate."""
    sample = verbs.add_parser("sample", help="draw images from a run or checkpoint")
    sample.add_argument("--out", required=True, type=Path, help="folder for samples.npz and grid.png")
    sample.add_argument("--threshold", type=float, default=None, help="one constant threshold for all experts (sample.threshold)")
    sample.add_argument("--classes", type=numbers, default=None, metavar="0,1,2", help="classes in turn (default: all)")
    sample.set_defaults(run=_sample)

    evaluate = verbs.add_parser("evaluate", help="score samples of a run or checkpoint against real images")
    evaluate.add_argument("--reference", required=True, type=Path, help="dataset folder of the training images")
    evaluate.add_argument("--heldout", required=True, type=Path, help="dataset folder of held-out images")
    evaluate.add_argument("--out", type=Path, default=None, help="folder for scores.json and grid.png")
    evaluate.set_defaults(run=_evaluate)

    for verb, num in ((sample, 100), (evaluate, 500)):
        verb.add_argument("path", type=Path, help="run folder, one checkpoint in it, or an imported or exported folder")
        verb.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example sample.steps=50 sample.selection=count parallel.expert=2"
        )
        verb.add_argument("--samples", type=int, default=num, help=f"number of samples (default {num})")
        verb.add_argument("--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)")


@dataclass(frozen=True)
class Source:
    """What samples are drawn from."""

    checkpoint: Path
    config: Config  # the run's, with the command's overrides
    facts: dict[str, Any]  # of the data that it was trained on
    seed: int  # of the samples' first noise


def source_of(options: argparse.Namespace) -> Source:
    """Find the checkpoint and check everything that follows from it; parallel.expert is 1 unless an override says otherwise."""
    from diffmoe_ep.checkpoint.exchange import config_of, facts_of, located
    from diffmoe_ep.evaluate.draw import check_sampling
    from diffmoe_ep.parallel.mesh import launched_world

    checkpoint = located(options.path)
    config = override(config_of(checkpoint), ["parallel.expert=1", *options.overrides])
    world, expert = launched_world(), config.parallel.expert
    if options.samples < 1:
        raise ConfigError(f"--samples is {options.samples}; it must be at least 1")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed is {options.seed}; it must be at least 0 and less than 2^63")
    if world % expert:
        started = f"{world} process{'es were' if world > 1 else ' was'} started"
        raise ConfigError(f"parallel.expert is {expert} and {started}; start a multiple of parallel.expert, or leave it at 1")
    check_sampling(config, options.samples)
    return Source(checkpoint, config, facts_of(checkpoint), config.seed if options.seed is None else options.seed)


def load_source(source: Source) -> "tuple[DiT, Mesh]":
    """Load the checkpoint over all launched ranks."""
    from diffmoe_ep.checkpoint.exchange import load_sharded
    from diffmoe_ep.parallel import mesh as meshes

    config = source.config
    mesh = meshes.start(config.parallel.expert, 1, config.parallel.timeout_minutes)
    return load_sharded(source.checkpoint, config.sample.weights, config, mesh), mesh


def bar_for(mesh: "Mesh", title: str) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(unit="step", desc=title, disable=not (mesh.is_first and sys.stderr.isatty()))


def _draw(source: Source, labels: "Tensor") -> "Drawn | None":
    """Load the checkpoint and draw a sample for each label; the first rank gets them."""
    from diffmoe_ep.evaluate.draw import draw

    model, mesh = load_source(source)
    with bar_for(mesh, f"{len(labels)} samples") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        objective = source.config.train.objective
        return draw(model, labels, source.config.sample, mesh, seed=source.seed, objective=objective, progress=show)


def drawer(source: Source, model: "DiT", mesh: "Mesh") -> "Drawer":
    """Draw with the loaded model and any sampling settings."""
    from diffmoe_ep.evaluate.draw import draw

    def drawer(labels: "Tensor", sample: SampleConfig, progress: Callable[[int, int], None] | None) -> "Drawn | None":
        return draw(model, labels, sample, mesh, seed=source.seed, objective=source.config.train.objective, progress=progress)

    return drawer


def out_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be made ({error.strerror}); give a folder that can be written") from error
    return path


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of class numbers such as 0,1,2") from None


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from diffmoe_ep.evaluate.draw import check_labels, check_pictures, classes_in_turn, pixels_of, write_grid
    from diffmoe_ep.parallel import mesh as meshes

    if options.threshold is not None:
        options.overrides = [*options.overrides, f"sample.threshold={options.threshold}"]
    source, out = source_of(options), out_folder(options.out)
    config, pictures = source.config, source.facts["kind"] == "pixels"
    classes = options.classes if options.classes is not None else list(range(config.model.num_classes))
    check_labels(classes, config.model)
    if pictures:
        check_pictures(source.facts)
    drawn = _draw(source, classes_in_turn(options.samples, classes))
    if drawn is not None:
        arrays: dict[str, Any] = {"latents": drawn.latents.numpy(), "labels": drawn.labels.numpy()}
        if pictures:
            arrays["pixels"] = pixels_of(drawn, source.facts).numpy()
        np.savez(out / "samples.npz", **arrays)
        if pictures:
            write_grid(drawn, source.facts, out / "grid.png")
        print(
            f"{len(drawn.labels)} samples of {source.checkpoint}: seed {source.seed}, {config.sample.sampler} {config.sample.steps} steps, "
            f"guidance {config.sample.guidance:g}, selection {config.sample.selection}, C_infer^avg {drawn.capacity.average():.3f}"
        )
        print(f"written to {out}: samples.npz" + (", grid.png" if pictures else ""))
    meshes.stop()


def _evaluate(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.draw import check_pictures, classes_in_turn, pixels_of, write_grid
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel import mesh as meshes

    train, heldout = load_images(options.reference), load_images(options.heldout)
    source = source_of(options)
    check_pictures(source.facts)
    check_real(options.samples, tuple(source.facts["shape"]), {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else out_folder(options.out)
    drawn = _draw(source, classes_in_turn(options.samples, list(range(source.config.model.num_classes))))
    if drawn is not None:
        scores = score(pixels_of(drawn, source.facts), drawn.labels, train, heldout, drawn.capacity)
        print("\n".join(scores.lines()))
        if out is not None:
            protocol = {"checkpoint": str(source.checkpoint), "seed": source.seed, "sample": to_tree(source.config.sample)}
            (out / "scores.json").write_text(json.dumps({**scores.as_dict(), "protocol": protocol}, indent=2) + "\n", encoding="utf-8")
            write_grid(drawn, source.facts, out / "grid.png")
            print(f"written to {out}: scores.json, grid.png")
    meshes.stop()
