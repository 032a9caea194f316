"""The verb that looks on while a run trains: watch."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe_ep.cli.options import Verb, option, positional
from diffmoe_ep.config import ConfigError

if TYPE_CHECKING:
    from diffmoe_ep.train.run_view import RunView

# Codes of ANSI terminals.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a screen of its own without a cursor, and back
HOME, END_OF_LINE, REST = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Watch a run in this terminal: loss, norm, speed, capacity by layer, what happened; several as a table. Ctrl-C
    ends it, and not the run.
    """

    runs: tuple[Path, ...] = positional("run folders", metavar="RUN")
    once: bool = option(False, "print it once, as is done where no terminal is")
    seconds: float = option(2.0, "time between two looks")


def _watch(options: Options) -> None:
    if options.seconds <= 0:
        raise ConfigError(f"--seconds is {options.seconds:g}; it must be greater than 0")
    from diffmoe_ep.train.run_view import RunView

    views = [RunView(path) for path in options.runs]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these characters shows ?
    if options.once or not sys.stdout.isatty():
        print("\n".join(_frame(views)))
        return
    with _own_screen(), suppress(KeyboardInterrupt):
        while True:
            lines = _frame(views)[: shutil.get_terminal_size().lines]
            sys.stdout.write(HOME + "\n".join(line + END_OF_LINE for line in lines) + REST)
            sys.stdout.flush()
            time.sleep(options.seconds)
            for view in views:
                view.look()
    print("\n".join(_frame(views)))  # stays


def _frame(views: "Sequence[RunView]") -> list[str]:
    from diffmoe_ep.train.run_screen import rendered, screen

    width, height = shutil.get_terminal_size((100, 30))
    return rendered(screen(views, width, height), width, sys.stdout.isatty())


@contextmanager
def _own_screen() -> Iterator[None]:
    """Leave the terminal as it was found; SIGTERM is as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.write(ENTER)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


VERBS = (Verb(("watch",), Options, _watch),)
