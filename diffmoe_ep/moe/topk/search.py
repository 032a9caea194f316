"""Three ways for ranks to find each column's k-th largest value together, and how many of the values equal to it each
may still take.

Legend: S tokens on each rank, C columns, N of them experts, W ranks, P = W S tokens in the pool.

All are called with the same arguments and return the same bits: columns (C, S), the experts' first, without NaN and
with +0 for -0; k, one number or one for each column (C,). The order is total: value descending, then rank and token
ascending. So of the values equal to the k-th, the earlier ranks' are taken first, up to k in all: that is a rank's
`tie_quota`, which may be more than it has, or negative for none.

gather  every rank gets all scores and sorts for itself: the simple reference
owner   the columns are shared out; their owners get all scores of them and send back what each rank must know
radix   the k-th key is found byte by byte from histograms that are summed over the ranks; ties are counted at last
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ep.moe.topk.cost import BINS, Algorithm
from diffmoe_ep.parallel.collectives import Group, all_gather, all_sum, all_to_all


class KthValue(NamedTuple):
    """What a rank must know to choose among its own tokens."""

    kth_value: Tensor  # (C, ...) the k-th largest value of each column; +inf where k is 0
    # (N, ...) int: of this rank's values equal to it, how many are taken; more than there are: all; negative: none
    tie_quota: Tensor


def search_gather(columns: Tensor, k: int | Tensor, experts: int, group: Group) -> KthValue:
    """Find the k-th values from all ranks' scores."""
    tokens = columns.shape[1]
    pooled = all_gather(columns, group).view(group.size, *columns.shape)  # (W, C, S)
    pooled = pooled.transpose(0, 1).flatten(1)  # (C, P)
    kth = kth_largest(pooled, k)  # (C,)
    mine, bound = pooled[:experts], kth[:experts, None]
    before = (mine[:, : group.rank * tokens] == bound).sum(1)  # ties of earlier ranks
    return KthValue(kth, _first(k, experts) - (mine > bound).sum(1) - before)


def search_owner(columns: Tensor, k: int | Tensor, experts: int, group: Group) -> KthValue:
    """Find the k-th values where the columns are owned, each rank a run of them; some none, where there are more ranks
    than columns.
    """
    num_columns, tokens = columns.shape
    starts = [num_columns * rank // group.size for rank in range(group.size + 1)]
    owned = [end - start for start, end in itertools.pairwise(starts)]
    first, here = starts[group.rank], owned[group.rank]

    pooled = all_to_all(columns, owned, [here] * group.size, group).view(group.size, here, tokens)  # (W, here, S)
    ranking = k if isinstance(k, int) else k[first : first + here]
    kth = kth_largest(pooled.transpose(0, 1).flatten(1), ranking)  # (here,)
    above = (pooled > kth[:, None]).sum(2)  # (W, here)
    ties = (pooled == kth[:, None]).sum(2)
    quota = ranking - above.sum(0) - (ties.cumsum(0) - ties)  # (W, here)
    integer = _key_type(columns)
    answer = torch.stack(
        [kth.view(integer).expand_as(quota), quota.to(integer)], dim=2
    )  # (W, here, 2) bits of a value, a count

    answers = all_to_all(answer.flatten(0, 1), [here] * group.size, owned, group)  # (C, 2)
    return KthValue(answers[:, 0].contiguous().view(columns.dtype), answers[:experts, 1])


def search_radix(columns: Tensor, k: int | Tensor, experts: int, group: Group) -> KthValue:
    """Find the k-th value's key from its highest byte down: the k-th largest lies where the counts, from the top, first
    reach k.
    """
    keys = ordered_keys(columns)  # (C, S)
    wanted = torch.full((len(columns),), k, device=columns.device) if isinstance(k, int) else k  # (C,)
    left = wanted  # (C,) how many are taken among those that still match
    matches = torch.ones_like(columns, dtype=torch.bool)  # (C, S) whose higher bytes are the k-th's
    found = torch.zeros_like(wanted, dtype=torch.int64)  # (C,) the k-th key so far
    for shift in range(8 * columns.element_size() - 8, -1, -8):
        digit = ((keys >> shift) & (BINS - 1)).long()
        counts = torch.zeros(len(columns), BINS, dtype=torch.int32, device=columns.device)
        counts = all_sum(counts.scatter_add_(1, digit, matches.int()), group)
        reached = counts.flip(1).cumsum(1).flip(1)  # (C, 256) how many have this digit or a larger one
        place = (reached >= left[:, None]).sum(1, keepdim=True) - 1  # (C, 1) the largest digit that reaches k
        left = left - (reached - counts).gather(1, place).squeeze(1)
        matches &= digit == place
        found = (found << 8) | place.squeeze(1)
    ties = all_gather(matches[:experts].sum(1, dtype=torch.int32), group).view(group.size, experts)
    kth = _values(found, columns.dtype).masked_fill(wanted == 0, float("inf"))
    return KthValue(kth, left[:experts] - ties[: group.rank].sum(0))


SEARCHES: Mapping[Algorithm, Callable[[Tensor, int | Tensor, int, Group], KthValue]] = {
    "gather": search_gather,
    "owner": search_owner,
    "radix": search_radix,
}


def kth_largest(columns: Tensor, k: int | Tensor) -> Tensor:
    """The k-th largest value of each column (C, ..., P) along the last dimension, as (C, ...); +inf where k is 0.

    By the quickest of what torch offers: for one k an unsorted top-k, for many a sort, or on a CPU a quickselect for
    each column.
    """
    if isinstance(k, int):
        if k == 0:
            return columns.new_full(columns.shape[:-1], float("inf"))
        return columns.topk(k, sorted=False).values.amin(-1)
    per_column = k.view(-1, *[1] * (columns.dim() - 2))  # (C, ...)
    if columns.is_cuda or not len(columns):
        index = (per_column - 1).clamp(min=0).expand(columns.shape[:-1])
        kth = columns.sort(descending=True).values.gather(-1, index[..., None]).squeeze(-1)
    else:
        places = [columns.shape[-1] + 1 - max(number, 1) for number in k.tolist()]  # counted from the smallest
        kth = torch.stack([column.kthvalue(place).values for column, place in zip(columns, places, strict=True)])
    return kth.masked_fill(per_column == 0, float("inf"))


def ordered_keys(values: Tensor) -> Tensor:
    """Integers whose bits, read as unsigned, are ordered as float32 or float64 values without NaN are; -0 counts as +0.

    Of a negative number all bits are turned over, of others the sign alone.
    """
    integer = _key_type(values)
    bits = (values + 0.0).view(integer)
    return bits ^ ((bits >> (8 * values.element_size() - 1)) | torch.iinfo(integer).min)


def _values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of keys that are held in int64."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    size = torch.iinfo(integer).bits
    keys = keys << (64 - size) >> (64 - size)  # the sign of 32 bits
    return (keys ^ (~(keys >> 63) | torch.iinfo(integer).min)).to(integer).view(dtype)


def _key_type(values: Tensor) -> torch.dtype:
    assert values.dtype in (torch.float32, torch.float64), (
        f"scores are compared in float32 or float64, not {values.dtype}"
    )
    return torch.int32 if values.dtype == torch.float32 else torch.int64


def _first(k: int | Tensor, experts: int) -> int | Tensor:
    return k if isinstance(k, int) else k[:experts]
