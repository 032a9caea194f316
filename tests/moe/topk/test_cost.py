"""The cost of finding the top-k together: its formulas, and what it makes `auto` pick."""

import pytest

from diffmoe_ep.moe.topk.cost import (
    ALGORITHMS,
    CPU,
    NETWORK,
    NVLINK,
    Link,
    cheapest,
    dispatch_bytes,
    link_between,
    search_cost,
)


def test_bytes_and_rounds_over_ranks() -> None:
    """64 ranks with 8192 tokens and 16 experts: gather takes as much as the dispatch at D 1024, the others next to
    nothing.
    """
    gather, owner, radix = (search_cost(name, 8192, 16, 64, NETWORK) for name in ALGORITHMS)
    assert gather.received == 4 * 63 * 8192 * 16 == pytest.approx(dispatch_bytes(8192, 1024, 64), rel=0.01)
    assert owner.received == pytest.approx(4 * 8192 * 63, rel=0.01)  # one column, by each of the 16 owners
    assert radix.received == 4096 * 16 + 4 * 16 * 63
    assert (gather.rounds, owner.rounds, radix.rounds) == (1, 2, 5)
    assert search_cost("radix", 8192, 16, 64, NETWORK, width=8).rounds == 9


def test_the_ties_are_the_experts_alone() -> None:
    both, mine = (search_cost("radix", 100, 32, 5, CPU, experts=experts).received for experts in (None, 16))
    assert both - mine == 4 * 16 * 4


@pytest.mark.parametrize("tokens", [64, 1024, 16384])
@pytest.mark.parametrize("link", [NVLINK, NETWORK])
def test_radix_does_not_grow_with_tokens_nor_gather_shrink(tokens: int, link: Link) -> None:
    few, many = (
        {name: search_cost(name, tokens, 32, ranks, link, experts=16) for name in ALGORITHMS} for ranks in (8, 512)
    )
    assert many["radix"].received - few["radix"].received == 4 * 16 * (511 - 7)
    assert many["gather"].received == 73 * few["gather"].received
    assert all(many[name].seconds > few[name].seconds for name in ALGORITHMS)


def test_the_pick_is_the_quickest() -> None:
    """One round where little is sent, constant bytes where much is, and no message to every rank where there are
    thousands.
    """
    assert cheapest(16, 32, 8, NVLINK) == "gather"
    assert cheapest(8192, 32, 8, NVLINK) == "owner"
    assert cheapest(8192, 32, 1024, NETWORK) == "radix"
    slow = Link(latency=1.0, message=0.0, bandwidth=1e12, rate=1e12)
    assert cheapest(8192, 32, 1024, slow) == "gather"  # only rounds count
    narrow = Link(latency=0.0, message=0.0, bandwidth=1.0, rate=1e12)
    assert cheapest(8192, 32, 1024, narrow) == "radix"  # only bytes count
    assert cheapest(256, 32, 4, narrow) == "owner"


def test_one_rank_sends_nothing() -> None:
    assert {(cost.received, cost.rounds) for cost in (search_cost(name, 100, 16, 1, CPU) for name in ALGORITHMS)} == {
        (0, 0)
    }


def test_links_follow_device_and_machines() -> None:
    assert link_between("cuda", 1) is NVLINK
    assert link_between("cuda", 2) is NETWORK
    assert link_between("cpu", 1) is CPU
    assert link_between("cpu", 2).latency > CPU.latency
