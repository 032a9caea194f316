"""The planner's memory against the bytes of the tensors of real training steps, part by part, on 1, 2 and 4 ranks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_ep.config import Config, from_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.parallelize import is_expert
from diffmoe_ep.parallel.buckets import REDUCE_BUCKET
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.planner.layout import Layout, share
from diffmoe_ep.planner.memory import PARTS, Memory, copies, kernel_of, memory
from diffmoe_ep.planner.weights import weights
from diffmoe_ep.train.engine import settings
from planner.memory_ranks import forward_allocates, held
from ranks import run

SMALL: dict[str, Any] = {
    "input_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "hidden_size": 64,
    "num_blocks": 4,
    "num_heads": 4,
    "num_classes": 10,
}
BUCKET = 200_000

FAMILIES: dict[str, dict[str, Any]] = {
    "dense": {"family": "dense"},
    "diffmoe": {"family": "diffmoe", "num_experts": 8},
    "ec": {"family": "ec", "num_experts": 8},
    "tc": {"family": "tc", "num_experts": 8},
    "fine and shared": {"family": "diffmoe", "num_experts": 8, "granularity": 2, "shared_experts": 1},
    "every block": {"family": "diffmoe", "num_experts": 8, "interleave": False, "num_blocks": 3},
    "text": {"family": "diffmoe", "num_experts": 8, "condition": "text", "text_width": 48, "text_length": 20},
}
# family, precision, W, EP, ZeRO
LAYOUTS = [
    ("dense", "float32", 1, 1, 0),
    ("dense", "bf16", 2, 1, 2),
    ("diffmoe", "bf16", 1, 1, 0),
    ("diffmoe", "bf16", 2, 2, 1),
    ("diffmoe", "float32", 4, 2, 2),
    ("diffmoe", "bf16", 4, 4, 2),
    ("diffmoe", "bf16", 4, 2, 0),
    ("ec", "float32", 2, 2, 1),
    ("tc", "bf16", 2, 2, 1),
    ("fine and shared", "float32", 2, 2, 0),
    ("every block", "bf16", 2, 1, 1),
    ("text", "bf16", 2, 2, 1),
    ("text", "float32", 2, 2, 2),
]


KERNELS = [
    ("loop", "tc", "float32"),
    ("batched", "diffmoe", "bf16"),
    ("grouped", "diffmoe", "bf16"),
    ("fused", "tc", "float32"),
]


def small(
    folder: Path, family: str, precision: str, expert: int, zero: int, recompute: str = "none", **train: Any
) -> Config:
    """A model small enough for a test, with a bucket as small, so that gradients fill several."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
    tree = {
        "model": SMALL | FAMILIES[family],
        "train": {"global_batch": 16, "precision": precision, "max_grad_norm": 1.0, **train},
        "parallel": {"expert_parallel": expert, "zero_stage": zero, "deepspeed": str(path)},
        "compute": {"recompute": recompute},
    }
    return from_tree(tree)


def layout(config: Config, world: int) -> Layout:
    return Layout(world, config.parallel.expert_parallel, config.parallel.zero_stage, config.compute.recompute)


def within(predicted: float, found: float, tolerance: float = 0.05) -> bool:
    return abs(predicted - found) <= tolerance * found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "precision", "world", "expert", "zero"), LAYOUTS)
def test_every_part_is_what_the_tensors_hold(
    tmp_path: Path, family: str, precision: str, world: int, expert: int, zero: int
) -> None:
    """Rows differ from rank to rank, so what depends on them is compared in the mean, which is exact, and bounded by
    the most.
    """
    config = small(tmp_path, family, precision, expert, zero)
    found = run(world, held, config, timeout=240)
    mean, most = (memory(config, layout(config, world), "cpu", which) for which in (False, True))
    backward, reduction = mean.phases["start of the backward"], mean.phases["reduction of gradients"]
    predicted = {part: backward.get(part, 0) for part in PARTS if part != "workspace"}
    predicted |= {part: reduction.get(part, 0) for part in ("gradients", "reduced gradients", "gradient buckets")}
    by_rank = {part: [one.get(part, 0) for one in found] for part in predicted}
    for part, bytes_ in predicted.items():
        told = f"{part}: predicted {bytes_:,}, found {by_rank[part]}"
        if part in ("activations", "dispatch buffers"):  # by the rows
            assert within(bytes_, sum(by_rank[part]) / world), told
            assert max(by_rank[part]) <= 1.001 * most.phases["start of the backward"][part], told
        else:
            assert within(bytes_, max(by_rank[part])), told
    total = sum(sum(one.values()) for one in found) / world
    assert within(sum(predicted.values()), total)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["none", "ffn", "block"])
@pytest.mark.parametrize(
    ("family", "precision"), [("dense", "float32"), ("diffmoe", "bf16"), ("diffmoe", "float32"), ("text", "bf16")]
)
def test_what_a_forward_leaves_allocated(tmp_path: Path, family: str, precision: str, recompute: str) -> None:
    """The allocator's own account of a forward, with activations kept and computed again."""
    config = small(tmp_path, family, precision, 1, 0, recompute=recompute)
    (found,) = run(1, forward_allocates, config, timeout=240)
    kept = memory(config, layout(config, 1), "cpu").phases["end of the forward"]["activations"]
    kept += copies(
        config, config.compute.recompute, weights(config.model, 1), kernel_of(config, layout(config, 1), "cpu")
    )[0]
    assert within(kept, found), f"predicted {kept:,}, found {found:,}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kernel", "family", "precision"), KERNELS)
def test_what_each_kernel_keeps(tmp_path: Path, kernel: Any, family: str, precision: str) -> None:
    config = small(tmp_path, family, precision, 1, 0)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, kernel=kernel))
    (found,) = run(1, forward_allocates, config, timeout=240)
    given = layout(config, 1)
    kept = memory(config, given, "cpu").phases["end of the forward"]["activations"]
    kept += copies(config, "none", weights(config.model, 1), kernel)[0]
    assert within(kept, found), f"predicted {kept:,}, found {found:,}"


@pytest.mark.parametrize(
    ("family", "expert"),
    [(family, expert) for family in FAMILIES for expert in (1, 2) if (family, expert) != ("dense", 2)],
)
def test_weights_are_those_of_the_model_in_order(family: str, expert: int) -> None:
    config = from_tree({"model": SMALL | FAMILIES[family], "parallel": {"expert_parallel": expert}})
    with torch.device("meta"):
        model = DiT(config.model, config.pool)
    here = [
        (p.numel() // (expert if is_expert(name) else 1), is_expert(name) and expert > 1)
        for name, p in model.named_parameters()
    ]
    assert [(weight.numel, weight.expert) for weight in weights(config.model, expert)] == here


def test_the_bucket_is_the_engines() -> None:
    assert settings(from_tree({}), Mesh())["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET


@pytest.mark.parametrize(
    ("span", "world", "expert", "rows", "most_rows", "most_pairs"),
    [
        (
            "all",
            4,
            4,
            256,
            256,
            1024,
        ),  # the pool is the expert group: each of its 2 experts gets k = 128 rows; one rank may send them all
        ("all", 4, 2, 256, 512, 1024),  # wider than the group: 4 experts get up to k = 128 each
        ("all", 4, 1, 256, 1024, 1024),
        (4, 4, 2, 256, 256, 256),  # a pool inside each rank: k = 32 of each
        (8, 4, 2, 256, 256, 512),  # two ranks
    ],
)
def test_rows_that_experts_can_get(
    span: Any, world: int, expert: int, rows: int, most_rows: int, most_pairs: int
) -> None:
    """8 experts, 16 samples of 64 tokens over 4 ranks: 256 tokens each."""
    config = from_tree({"model": SMALL | FAMILIES["diffmoe"], "train": {"global_batch": 16}, "pool": {"span": span}})
    part = share(config, Layout(world, expert, 1, "none"))
    assert (part.tokens, part.rows, part.most_rows, part.most_pairs) == (256, rows, most_rows, most_pairs)


def test_recomputation_saves_activations_and_zero_saves_moments() -> None:
    config = from_tree({"model": {"size": "L"}, "train": {"global_batch": 64}})
    kept, ffn, block = (memory(config, Layout(8, 8, 1, kind)) for kind in ("none", "ffn", "block"))
    activations = [one.phases["end of the forward"]["activations"] for one in (kept, ffn, block)]
    assert activations[0] > 1.5 * activations[1] > 3 * activations[2]
    without, stage = (memory(config, Layout(8, 1, zero, "none")) for zero in (0, 1))
    assert within(stage.peak["moments"] * 8, without.peak["moments"], 0.001)
    assert (
        isinstance(kept, Memory)
        and kept.total == sum(kept.peak.values())
        and kept.peak[kept.largest] == max(kept.peak.values())
    )


def test_most_is_never_less_than_the_mean() -> None:
    config = from_tree({"model": {"size": "S"}, "train": {"global_batch": 64}})
    for expert in (1, 2, 4, 8):
        for zero in (0, 1, 2):
            given = Layout(8, expert, zero, "none")
            assert memory(config, given, most=True).total >= memory(config, given).total
