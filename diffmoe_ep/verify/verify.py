"""Does a run on these ranks compute what a run on one rank computes? The checks that answer it, on the launched ranks.

1. The choice over ranks is that of the joined batch, bit for bit; the layer's outputs and all its gradients agree in
   float64.
2. Dispatch and combine with identity experts give the sum of the gates; every expert kernel is the plain loop over
   experts.
3. Training is the same for every expert parallelism and ZeRO stage that the ranks allow: losses, gradient norms,
   thresholds, and how far each expert and each shared weight moves.
5. What a run is made of goes from each of these layouts to the next, through checkpoints, without a changed bit.

Each check compares with something that knows of no ranks: a sort, a few lines of tensor algebra, a plain training loop.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.parallel.mesh import Mesh, destroy_mesh, init_mesh, launched_rank, launched_world
from diffmoe_ep.verify.difference import Difference
from diffmoe_ep.verify.layer import check_choice, check_dispatch, check_kernels, check_layer
from diffmoe_ep.verify.reshard import Relay, relay_over
from diffmoe_ep.verify.train import Trace, check_training, train_alone


@dataclass(frozen=True)
class Check:
    """One comparison over all ranks."""

    name: str  # what was checked, with the number of its law
    compared: str  # with what
    difference: Difference  # the largest over all ranks
    tolerance: float  # the largest that is allowed

    @property
    def passed(self) -> bool:
        """Whether it held."""
        return self.difference.largest <= self.tolerance

    def lines(self) -> list[str]:
        """A row of the table; a failure says what differs and where."""
        numbers = f"{self.difference.largest:>10.1e}{self.tolerance:>10.0e}"
        row = f"{self.name:<60}{self.compared:<30}{numbers}  {'ok' if self.passed else 'FAILED'}"
        return [row] if self.passed else [row, f"    {self.difference.where}"]


HEAD = f"{'check':<60}{'compared with':<30}{'largest':>10}{'allowed':>10}"


@dataclass(frozen=True)
class Verdict:
    """All checks."""

    checks: tuple[Check, ...]
    ranks: int  # that took part
    seconds: float  # that it took
    left_out: str = ""  # what could not be checked, and why

    @property
    def passed(self) -> bool:
        """Whether all held."""
        return all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """The sum, after the checks' own lines."""
        failed = [check.name for check in self.checks if not check.passed]
        end = f"{len(self.checks)} checks on {self.ranks} rank{'s' * (self.ranks > 1)} in {self.seconds:.0f} s"
        sums = f"{end}: all hold" if not failed else f"{end}: {len(failed)} FAILED: {'; '.join(failed)}"
        return [*([self.left_out] if self.left_out else []), sums]


@dataclass(frozen=True)
class Layout:
    """One way to lay the ranks out."""

    expert: int  # expert parallelism
    pool: int  # ranks that a pool covers


def layouts(world: int) -> list[Layout]:
    """Experts whole on each rank, sharded over groups, and over all ranks; pools wider than, as wide as and narrower
    than those groups.
    """
    divisors = [number for number in range(2, world) if world % number == 0]
    some = [] if not divisors else [divisors[len(divisors) // 2]]
    chosen = (
        [Layout(1, world)] + [Layout(number, number) for number in some] + ([Layout(world, world)] if world > 1 else [])
    )
    return chosen + ([Layout(world, some[0])] if some else [])


def verify(
    device: str | None = None,
    timeout_minutes: float = 10.0,
    show: Callable[[Check], None] = lambda _: None,
    given: Sequence[Layout] | None = None,
    stages: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
) -> Verdict:
    """Make all checks on the launched ranks, all of which call this.

    show: called with each check as soon as all ranks have made it; given: these layouts instead of all; stages: of
    ZeRO; folder: for checkpoints, one that all hosts see (usual: among temporary files, where all ranks are on one
    host).
    """
    started, checks = time.monotonic(), list[Check]()
    alone: dict[int, dict[str, Trace]] = {}  # by the ranks that a pool covers
    chosen = given or layouts(launched_world())
    logging.disable(logging.WARNING)  # DeepSpeed repeats itself with every engine
    mesh = init_mesh(chosen[0].expert, chosen[0].pool, timeout_minutes, device)
    with relay_over(mesh, folder) as relay:
        for layout in chosen:
            mesh = init_mesh(layout.expert, layout.pool, timeout_minutes, device)
            if layout.pool not in alone:
                alone[layout.pool] = train_alone(mesh)
            for check in _checks(mesh, layout, alone[layout.pool], relay, timeout_minutes, stages, first=not checks):
                checks.append(check)
                show(check)
    logging.disable(logging.NOTSET)
    left_out = "" if relay else "5 state is not checked: hosts share no temporary files; name a folder with --folder"
    return Verdict(tuple(checks), mesh.size, time.monotonic() - started, left_out)


def _checks(
    mesh: Mesh, layout: Layout, alone: dict[str, Trace], relay: Relay | None, timeout_minutes: float,
    stages: Sequence[int], first: bool,
) -> Iterator[Check]:  # fmt: skip
    """All laws on one layout; what does not depend on it only the first time."""
    exact = 1e-12 if mesh.device.type == "cpu" else 1e-10  # a GPU sums in another order, in float64 too
    pools = f"pools over {layout.pool} rank{'s' * (layout.pool > 1)}"
    for algorithm, difference in check_choice(mesh):
        yield Check(f"1 choice, {pools}, {algorithm}", "a sort of the joined batch", difference, 0.0)
    for name, difference in check_layer(mesh):
        yield Check(f"1 {name}, EP {layout.expert}, {pools}", "Algorithm 3 in float64", difference, exact)
    yield Check(
        f"2 dispatch and combine, EP {layout.expert}",
        "the sum of the gates",
        check_dispatch(mesh),
        exact,
    )
    if first:
        for kernel, difference, tolerance in check_kernels(mesh):
            yield Check(f"2 expert kernel {kernel}", "one expert after the other", difference, tolerance)
    for name, difference, tolerance in check_training(mesh, alone, timeout_minutes, stages):
        yield Check(f"3 {name}, {pools}", "a plain loop in one process", difference, tolerance)
    for name, writer, difference in relay.check(mesh, timeout_minutes, stages) if relay else ():
        yield Check(f"5 state taken over by {name}", f"what {writer} saved", difference, 0.0)


def run(device: str | None, timeout_minutes: float, folder: Path | None = None) -> None:
    """The verb: print the checks on the first rank; exit code 1 on every rank if one failed."""
    first = launched_rank() == 0

    def show(check: Check) -> None:
        if first:
            print("\n".join(check.lines()), flush=True)

    if first:
        print(HEAD, flush=True)
    verdict = verify(device, timeout_minutes, show, folder=folder)
    if first:
        print("\n".join(verdict.lines()), flush=True)
    destroy_mesh()
    if not verdict.passed:
        sys.exit(1)
