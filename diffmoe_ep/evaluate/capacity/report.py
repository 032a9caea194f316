"""How much compute a trained model spends, and on what: by sampling step, layer, expert, and class or prompt.

Capacity 1 is the compute of a dense model: C of an expert is N * processed / tokens (Eq. 8, 9), measured while samples
are drawn.
"""

import contextlib
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.config import (
    ConfigError,
    ModelConfig,
    SampleConfig,
    has_experts,
    has_predictor,
    num_tokens,
    to_tree,
    tokens_per_expert,
)
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.evaluate.capacity import plots
from diffmoe_ep.model.count import count, equation_40
from diffmoe_ep.model.dit import DiT, is_moe
from diffmoe_ep.moe.dispatch import Dispatch, Route
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.moe.routing import Assignment, choose_by_pool
from diffmoe_ep.parallel.collectives import collect_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.generate import CapacityRecord
from diffmoe_ep.sampling.prompts import Prompts
from diffmoe_ep.sampling.sample import Drawn, check_labels, highest, pixels_of

Progress = Callable[[int, int], None]  # (done, in all)
Asked = Tensor | Prompts  # labels (n,), or as many prompts
Drawer = Callable[
    [Asked, SampleConfig, Progress | None], Drawn | None
]  # for what, how, told after each step; None but on the first rank
EXTREMES = 10  # classes or prompts at either end of the ranking that are shown


@dataclass(frozen=True)
class ClassCapacity:
    """What the samples of one class, or of one prompt, cost."""

    label: int  # or the prompt's number
    name: str  # or the prompt
    per_step: Tensor  # (steps,) float64 C
    samples: Drawn | None  # kept for those at either end of the ranking

    @property
    def capacity(self) -> float:
        """C_infer^avg of the class."""
        return float(self.per_step.mean())


@dataclass(frozen=True)
class AgainstTopK:
    """The predictor's choice beside that of a top-k over the same sample's tokens, at batch 1 (Figure 6)."""

    names: tuple[str, ...]  # of the samples' classes, or their prompts
    k: int  # tokens that the top-k lets an expert take of a sample's
    # (steps, layers, 3) float64 (token, expert) pairs along the predictor's samples: predictor's, top-k's, those of
    # both
    counts: Tensor
    predictor: Drawn  # samples drawn with the predictor
    topk: Drawn  # the same drawn with the top-k

    def agreement(self) -> Tensor:
        """Pairs that both take as a share of those that either takes, (steps, layers); 1 where neither takes any."""
        return _shared(self.counts)

    def agreement_per_step(self) -> Tensor:
        """The same over all layers, (steps,)."""
        return _shared(self.counts.sum(1))

    def overall(self) -> float:
        """The same over all steps and layers."""
        return float(_shared(self.counts.sum((0, 1))))


def _shared(counts: Tensor) -> Tensor:
    ours, theirs, both = counts.unbind(-1)
    either = ours + theirs - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Report:
    """Where a model spends its compute, measured on `per_class` samples of each class (or prompt), drawn class by
    class.
    """

    model: ModelConfig
    sample: SampleConfig
    data_info: DataInfo  # of the data that the model was trained on
    seed: int  # of the samples' first noise, the same for each class
    per_class: int
    record: CapacityRecord  # over all classes
    classes: tuple[ClassCapacity, ...]  # hardest first
    topk: (
        AgainstTopK | None
    )  # None: the model has no predictor, or a sample has too few tokens for every expert to take one
    activated: float  # parameters that work on an average token at the measured capacity, counted exactly
    estimate: float  # the same by the paper's Eq. 40

    @property
    def kind(self) -> str:
        """What is ranked: class or prompt."""
        return "prompt" if self.model.condition == "text" else "class"

    @property
    def kinds(self) -> str:
        """The same for many."""
        return "prompts" if self.kind == "prompt" else "classes"

    @property
    def blocks(self) -> list[int]:
        """Which blocks (from 0) the MoE layers are."""
        return [block for block in range(self.model.num_blocks) if is_moe(self.model, block)]

    def per_layer_expert_step(self) -> Tensor:
        """C of every step, layer and expert (steps, layers, N) float64."""
        return self.model.num_experts * self.record.processed / self.record.tokens[:, :, None]

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        steps, experts, number = self.record.per_step(), self.record.per_layer_expert(), len(self.classes)
        lowest, largest = int(steps.argmin()), int(steps.argmax())
        idle, busiest = (divmod(int(place), experts.shape[1]) for place in (experts.argmin(), experts.argmax()))
        shown = min(5, number // 2)
        rows = [
            (
                f"capacity of {number * self.per_class} samples",
                f"{self.per_class} of each of {number} {self.kinds}, seed {self.seed}",
            ),
            ("C_infer^avg", f"{self.record.average():.4f}  (1 = compute of a dense model)"),
            ("by step", f"{steps[lowest]:.3f} (step {lowest}) to {steps[largest]:.3f} (step {largest})"),
            (
                "by layer",
                ", ".join(
                    f"block {block} {value:.3f}" for block, value in zip(self.blocks, experts.mean(1), strict=True)
                ),
            ),
            (
                "by expert",
                f"{experts[idle]:.3f} ({self._expert(idle)}) to {experts[busiest]:.3f} ({self._expert(busiest)})",
            ),
        ]
        if shown:
            for which, part in (("hardest", self.classes[:shown]), ("easiest", self.classes[: -shown - 1 : -1])):
                gap = "; " if self.kind == "prompt" else ", "
                rows.append((f"{which} {self.kinds}", gap.join(f"{one.name} {one.capacity:.3f}" for one in part)))
        rows.append(
            (
                "activated parameters",
                f"{self.estimate / 1e6:,.3f}M by Eq. 40, {self.activated / 1e6:,.3f}M counted exactly",
            )
        )
        if self.topk is not None:
            ours, theirs, _ = self.topk.counts.sum((0, 1)).tolist()
            rows.append(
                (
                    "top-k at batch 1",
                    f"agrees on {self.topk.overall():.1%} of what either takes; predictor takes {ours / theirs:.3f} times as much",
                )
            )
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]

    def as_dict(self) -> dict[str, object]:
        """The summary, ready for JSON; the tables hold the rest."""
        return {
            "capacity": self.record.average(),
            "capacity_per_step": self.record.per_step().tolist(),
            "capacity_per_layer": self.record.per_layer_expert().mean(1).tolist(),
            f"capacity_per_{self.kind}": {one.name: one.capacity for one in self.classes},
            "activated": self.activated,
            "activated_by_equation_40": self.estimate,
            "agreement_with_topk": None if self.topk is None else self.topk.overall(),
            f"per_{self.kind}": self.per_class,
            "seed": self.seed,
            "sample": to_tree(self.sample),
        }

    def _expert(self, place: tuple[int, int]) -> str:
        return f"block {self.blocks[place[0]]}, expert {place[1]}"


def check_report(
    model: ModelConfig, per_class: int, classes: Sequence[int] | None = None, prompts: int | None = None
) -> None:
    """Raise ConfigError, before anything is drawn, unless a capacity report can be made of this model."""
    if not has_experts(model):
        raise ConfigError(
            "model.family is dense: it has no experts, and its capacity is 1 at every step; name a run that has experts"
        )
    if not any(is_moe(model, block) for block in range(model.num_blocks)):
        raise ConfigError(
            f"the model has no MoE layer: model.interleave leaves block 0 dense and model.num_blocks is {model.num_blocks}"
        )
    if per_class < 1:
        raise ConfigError(
            f"{'--per-prompt' if model.condition == 'text' else '--per-class'} is {per_class}; it must be at least 1"
        )
    if model.condition == "text" and not prompts:
        raise ConfigError('the model is conditioned on captions; say what to draw: --prompt "...", or --prompts FILE')
    if model.condition == "class" and prompts:
        raise ConfigError(
            "prompts are given, but the model is conditioned on classes; give --classes, or nothing for all of them"
        )
    if classes is not None and not classes:
        raise ConfigError("no classes are named; leave --classes out for all of them")
    if classes is not None or model.condition == "class":
        check_labels(list(classes or ()), model)
    if find_spec("matplotlib") is None:
        raise ConfigError("capacity plots need matplotlib, which is not installed: pip install 'diffmoe_ep[log]'")


def report(
    module: DiT,
    draw: Drawer,
    sample: SampleConfig,
    data_info: DataInfo,
    mesh: Mesh,
    *,
    per_class: int,
    seed: int,
    out: Path | None = None,
    classes: Sequence[int] | None = None,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Draw `per_class` samples of each class, or of each of the prompts, and tell where the compute went; None on all
    ranks but the first.

    draw draws with `module`, which is watched meanwhile, over the ranks of `mesh`, always from the same noise (seed
    says which), so that classes differ by their condition alone. A class is drawn by itself: under
    selection `count` and `topk` its chunks are its pools. With `out`, tables and plots are written there.
    """
    model = module.config
    check_report(model, per_class, classes, None if prompts is None else len(prompts))
    if prompts is not None:
        labels, names = list(range(len(prompts))), list(prompts.words)
    else:
        labels = sorted(set(classes)) if classes is not None else list(range(model.num_classes))
        names = list(data_info.class_names) or [str(label) for label in range(model.num_classes)]
    k = _topk_of_a_sample(model, sample)
    total = len(labels) + (2 if k else 0)
    record, measured = CapacityRecord.empty(), []

    def asked(numbers: list[int]) -> Asked:
        return torch.tensor(numbers) if prompts is None else prompts.taken(numbers)

    for done, label in enumerate(labels):
        if progress is not None:
            progress(done, total)
        drawn = draw(asked([label] * per_class), sample, None)
        if done == 0:
            mesh.agree(None if drawn is None else _unsteady(drawn, sample))
        if drawn is not None:
            record = record.merge(drawn.capacity)
            measured.append(ClassCapacity(label, names[label], drawn.capacity.per_step(), drawn))
            measured.sort(key=lambda one: -one.capacity)  # stable: equal ones stay in order
            middle = measured[EXTREMES:-EXTREMES]
            measured[EXTREMES:-EXTREMES] = [replace(one, samples=None) for one in middle]
    some = [labels[place] for place in _spread(len(labels), EXTREMES)]
    against = _against_topk(module, draw, asked(some), [names[label] for label in some], sample, mesh, k) if k else None
    if progress is not None:
        progress(total, total)
    if not mesh.is_first:
        return None
    spent = record.average()
    found = Report(
        model=model,
        sample=sample,
        data_info=data_info,
        seed=seed,
        per_class=per_class,
        record=record,
        classes=tuple(measured),
        topk=against,
        activated=count(model).activated(spent),
        estimate=equation_40(model, spent),
    )
    if out is not None:
        write(found, out)
    return found


def _unsteady(drawn: Drawn, sample: SampleConfig) -> str | None:
    """What is wrong with steps that the solver chooses itself: those of one draw are not those of another."""
    taken = len(drawn.capacity.tokens)
    if taken == sample.steps:
        return None
    return f"the solver took {taken} steps of its own where sample.steps is {sample.steps}; set sample.sampler=heun or euler for a report"


# -- top-k against the predictor ---------------------------------------------------------------------------------------


class _Watch:
    """Stands before a layer's dispatcher and counts, sample by sample, what the layer chose and what a top-k would
    have.
    """

    def __init__(self, inner: Dispatch, tokens: int, k: int, counts: Tensor) -> None:
        self.inner, self.pools, self.k = inner, Pools(tokens), k
        self.compiled = inner.compiled
        self.counts = counts  # (steps, 3) a layer's part of AgainstTopK.counts
        self.step = 0

    def route(self, assignment: Assignment) -> Route:
        """See `Dispatch.route`."""
        if len(assignment.chosen):
            ours = assignment.chosen
            theirs = choose_by_pool(assignment.weight, self.k, self.pools)[0].chosen
            self.counts[self.step] += (
                torch.stack([chosen.sum() for chosen in (ours, theirs, ours & theirs)]).double().cpu()
            )
        return self.inner.route(assignment)

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """See `Dispatch.dispatch`."""
        return self.inner.dispatch(tokens, route)

    def combine(self, rows: Tensor, route: Route, weight: Tensor) -> Tensor:
        """See `Dispatch.combine`."""
        return self.inner.combine(rows, route, weight)


@contextlib.contextmanager
def _watched(module: DiT, k: int, counts: Tensor) -> Iterator[list[_Watch]]:
    """Count each layer's choices into counts (steps, layers, 3) for as long as it lasts."""
    layers = module.moe_layers()
    watches = [
        _Watch(layer.dispatcher, num_tokens(module.config), k, part)
        for layer, part in zip(layers, counts.unbind(1), strict=True)
    ]
    for layer, watch in zip(layers, watches, strict=True):
        layer.dispatcher = watch
    try:
        yield watches
    finally:
        for layer, watch in zip(layers, watches, strict=True):
            layer.dispatcher = watch.inner


@contextlib.contextmanager
def _choosing_from_one_sample(module: DiT) -> Iterator[None]:
    """Let every layer choose from one sample's tokens for as long as it lasts; then pools and inference rule are as
    before.
    """
    layers = module.moe_layers()
    before = [(layer.pools, layer.rule) for layer in layers]
    for layer in layers:
        layer.pools = Pools(num_tokens(module.config))
    try:
        yield
    finally:
        for layer, (pools, rule) in zip(layers, before, strict=True):
            layer.pools, layer.rule = pools, rule


def _topk_of_a_sample(model: ModelConfig, sample: SampleConfig) -> int | None:
    """Tokens that an expert takes of one sample by the training rule; None where there is nothing to compare or nothing
    to take.
    """
    if not has_predictor(model) or sample.selection == "topk":
        return None
    try:
        return tokens_per_expert(
            num_tokens(model), sample.capacity, model.num_experts, "sample.capacity", model.granularity
        )
    except ConfigError:  # fewer tokens than experts: such a top-k cannot be
        return None


def _against_topk(
    module: DiT, draw: Drawer, asked: Asked, names: list[str], sample: SampleConfig, mesh: Mesh, k: int
) -> AgainstTopK | None:
    """Draw a sample of each class or prompt asked for, one at a time, with the predictor and with a top-k; None but on
    the first rank.
    """
    alone = replace(sample, chunk=1)
    counts = torch.zeros(sample.steps, len(module.moe_layers()), 3, dtype=torch.float64)
    with _watched(module, k, counts) as watches:

        def follow(done: int, _: int) -> None:
            for watch in watches:
                watch.step = done % sample.steps

        predictor = draw(asked, alone, follow)
    with _choosing_from_one_sample(module):
        topk = draw(asked, replace(alone, selection="topk"), None)
    parts: list[Tensor] | None = collect_objects(counts, mesh.world)
    if parts is None or predictor is None or topk is None:
        return None
    return AgainstTopK(tuple(names), k, torch.stack(parts).sum(0), predictor, topk)


def _spread(number: int, most: int) -> list[int]:
    """Up to `most` of the places 0..number-1, evenly spread."""
    return sorted({round(place * (number - 1) / max(1, min(number, most) - 1)) for place in range(min(number, most))})


# -- tables and plots --------------------------------------------------------------------------------------------------


def write(found: Report, out: Path) -> list[str]:
    """Write all tables and plots to a folder; gives the files' names."""
    out.mkdir(parents=True, exist_ok=True)
    return [*write_tables(found, out), *write_plots(found, out)]


def write_tables(found: Report, out: Path) -> list[str]:
    """Write the measurements as CSV files, steps, layers and experts counted from 0; gives their names."""
    write_csv(out / "capacity_per_step.csv", ("step", "capacity"), enumerate(found.record.per_step().tolist()))
    cube = found.per_layer_expert_step().tolist()
    rows = (
        (step, layer, found.blocks[layer], expert, value)
        for step, layers in enumerate(cube)
        for layer, experts in enumerate(layers)
        for expert, value in enumerate(experts)
    )
    write_csv(out / "capacity_per_layer_expert.csv", ("step", "layer", "block", "expert", "capacity"), rows)
    ranking = ((rank, one.label, one.name, found.per_class, one.capacity) for rank, one in enumerate(found.classes, 1))
    write_csv(out / f"capacity_per_{found.kind}.csv", ("rank", found.kind, "name", "samples", "capacity"), ranking)
    names = ["capacity_per_step.csv", "capacity_per_layer_expert.csv", f"capacity_per_{found.kind}.csv"]
    if found.topk is not None:
        pairs, agreement = found.topk.counts.long().tolist(), found.topk.agreement().tolist()
        lines = (
            (step, layer, found.blocks[layer], *pairs[step][layer], agreement[step][layer])
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


def write_plots(found: Report, out: Path) -> list[str]:
    """Draw the measurements; gives the files' names. Pictures of samples are shown where there are some."""
    cube, blocks = found.per_layer_expert_step().numpy(), found.blocks
    ranked = [(one.name, one.capacity) for one in found.classes]
    curves = torch.stack([one.per_step for one in found.classes]).numpy()  # (classes, steps)
    plots.steps(
        out / "capacity_per_step.png", found.record.per_step().numpy(), curves, [name for name, _ in ranked], found.kind
    )
    plots.expert_map(out / "capacity_per_layer_expert.png", cube, blocks)
    plots.expert_curves(out / "expert_dynamics.png", cube, blocks)
    plots.classes(out / f"capacity_per_{found.kind}.png", ranked, found.record.average(), found.kind)
    names = [
        "capacity_per_step.png",
        "capacity_per_layer_expert.png",
        "expert_dynamics.png",
        f"capacity_per_{found.kind}.png",
    ]
    shown, pictures = min(EXTREMES, len(ranked) // 2), _as_pictures(found)
    if pictures is not None and shown:
        hardest, easiest = (
            [(one.name, one.capacity, pictures(one.samples)) for one in part if one.samples is not None]
            for part in (found.classes[:shown], found.classes[: -shown - 1 : -1])
        )
        plots.extremes(out / "hardest_easiest.png", hardest, easiest, found.kinds)
        names.append("hardest_easiest.png")
    if found.topk is not None:
        against = found.topk
        strips = None if pictures is None else (pictures(against.topk), pictures(against.predictor))
        capacities = (against.topk.capacity.per_step().numpy(), against.predictor.capacity.per_step().numpy())
        together = (against.agreement_per_step().numpy(), against.overall())
        agreement, path = against.agreement().numpy(), out / "topk_against_predictor.png"
        plots.topk(path, strips, against.names, capacities, agreement, together, blocks)
        names.append("topk_against_predictor.png")
    return names


def _as_pictures(found: Report) -> Callable[[Drawn], plots.Pictures] | None:
    """How samples are shown: as numbers in 0..1 (n, H, W, C); None for what is no picture of 1 or 3 channels."""
    data_info = found.data_info
    decoded = any(one.samples is not None and one.samples.decoded is not None for one in found.classes)
    if not decoded and (
        data_info.kind != "pixels" or data_info.shape[0] not in (1, 3) or not 1 <= highest(data_info) <= 255
    ):
        return None
    return lambda drawn: pixels_of(drawn, data_info).permute(0, 2, 3, 1).double().numpy() / highest(data_info)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as a CSV file under a line of names; numbers with six digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
