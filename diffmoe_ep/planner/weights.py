"""The parameters that one rank holds in a layout, and the flat parts into which ZeRO cuts them; a build on the meta
device has their names and shapes.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

from diffmoe_ep.config import ModelConfig
from diffmoe_ep.model.count import shapes
from diffmoe_ep.model.dit import is_moe
from diffmoe_ep.model.parallelize import is_expert
from diffmoe_ep.parallel.buckets import LARGEST_EXPERT_GROUP
from diffmoe_ep.planner.layout import Layout

# Matrices of which autograd keeps no copy in the compute type: their input needs no gradient, or they multiply in
# float32, or not at all.
NOT_COPIED = ("patches.", "time.", "label.", ".router.", ".predictor.fc1.")


@dataclass(frozen=True)
class Weight:
    """One trainable tensor as a rank holds it."""

    numel: int
    expert: bool  # sharded over the expert group and copied in the replicas
    copied: bool  # under bf16 its cast copy is kept from the forward to the backward
    moe: bool = False  # stands in an MoE block
    block: bool = False  # stands in a block
    ffn: bool = False  # in its feed-forward half
    stacked: bool = False  # holds several experts


@lru_cache
def weights(model: ModelConfig, expert: int) -> tuple[Weight, ...]:
    """A rank's trainable tensors in the order of `model.parameters()`, for experts sharded over `expert` ranks."""
    return tuple(_weight(model, expert, name, shape) for name, shape in shapes(model))


def _weight(model: ModelConfig, expert: int, name: str, shape: tuple[int, ...]) -> Weight:
    stacked, block = is_expert(name), name.startswith("blocks.")
    return Weight(
        numel=prod(shape) // (expert if stacked else 1),
        expert=stacked and expert > 1,
        copied=name.endswith("weight") and not any(part in name for part in NOT_COPIED),
        moe=block and is_moe(model, int(name.split(".")[1])),
        block=block,
        ffn=".ffn." in name,
        stacked=stacked,
    )


@dataclass(frozen=True)
class Partition:
    """A flat group of parameters as ZeRO 1 and 2 cut it: the rank that holds most."""

    ranks: int  # over which it is cut
    padded: int  # elements of the whole group, with the padding that makes the parts equal
    touched: int  # elements of the parameters of which this part holds anything: their reduced gradients are kept whole

    @property
    def part(self) -> int:
        """Elements of one part."""
        return self.padded // self.ranks


@lru_cache
def partitions(held: tuple[Weight, ...], layout: Layout) -> tuple[Partition, ...]:
    """The flat groups of a rank's parameters: dense ones over all ranks, sharded experts, in groups of a most size,
    over their copies.
    """
    groups = [([weight.numel for weight in held if not weight.expert], layout.world)]
    run: list[int] = []
    for numel in [weight.numel for weight in held if weight.expert]:
        if sum(run) + numel > LARGEST_EXPERT_GROUP:
            groups.append((run, layout.replicas))
            run = []
        run.append(numel)
    groups.append((run, layout.replicas))
    return tuple(_cut(numels, ranks) for numels, ranks in groups if numels)


def _cut(numels: list[int], ranks: int) -> Partition:
    step = 2 * ranks  # DeepSpeed's alignment
    padded = -(-sum(numels) // step) * step
    size = padded // ranks
    touched = [0] * ranks
    for end, numel in zip(accumulate(numels), numels, strict=True):
        for part in range((end - numel) // size, (end - 1) // size + 1):
            touched[part] += numel
    return Partition(ranks, padded, max(touched))
