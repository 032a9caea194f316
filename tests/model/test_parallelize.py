"""A rank's part of a model: cut before it has any memory, and started the same for every layout."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from diffmoe_ep.config import from_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import apply_recompute, build_sharded, is_expert
from diffmoe_ep.moe.dispatch import AllToAllDispatch
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh

ROOT = Path(__file__).parents[2]
SMALL = {
    "input_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "hidden_size": 16,
    "num_blocks": 4,
    "num_heads": 2,
    "num_classes": 4,
    "num_experts": 8,
}
KINDS = {"class": SMALL, "text": SMALL | {"condition": "text", "text_width": 12, "text_length": 5}}

MEASURE = """
import sys, torch
from diffmoe_ep.config import from_tree
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import build_sharded
from diffmoe_ep.parallel.collectives import Group
from diffmoe_ep.parallel.mesh import Mesh

def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

config = from_tree({"model": {"hidden_size": 512, "num_blocks": 8, "num_heads": 8, "num_experts": 32}})
# what the first use of torch takes is not counted
initialize(build_sharded(from_tree({"model": {"hidden_size": 32, "num_blocks": 2, "num_heads": 2}}), Mesh()), 0)
before = peak()
model = initialize(build_sharded(config, Mesh(expert=Group(8, 3))), 0)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_rank_starts_with_its_part_of_one_model(kind: str, ranks: int) -> None:
    config = from_tree({"model": KINDS[kind]})
    whole = initialize(DiT(config.model, config.pool), 3).state_dict()
    parts = [initialize(build_sharded(config, Mesh(expert=Group(ranks, rank))), 3) for rank in range(ranks)]
    for name, expected in whole.items():
        held = [part.state_dict()[name] for part in parts]
        if is_expert(name):
            assert torch.equal(torch.cat(held), expected)
        else:
            assert all(torch.equal(one, expected) for one in held)
    assert all(torch.equal(part.positions, DiT(config.model).positions) for part in parts)


@pytest.mark.slow
def test_a_rank_never_holds_much_more_than_its_share() -> None:
    """Of a model of 1.1 GB in all; seen by the operating system, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    peak, share = map(int, done.stdout.split())
    assert share > 200e6
    assert peak < 1.5 * share, f"{peak / share:.2f} times this rank's share"


@pytest.mark.parametrize("overlap", [1, 4])
def test_compute_keys_reach_the_layers(overlap: int) -> None:
    given = from_tree({"model": SMALL, "compute": {"overlap": overlap, "kernel": "batched", "topk": "owner"}})
    layers = build_sharded(given, Mesh(expert=Group(2, 1))).moe_layers()
    assert len(layers) == 2
    for layer in layers:
        assert isinstance(layer.dispatcher, AllToAllDispatch) and layer.dispatcher.num_chunks == overlap
        assert layer.experts.kernel == "batched" and layer.pools.algorithm == "owner"


@pytest.mark.parametrize("recompute", ["ffn", "block"])
def test_a_copied_model_computes_with_its_own_weights(recompute: Literal["ffn", "block"]) -> None:
    model = initialize(DiT(from_tree({"model": SMALL}).model), 0)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    given = torch.ones(2, 1, 8, 8), torch.full((2,), 0.5), torch.tensor([0, 1])
    before = model(*given).prediction
    copied = copy.deepcopy(apply_recompute(model, recompute))
    for parameter in copied.parameters():
        parameter.data.mul_(2)
    assert torch.equal(model(*given).prediction, before)
    found = copied(*given).prediction
    assert torch.equal(found, apply_recompute(copied, "none")(*given).prediction)
    assert (found - before).abs().max() > 1e-3
