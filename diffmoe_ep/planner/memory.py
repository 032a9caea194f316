"""Bytes that one rank holds in a training step, by part and by phase, from a config and a layout alone.

Legend: P parameters of a rank, S tokens of its micro-step, D hidden size, F width of an expert, N experts, R rows that
its experts get, A (token, expert) pairs of its tokens, T tokens of a sample, M places of a caption, H heads, c bytes of
the compute type (4, or 2 under bf16).

Weights are float32 at every stage and are the master weights; bf16 is a compute type, by autocast. ZeRO 1 and 2 keep
the weights whole on every rank (as views of flat groups) and hold beside them a float32 copy of this rank's part, which
the optimizer moves, and that part's moments. So ZeRO saves moments, and at stage 2 gradients; it adds the part's copy.

A step's memory peaks in one of four phases, and what is held in each is listed in `_phases`. Not counted: the data
loader's batches, what libraries take for themselves (a cluster file's reserve_gb), fragmentation.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from diffmoe_ep.config import Config
from diffmoe_ep.config.foreign import is_number, parse_json, read_bytes
from diffmoe_ep.model.count import expert_width
from diffmoe_ep.model.dit import is_moe
from diffmoe_ep.model.parallelize import Recompute
from diffmoe_ep.moe.kernels.choose import Kernel, choose_kernel
from diffmoe_ep.moe.kernels.saved import keeps_cast_weights
from diffmoe_ep.parallel.buckets import REDUCE_BUCKET, STAGE_0_BUCKET
from diffmoe_ep.planner.layout import Layout, share
from diffmoe_ep.planner.operations import FLOAT, Load, Operations, operations, saved
from diffmoe_ep.planner.weights import Weight, partitions, weights

PARTS = (
    "weights", "master copy", "moments", "EMA", "gradients", "reduced gradients", "gradient buckets", "activations",
    "bf16 copies", "dispatch buffers", "workspace",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a step."""

    phases: dict[str, dict[str, int]]  # phase -> part -> bytes; a part that is not named holds nothing then

    @cached_property
    def phase(self) -> str:
        """When most is held."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @cached_property
    def peak(self) -> dict[str, int]:
        """What each part holds then."""
        return {part: self.phases[self.phase].get(part, 0) for part in PARTS}

    @cached_property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())

    @property
    def largest(self) -> str:
        """The part that holds most at the peak."""
        return max(PARTS, key=lambda part: self.peak[part])


def memory(config: Config, layout: Layout, kind: Literal["cuda", "cpu"] = "cuda", most: bool = False) -> Memory:
    """A rank's memory. most: with the most rows that the experts' choice can send here, else with the mean over
    ranks.
    """
    part = share(config, layout)
    rows, pairs = (part.most_rows, part.most_pairs) if most else (part.rows, part.pairs)
    forward = forward_of(config, layout, kind, rows, pairs)
    return Memory(_phases(config, layout, forward, rows, pairs, kernel_of(config, layout, kind)))


def forward_of(config: Config, layout: Layout, kind: Literal["cuda", "cpu"], rows: int, pairs: int) -> Operations:
    """The operations of a rank's forward when its experts get `rows` rows and its tokens are taken `pairs` times."""
    model, samples = config.model, share(config, layout).samples
    bf16, kernel = config.train.precision == "bf16", kernel_of(config, layout, kind)
    return operations(model, Load(samples, pairs, rows, model.num_experts // layout.expert, bf16, kind, kernel))


def saved_activations(forward: Operations, recompute: Recompute) -> int:
    """Bytes of activations that are held when the forward of one micro-step has ended."""
    outside, attention = saved(forward.before) + saved(forward.after), saved(forward.attention)
    dense, moe = saved(forward.dense), saved(forward.moe)
    if recompute != "none":
        dense, moe = forward.input, forward.input + forward.choice
    if recompute == "block":
        attention = 0
    return outside + sum(attention + (moe if is_moe else dense) for is_moe in forward.blocks)


def recomputed(forward: Operations, recompute: Recompute) -> int:
    """Bytes that the largest of the blocks holds while its backward runs on what was computed again."""
    ffn = max(saved(forward.moe if is_moe else forward.dense) for is_moe in forward.blocks)
    return {"none": 0, "ffn": ffn, "block": saved(forward.attention) + ffn}[recompute]


def kernel_of(config: Config, layout: Layout, kind: str) -> Kernel:
    """The expert kernel of training: the config's, or what auto becomes on a type of device."""
    if config.compute.kernel != "auto":
        return config.compute.kernel
    model, part = config.model, share(config, layout)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    even = model.family != "tc" and part.rows == part.most_rows
    return choose_kernel(kind, dtype, even, model.hidden_size, expert_width(model))


def _phases(
    config: Config, layout: Layout, forward: Operations, rows: int, pairs: int, kernel: Kernel
) -> dict[str, dict[str, int]]:
    held, compute, zero = weights(config.model, layout.expert), _width(config), layout.zero
    groups, total = partitions(held, layout), sum(weight.numel for weight in held)
    mine = sum(group.part for group in groups) if zero else total  # elements whose optimizer state is here
    optimizer = config.train.optimizer
    states = 2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0)
    always = {
        "weights": FLOAT * (sum(group.padded for group in groups) if zero else total),
        "master copy": FLOAT * mine if zero else 0,
        "moments": FLOAT * mine * states,
        "EMA": FLOAT * total,
    }

    # gradients: whole, reduced (of the parameters that this rank's part touches), and of earlier micro-steps
    whole = {"gradients": FLOAT * total} if zero < 2 else {}
    reduced = FLOAT * sum(group.touched for group in groups)
    collected = {"gradient buckets": FLOAT * _buckets(held, layout, reduce_bucket(config))}
    accumulated = "reduced gradients" if zero == 2 else "gradients"
    earlier = 0 if config.train.grad_accumulation == 1 else reduced if zero == 2 else FLOAT * total

    # activations; on their way through an FFN: two gradients, and that of one weight
    saved_here = saved_activations(forward, layout.recompute)
    hidden, width = config.model.hidden_size, expert_width(config.model)
    buffers = (rows + pairs) * hidden * compute if layout.expert > 1 else 0
    widest = max(rows * width, share(config, layout).tokens * 4 * hidden)
    workspace = 2 * widest * compute + FLOAT * max(weight.numel for weight in held)

    forward_end = {
        accumulated: earlier,
        "activations": saved_here,
        "bf16 copies": sum(copies(config, "none", held, kernel)),
        "dispatch buffers": buffers,
    }
    backward = {
        accumulated: earlier,
        "activations": saved_here + recomputed(forward, layout.recompute),
        "bf16 copies": sum(copies(config, layout.recompute, held, kernel)),
        "dispatch buffers": buffers,
        "workspace": workspace,
    }
    if zero == 2:  # reduced as they come
        backward |= collected | {"reduced gradients": earlier + reduced}
    reduction = collected | whole | {"reduced gradients": (earlier if zero == 2 else 0) + reduced if zero else 0}
    return {
        "end of the forward": always | forward_end,
        "start of the backward": always | backward,
        "reduction of gradients": always | reduction,
        "optimizer's step": always | ({"reduced gradients": reduced + FLOAT * mine} if zero else whole),
    }


def copies(config: Config, recompute: Recompute, held: tuple[Weight, ...], kernel: Kernel) -> tuple[int, int]:
    """Bytes of the cast copies of weights from the forward to the backward, and of those that one block makes again
    there.

    While the forward runs all copies are held in any case: autocast keeps them to its end.
    """
    compute = _width(config)
    if compute == FLOAT:
        return 0, 0
    copied = [weight for weight in held if weight.copied and (keeps_cast_weights(kernel) or not weight.stacked)]
    if recompute == "none":
        return compute * sum(weight.numel for weight in copied), 0
    again = [weight for weight in copied if weight.block and (recompute == "block" or weight.ffn)]
    saved_numel = sum(weight.numel for weight in copied) - sum(weight.numel for weight in again)
    layers = {moe: sum(weight.numel for weight in again if weight.moe is moe) for moe in (False, True)}
    counts = {
        moe: sum(is_moe(config.model, block) is moe for block in range(config.model.num_blocks))
        for moe in (False, True)
    }
    return compute * saved_numel, compute * max(layers[moe] // counts[moe] for moe in (False, True) if counts[moe])


def _buckets(held: tuple[Weight, ...], layout: Layout, size: int) -> int:
    """Elements of what gradients are collected in: ZeRO's bucket, and the one piece that is made of a bucket to be
    reduced.

    Gradients fill a bucket in the order of the parameters (stages 0 and 1) or as the backward makes them (2); dense
    ones and experts are reduced apart.
    """
    limit = size if layout.zero else STAGE_0_BUCKET
    order = sorted(held, key=lambda weight: weight.expert) if layout.zero < 2 else held[::-1]
    largest, filled = 0, {False: 0, True: 0}
    for weight in order:
        full = sum(filled.values()) + weight.numel > limit if layout.zero else filled[weight.expert] > limit
        if full:
            filled = {False: 0, True: 0}
        filled[weight.expert] += weight.numel
        largest = max(largest, *filled.values())
    return largest + (size if layout.zero else 0)


def reduce_bucket(config: Config) -> int:
    """Elements of ZeRO's bucket: the engine's, or what the user's DeepSpeed file sets, if it can be read here."""
    path = config.parallel.deepspeed
    if path is not None and Path(path).is_file():
        try:
            user = parse_json(read_bytes(path))
        except (OSError, ValueError):
            return REDUCE_BUCKET  # training says what is wrong with it
        zero = user.get("zero_optimization", {}) if isinstance(user, dict) else {}
        found = zero.get("reduce_bucket_size", REDUCE_BUCKET) if isinstance(zero, dict) else REDUCE_BUCKET
        return int(found) if is_number(found) and 1 <= found < 2**63 else REDUCE_BUCKET
    return REDUCE_BUCKET


def _width(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else FLOAT
