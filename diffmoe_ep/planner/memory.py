"""Bytes that one rank holds in a training step, by part and by moment, from a config and a layout alone.

Legend: P parameters of a rank, S tokens of its micro-step, D hidden size, F width of an expert, N experts, R rows that
its experts get, A (token, expert) pairs of its tokens, T tokens of a sample, M places of a caption, H heads, c bytes of
the compute type (4, or 2 under bf16).

Weights are float32 at every stage and are the master weights; bf16 is a compute type, by autocast. ZeRO 1 and 2 keep
the weights whole on every rank (as views of flat groups) and hold beside them a float32 copy of this rank's part, which
the optimiser moves, and that part's moments. So ZeRO saves moments, and at stage 2 gradients; it adds the part's copy.

A step's memory peaks at one of four moments, and what is held at each is listed in `_moments`. Not counted: the data
loader's batches, what libraries take for themselves (a cluster file's reserve_gb), fragmentation.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from diffmoe_ep.config import Config, has_predictor
from diffmoe_ep.model.count import expert_width
from diffmoe_ep.model.dit import is_moe
from diffmoe_ep.moe.kernels.fused import keeps_all
from diffmoe_ep.planner.shape import Layout, Recompute, Share, Weight, partitions, share, weights

FLOAT = 4  # bytes
LONG = 8
REDUCE_BUCKET = 50_000_000  # elements of ZeRO's bucket, as the engine sets it
STAGE_0_BUCKET = 500_000_000  # elements that DeepSpeed flattens at a time without ZeRO

PARTS = ("weights", "master copy", "moments", "EMA", "gradients", "reduced gradients", "gradient buckets", "activations", "bf16 copies",
         "dispatch buffers", "workspace")  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in a step."""

    moments: dict[str, dict[str, int]]  # moment -> part -> bytes; a part that is not named holds nothing then

    @cached_property
    def moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @cached_property
    def peak(self) -> dict[str, int]:
        """What each part holds then."""
        return {part: self.moments[self.moment].get(part, 0) for part in PARTS}

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
    saved = activations(config, layout, part, rows, pairs, kind)
    return Memory(_moments(config, layout, saved, rows, pairs, kernel_of(config, layout, kind)))


@dataclass(frozen=True)
class Activations:
    """What autograd keeps from the forward of one micro-step, in bytes, without bf16 copies of weights."""

    outside: int  # before the first block and after the last
    attention: int  # a block's attention part
    dense: int  # the feed-forward part of a dense block
    moe: int  # and of an MoE block
    input: int  # the tokens that a part or block gets, all that is kept of one that is computed again
    choice: int  # and, of an MoE layer that is computed again, who takes whom
    blocks: tuple[bool, ...]  # whether each block is MoE

    def kept(self, recompute: Recompute) -> int:
        """All that is held when the forward has ended."""
        ffn = {is_moe: self.moe if is_moe else self.dense for is_moe in (False, True)}
        if recompute != "none":
            ffn = {is_moe: self.input + is_moe * self.choice for is_moe in (False, True)}
        attention = 0 if recompute == "block" else self.attention
        return self.outside + sum(attention + ffn[is_moe] for is_moe in self.blocks)

    def again(self, recompute: Recompute) -> int:
        """What the largest of the blocks holds while its backward runs on what was computed again."""
        ffn = max(self.moe if is_moe else self.dense for is_moe in self.blocks)
        return {"none": 0, "ffn": ffn, "block": self.attention + ffn}[recompute]


def activations(config: Config, layout: Layout, part: Share, rows: int, pairs: int, kind: str) -> Activations:
    """What each block's forward saves, one line an operation: the one place to change when a block's code changes."""
    model, compute = config.model, _width(config)
    hidden, width, experts, tokens = model.hidden_size, expert_width(model), model.num_experts, part.tokens
    bf16 = config.train.precision == "bf16"
    whole = tokens * hidden * compute  # (S, D) in the compute type
    norm_in = tokens * hidden * FLOAT if kind == "cuda" else whole  # CUDA's autocast normalises in float32
    statistics = 2 * tokens * (FLOAT if kind == "cuda" else compute)  # mean and deviation of each token
    scales = part.samples * hidden * compute  # 1 + scale
    caption = part.samples * model.text_length  # places for the tokens of captions
    modulated = norm_in + statistics + scales + 2 * whole  # the norm's input, its output, and what goes into the matmul

    attention = modulated
    attention += part.samples * 6 * hidden * compute  # the modulation's output
    attention += 3 * whole  # query, key, value
    attention += whole + tokens * model.num_heads * FLOAT  # mixed values and log-sum-exp
    attention += whole  # output, for its gate
    if model.condition == "text":
        attention += norm_in + statistics + whole  # the norm's input and its output, from which queries come
        attention += whole + 2 * caption * hidden * compute  # query, key, value
        attention += whole + tokens * model.num_heads * FLOAT  # mixed values and log-sum-exp
        attention += caption * compute  # the mask as numbers

    dense = modulated
    dense += tokens * 4 * hidden * 2 * compute  # before and after GELU
    dense += whole  # output, for its gate

    indices = pairs * 3 * LONG + tokens * LONG
    order = 2 * rows * LONG if 1 < layout.expert < experts else 0  # received rows by expert, and back
    moe = modulated
    moe += tokens * hidden * FLOAT if bf16 else 0  # the router's float32 input
    moe += tokens * experts * FLOAT  # its softmax
    if has_predictor(model):
        moe += 2 * whole  # before and after SiLU
        moe += 2 * tokens * experts * FLOAT  # logits and the choice as target
    moe += indices + pairs * FLOAT  # which pairs, and their weights
    moe += rows * hidden * compute  # the experts' input
    kernel = kernel_of(config, layout, kind)
    dtype = torch.bfloat16 if bf16 else torch.float32
    saved = 2 if kernel == "fused" and keeps_all(rows, width, kind, dtype) else KERNELS[kernel][0]
    moe += rows * width * saved * compute
    moe += rows * experts // layout.expert * compute if kernel == "grouped" else 0  # which expert each row is of
    moe += pairs * hidden * compute  # answers, for their weights
    moe += order
    if model.shared_experts:
        moe += tokens * model.shared_experts * width * 2 * compute
    moe += whole  # output, for its gate

    patches = tokens * model.in_channels * model.patch**2 * compute
    condition = part.samples * (
        256 * compute + 2 * hidden * compute + LONG + hidden * (FLOAT + compute) + 2 * hidden * compute
    )
    if model.condition == "text":
        condition -= part.samples * LONG  # no labels
        condition += caption * (
            model.text_width * compute + 3 * hidden * compute
        )  # features, before and after GELU, output
        condition += 2 * caption + part.samples  # masks
    prediction = part.samples * model.in_channels * model.input_size**2 * FLOAT  # the difference that the loss squares
    outside = patches + condition + modulated + prediction
    choice = tokens * experts + indices + order  # a byte for each token and expert
    kinds = tuple(is_moe(model, block) for block in range(model.num_blocks))
    return Activations(outside, attention, dense, moe, whole, choice, kinds)


# What each expert kernel keeps for the backward: (R, F) tensors (before GELU, and after it), and whether cast copies of
# the weights. `fused` keeps two where they are small (`keeps_all`).
KERNELS = {"loop": (2, True), "batched": (2, True), "grouped": (2, True), "fused": (1, False)}


def kernel_of(config: Config, layout: Layout, kind: str) -> str:
    """The expert kernel of training: the config's, or what `moe.experts.choose_kernel` makes of auto there."""
    if config.compute.kernel != "auto":
        return config.compute.kernel
    if kind == "cpu":
        return "fused"
    part = share(config, layout)
    even = config.model.family != "tc" and part.rows == part.most_rows
    return "batched" if even else "grouped" if config.train.precision == "bf16" else "fused"


def _moments(
    config: Config, layout: Layout, saved: Activations, rows: int, pairs: int, kernel: str
) -> dict[str, dict[str, int]]:
    held, compute = weights(config.model, layout.expert), _width(config)
    groups, total = partitions(held, layout), sum(weight.numel for weight in held)
    flat = bool(layout.zero)
    mine = sum(group.part for group in groups) if flat else total  # elements whose optimiser state is here
    touched = sum(group.touched for group in groups)
    optimizer = config.train.optimizer
    state = 2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0)
    always = {
        "weights": FLOAT * (sum(group.padded for group in groups) if flat else total),
        "master copy": FLOAT * mine * flat,
        "moments": FLOAT * mine * state,
        "EMA": FLOAT * total,
    }
    reduced = FLOAT * touched  # reduced gradients of the parameters that this rank's part touches
    largest = max(weight.numel for weight in held)
    buckets = FLOAT * _buckets(held, layout, reduce_bucket(config))
    before = (
        (reduced if layout.zero == 2 else FLOAT * total) if config.train.grad_accumulation > 1 else 0
    )  # of earlier micro-steps
    before_name = "reduced gradients" if layout.zero == 2 else "gradients"
    all_copies = sum(copies(config, "none", held, kernel))
    kept_copies, copies_of_again = copies(config, layout.recompute, held, kernel)
    hidden, width = config.model.hidden_size, expert_width(config.model)
    buffers = (rows + pairs) * hidden * compute if layout.expert > 1 else 0
    widest = max(rows * width, share(config, layout).tokens * 4 * hidden)
    workspace = 2 * widest * compute + FLOAT * largest  # gradients on their way through an FFN, and one weight's
    kept, again = saved.kept(layout.recompute), saved.again(layout.recompute)
    backward = {
        before_name: before,
        "activations": kept + again,
        "bf16 copies": kept_copies + copies_of_again,
        "dispatch buffers": buffers,
        "workspace": workspace,
    }
    if layout.zero == 2:  # reduced as they come
        backward |= {"reduced gradients": before + reduced, "gradient buckets": buckets}
    whole = {"gradients": FLOAT * total} if layout.zero < 2 else {}
    ready = {"reduced gradients": (before * (layout.zero == 2) + reduced) * flat}
    return {
        "end of the forward": always
        | {before_name: before, "activations": kept, "bf16 copies": all_copies, "dispatch buffers": buffers},
        "start of the backward": always | backward,
        "reduction of gradients": always | whole | ready | {"gradient buckets": buckets},
        "optimiser's step": always | ({"reduced gradients": reduced + FLOAT * mine} if flat else whole),
    }


def copies(config: Config, recompute: Recompute, held: tuple[Weight, ...], kernel: str) -> tuple[int, int]:
    """Bytes of the cast copies of weights from the forward to the backward, and of those that one block makes again
    there.

    While the forward runs all copies are held in any case: autocast keeps them to its end.
    """
    compute = _width(config)
    if compute == FLOAT:
        return 0, 0
    copied = [weight for weight in held if weight.copied and (KERNELS[kernel][1] or not weight.stacked)]
    if recompute == "none":
        return compute * sum(weight.numel for weight in copied), 0
    again = [weight for weight in copied if weight.block and (recompute == "block" or weight.ffn)]
    kept = sum(weight.numel for weight in copied) - sum(weight.numel for weight in again)
    layers = {moe: sum(weight.numel for weight in again if weight.moe is moe) for moe in (False, True)}
    counts = {
        moe: sum(is_moe(config.model, block) is moe for block in range(config.model.num_blocks))
        for moe in (False, True)
    }
    return compute * kept, compute * max(layers[moe] // counts[moe] for moe in (False, True) if counts[moe])


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
            user = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            return REDUCE_BUCKET  # training says what is wrong with it
        zero = user.get("zero_optimization", {}) if isinstance(user, dict) else {}
        found = zero.get("reduce_bucket_size", REDUCE_BUCKET) if isinstance(zero, dict) else REDUCE_BUCKET
        return int(found) if isinstance(found, int | float) else REDUCE_BUCKET
    return REDUCE_BUCKET


def _width(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else FLOAT
