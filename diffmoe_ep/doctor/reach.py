"""Which hosts reach which, and how far their clocks are apart: plain connections, before anything that would wait for
all of them.

Each host listens at the address that its ranks will listen at, on a port that the system chooses, as gloo and NCCL do;
each other host connects and asks who is there and what time it is.
"""

import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

QUESTIONS = 5  # of which the quickest answer tells the time best
AT_ONCE = 32  # connections that a host tries together


class Listener:
    """Answers whoever connects with a word of its own and the time, until it is closed."""

    def __init__(self, address: str, word: str) -> None:
        """Raises OSError where this host has no such address."""

        class Answer(socketserver.StreamRequestHandler):
            timeout = 30.0

            def handle(self) -> None:
                while self.rfile.readline(64):
                    self.wfile.write(json.dumps([word, time.time()]).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            address_family = family(address)
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """One who leaves in the middle is no fault of this host."""

        self.server = Server((address, 0), Answer)
        self.port: int = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), name="listener", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@dataclass(frozen=True)
class Contact:
    """What came of one connection."""

    problem: str  # "" where it was as it should be
    seconds: float = 0.0  # there and back, the quickest
    ahead: float = 0.0  # by how many seconds the other clock is ahead, give or take half of that


def contact(address: str, port: int, word: str, seconds: float) -> Contact:
    """Connect, ask several times, and compare the word with the one that is expected there."""
    try:
        with (
            socket.create_connection((address, port), timeout=seconds) as connection,
            connection.makefile("rb") as file,
        ):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            best = Contact("", float("inf"))
            for _ in range(QUESTIONS):
                asked, started = time.time(), time.monotonic()
                connection.sendall(b"?\n")
                answer = file.readline(4096)
                taken = time.monotonic() - started
                if not answer:
                    return Contact("the connection was closed")
                said, there = json.loads(answer)
                if said != word:
                    return Contact("another host answered")
                if taken < best.seconds:
                    best = Contact("", taken, there - (asked + taken / 2))
            return best
    except TimeoutError:
        return Contact("no answer")
    except OSError as error:
        return Contact((os.strerror(error.errno) if error.errno else str(error)).lower())
    except (ValueError, TypeError):
        return Contact("another program answered")


def contacts(targets: Mapping[str, tuple[str, int, str]], seconds: float) -> dict[str, Contact]:
    """`contact` with several (address, port, word) by name, many at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(
            zip(
                targets,
                pool.map(lambda target: contact(target[0], target[1], target[2], seconds), targets.values()),
                strict=True,
            )
        )


def family(address: str) -> socket.AddressFamily:
    """Whether an address is of the old or of the new kind."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def skew(ahead: Sequence[float]) -> tuple[int, float]:
    """Of several clocks, by how many seconds each is ahead of the first: the one that is furthest from the middle one,
    and by how much.
    """
    middle = sorted(ahead)[len(ahead) // 2]
    furthest = max(range(len(ahead)), key=lambda number: abs(ahead[number] - middle))
    return furthest, ahead[furthest] - middle
