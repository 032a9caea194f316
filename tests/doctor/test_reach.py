"""A connection tells whether the right host answers, how long it takes, and what time it is there."""

import socket
import threading
from unittest import mock

import pytest

from diffmoe_ep.doctor import reach
from diffmoe_ep.doctor.reach import Listener, contact, contacts, skew


def test_a_host_that_answers() -> None:
    with Listener("127.0.0.1", "word") as listener:
        found = contact("127.0.0.1", listener.port, "word", 30.0)
        assert found.problem == ""
        assert 0 < found.seconds < 30
        assert abs(found.ahead) <= found.seconds / 2 + 0.05
        assert contact("127.0.0.1", listener.port, "other", 30.0).problem == "another host answered"
    assert contact("127.0.0.1", listener.port, "word", 30.0).problem == "connection refused"


@pytest.mark.parametrize("ahead", [120.0, -7.5])
def test_a_clock_that_is_wrong(ahead: float) -> None:
    real = reach.time.time

    def there() -> float:  # the listener answers from a thread of its own
        return real() + (0.0 if threading.current_thread() is threading.main_thread() else ahead)

    with mock.patch.object(reach.time, "time", there), Listener("127.0.0.1", "word") as listener:
        found = contact("127.0.0.1", listener.port, "word", 30.0)
    assert found.ahead == pytest.approx(ahead, abs=found.seconds + 0.05)


def test_who_does_not_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert contact("127.0.0.1", silent.getsockname()[1], "word", 0.2).problem == "no answer"


def test_several_at_once_and_an_address_of_nobody() -> None:
    with Listener("127.0.0.1", "word") as listener:
        found = contacts({str(n): ("127.0.0.1", listener.port, "word") for n in range(40)}, 30.0)
    assert {one.problem for one in found.values()} == {""}
    with pytest.raises(OSError, match="assign"):
        Listener("192.0.2.77", "word")


def test_the_clock_that_is_furthest_from_the_others() -> None:
    assert skew([0.0, 0.01, 9.0, -0.02]) == (2, pytest.approx(9.0, abs=0.03))
    assert skew([0.0, 5.0, 5.0]) == (0, -5.0)  # the first one is wrong, not the others
