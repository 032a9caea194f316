"""Verbs that show where a trained model spends its compute: capacity report, capacity search."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe_ep.cli.sample import bar_for, drawer, encoded, load_source, numbers, out_folder, source_of

if TYPE_CHECKING:
    from diffmoe_ep.sampling.sample import Drawn


def add(verbs: Any) -> None:
    """Declare capacity report and capacity search."""
    capacity = verbs.add_parser("capacity", help="where a trained model spends its compute").add_subparsers(
        required=True, metavar="WHAT"
    )
    report = capacity.add_parser(
        "report", help="capacity by sampling step, layer, expert, and class or prompt, as CSV and plots"
    )
    report.add_argument("--out", required=True, type=Path, help="folder for tables and plots")
    report.add_argument("--classes", type=numbers, default=None, metavar="0,1,2", help="classes (default: all)")
    report.add_argument("--per-class", dest="samples", type=int, default=8, help="samples of each class (default 8)")
    report.add_argument("--per-prompt", dest="samples", type=int, help="the same of each prompt")
    report.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="WORDS",
        help="what to draw (a model of captions); again for more",
    )
    report.add_argument(
        "--prompts", type=Path, default=None, metavar="FILE", help="text file of prompts, one on each line"
    )
    report.set_defaults(run=_capacity_report)
    search = capacity.add_parser(
        "search", help="try constant thresholds and pick the best with C at most 1 (interval search)"
    )
    search.add_argument(
        "--thresholds",
        required=True,
        type=_thresholds,
        metavar="0.3,0.5,dynamic",
        help="constants to try, and dynamic or raw",
    )
    search.add_argument("--reference", required=True, type=Path, help="dataset folder of the training images")
    search.add_argument("--heldout", required=True, type=Path, help="dataset folder of held-out images")
    search.add_argument("--out", type=Path, default=None, help="folder for thresholds.csv and thresholds.png")
    search.add_argument("--samples", type=int, default=500, help="samples for each threshold (default 500)")
    search.set_defaults(run=_capacity_search)
    for verb in (report, search):
        verb.add_argument("path", type=Path, help="run folder, one checkpoint in it, or an imported or exported folder")
        verb.add_argument("overrides", nargs="*", metavar="key=value")
        verb.add_argument(
            "--seed", type=int, default=None, help="seed of the samples' first noise (default: the run's)"
        )


def _thresholds(text: str) -> list[Any]:
    try:
        return [part if part in ("dynamic", "raw") else float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of thresholds such as 0.3,0.5,dynamic") from None


def _capacity_report(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.capacity.report import check_report, report
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.prompts import read_prompts

    words = [*options.prompt, *(read_prompts(options.prompts) if options.prompts is not None else [])]
    source, out = source_of(options), out_folder(options.out)
    check_report(source.config.model, options.samples, options.classes, len(words))
    model, mesh = load_source(source)
    prompts = encoded(source, mesh, words) if words else None
    with bar_for(mesh, "classes") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = report(
            model, drawer(source, model, mesh), source.config.sample, source.data_info, mesh,
            per_class=options.samples, seed=source.seed, out=out, classes=options.classes, prompts=prompts, progress=show,
        )  # fmt: skip
    if found is not None:
        print("\n".join(found.lines()))
        print(f"written to {out}")
    destroy_mesh()


def _capacity_search(options: argparse.Namespace) -> None:
    from diffmoe_ep.evaluate.capacity.intervals import check_search, search, with_threshold, write_search
    from diffmoe_ep.evaluate.pipeline import check_real, load_images, score
    from diffmoe_ep.parallel.mesh import destroy_mesh
    from diffmoe_ep.sampling.sample import check_pixels, classes_in_turn, pixels_of

    train, heldout = load_images(options.reference), load_images(options.heldout)
    source = source_of(options)
    check_search(source.config.model, source.config.sample, options.thresholds)
    check_pixels(source.data_info)
    check_real(options.samples, source.data_info.shape, {"--reference": train, "--heldout": heldout})
    out = None if options.out is None else out_folder(options.out)
    model, mesh = load_source(source)
    labels = classes_in_turn(options.samples, list(range(source.config.model.num_classes)))

    def scorer(drawn: "Drawn") -> float:
        return score(pixels_of(drawn, source.data_info), drawn.labels, train, heldout, drawn.capacity).frechet

    draw_with = with_threshold(drawer(source, model, mesh), labels, source.config.sample)
    found = search(draw_with, options.thresholds, scorer, score="Fréchet distance")
    if found is not None:
        print("\n".join(found.lines()))
        if out is not None:
            print(f"written to {out}: {', '.join(write_search(found, out))}")
    destroy_mesh()
