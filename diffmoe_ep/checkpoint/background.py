"""Checkpoints written beside the training: it waits for a copy to host memory, and a thread does the rest.

Each rank has such a thread, and they talk over a process group of their own, so that nothing of theirs comes between
the collectives of a step. What is written, and in which order things get their names, is `saving`'s alone.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.fragments import Fragment
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.checkpoint.store import CheckpointError, Ranks
from diffmoe_ep.config import CheckpointConfig
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh, another_group


class Saver:
    """`with Saver(root, config, mesh, timeout_minutes) as saver:` saves one checkpoint at a time; collective, as are
    `save` and `finish`.

    At its end, also by an exception, it waits for the checkpoint that is being written. Outside of the block a save
    returns when all is written.
    """

    def __init__(self, root: Path, config: CheckpointConfig, mesh: Mesh, timeout_minutes: float) -> None:
        self.root, self.config, self.mesh, self.timeout_minutes = root, config, mesh, timeout_minutes
        self.group = mesh.world
        self._copies: list[Tensor] = []
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Self:
        if self.config.background:
            self.group = another_group(self.mesh, self.timeout_minutes)
            self._thread = ThreadPoolExecutor(1, "saving")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None:  # something else has failed, perhaps on this rank alone: nothing to agree upon
            step, pending = self._pending
            if (lost := pending.exception()) is not None:
                print(f"the checkpoint of step {step} was not written either: {lost}", file=sys.stderr, flush=True)
        if self._thread is not None:
            self._thread.shutdown()

    def save(self, step: int, fragments: Sequence[Fragment], meta: dict[str, Any], then: Callable[[int], None]) -> None:
        """Save what all ranks' fragments make up, as `saving.save` does, and call `then` with the step when it is
        complete; in the background: return as soon as everything is copied.

        Waits for the checkpoint before, and says so; raises what that failed with.
        """
        if self._pending is not None and not self._pending[1].done() and self.mesh.is_first:
            told = f"the checkpoint of step {step} waits for that of step {self._pending[0]}, which is still written"
            print(told, file=sys.stderr, flush=True)
        self.finish()
        if self._thread is None:
            self._write(step, fragments, meta, then)
        else:
            self._pending = step, self._thread.submit(self._write, step, self._copied(step, fragments), meta, then)

    @property
    def failed(self) -> bool:
        """Whether writing has failed on this rank; all hear of it at the next `save` or `finish`."""
        return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete on all ranks.

        Raises CheckpointError, on all ranks alike, if it could not be written on one of them.
        """
        if self._pending is None:
            return
        (step, pending), self._pending = self._pending, None
        error = pending.exception()
        assert error is None or isinstance(error, Exception), error
        problem = None if error is None else self._ranks(step).message(error)
        found = next((text for text in gather_objects(problem, self.group) if text), None)
        if found is not None:
            raise CheckpointError(found, everywhere=True) from error

    def _write(
        self, step: int, fragments: Sequence[Fragment], meta: dict[str, Any], then: Callable[[int], None]
    ) -> None:
        save(
            self.root, step, fragments, meta, group=self._ranks(step).group, rank=self.mesh.rank, world=self.mesh.size,
            keep_last=self.config.keep_last, keep_every=self.config.keep_every,
        )  # fmt: skip
        then(step)

    def _copied(self, step: int, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The same in host memory, which is taken at the first save and used again; on the device, everything up to
        here has happened when this returns.
        """
        if not self._copies:
            self._ranks(step).together(lambda: self._copies.extend(map(_host_memory, fragments)))
        assert [copy.shape for copy in self._copies] == [fragment.data.shape for fragment in fragments]
        for copy, fragment in zip(self._copies, fragments, strict=True):
            copy.copy_(fragment.data, non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream(self.mesh.device).synchronize()
        return [
            dataclasses.replace(fragment, data=copy) for copy, fragment in zip(self._copies, fragments, strict=True)
        ]

    def _ranks(self, step: int) -> Ranks:
        alone = self._thread is None and self.mesh.size == 1
        what = f"cannot save the checkpoint {self.root / f'step-{step:07d}'}"
        return Ranks(None if alone else self.group.handle, self.mesh.size, what)


def _host_memory(fragment: Fragment) -> Tensor:
    try:
        return torch.empty(fragment.data.shape, dtype=fragment.data.dtype, pin_memory=fragment.data.is_cuda)
    except RuntimeError as error:
        raise CheckpointError(
            f"a checkpoint in the background needs a copy in host memory, which is full ({error}); set "
            "checkpoint.background=false"
        ) from error
