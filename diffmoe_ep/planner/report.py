"""A cluster plan as values and as tables to read: all layouts side by side, then one in detail, then the verdict."""

from dataclasses import asdict, dataclass
from typing import Any

from diffmoe_ep.config import Config, has_experts, num_tokens
from diffmoe_ep.model.count import count, moe_blocks
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.memory import Memory
from diffmoe_ep.planner.shape import RECOMPUTES, Layout, share
from diffmoe_ep.planner.time import Step
from diffmoe_ep.planner.traffic import Flow, Traffic
from diffmoe_ep.tables import beside, duration, size, table, three_digits

DAY = 86400.0
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
            **asdict(self.layout), "fits": self.verdict, "bytes": self.memory.total, "bytes_most": self.most.total, "room": self.room,
            "peak": {"moment": self.memory.moment, **self.memory.peak}, "moments": self.memory.moments,
            "seconds": self.step.seconds, "seconds_overlapped": self.step.overlapped, "parts": self.step.parts,
            "mfu": self.step.utilisation, "mfu_overlapped": self.step.utilisation * self.step.seconds / self.step.overlapped,
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
    samples: int  # for which the days are told

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
            "cluster": asdict(self.cluster), "samples": self.samples, "parameters": count(self.config.model).total, "reason": self.reason,
            "config": None if own is None else own.as_dict() | {"days": self.days(own)},
            "best": None if best is None else best.as_dict() | {"days": self.days(best)},
            "layouts": [estimate.as_dict() | {"days": self.days(estimate)} for estimate in self.estimates],
        }  # fmt: skip


def flows(moved: Traffic) -> dict[str, Flow]:
    """A rank's traffic by purpose."""
    return {
        "selection of a layer": moved.selection, "rows of a layer, one way": moved.dispatch,
        "dense gradients": moved.dense_gradients, "expert gradients": moved.expert_gradients, "weights after the step": moved.gather,
    }  # fmt: skip


def lines(plan: ClusterPlan) -> list[str]:
    """The whole plan."""
    best, own = plan.best, plan.own
    shown = own or best or plan.closest
    title = f"{'The config' if shown is own else 'The best layout' if shown is best else 'The layout that needs least'}: {shown.layout.name}"
    return [*_head(plan), "", *_layouts(plan), "", *_details(plan, shown, title), "", *_verdict(plan)]


def _head(plan: ClusterPlan) -> list[str]:
    config, ranks = plan.config, plan.cluster.ranks
    micro = config.train.micro_step_samples
    part = share(config, plan.estimates[0].layout)
    steps = f", {config.train.grad_accumulation} micro-steps" if config.train.grad_accumulation > 1 else ""
    lines = [
        f"cluster: {plan.cluster.title()}",
        f"model: {config.model.family}, {count(config.model).total / 1e6:,.1f}M parameters, {config.train.precision}, "
        f"{num_tokens(config.model)} tokens a sample",
        f"step: {config.train.global_batch} samples{steps}; a rank has {part.samples} of the {micro} samples of a micro-step, "
        f"{part.tokens:,} tokens",
    ]
    if has_experts(config.model) and moe_blocks(config.model) and config.model.family != "tc":
        per_node = plan.cluster.ranks_per_node
        over = part.pool_ranks
        where = "inside a rank" if over == 1 else "all ranks" if over == ranks else f"{over} ranks"
        nodes = f", {over // per_node} nodes" if over > per_node else ""
        lines.append(f"pool: {where}{nodes}; a rank's experts get {part.rows:,} rows a layer in the mean")
    return lines


def _layouts(plan: ClusterPlan) -> list[str]:
    """One row for each expert parallelism and ZeRO stage, by the quickest; memory and time for each way to
    recompute.
    """
    grouped: dict[tuple[int, int], dict[str, Estimate]] = {}
    for one in plan.estimates:
        grouped.setdefault((one.layout.expert, one.layout.zero), {})[one.layout.recompute] = one
    head = [
        "EP",
        "ZeRO",
        *("memory" if kind == "none" else kind for kind in RECOMPUTES),
        *("step" if kind == "none" else kind for kind in RECOMPUTES),
    ]
    rows = [[*head, "overlap", "MFU", "samples/s", "samples/day", "days", ""]]
    chosen = {
        key: next((one for one in group.values() if one.verdict != "no"), group[RECOMPUTES[0]])
        for key, group in grouped.items()
    }
    for (expert, zero), first in sorted(
        chosen.items(), key=lambda item: (item[1].verdict == "no", item[1].step.seconds)
    ):
        group = grouped[expert, zero]
        marks = [f"<- {word}" for word, which in (("best", plan.best), ("config", plan.own)) if which in group.values()]
        rate = first.step.rate()
        rows.append([
            str(expert), str(zero), *(size(group[kind].memory.total) + SIGNS[group[kind].verdict] for kind in RECOMPUTES),
            *(duration(group[kind].step.seconds) for kind in RECOMPUTES), duration(first.step.overlapped),
            f"{first.step.utilisation:.1%}",
            f"{rate:,.{0 if rate >= 100 else 1}f}", f"{rate * 0.0864:,.{1 if rate >= 100 else 2}f} M", three_digits(plan.days(first)),
            ", ".join(marks),
        ])  # fmt: skip
    room = size(plan.estimates[0].room)
    signs = {one.verdict for one in plan.estimates}
    notes = [
        f"memory: a rank's peak, of {room} of room; step: its time; each with compute.recompute=none, ffn and block",
        f"overlap, rates and days: by the quickest of the three that fits; overlap: rows travel while experts compute; days: "
        f"{plan.samples:,} samples",
        *(["  !  does not fit"] if "no" in signs else []),
        *(
            ["  ~  fits with the rows that experts get in the mean, not if all choices fell on one rank"]
            if "in the mean" in signs
            else []
        ),
    ]
    width = max(len(row[-1]) for row in rows)
    return [*table([row if width else row[:-1] for row in rows], align=">"), *notes]


def _details(plan: ClusterPlan, one: Estimate, title: str) -> list[str]:
    peak, total = one.memory.peak, one.memory.total
    held = [
        ("memory of a rank", "bytes", "share"),
        *((name, size(held), f"{held / total:.1%}") for name, held in peak.items() if held),
    ]
    held.append(("total", size(total), f"of {size(one.room)}"))
    seconds = [("time of a step", "time", "share")]
    seconds += [
        (name, duration(taken), f"{taken / one.step.seconds:.1%}") for name, taken in one.step.parts.items() if taken
    ]
    seconds.append(("total", duration(one.step.seconds), f"{one.step.utilisation:.1%} MFU"))
    return [title, "", *beside(table(held), table(seconds)), f"peak: {one.memory.moment}", "", *_traffic(plan, one)]


def _traffic(plan: ClusterPlan, one: Estimate) -> list[str]:
    moved, moe = one.traffic, moe_blocks(plan.config.model)
    micro, backward = plan.config.train.grad_accumulation, 2 + (one.layout.recompute != "none")
    reductions = micro if one.layout.zero == 2 else 1
    times = dict(zip(flows(moved), (moe * micro, 2 * backward * moe * micro, reductions, reductions, 1), strict=True))
    rows = [("received by a rank", "inside node", "across nodes", "rounds", "time", "times a step")]
    for name, flow in flows(moved).items():
        word = f"{name} ({moved.algorithm})" if flow is moved.selection and moved.algorithm else name
        if flow.rounds:
            rows.append(
                (
                    word,
                    size(flow.inside),
                    size(flow.across),
                    str(flow.rounds),
                    duration(flow.seconds(plan.cluster)),
                    str(times[name]),
                )
            )
    for name, flow in moved.selections.items():
        if name != moved.algorithm:
            rows.append(
                (
                    f"  (by {name})",
                    size(flow.inside),
                    size(flow.across),
                    str(flow.rounds),
                    duration(flow.seconds(plan.cluster)),
                    "",
                )
            )
    return table(rows) if len(rows) > 1 else ["nothing crosses ranks"]


def _verdict(plan: ClusterPlan) -> list[str]:
    found, best, own = [], plan.best, plan.own
    if own is None:
        found.append(f"The config's layout is not possible here: {plan.reason}")
    elif own.over > 0:
        found.append(f"The config's layout does not fit: {_excess(own)}.")
    elif own.verdict != "yes":
        found.append(
            f"The config's layout fits in the mean; should all choices fall on one rank, {size(own.most.total - own.room)} are missing."
        )
    if best is None:
        found.append(
            f"No layout fits. The one that needs least is {plan.closest.layout.name}: {_excess(plan.closest)}."
        )
        found.append(
            "More ranks, a smaller train.global_batch, or more of train.grad_accumulation would shrink what a rank "
            "holds."
        )
    elif best is own:
        found.append(f"The config's layout is the fastest that fits{'' if best.verdict == 'yes' else ' in the mean'}.")
    else:
        again = f" compute.recompute={best.layout.recompute}"
        faster = (
            f", {own.step.seconds / best.step.seconds:.2f} times the config's speed"
            if own is not None and own.over <= 0
            else ""
        )
        least = "" if best.verdict == "yes" else " in the mean"
        found.append(
            f"The fastest layout that fits{least}: parallel.expert_parallel={best.layout.expert} parallel.zero_stage={best.layout.zero}{again} "
            f"({size(best.memory.total)}, {duration(best.step.seconds)}{faster})."
        )
    return found


def _excess(one: Estimate) -> str:
    return (
        f"a rank needs {size(one.memory.total)}, {size(one.over)} more than there is; most of it is {one.memory.largest}, "
        f"{size(one.memory.peak[one.memory.largest])}, at the {one.memory.moment}"
    )
