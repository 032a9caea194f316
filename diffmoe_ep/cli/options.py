"""A verb's options: a frozen dataclass says what they are, is parsed into once, and is typed from there on.

@dataclass(frozen=True, kw_only=True)
class Options:
    \"\"\"What the verb does, as --help shows it.\"\"\"

    run: Path = positional("run folder")                # diffmoe VERB RUN
    samples: int = option(100, "number of samples")     # --samples N
    out: Path = required("folder to write to")          # --out OUT, which has no default
    overrides: tuple[str, ...] = overrides("sample.steps=50")
"""

import argparse
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MISSING = object()
METAVARS = {int: "N", float: "X", Path: "PATH"}


@dataclass(frozen=True)
class Verb:
    """One command of the program."""

    words: tuple[str, ...]
    """How it is called: ("train",), ("data", "check")."""
    options: type
    """A dataclass of options; its docstring is the help."""
    run: Callable[[Any], None]
    """Is called with the parsed options."""


@dataclass(frozen=True)
class _Declared:
    text: str
    default: Any
    positional: bool = False
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None


def option(default: Any, text: str, metavar: str | None = None, parse: Callable[[str], Any] | None = None) -> Any:
    """Declare --name with a default. parse: from the word to the value, where the type alone does not say."""
    return field(default=default, metadata={"option": _Declared(text, default, metavar=metavar, parse=parse)})


def required(text: str, metavar: str | None = None, parse: Callable[[str], Any] | None = None) -> Any:
    """Declare --name that has to be given."""
    return field(metadata={"option": _Declared(text, MISSING, metavar=metavar, parse=parse)})


def positional(text: str, default: Any = MISSING, metavar: str | None = None) -> Any:
    """Declare a word without a flag; a tuple takes one or more."""
    declared = {"option": _Declared(text, default, positional=True, metavar=metavar)}
    return field(metadata=declared) if default is MISSING else field(default=default, metadata=declared)


def overrides(example: str) -> Any:
    """Declare the settings key=value that may follow."""
    return field(default=(), metadata={"option": _Declared(f"settings, for example {example}", (), True, "key=value")})


def declare(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give a parser the options of a dataclass."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        declared: _Declared = entry.metadata["option"]
        several, inner = _inner(hints[entry.name])
        how: dict[str, Any] = {"help": _help(declared, inner), "dest": entry.name}
        if inner is bool:
            how |= {"action": "store_true"}
        else:
            metavar = declared.metavar or (None if declared.positional else METAVARS.get(inner, "WORD"))
            how |= {"metavar": metavar, "type": declared.parse or (None if inner in (str, Any) else inner)}
        if get_origin(inner) is Literal:
            how |= {"choices": get_args(inner), "type": str, "metavar": None}
        if declared.positional:
            del how["dest"]
            if several or declared.default is not MISSING:
                how["nargs"] = ("+" if declared.default is MISSING else "*") if several else "?"
            parser.add_argument(entry.name, **how, default=None if several else _default(declared))
            continue
        if several and declared.parse is None:
            how["action"] = "append"
        flag = "--" + entry.name.replace("_", "-")
        absent = None if how.get("action") == "append" else _default(declared)
        parser.add_argument(flag, **how, default=absent, required=declared.default is MISSING)


def build(kind: type, parsed: argparse.Namespace) -> Any:
    """The dataclass from what was parsed; what is several is a tuple."""
    values = {entry.name: getattr(parsed, entry.name) for entry in fields(kind)}
    for name, hint in get_type_hints(kind).items():
        if _inner(hint)[0] and not isinstance(values[name], tuple):
            values[name] = None if values[name] is None and type(None) in get_args(hint) else tuple(values[name] or ())
    return kind(**values)


def _inner(hint: Any) -> tuple[bool, Any]:
    """Whether a hint is of several values, and the type of one; null is left out."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(member for member in get_args(hint) if member is not types.NoneType)
    if get_origin(hint) is tuple:
        return True, get_args(hint)[0]
    return False, hint


def _default(declared: _Declared) -> Any:
    return None if declared.default is MISSING else declared.default


def _help(declared: _Declared, inner: Any) -> str:
    """The help, with the default where there is one and the text does not say it."""
    tells = declared.default in (None, MISSING, (), "") or inner is bool or "default" in declared.text
    text = declared.text.replace("%", "%%")
    return text if tells else f"{text} (default {declared.default})"
