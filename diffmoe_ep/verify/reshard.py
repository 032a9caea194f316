"""Law 5: what a run is made of goes from layout to layout through checkpoints without a changed bit.

The first layout trains a few steps and saves. Each other one, at each ZeRO stage, loads what the one before saved and
saves it again; the first rank then reads both as one process does, whole.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffmoe_ep.checkpoint import store
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.metrics import Clock
from diffmoe_ep.train.preflight import check_shared
from diffmoe_ep.train.trainer import Trainer
from diffmoe_ep.verify.difference import Difference, compare, largest, over_ranks
from diffmoe_ep.verify.train import STEPS, RandomImages, config_of, randomize_zero_weights


class Relay:
    """A folder of checkpoints that goes from layout to layout."""

    def __init__(self, folder: Path) -> None:
        """folder: one that all ranks see."""
        self.folder = folder
        self.newest: Path | None = None  # what the layout before has saved
        self.writer = ""  # that layout's name

    def check(
        self, mesh: Mesh, timeout_minutes: float, stages: Sequence[int] = (0, 1, 2)
    ) -> Iterator[tuple[str, str, Difference]]:
        """Take over and hand on at every ZeRO stage: this layout, who wrote what it read, and what has changed."""
        for zero in stages:
            config = config_of("adamw", mesh, mesh.expert.size, zero, timeout_minutes)
            config = dataclasses.replace(config, folder=str(self.folder))
            trainer = Trainer(config, mesh, Mixture([RandomImages()]), self.newest)
            if self.newest is None:
                randomize_zero_weights(trainer.model)
                clock = Clock(0)
                for _ in range(STEPS):
                    trainer.train_step(clock)
            before, writer, name = self.newest, self.writer, f"EP {mesh.expert.size}, ZeRO {zero}"
            trainer.step += 1  # the same state under another name
            with trainer.saver as saver:
                trainer.save(lambda _: None)
                saver.finish()
            trainer.stream.close()
            self.newest, self.writer = store.resolve(self.folder), name
            if before is not None:
                mine = _changes(before, self.newest) if mesh.is_first else Difference(0.0)
                yield name, writer, over_ranks(mine, mesh)


def _changes(before: Path, after: Path) -> Difference:
    """What two checkpoints differ by, in any tensor."""
    names, others = sorted(store.tensors(before)), sorted(store.tensors(after))
    if names != others:
        odd = sorted(set(names) ^ set(others))[0]
        return Difference(float("inf"), f"{odd} is in one of the checkpoints only")
    found, expected = store.read(after, names), store.read(before, names)
    return largest(compare(name, found[name], expected[name]) for name in names)


@contextmanager
def relay_over(mesh: Mesh, folder: Path | None) -> Iterator[Relay | None]:
    """A relay in a new folder within `folder`, which is removed in the end; by default among temporary files, and None
    where ranks on several hosts do not share those. Raises ConfigError where they do not share `folder`.
    """
    problem, made = None, None
    try:
        if mesh.is_first:
            made = tempfile.mkdtemp(prefix="diffmoe-verify-", dir=folder)
    except OSError as error:
        problem = f"--folder {folder} cannot be written ({error.strerror}); give another"
    mesh.agree(problem)
    shared = Path(str(mesh.same(made)))
    try:
        try:
            check_shared(shared, mesh)
        except ConfigError as error:
            if folder is not None:
                raise ConfigError(f"--folder {folder} is not one that all hosts see", everywhere=True) from error
            yield None
        else:
            yield Relay(shared)
    finally:
        if mesh.is_first:
            shutil.rmtree(shared, ignore_errors=True)
