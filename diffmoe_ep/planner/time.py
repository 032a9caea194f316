"""Seconds of a training step by part, from counts of FLOPs, bytes and operations and the rates of a device.

Legend: B samples, S tokens and R rows of a rank's micro-step, D hidden size, F width of an expert, N experts, P
parameters of a rank, c bytes of the compute type.

An operation takes as long as the slower of its FLOPs at the rate of a large matmul and its bytes at the rate of a copy,
and what starting it costs. The backward of a matmul is two matmuls, of any other operation twice its bytes. What a
program could fuse is counted as the code does it today. Where communication hides behind nothing, as DeepSpeed's
reductions here, it is added.
"""

from dataclasses import dataclass

from diffmoe_ep.config import Config, has_predictor, num_tokens
from diffmoe_ep.model.count import expert_width, moe_blocks
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.flops import plan
from diffmoe_ep.planner.shape import Layout, partitions, share, weights
from diffmoe_ep.planner.traffic import Traffic, traffic

# parts of an overlapped dispatch where the config has one; of the shorter of travel and compute one part cannot hide
CHUNKS = 2
PARTS = ("attention", "feed-forward", "experts", "router and predictor", "weight copies", "selection", "dispatch", "gradient reduction",
         "optimiser", "weight gather", "EMA")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    parts: dict[str, float]  # seconds of each of PARTS, nothing hidden
    hidden: float  # seconds that overlapping dispatch with expert compute saves
    utilisation: float  # MFU without overlap: the model's FLOPs over the ranks' bf16 peak
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


@dataclass(frozen=True)
class Work:
    """What some operations take, forward alone."""

    flops: float = 0.0
    moved: float = 0.0  # bytes
    calls: int = 0
    gelu: float = 0.0  # elements


def step_time(config: Config, layout: Layout, cluster: Cluster, moved: Traffic | None = None) -> Step:
    """Predict a training step; the config's batch must divide over the ranks."""
    moved = traffic(config, layout, cluster) if moved is None else moved
    model, accumulation, moe = config.model, config.train.grad_accumulation, moe_blocks(config.model)
    rate = cluster.flops(config.train.precision)
    work = _forward(config, layout)
    forward = {name: sum(_seconds(one, rate, cluster) for one in works) for name, works in work.items()}
    backward = {name: sum(_seconds(one, rate, cluster, back=True) for one in works) for name, works in work.items()}
    again = 0 if layout.recompute == "none" else 1
    twice = {"none": (), "ffn": ("feed-forward", "experts", "router and predictor"), "block": tuple(work)}[
        layout.recompute
    ]
    compute = {name: accumulation * ((1 + (name in twice)) * forward[name] + backward[name]) for name in work}
    held = weights(model, layout.expert)
    copied = (
        sum(weight.numel for weight in held if weight.copied or weight.block) if config.train.precision == "bf16" else 0
    )
    bandwidth = 1e9 * cluster.bandwidth_gbs
    compute["weight copies"] = (
        accumulation * (6 * (1 + again) + 6) * copied / bandwidth
    )  # read 4, write 2, and gradients the other way
    compute["weight copies"] += (
        accumulation * 4 * (3 if accumulation > 1 else 0) * sum(weight.numel for weight in held) / bandwidth
    )

    directions = 4 + 2 * again  # there and back, in the forward and in the backward
    one_way = moved.dispatch.seconds(cluster)
    dispatch = accumulation * moe * directions * one_way
    selection = accumulation * moe * (moved.search + (_exchange(moved, cluster) if layout.expert > 1 else 0.0))
    reductions = accumulation if layout.zero == 2 else 1
    reduction = reductions * (moved.dense_gradients.seconds(cluster) + moved.expert_gradients.seconds(cluster))
    total = sum(weight.numel for weight in held)
    mine = sum(group.part for group in partitions(held, layout)) if layout.zero else total
    parts = {name: compute.get(name, 0.0) for name in PARTS} | {
        "selection": selection,
        "dispatch": dispatch,
        "gradient reduction": reduction + reductions * _collecting(layout, total, mine, cluster),
        "optimiser": (32 * mine + 8 * mine * bool(layout.zero))
        / bandwidth,  # norm; weights, gradients, moments in; three of them out
        "weight gather": moved.gather.seconds(cluster),
        "EMA": 12 * total / bandwidth,
    }
    hidden = min(dispatch, compute["experts"]) * (1 - 1 / max(CHUNKS, config.compute.overlap))
    seconds = sum(parts.values())
    flops = plan(config).training * config.train.global_batch
    return Step(parts, hidden, flops / (seconds * layout.world * 1e12 * cluster.peak_tflops), config.train.global_batch)


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


def _seconds(work: Work, rate: float, cluster: Cluster, back: bool = False) -> float:
    times = 2 if back else 1
    bound = max(work.flops / rate, work.moved / (1e9 * cluster.bandwidth_gbs))
    return times * (max(bound, work.gelu / (1e9 * cluster.gelu_gelements)) + work.calls * cluster.launch_us * 1e-6)


def _forward(config: Config, layout: Layout) -> dict[str, list[Work]]:
    """The operations of one micro-step's forward on one rank: (what it is) -> works."""
    model, part = config.model, share(config, layout)
    size, tokens, hidden, width = (
        2 if config.train.precision == "bf16" else 4,
        part.tokens,
        model.hidden_size,
        expert_width(model),
    )
    moe, experts, here = moe_blocks(model), model.num_experts, model.num_experts // layout.expert

    def linear(rows: float, ins: int, outs: int, copies: int = 1) -> Work:
        """`copies` weights, rows in all."""
        return Work(2.0 * rows * ins * outs, size * (rows * (ins + outs) + copies * ins * outs), 1)

    def passes(number: float, rows: float = tokens, columns: int = hidden, calls: int = 1, bytes_: int = size) -> Work:
        """Elementwise: so many readings or writings of (rows, columns)."""
        return Work(0.0, number * rows * columns * bytes_, calls)

    def ffn(rows: float, wide: int, copies: int = 1) -> list[Work]:
        gelu = Work(0.0, 2.0 * rows * wide * size, 1, rows * wide)
        return [linear(rows, hidden, wide, copies), gelu, linear(rows, wide, hidden, copies)]

    modulated = [passes(2), passes(4, calls=3)]  # norm; scale and shift
    gated = [passes(2), passes(3)]  # gate; residual
    mixing = Work(4.0 * tokens * num_tokens(model) * hidden, size * 4.0 * tokens * hidden, 1)
    attention = [*modulated, linear(tokens, hidden, 3 * hidden), mixing, linear(tokens, hidden, hidden), *gated]
    attention.append(linear(part.samples, hidden, 6 * hidden))
    pixels = model.patch**2
    caption: list[Work] = []
    if model.condition == "text":
        places = part.samples * model.text_length
        looking = Work(4.0 * tokens * model.text_length * hidden, size * (2.0 * tokens + 2.0 * places) * hidden, 1)
        attention += [
            passes(2),
            linear(tokens, hidden, hidden),
            linear(places, hidden, hidden),
            linear(places, hidden, hidden),
        ]
        attention += [looking, linear(tokens, hidden, hidden), passes(3)]
        caption = [linear(places, model.text_width, hidden), passes(2, places), linear(places, hidden, hidden)]
    ends = [
        linear(tokens, model.in_channels * pixels, hidden),
        *modulated,
        linear(tokens, hidden, pixels * model.out_channels),
    ]
    dense = [*modulated, *gated] * model.num_blocks + ffn(tokens, 4 * hidden) * (model.num_blocks - moe)

    expert = ffn(part.rows, width, here)
    rows = [
        passes(2, part.pairs),
        passes(2, part.rows, calls=8),
        passes(4, part.pairs, bytes_=4),
        passes(3, part.pairs, bytes_=4, calls=2),
    ]
    if model.shared_experts:
        expert += ffn(tokens, model.shared_experts * width)
    routing = [
        passes(3, columns=hidden, bytes_=4),
        Work(2.0 * tokens * hidden * experts, 0.0, 1),
        passes(20, columns=experts, bytes_=4, calls=12),
    ]
    if has_predictor(model):
        routing += [linear(tokens, hidden, hidden), passes(2), linear(tokens, hidden, experts)]
        routing += [passes(8, columns=experts, bytes_=4, calls=6)]
    return {
        "attention": attention * model.num_blocks + caption + ends, "feed-forward": dense,
        "experts": [*expert, *rows] * moe, "router and predictor": routing * moe,
    }  # fmt: skip
