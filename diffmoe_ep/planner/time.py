"""Seconds of a training step by part, from counts of FLOPs, bytes and operations and the rates of a device.

Legend: B samples, S tokens and R rows of a rank's micro-step, D hidden size, F width of an expert, N experts, P
parameters of a rank, c bytes of the compute type.

An operation takes as long as the slower of its FLOPs at the rate of a large matmul and its bytes at the rate of a copy,
and what starting it costs. The backward of a matmul is two matmuls, of any other operation twice its bytes. What a
program could fuse is counted as the code does it today. Where communication hides behind nothing, as DeepSpeed's
reductions here, it is added.
"""

from dataclasses import dataclass

from diffmoe_ep.config import Config
from diffmoe_ep.model.count import moe_blocks
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.layout import Layout, share
from diffmoe_ep.planner.memory import forward_of
from diffmoe_ep.planner.operations import Operation
from diffmoe_ep.planner.plan import plan
from diffmoe_ep.planner.traffic import Traffic, traffic
from diffmoe_ep.planner.weights import partitions, weights

# Parts of an overlapped dispatch where the config has one; of the shorter of travel and compute one part cannot hide.
CHUNKS = 2
PARTS = (
    "attention", "feed-forward", "experts", "router and predictor", "weight copies", "selection", "dispatch",
    "gradient reduction", "optimizer", "weight gather", "EMA",
)  # fmt: skip
PART_OF = {
    "attention": "attention", "cross-attention": "attention", "adaLN": "attention", "other": "attention",
    "FFN": "feed-forward", "experts": "experts", "shared experts": "experts",
    "router": "router and predictor", "predictor": "router and predictor",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    parts: dict[str, float]  # seconds of each of PARTS, nothing hidden
    hidden: float  # seconds that overlapping dispatch with expert compute saves
    mfu: float  # without overlap: the model's FLOPs over the ranks' bf16 peak
    samples: int  # of a step

    @property
    def seconds(self) -> float:
        """Without overlap."""
        return sum(self.parts.values())

    @property
    def overlapped(self) -> float:
        """With dispatch overlapped with expert compute."""
        return self.seconds - self.hidden

    def rate(self, overlap: bool = False) -> float:
        """Samples a second over all ranks."""
        return self.samples / (self.overlapped if overlap else self.seconds)


def step_time(config: Config, layout: Layout, cluster: Cluster, moved: Traffic | None = None) -> Step:
    """Predict a training step; the config's batch must divide over the ranks."""
    moved = traffic(config, layout, cluster) if moved is None else moved
    train, moe, bandwidth = config.train, moe_blocks(config.model), 1e9 * cluster.bandwidth_gbs
    forwards = 1 if layout.recompute == "none" else 2  # of what is computed again
    held = weights(config.model, layout.expert)
    total = sum(weight.numel for weight in held)
    mine = sum(group.part for group in partitions(held, layout)) if layout.zero else total
    copied = sum(weight.numel for weight in held if weight.copied or weight.block) if train.precision == "bf16" else 0

    # of each micro-step
    compute = _compute(config, layout, cluster)
    # bf16 copies: 4 bytes read and 2 written in each forward, the other way in the backward; gradients added up
    compute["weight copies"] = (6 * forwards + 6) * copied / bandwidth
    compute["weight copies"] += 4 * (3 if train.grad_accumulation > 1 else 0) * total / bandwidth
    compute["selection"] = moe * (moved.search + (_exchange(moved, cluster) if layout.expert > 1 else 0.0))
    compute["dispatch"] = (
        moe * 2 * (forwards + 1) * moved.dispatch.seconds(cluster)
    )  # there and back, and in the backward
    seconds = {name: train.grad_accumulation * taken for name, taken in compute.items()}

    # of the step
    reductions = train.grad_accumulation if layout.zero == 2 else 1
    reduction = moved.dense_gradients.seconds(cluster) + moved.expert_gradients.seconds(cluster)
    seconds["gradient reduction"] = reductions * (reduction + _collecting(layout, total, mine, cluster))
    # the norm; weights, gradients and moments in, three of them out
    seconds["optimizer"] = (32 * mine + 8 * mine * bool(layout.zero)) / bandwidth
    seconds["weight gather"] = moved.gather.seconds(cluster)
    seconds["EMA"] = 12 * total / bandwidth

    parts = {name: seconds[name] for name in PARTS}
    hidden = min(parts["dispatch"], parts["experts"]) * (1 - 1 / max(CHUNKS, config.compute.overlap))
    flops = plan(config).training * train.global_batch
    mfu = flops / (sum(parts.values()) * layout.world * 1e12 * cluster.peak_tflops)
    return Step(parts, hidden, mfu, train.global_batch)


def _exchange(moved: Traffic, cluster: Cluster) -> float:
    """The small exchange of splits before rows travel."""
    return (cluster.network_us if moved.dispatch.over_nodes else cluster.node_us) * 1e-6


def _collecting(layout: Layout, total: int, mine: int, cluster: Cluster) -> float:
    """Seconds in memory: gradients are copied into a bucket (ZeRO) and into one piece, reduced there, scaled and copied
    back.

    The bucket, the piece and this rank's part are taken anew each time.
    """
    moved = 4.0 * (total * (8 if layout.zero else 6) + 2 * mine * bool(layout.zero))
    fresh = 4.0 * (total * (2 if layout.zero else 1) + 2 * mine * bool(layout.zero))
    return moved / (1e9 * cluster.bandwidth_gbs) + fresh / (1e9 * cluster.fresh_gbs)


def _compute(config: Config, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """Seconds that the operations of one micro-step take by part: forward, what is computed again, backward."""
    part, rate = share(config, layout), cluster.flops(config.train.precision)
    forward = forward_of(config, layout, cluster.kind, part.rows, part.pairs)
    again = {"none": (), "ffn": (forward.dense, forward.moe), "block": (forward.attention, forward.dense, forward.moe)}
    found = dict.fromkeys(PART_OF.values(), 0.0)
    for times, listed in forward.counted():
        forwards = 2 if any(listed is half for half in again[layout.recompute]) else 1
        for operation in listed:
            # the backward of a matmul is two matmuls, of any other operation twice its bytes
            found[PART_OF[operation.module]] += times * (forwards + 2) * _seconds(operation, rate, cluster)
    return found


def _seconds(operation: Operation, rate: float, cluster: Cluster) -> float:
    """A forward of one operation: the slowest of its FLOPs, its bytes and its GELU, and what starting it costs."""
    moved, gelu = operation.moved / (1e9 * cluster.bandwidth_gbs), operation.gelu / (1e9 * cluster.gelu_gelements)
    return max(operation.flops / rate, moved, gelu) + operation.calls * cluster.launch_us * 1e-6
