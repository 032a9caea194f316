"""A cluster plan as values and as tables to read: all layouts side by side, then one in detail, then the verdict."""

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from diffmoe_ep.config import Config, has_experts, num_tokens
from diffmoe_ep.model.count import count, moe_blocks
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.layout import RECOMPUTES, Layout, share
from diffmoe_ep.planner.memory import Memory
from diffmoe_ep.planner.time import Step
from diffmoe_ep.planner.traffic import Flow, Traffic
from diffmoe_ep.tables import beside, duration, size, table, three_digits

DAY = 86400.0
WIDTH = 120  # of a terminal
SIGNS = {"yes": " ", "in the mean": "~", "no": "!"}


@dataclass(frozen=True)
class Estimate:
    """One layout."""

    layout: Layout
    memory: Memory  # of a rank, with the mean rows that its experts get
    most: Memory  # with the most rows that the experts' choice can send to one rank
    traffic: Traffic
    step: Step
    room: float  # bytes that a rank may hold

    @property
    def over(self) -> float:
        """Bytes by which the mean is more than there is room for; negative if it fits."""
        return self.memory.total - self.room

    @property
    def verdict(self) -> str:
        """Whether it fits: yes; in the mean (not if all choices fell on one rank); no."""
        return "no" if self.over > 0 else "in the mean" if self.most.total > self.room else "yes"

    def as_dict(self) -> dict[str, Any]:
        """The estimate as plain data: bytes and seconds."""
        return {
            **asdict(self.layout), "fits": self.verdict, "bytes": self.memory.total,
            "bytes_most": self.most.total, "room": self.room,
            "peak": {"phase": self.memory.phase, **self.memory.peak}, "phases": self.memory.phases,
            "seconds": self.step.seconds, "seconds_overlapped": self.step.overlapped, "parts": self.step.parts,
            "mfu": self.step.mfu, "mfu_overlapped": self.step.mfu * self.step.seconds / self.step.overlapped,
            "samples_per_second": self.step.rate(), "samples_per_day": self.step.rate() * DAY,
            "traffic": {
                "selection": self.traffic.algorithm,
                **{name: asdict(flow) for name, flow in flows(self.traffic).items()},
                "selections": {name: asdict(flow) for name, flow in self.traffic.selections.items()},
            },
        }  # fmt: skip


@dataclass(frozen=True)
class ClusterPlan:
    """All layouts of a config on a cluster."""

    config: Config
    cluster: Cluster
    estimates: tuple[Estimate, ...]  # fastest first
    own: Estimate | None  # the config's layout
    reason: str  # why the config's layout is none of these; empty if it is
    samples: int  # for which the days are given

    @property
    def best(self) -> Estimate | None:
        """The fastest layout that fits whatever the experts choose; without one, the fastest that fits in the mean."""
        for verdict in ("yes", "in the mean"):
            fitting = [estimate for estimate in self.estimates if estimate.verdict == verdict]
            if fitting:
                return fitting[0]
        return None

    @property
    def closest(self) -> Estimate:
        """The layout that needs least memory."""
        return min(self.estimates, key=lambda estimate: estimate.memory.total)

    def days(self, estimate: Estimate) -> float:
        """Days for the plan's samples."""
        return self.samples / estimate.step.rate() / DAY

    def lines(self) -> list[str]:
        """The plan to read."""
        return lines(self)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data: bytes, seconds."""
        best, own = self.best, self.own
        return {
            "cluster": asdict(self.cluster), "samples": self.samples, "parameters": count(self.config.model).total,
            "reason": self.reason,
            "config": None if own is None else own.as_dict() | {"days": self.days(own)},
            "best": None if best is None else best.as_dict() | {"days": self.days(best)},
            "layouts": [estimate.as_dict() | {"days": self.days(estimate)} for estimate in self.estimates],
        }  # fmt: skip


def flows(moved: Traffic) -> dict[str, Flow]:
    """A rank's traffic by purpose."""
    return {
        "selection of a layer": moved.selection, "rows of a layer, one way": moved.dispatch,
        "dense gradients": moved.dense_gradients, "expert gradients": moved.expert_gradients,
        "weights after the step": moved.gather,
    }  # fmt: skip


def lines(plan: ClusterPlan) -> list[str]:
    """The whole plan, in lines of at most WIDTH characters."""
    best, own = plan.best, plan.own
    shown = own or best or plan.closest
    which = "config's" if shown is own else "best" if shown is best else "smallest"
    return [
        *_head(plan), "", *_layouts(plan), "",
        f"The {which} layout: {shown.layout.name}", "", *_details(shown), "", *_traffic(plan, shown), "",
        *_verdict(plan),
    ]  # fmt: skip


def _head(plan: ClusterPlan) -> list[str]:
    config, ranks, per_node = plan.config, plan.cluster.ranks, plan.cluster.ranks_per_node
    part, accumulation = share(config, plan.estimates[0].layout), config.train.grad_accumulation
    steps = f" in {accumulation} micro-steps" if accumulation > 1 else ""
    found = [
        f"cluster  {plan.cluster.title()}",
        f"model    {config.model.family}, {count(config.model).total / 1e6:,.1f}M parameters, "
        f"{config.train.precision}, {num_tokens(config.model)} tokens a sample",
        f"step     {config.train.global_batch} samples{steps}; a rank has {part.samples} of the "
        f"{config.train.micro_step_samples} samples of a micro-step, {part.tokens:,} tokens",
    ]
    if has_experts(config.model) and moe_blocks(config.model) and config.model.family != "tc":
        over = part.pool_ranks
        where = "inside a rank" if over == 1 else "all ranks" if over == ranks else f"{over} ranks"
        nodes = f", {over // per_node} nodes" if over > per_node else ""
        found.append(f"pool     {where}{nodes}; a rank's experts get {part.rows:,} rows a layer in the mean")
    return found


def _layouts(plan: ClusterPlan) -> list[str]:
    """A row for each expert parallelism and ZeRO stage, those that fit first, by the time of their quickest way to
    recompute that fits.
    """
    best, own = plan.best, plan.own
    grouped: dict[tuple[int, int], dict[str, Estimate]] = {}
    for one in plan.estimates:
        grouped.setdefault((one.layout.expert, one.layout.zero), {})[one.layout.recompute] = one
    quickest = {
        key: next((one for one in group.values() if one.verdict != "no"), group[RECOMPUTES[0]])
        for key, group in grouped.items()
    }
    mark = {id(own): "=", id(best): "*"} | ({id(own): "*="} if own is best else {})
    wide = max((len(word) for key, word in mark.items() if key != id(None)), default=0)
    rows = [["EP", "ZeRO", *RECOMPUTES, *RECOMPUTES, "overlap", "MFU", "samples/s", "M a day", "days"]]
    for key, first in sorted(quickest.items(), key=lambda item: (item[1].verdict == "no", item[1].step.seconds)):
        ways, rate = [grouped[key][kind] for kind in RECOMPUTES], first.step.rate()
        rows.append([
            *map(str, key), *(size(one.memory.total) + SIGNS[one.verdict] for one in ways),
            *(f"{duration(one.step.seconds)}{mark.get(id(one), ''):<{wide}}" for one in ways),
            duration(first.step.overlapped), f"{first.step.mfu:.1%}", f"{rate:,.{0 if rate >= 100 else 1}f}",
            f"{rate * 0.0864:,.{1 if rate >= 100 else 2}f}", three_digits(plan.days(first)),
        ])  # fmt: skip
    groups = [("", 2), ("memory of a rank", 3), ("time of a step", 3), ("the quickest of the three that fits", 5)]
    return [*table(rows, align=">", groups=groups), *_legend(plan, set(mark.values()) if wide else set())]


def _legend(plan: ClusterPlan, marks: set[str]) -> list[str]:
    signs = {one.verdict for one in plan.estimates}
    words = {
        "*": "the fastest that fits" if any("*" in mark for mark in marks) else "",
        "=": "the config's layout" if plan.own is not None else "",
        "!": "does not fit" if "no" in signs else "",
        "~": "fits in the mean, not if all choices fell on one rank" if "in the mean" in signs else "",
    }
    return [
        "   ".join(f"{sign} {text}" for sign, text in words.items() if text),
        f"none, ffn, block: compute.recompute. Memory: the peak, of {size(plan.estimates[0].room)}. "
        f"Days: for {plan.samples:,} samples.",
        "Overlap: the step's time when rows travel while experts compute (compute.overlap); the rest is without.",
    ]


def _details(one: Estimate) -> list[str]:
    """Memory and time of one layout, part by part, side by side."""
    total, step = one.memory.total, one.step
    memory = [("memory of a rank", "bytes", "share")]
    memory += [(name, size(held), f"{held / total:.1%}") for name, held in one.memory.peak.items() if held]
    memory.append(("total", size(total), f"of {size(one.room)}"))
    times = [("time of a step", "time", "share")]
    times += [(name, duration(taken), f"{taken / step.seconds:.1%}") for name, taken in step.parts.items() if taken]
    times.append(("total", duration(step.seconds), f"{step.mfu:.1%} MFU"))
    return [*beside(table(memory), table(times)), f"peak: {one.memory.phase}"]


def _traffic(plan: ClusterPlan, one: Estimate) -> list[str]:
    """What one rank receives, by purpose, and what the other algorithms of the selection would bring it."""
    moved, moe = one.traffic, moe_blocks(plan.config.model)
    micro, backward = plan.config.train.grad_accumulation, 2 + (one.layout.recompute != "none")
    reductions = micro if one.layout.zero == 2 else 1
    times = (moe * micro, 2 * backward * moe * micro, reductions, reductions, 1)
    rows = [("received by a rank", "inside node", "across nodes", "rounds", "time", "times a step")]

    def add(name: str, flow: Flow, often: str) -> None:
        seconds = duration(flow.seconds(plan.cluster))
        rows.append((name, size(flow.inside), size(flow.across), str(flow.rounds), seconds, often))

    for (name, flow), often in zip(flows(moved).items(), times, strict=True):
        if flow.rounds:
            by = f" ({moved.algorithm})" if flow is moved.selection and moved.algorithm else ""
            add(name + by, flow, str(often))
    for algorithm, flow in moved.selections.items():
        if algorithm != moved.algorithm:
            add(f"  (by {algorithm})", flow, "")
    return table(rows) if len(rows) > 1 else ["nothing crosses ranks"]


def _verdict(plan: ClusterPlan) -> list[str]:
    """Whether the config's layout fits, and which layout is the fastest that does."""
    found, best, own = list[str](), plan.best, plan.own
    if own is None:
        found += textwrap.wrap(f"The config's layout is not possible here: {plan.reason}", WIDTH)
    elif own.over > 0:
        found += ["The config's layout does not fit:", f"  {_excess(own)}."]
    elif own.verdict != "yes":
        found.append(
            "The config's layout fits in the mean; should all choices fall on one rank, "
            f"{size(own.most.total - own.room)} are missing."
        )
    if best is None:
        found += [
            f"No layout fits. The one that needs least is {plan.closest.layout.name}:", f"  {_excess(plan.closest)}.",
            "More ranks, a smaller train.global_batch or more train.grad_accumulation shrink what a rank holds.",
        ]  # fmt: skip
    elif best is own:
        found.append(f"The config's layout is the fastest that fits{'' if best.verdict == 'yes' else ' in the mean'}.")
    else:
        fits = "fits" if best.verdict == "yes" else "fits in the mean"
        faster = ""
        if own is not None and own.over <= 0:
            faster = f", {own.step.seconds / best.step.seconds:.2f} times the config's speed"
        found += [
            f"The fastest layout that {fits} ({size(best.memory.total)}, {duration(best.step.seconds)}{faster}):",
            f"  parallel.expert_parallel={best.layout.expert} parallel.zero_stage={best.layout.zero} "
            f"compute.recompute={best.layout.recompute}",
        ]
    return found


def _excess(one: Estimate) -> str:
    return (
        f"a rank needs {size(one.memory.total)}, {size(one.over)} more than there is; most of it is "
        f"{one.memory.largest}, {size(one.memory.peak[one.memory.largest])}, at the {one.memory.phase}"
    )
