"""What two computations of the same thing differ by, and where: tensor, expert, index, rank and the two values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh


@dataclass(frozen=True)
class Difference:
    """The largest difference of a comparison."""

    largest: float  # 0 when all is equal, inf when something is no number or of another shape
    where: str = ""  # the place, with both values


def compare(
    name: str, found: Tensor, expected: Tensor, *, first: int | None = None, relative: bool = False
) -> Difference:
    """The element that differs most. first: dimension 0 counts experts from this number; relative: to the largest
    element expected.
    """
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if found.shape != expected.shape:
        return Difference(math.inf, f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not found.numel():
        return Difference(0.0)
    apart = (found.double() - expected.double()).abs().nan_to_num(math.inf, math.inf)
    apart[found == expected] = 0.0  # infinities of one sign are equal
    if relative:
        apart = apart / expected.double().abs().max().clamp(min=1e-300)
    place = int(apart.argmax())
    index = [int(number) for number in torch.unravel_index(torch.tensor(place), found.shape)]
    expert = f", expert {first + index.pop(0)}" if first is not None else ""
    at = f"[{', '.join(map(str, index))}]" if index else ""
    values = f"{found.flatten()[place].item():.17g}, not {expected.flatten()[place].item():.17g}"
    return Difference(float(apart.max()), f"{name}{expert}{' ' * bool(expert and at)}{at} is {values}")


def largest(differences: Iterable[Difference]) -> Difference:
    """The worst of several comparisons."""
    return max(differences, key=lambda one: one.largest, default=Difference(0.0))


def over_ranks(mine: Difference, mesh: Mesh) -> Difference:
    """The worst of all ranks' comparisons, which says whose it is; the same on every rank."""
    found = gather_objects((mine.largest, mine.where), mesh.world)
    rank = max(range(len(found)), key=lambda number: found[number][0])
    return Difference(found[rank][0], f"rank {rank}: {found[rank][1]}" if found[rank][1] else "")
