"""The verb watch: once where no terminal is, and on a terminal until Ctrl-C, which it is left by as it was found."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from diffmoe_ep.cli import main
from train.test_run_view import append, folder, line


def test_without_a_terminal_it_prints_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["watch", str(folder(tmp_path / "run", line(1), line(2)))])
    told = capsys.readouterr().out
    assert "step 2 of 100" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("words", [["--seconds", "0"], []])
def test_mistakes_are_a_line(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watch", str(tmp_path), *words])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def until(terminal: int, words: str, seen: str = "", seconds: float = 120.0) -> str:
    """Read what a terminal shows until it shows some words, or is closed."""
    deadline = time.monotonic() + seconds
    while not words or words not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                seen += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_goes_on_until_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    run = folder(tmp_path / "run", line(1), line(2))
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in a script's background
        os.execv(
            sys.executable, [sys.executable, "-m", "diffmoe_ep", "watch", str(run), "--seconds", "0.1"]
        )  # fmt: skip
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        seen = until(terminal, "step 2 of 100")
        assert seen.startswith("\x1b[?1049h\x1b[?25l")
        append(run, line(3))
        seen = until(terminal, "step 3 of 100", seen)
        os.kill(process, number)
        seen = until(terminal, "", seen)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise
    finally:
        os.close(terminal)
    frames, _, after = seen.partition("\x1b[?25h\x1b[?1049l")
    assert "step 3 of 100" in after
    for frame in frames.split("\x1b[H")[2:]:
        lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).rstrip("\r") for text in frame.split("\n")]
        assert len(lines) <= 24 and max(map(len, lines)) <= 80
