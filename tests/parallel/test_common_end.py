"""What ends one rank ends all, with one sentence and one exit code; each rank here is a process that is started by
hand.
"""

import signal
import sys

import pytest

from launched import free_port, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RANK = """
import os, signal, sys, time
from diffmoe_ep import cli
from diffmoe_ep.cli.options import Verb
from diffmoe_ep.config import ConfigError

def verb(_):
    import torch
    from diffmoe_ep.parallel.collectives import all_sum
    from diffmoe_ep.parallel.common_end import CommonEnd
    from diffmoe_ep.parallel.mesh import init_mesh

    what, who = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: None)  # a training notes it, and ends by itself (train/stopping.py)
    mesh = init_mesh(1, 1, 0.2 if what == "hang" else 2.0)
    with CommonEnd(mesh):
        all_sum(torch.ones(1), mesh.world)
        if what == "all":
            raise ConfigError("none of us likes it", everywhere=True)
        if mesh.rank == who:
            if what == "mistake":
                raise ConfigError("my disk is full")
            if what == "fault":
                raise KeyError("a fault of ours")
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hang":
                time.sleep(60)
        while what != "fine":
            all_sum(torch.ones(1), mesh.world)  # with a rank that never comes
            time.sleep(0.01)

cli.parse = lambda _: (Verb((), object, verb), None)
cli.main([])
"""


def ended(what: str, who: int, world: int = 3) -> tuple[list[int], list[str]]:
    """Exit code and error output of each rank."""
    return ranks_of(world, [sys.executable, "-c", RANK, what, str(who)])


@pytest.mark.parametrize("who", [0, 2])
def test_a_ranks_mistake_is_everyones_end(who: int) -> None:
    codes, errors = ended("mistake", who)
    assert codes == [2, 2, 2]
    assert "".join(errors) == f"diffmoe: error: rank {who}: my disk is full\n"


def test_a_mistake_of_all_is_shown_once() -> None:
    codes, errors = ended("all", 0)
    assert codes == [2, 2, 2]
    assert errors == ["diffmoe: error: none of us likes it\n", "", ""]


def test_a_fault_of_ours_has_one_traceback() -> None:
    codes, errors = ended("fault", 1)
    assert codes == [1, 1, 1]
    assert (errors[0], errors[2]) == ("", "")
    assert errors[1].count("Traceback") == 1 and errors[1].endswith("KeyError: 'a fault of ours'\n")


@pytest.mark.parametrize(("who", "named"), [(1, "rank 1 on "), (0, "rank 0 on ")])
def test_a_rank_that_is_gone_is_named(who: int, named: str) -> None:
    codes, errors = ended("killed", who)
    assert codes == [-signal.SIGKILL if rank == who else 1 for rank in range(3)]
    told = [error for error in errors if error]
    assert len(told) == 1 and told[0].count("\n") == 1
    assert told[0].startswith(f"diffmoe: error: {named}") and "ended without a word" in told[0]


def test_a_rank_that_is_gone_is_named_though_a_launcher_ends_the_others() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", free_port()]
    (code,), (error,) = ranks_of(1, [*command, "--no-python", sys.executable, "-c", RANK, "killed", "2"])
    assert code == 1  # torchrun's, for any failure
    told = [line for line in error.splitlines() if line.startswith("diffmoe: error")]
    assert len(told) == 1 and told[0].startswith("diffmoe: error: rank 2 on ") and "ended without a word" in told[0]


def test_a_rank_that_is_stuck_is_shown_where_it_is() -> None:
    codes, errors = ended("hang", 2)
    assert codes == [1, 1, 1]
    told = [error for error in errors if error]
    assert len(told) == 1 and told[0].count("\n") == 1
    assert "all still run: ranks 0, 1 at parallel/collectives.py:" in told[0] and "; rank 2 at cli/" in told[0]


def test_a_good_end_is_one() -> None:
    assert ended("fine", 0) == ([0, 0, 0], ["", "", ""])
