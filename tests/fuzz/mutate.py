"""Seeded damage to the content of a file: bytes, words, JSON values, and other things in a file's place."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = [
    "0", "-1", "1", "255", "65536", "2147483648", "100000000", "1000000000000000", "999999000001", "1e18", "1e999",
    "-1e400", "NaN", "nan", ".inf", "0x" + "f" * 5000, "9" * 19, "9" * 30, "9" * 400, "9" * 5000, "1.5", "-0", "1:9:9",
]  # fmt: skip
WORDS = [
    "", "null", "true", "~", "../x", "/etc/passwd", "-oProxyCommand=x", "é", "\u202e", "\x00", "\x1b[2J", "*a", "&a",
    "!!int", "!!python/object:os.system", "<<", "[" * 3000, "{a: " * 3000, '{"a":' * 3000, "a" * 10_000, "{", "}",
    ",", ":", "\n", "#", "\\ud800", "@", "$(id)", "slots=99999999999999999999",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**8, 10**15, 10**18, 10**30, -(10**18), 0.5, 1e300, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "\ud800", "\0", "a" * 10_000, "0" * 64, [], [[]], [0] * 1000, {},
    {"a": 1},
]  # fmt: skip
DEEP = '"a nest of brackets"'


def content(drawn: random.Random, before: bytes) -> bytes:
    """A file's content after some changes, mostly one: often such as leave it readable, bits of bytes and values of
    JSON.
    """
    number, gentle = drawn.choice([1, 1, 1, 2, 4]), drawn.random() < 0.6
    for _ in range(number):
        ways: list[Callable[[random.Random, bytes], bytes]] = [_bits, _cut, _insert, _remove, _repeat, _zeros, _shuffle]
        if gentle:
            ways = [_json] if _json_lines(before) else [_word] if _is_text(before) else [_bits]
        elif _is_text(before):
            ways += [_word, _word, _word, _line]
        before = drawn.choice(ways)(drawn, before)
    return before


def inside(drawn: random.Random, before: bytes, first: int, last: int) -> bytes:
    """A file's content with changes between two places, at its old length."""
    piece = content(drawn, before[first:last])[: last - first].ljust(last - first, b"\0")
    return before[:first] + piece + before[last:]


def replace(drawn: random.Random, path: Path) -> None:
    """Puts something else in a file's place: nothing, a folder, a pipe, a device, a link to nowhere or to itself."""
    path.unlink(missing_ok=True)
    kind = drawn.randrange(7)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind:
        path.symlink_to(["/dev/zero", "/dev/tty", path.name, "nowhere"][kind - 3])


def _is_text(before: bytes) -> bool:
    return b"\0" not in before[:4000] and before.isascii()


def _place(drawn: random.Random, before: bytes) -> int:
    return drawn.randrange(len(before) + 1)


def _bits(drawn: random.Random, before: bytes) -> bytes:
    changed = bytearray(before)
    for _ in range(drawn.choice([1, 1, 1, 8]) if before else 0):
        changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def _cut(drawn: random.Random, before: bytes) -> bytes:
    return before[: _place(drawn, before)]


def _insert(drawn: random.Random, before: bytes) -> bytes:
    place = _place(drawn, before)
    what = drawn.choice(
        [drawn.randbytes(drawn.randint(1, 16)), b"\xff", b"\xed\xa0\x80", b"\0", b"\n", b"\xef\xbb\xbf", b"\r"]
    )
    return before[:place] + what + before[place:]


def _remove(drawn: random.Random, before: bytes) -> bytes:
    place = _place(drawn, before)
    return before[:place] + before[place + drawn.choice([1, 4, 64]) :]


def _repeat(drawn: random.Random, before: bytes) -> bytes:
    first, last = sorted((_place(drawn, before), _place(drawn, before)))
    return before[:last] + before[first:last] + before[last:]


def _zeros(drawn: random.Random, before: bytes) -> bytes:
    place, length = _place(drawn, before), drawn.choice([1, 8, 64, 512])
    return before[:place] + bytes(length) + before[place + length :]


def _shuffle(drawn: random.Random, before: bytes) -> bytes:
    """Two pieces change places."""
    a, b, c, d = sorted(_place(drawn, before) for _ in range(4))
    return before[:a] + before[c:d] + before[b:c] + before[a:b] + before[d:]


def _word(drawn: random.Random, before: bytes) -> bytes:
    """A word becomes a number, another word of the file, or something odd."""
    text = before.decode()
    words = list(re.finditer(r"[\w.+-]+|[^\w\s]", text))
    if not words:
        return before
    word, other = drawn.choice(words), drawn.choice(words)
    new = drawn.choice([drawn.choice(NUMBERS), drawn.choice(WORDS), other[0]])
    return (text[: word.start()] + new + text[word.end() :]).encode()


def _line(drawn: random.Random, before: bytes) -> bytes:
    """Lines are repeated, removed or swapped."""
    lines = before.splitlines(keepends=True)
    if lines:
        one, other = drawn.randrange(len(lines)), drawn.randrange(len(lines))
        match drawn.randrange(3):
            case 0:
                lines.insert(one, lines[other])
            case 1:
                del lines[one]
            case _:
                lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def _json_lines(before: bytes) -> list[bytes]:
    """A JSON file as one piece, one of JSON lines as its lines; nothing where it is neither."""
    for pieces in ([before], before.splitlines()):
        try:
            if pieces and all(isinstance(json.loads(piece), dict | list) for piece in pieces):
                return pieces
        except (ValueError, RecursionError):
            continue
    return []


def _json(drawn: random.Random, before: bytes) -> bytes:
    """A value of a JSON file becomes another, or its key goes, comes or is renamed."""
    pieces = _json_lines(before)
    if not pieces:
        return before
    number = drawn.randrange(len(pieces))
    tree = json.loads(pieces[number])
    places = list(_places(tree))
    if not places:
        return before
    holder, key = drawn.choice(places)
    new = drawn.choice([*VALUES, DEEP, drawn.choice(places)[0]])
    match drawn.randrange(5) if isinstance(holder, dict) else 4:
        case 0:
            del holder[key]
        case 1:
            holder[str(key) + "x"] = new
        case 2:
            holder["x" + str(key)] = holder.pop(key)
        case _:
            holder[key] = new
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):  # it holds itself now
        return before
    depth = drawn.choice([100, 3000, 100_000])
    pieces[number] = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()
    return b"\n".join(pieces) + b"\n"


def _places(tree: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return found
