"""What dispatch must know to bring rows to the experts, and combine to bring the answers back.

Legend: S tokens on this rank, D hidden size, N experts (E = N / EP of them on this rank), R chosen pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe_ep.moe.permute import Permutation, order_by_expert, permutation_of, reorder
from diffmoe_ep.parallel.async_all_to_all import RowCounts
from diffmoe_ep.parallel.collectives import Group


class Chunk(NamedTuple):
    """Local experts [start, end) whose rows travel together: all of them, or, where parts overlap, some."""

    start: int
    end: int
    send: Sequence[int]  # (EP,) rows that go to each rank of the expert group
    receive: Sequence[int]  # (EP,) rows that come from each rank
    order: Tensor | None  # (R,) takes rows from (rank, expert) to (expert, rank); None where that is the same
    inverse: Tensor | None  # (R,) and back

    def by_expert(self, rows: Tensor) -> Tensor:
        """Rows as they came (R, D), grouped by expert."""
        return rows if self.order is None or self.inverse is None else reorder(rows, self.order, self.inverse)

    def by_rank(self, rows: Tensor) -> Tensor:
        """Rows grouped by expert (R, D), as they go back."""
        return rows if self.order is None or self.inverse is None else reorder(rows, self.inverse, self.order)


@dataclass(frozen=True)
class DispatchHandle:
    """Where this rank's chosen rows go and what comes here.

    Without gradient, and frozen, so that a recomputed forward uses the same. It exists before the row counts have come:
    the host waits for them when `counts`, `permutation` or `chunks` is first read.
    """

    chosen: Tensor  # (S, N) bool
    processed: Tensor  # (N,) rows that each expert of the layer takes from this rank's tokens
    row_counts: RowCounts  # rows to and from each expert and rank, on their way
    group: Group  # the ranks that rows travel over
    rows_per_expert: int | None = None  # of each local expert from all ranks, where that is known without asking
    num_chunks: int = 1  # parts in which rows travel

    @cached_property
    def counts(self) -> Sequence[int]:
        """Rows of each local expert, (E,)."""
        if self.rows_per_expert is not None:
            return [self.rows_per_expert] * self._num_local
        return [sum(column) for column in zip(*self.row_counts.arriving, strict=True)]

    @cached_property
    def permutation(self) -> Permutation:
        """This rank's chosen pairs, ordered by (chunk, expert, token), as their rows travel."""
        total, bounds = sum(self.row_counts.sent), self._bounds
        if len(bounds) == 1:
            return permutation_of(self.chosen, total)
        experts = torch.arange(self.chosen.shape[1], device=self.chosen.device).view(self.group.size, -1)  # (EP, E)
        return permutation_of(self.chosen, total, torch.cat([experts[:, start:end].flatten() for start, end in bounds]))

    @cached_property
    def chunks(self) -> Sequence[Chunk]:
        """What travels together."""
        ranks, here = self.group.size, self._num_local
        sent, arriving = self.row_counts.sent, self.row_counts.arriving
        matrix = self.row_counts.tensor[1].view(ranks, here)  # `arriving` on the device
        chunks = []
        for start, end in self._bounds:
            send = [sum(sent[rank * here + start : rank * here + end]) for rank in range(ranks)]
            receive = [sum(counts[start:end]) for counts in arriving]
            mixed = end - start > 1 and ranks > 1
            order, inverse = order_by_expert(matrix[:, start:end], sum(receive)) if mixed else (None, None)
            chunks.append(Chunk(start, end, send, receive, order, inverse))
        return chunks

    @property
    def _bounds(self) -> Sequence[tuple[int, int]]:
        """Local experts [start, end) of each chunk, as even as they come."""
        here = self._num_local
        chunks = min(self.num_chunks, here)
        return [(here * chunk // chunks, here * (chunk + 1) // chunks) for chunk in range(chunks)]

    @property
    def _num_local(self) -> int:
        """Experts E of each rank."""
        return self.chosen.shape[1] // self.group.size
