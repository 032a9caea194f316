"""Files of others: only regular ones are opened, and what they hold ends in data or in one clean error, soon."""

import os
import socket
from pathlib import Path

import pytest

from diffmoe_ep.config import ConfigError, load, override
from diffmoe_ep.config.foreign import (
    open_binary,
    open_regular,
    parse_json,
    parse_json_lines,
    parse_yaml,
    read_bytes,
    regular_size,
)
from diffmoe_ep.config.schema import Config

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))


def odd(folder: Path, kind: str) -> Path:
    path = folder / "odd"
    match kind:
        case "a named pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a device":
            path.symlink_to("/dev/zero")
        case "a socket":
            os.chdir(folder)  # a socket's name is short
            socket.socket(socket.AF_UNIX).bind("odd")
    return path


@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a device", "a socket"])
def test_only_files_are_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = odd(tmp_path, kind)
    for read in (open_regular, open_binary, read_bytes, regular_size):
        with pytest.raises(OSError, match=f"it is {kind}, not a file"):
            read(path)
    with pytest.raises(
        ConfigError, match=f"config file .*odd cannot be read \\(it is {kind}, not a file\\); give the path"
    ):
        load(path)


def test_a_file_is_read_and_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    before = os.listdir("/proc/self/fd")
    assert (read_bytes(path), regular_size(path)) == (b"content", 7)
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):  # noqa: PT011
            open_regular(wrong)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a":' * 3000, "it is nested too deeply"),
        ("9" * 21, "it holds a whole number of 21 digits"),
        ("-" + "9" * 5000, "it holds a whole number of 5000 digits"),
        ('"\\ud800"', "it holds half a character"),
        ('{"a": ["\\uDC00x"]}', "it holds half a character"),
        ("", "Expecting value"),
    ],
)
def test_json_that_nobody_should_read(text: str, message: str) -> None:
    for content in (text, text.encode()):
        with pytest.raises(ValueError, match=message):
            parse_json(content)


def test_json_as_it_is_meant() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -18446744073709551615, "\\ud83d\\ude00", 1e3]}') == {
        "a": [1, -(2**64) + 1, "\U0001f600", 1000.0]
    }
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xed\xa0\x80"')  # a surrogate, as bytes


def test_lines_of_json() -> None:
    content = b'{"step": 1}\n\n[1]\n{"step": true}\n{"stop": 1}\n\xff\n5\n{"step": 2, "a": NaN}\n\0\0\n{"step": 3, "l'
    found, strange = parse_json_lines(content, "step")
    assert [line["step"] for line in found] == [1, 2]
    assert strange == 6  # the last line is what a kill leaves
    assert parse_json_lines(b"", "step") == ([], 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "it is nested too deeply"),
        ("- " * 100_000, "it is nested too deeply"),
        (BOMB, "more than 100,000 values, aliases written out"),
        (MERGES, "more than 100,000 values, aliases written out"),
        ("a: &a [*a]", "more than 100,000 values, aliases written out"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("seed: 0x" + "f" * 9000, "a whole number of more than 20 digits"),
        ("a: !!bool x", "it holds a value that is not of its type"),
        ("a: !!int ''", "it holds a value that is not of its type"),
        ("a: !!timestamp x", "it holds a value that is not of its type"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a" * (1 << 20) + "b", "it has 1,048,577 bytes, a file of settings at most 1,048,576"),
        ("\0", "unacceptable character"),
    ],
)
def test_yaml_that_nobody_should_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load(path)
    assert f"config file {path} is not YAML: " in str(raised.value)


def test_aliases_that_stand_for_little_are_read() -> None:
    assert parse_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}") == {
        "a": {"x": [1, 2]},
        "b": {"x": [1, 2]},
        "c": {"x": [1, 2], "y": 3},
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.global_batch=999999000001", "train.grad_accumulation=2"], r"accumulation that divides it: 1, \.\.\."),
        (["train.global_batch=999999000000", "data.lanes=17"], r"lanes that do: 1, 2, 3, .*, \.\.\."),
        (["train.steps=9223372036854775808"], "train.steps: expected a whole number of less than 64 bits"),
        (["train.steps=.inf"], "train.steps: expected a whole number of less than 64 bits, got inf"),
        (["train.optimizer.lr=1.0e+301"], "train.optimizer.lr: expected a finite number"),
        (["model.size=[1]"], "model.size: "),
        (["folder='a\\0b'".replace("'", '"')], "folder: 'a.x00b' .* holds a character that no file name"),
        (['folder="\\ud800"'], "folder: '.ud800' .* holds a character that no file name"),
        (["model.hidden_size=1200000000000"], "model.num_experts .* which no machine holds; lower one of them"),
        (["model.input_size=1000000000"], "model.input_size 1000000000 with .* which no machine holds"),
        (["model.num_classes=9000000000000000"], "model.num_classes .* which no machine holds"),
        (["model.num_blocks=1000000"], "model.num_blocks is 1000000; it must be at most 10,000"),
        (["train.steps=" + "[" * 3000], "the value is not YAML: it is nested too deeply"),
    ],
)
def test_numbers_and_words_that_no_run_has(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        override(Config(), settings)
    assert len(str(raised.value)) < 5000
