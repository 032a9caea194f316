"""Files that others may have written. Only regular files are opened, and whatever they hold ends in plain data or in a
ValueError, at a cost that their own size bounds.
"""

import errno
import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_YAML = 1 << 20  # bytes of a file of settings
MOST_VALUES = 100_000  # of a YAML document, its aliases written out
DIGITS = 20  # of a whole number: none that we write is longer
KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file; OSError for anything else, a pipe or a device among them, which could keep a
    reader for ever.
    """
    if flags & os.O_CREAT == 0 or os.path.exists(path):
        _demand_regular(os.stat(path).st_mode, path)  # before it is opened, which a device may notice
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
    try:
        _demand_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _demand_regular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file", str(path))


def regular_size(path: str | Path) -> int:
    """The bytes of a regular file; OSError for anything else."""
    found = os.stat(path)
    _demand_regular(found.st_mode, path)
    return found.st_size


def open_binary(path: str | Path) -> io.BufferedReader:
    """A regular file, opened to be read as bytes; OSError for anything else."""
    return io.BufferedReader(io.FileIO(open_regular(path)))


def read_bytes(path: str | Path) -> bytes:
    """What a regular file holds; OSError for anything else."""
    with open_binary(path) as file:
        return file.read()


def parse_json(content: bytes | str) -> Any:
    """What JSON says. ValueError for all that is none, for nesting beyond the stack, for whole numbers of more than
    `DIGITS` digits and for halves of surrogate pairs, which no file or terminal takes.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    try:
        found = json.loads(text, parse_int=_whole)
        if re.search(r"\\u[dD]", text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits.lstrip('-'))} digits")
    return int(digits)


def parse_yaml(content: bytes | str) -> Any:
    """What one YAML document says. ValueError for all that is none, for nesting beyond the stack, for aliases that
    stand for more than `MOST_VALUES` values and for whole numbers of more than `DIGITS` digits.
    """
    if len(content) > MOST_YAML:
        raise ValueError(f"it has {len(content):,} bytes, a file of settings at most {MOST_YAML:,}")
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (LookupError, AttributeError, TypeError, OverflowError) as error:  # a value that is not what its tag says
        raise ValueError(f"it holds a value that is not of its type ({error})") from error


class _Loader(yaml.SafeLoader):
    """Refuses what costs more than its file's size."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _num_values(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_VALUES:,} values, aliases written out", node.start_mark
            )
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 10**DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a whole number of more than {DIGITS} digits", node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """The values of a document from this one on, aliases counted as what they stand for."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # met again below itself: endless
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = min(1 + sum(_num_values(part, known) for part in parts), MOST_VALUES + 1)
    return known[id(node)]


def parse_json_lines(content: bytes, key: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file that are objects with a whole number `key`, and how many others there are that no kill can
    have left by cutting the last one short.
    """
    found, strange = [], 0
    *whole, last = content.split(b"\n")
    for text in filter(bytes.strip, [*whole, last]):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and type(line.get(key)) is int:
            found.append(line)
        else:
            strange += text is not last
    return found, strange


def is_number(value: Any) -> bool:
    """Whether a value that was read from JSON is a number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
