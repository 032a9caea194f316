"""Verbs that show where a trained model spends its compute: capacity report, capacity search."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.cli.options import Verb, option, required
from diffmoe_ep.cli.source import (
    SourceOptions,
    bar_for,
    encoded,
    load_source,
    numbers,
    out_folder,
    sample_fn,
    source_of,
)

if TYPE_CHECKING:
    from diffmoe_ep.sampling.sample import Samples


def _thresholds(text: str) -> list[Any]:
    try:
        return [part if part in ("dynamic", "raw") else float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of thresholds such as 0.3,0.5,dynamic") from None


@dataclass(frozen=True, kw_only=True)
class Report(SourceOptions):
    """Capacity by sampling step, layer, expert, and class or prompt, as CSV and plots."""

    out: Path = required("folder for tables and plots")
    classes: tuple[int, ...] | None = option(None, "classes (default: all)", "0,1,2", numbers)
    per_class: int = option(8, "samples of each class")
    prompt: tuple[str, ...] = option((), "what to draw (a model of captions); again for more", "WORDS")
    prompts: Path | None = option(None, "text file of prompts, one on each line", "FILE")
    per_prompt: int = option(8, "samples of each prompt")


@dataclass(frozen=True, kw_only=True)
class Search(SourceOptions):
    """Try constant thresholds and pick the best with C at most 1 (interval search)."""

    thresholds: tuple[Any, ...] = required("constants to try, and dynamic or raw", "0.3,0.5,dynamic", _thresholds)
    reference: Path = required("dataset folder of the training images", "FOLDER")
    heldout: Path = required("dataset folder of held-out images", "FOLDER")
    out: Path | None = option(None, "folder for thresholds.csv and thresholds.png")
    samples: int = option(500, "samples for each threshold")


def _report(options: Report) -> None:
    from diffmoe_ep.evaluate.capacity.report import check_report, report
    from diffmoe_ep.evaluate.capacity.report_files import write
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.prompts import read_prompts

    words = [*options.prompt, *(read_prompts(options.prompts) if options.prompts is not None else [])]
    samples = options.per_prompt if words else options.per_class
    classes = None if options.classes is None else list(options.classes)
    source, out = source_of(options, samples), out_folder(options.out)
    check_report(source.config.model, samples, classes, len(words))
    model, mesh = load_source(source)
    prompts = encoded(source, mesh, words) if words else None
    with bar_for(mesh, "classes") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = report(
            model, sample_fn(source, model, mesh), source.config.sample, source.data_info, mesh,
            per_class=samples, seed=source.seed, classes=classes, prompts=prompts, progress=show,
        )  # fmt: skip
    if found is not None:
        write(found, out)
        print("\n".join(found.lines()))
        print(f"written to {out}")
    destroy_mesh()


def _search(options: Search) -> None:
    from diffmoe_ep.evaluate.capacity.intervals import check_search, search, with_threshold, write_search
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.picture import check_pixels, pixels_of
    from diffmoe_ep.sampling.sample import classes_in_turn

    train, heldout = load_images(options.reference), load_images(options.heldout)
    source = source_of(options, options.samples)
    check_search(source.config.model, source.config.sample, list(options.thresholds))
    check_pixels(source.data_info)
    check_real(options.samples, source.data_info.shape, {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else out_folder(options.out)
    model, mesh = load_source(source)
    labels = classes_in_turn(options.samples, list(range(source.config.model.num_classes)))

    def scorer(drawn: "Samples") -> float:
        return score(pixels_of(drawn, source.data_info), drawn.labels, train, heldout, drawn.capacity).frechet

    sample_with = with_threshold(sample_fn(source, model, mesh), labels, source.config.sample)
    found = search(sample_with, list(options.thresholds), scorer, score="Fréchet distance")
    if found is not None:
        print("\n".join(found.lines()))
        if out is not None:
            print(f"written to {out}: {', '.join(write_search(found, out))}")
    destroy_mesh()


VERBS = (Verb(("capacity", "report"), Report, _report), Verb(("capacity", "search"), Search, _search))
