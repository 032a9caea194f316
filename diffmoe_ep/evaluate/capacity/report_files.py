"""A capacity report as files: tables and plots."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffmoe_ep.evaluate.capacity import plots
from diffmoe_ep.evaluate.capacity.report import EXTREMES, Report
from diffmoe_ep.sampling.picture import are_pictures, highest, pixels_of
from diffmoe_ep.sampling.sample import Samples


def write(report: Report, out: Path) -> list[str]:
    """Write all tables and plots to a folder; returns the files' names."""
    out.mkdir(parents=True, exist_ok=True)
    return [*write_tables(report, out), *write_plots(report, out)]


def write_tables(report: Report, out: Path) -> list[str]:
    """Write the measurements as CSV files, steps, layers and experts counted from 0; returns their names."""
    write_csv(out / "capacity_per_step.csv", ("step", "capacity"), enumerate(report.record.per_step().tolist()))
    cube = report.per_layer_expert_step().tolist()
    rows = (
        (step, layer, report.blocks[layer], expert, value)
        for step, layers in enumerate(cube)
        for layer, experts in enumerate(layers)
        for expert, value in enumerate(experts)
    )
    write_csv(out / "capacity_per_layer_expert.csv", ("step", "layer", "block", "expert", "capacity"), rows)
    ranking = (
        (rank, one.label, one.name, report.per_class, one.capacity) for rank, one in enumerate(report.classes, 1)
    )
    write_csv(out / f"capacity_per_{report.kind}.csv", ("rank", report.kind, "name", "samples", "capacity"), ranking)
    names = ["capacity_per_step.csv", "capacity_per_layer_expert.csv", f"capacity_per_{report.kind}.csv"]
    if report.topk is not None:
        pairs, agreement = report.topk.counts.long().tolist(), report.topk.agreement().tolist()
        lines = (
            (step, layer, report.blocks[layer], *pairs[step][layer], agreement[step][layer])
            for step in range(len(pairs))
            for layer in range(len(pairs[step]))
        )
        write_csv(
            out / "topk_against_predictor.csv",
            ("step", "layer", "block", "predictor", "topk", "both", "agreement"),
            lines,
        )
        names.append("topk_against_predictor.csv")
    return names


def write_plots(report: Report, out: Path) -> list[str]:
    """Draw the measurements; returns the files' names. Pictures of samples are shown where there are some."""
    cube, blocks = report.per_layer_expert_step().numpy(), report.blocks
    ranked = [(one.name, one.capacity) for one in report.classes]
    curves = torch.stack([one.per_step for one in report.classes]).numpy()  # (classes, steps)
    plots.steps(
        out / "capacity_per_step.png",
        report.record.per_step().numpy(),
        curves,
        [name for name, _ in ranked],
        report.kind,
    )
    plots.expert_map(out / "capacity_per_layer_expert.png", cube, blocks)
    plots.expert_curves(out / "expert_dynamics.png", cube, blocks)
    plots.classes(out / f"capacity_per_{report.kind}.png", ranked, report.record.average(), report.kind)
    names = [
        "capacity_per_step.png",
        "capacity_per_layer_expert.png",
        "expert_dynamics.png",
        f"capacity_per_{report.kind}.png",
    ]
    shown, pictures = min(EXTREMES, len(ranked) // 2), _as_pictures(report)
    if pictures is not None and shown:
        hardest, easiest = (
            [(one.name, one.capacity, pictures(one.samples)) for one in part if one.samples is not None]
            for part in (report.classes[:shown], report.classes[: -shown - 1 : -1])
        )
        plots.extremes(out / "hardest_easiest.png", hardest, easiest, report.kinds)
        names.append("hardest_easiest.png")
    if report.topk is not None:
        against = report.topk
        strips = None if pictures is None else (pictures(against.topk), pictures(against.predictor))
        capacities = (against.topk.capacity.per_step().numpy(), against.predictor.capacity.per_step().numpy())
        together = (against.agreement_per_step().numpy(), against.overall())
        agreement, path = against.agreement().numpy(), out / "topk_against_predictor.png"
        plots.topk(path, strips, against.names, capacities, agreement, together, blocks)
        names.append("topk_against_predictor.png")
    return names


def _as_pictures(report: Report) -> Callable[[Samples], plots.Pictures] | None:
    """How samples are shown: as numbers in 0..1 (n, H, W, C); None for what is no picture of 1 or 3 channels."""
    data_info = report.data_info
    decoded = any(one.samples is not None and one.samples.decoded is not None for one in report.classes)
    if not decoded and not are_pictures(data_info):
        return None
    return lambda samples: pixels_of(samples, data_info).permute(0, 2, 3, 1).double().numpy() / highest(data_info)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as a CSV file under a line of names; numbers with six digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
