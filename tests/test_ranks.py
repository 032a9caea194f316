"""The pool of ranks that the distributed tests stand on."""

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run

pytestmark = pytest.mark.slow


def summed(rank: int, number: float) -> tuple[int, torch.Tensor, int]:
    """Sums number + rank over the ranks, in a process group made here and left to the pool."""
    dist.init_process_group("gloo")
    total = torch.full((3,), number + rank)
    dist.all_reduce(total)
    return rank, total, os.getpid()


def several(rank: int) -> dict[str, Any]:
    """Results of the kinds that tests return."""
    weight = torch.arange(6.0, requires_grad=True)
    return {
        "view": (2 * weight).view(2, 3)[1:].bfloat16(),
        "array": np.arange(rank + 1),
        "text": os.environ["WORLD_SIZE"],
    }


def spoiled(rank: int) -> None:
    """Leaves marks that the next call must not find."""
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)


def marks(rank: int) -> tuple[str | None, str, torch.dtype]:
    """What `spoiled` would have left."""
    return os.environ.get("LEFT_BEHIND"), os.getcwd(), torch.get_default_dtype()


def raises_on(rank: int, bad: int) -> None:
    """One rank raises while the others wait for it in a collective."""
    dist.init_process_group("gloo")
    if rank == bad:
        raise ValueError("the reason")
    dist.barrier()


def hangs_on(rank: int, bad: int) -> None:
    """One rank never returns."""
    if rank == bad:
        threading.Event().wait()


def ends_on(rank: int, bad: int) -> None:
    """One rank's process ends."""
    if rank == bad:
        os._exit(3)


def grouped(rank: int) -> tuple[int, float]:
    """Groups of megatron-core and of DeepSpeed's own, which both refuse to be made twice."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    import deepspeed.comm
    from deepspeed.ops.op_builder import ShareMemCommBuilder
    from deepspeed.utils import groups

    ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False
    assert not deepspeed.comm.is_initialized()
    deepspeed.comm.init_distributed("gloo", dist_init_required=True, verbose=False)
    assert not groups._EXPERT_PARALLEL_GROUP
    groups._create_expert_and_data_parallel(2)
    total = torch.ones(())
    deepspeed.comm.all_reduce(total, group=groups._get_expert_parallel_group("ep_size_2"))
    dist.all_reduce(total, group=parallel_state.get_expert_model_parallel_group())
    return rank, float(total)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_compute_together_in_processes_that_stay(world: int) -> None:
    first, second = run(world, summed, 1.5), run(world, summed, 2.0)
    for answers, number in ((first, 1.5), (second, 2.0)):
        assert [rank for rank, _, _ in answers] == list(range(world))
        assert all(
            torch.equal(total, torch.full((3,), sum(number + rank for rank in range(world)))) for _, total, _ in answers
        )
    assert [process for *_, process in first] == [process for *_, process in second]
    assert len({os.getpid(), *(process for *_, process in first)}) == world + 1


def test_results_come_back_by_value() -> None:
    answers = run(2, several)
    assert torch.equal(answers[0]["view"].float(), torch.tensor([[6.0, 8.0, 10.0]]))
    assert [answer["array"].tolist() for answer in answers] == [[0], [0, 1]]
    assert answers[1]["text"] == "2"


def test_a_call_finds_nothing_of_the_one_before() -> None:
    before = run(2, marks)
    run(2, spoiled)
    assert run(2, marks) == before


def test_the_rank_that_raised_is_named_with_its_traceback() -> None:
    processes = [process for *_, process in run(2, summed, 0.0)]
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed first.*raises_on.*ValueError: the reason") as failure:
        run(2, raises_on, 1)
    assert sorted(failure.value.errors) == [0, 1]  # the other was told by its closed connection
    assert [process for *_, process in run(2, summed, 0.0)] == processes


def test_a_hanging_rank_is_shown_and_replaced() -> None:
    with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 gave no answer within 1 s.*hangs_on"):
        run(2, hangs_on, 1, timeout=1.0)
    assert [float(total[0]) for _, total, _ in run(2, summed, 1.0)] == [3.0, 3.0]


def test_a_rank_that_ended_is_named_and_replaced() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 0 of 2 failed first.*exit code 3"):
        run(2, ends_on, 0)
    assert [float(total[0]) for _, total, _ in run(2, summed, 1.0)] == [3.0, 3.0]


def test_groups_of_megatron_and_deepspeed_are_taken_down() -> None:
    assert run(2, grouped) == run(2, grouped) == [(0, 4.0), (1, 4.0)]
