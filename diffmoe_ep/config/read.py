"""Reading and writing a config: defaults <- YAML <- dotted overrides, strict about keys and types."""

import difflib
import json
import shlex
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from diffmoe_ep.config.check import check, check_limits
from diffmoe_ep.config.foreign import parse_yaml, read_bytes
from diffmoe_ep.config.knob import ConfigError, Key
from diffmoe_ep.config.names import answer, today
from diffmoe_ep.config.schema import SIZES, Config

T = TypeVar("T")

LARGEST_INT, LARGEST_FLOAT = 2**63, 10**300  # a config's numbers lie below


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay dotted overrides ("train.steps=20") over it and build the typed, checked config.

    Raises ConfigError for a missing or malformed file, an unknown key (the nearest is named), a wrong type or numbers
    that contradict.
    """
    tree = _read_yaml(path, "config file ", ", for example configs/digits.yaml")
    return from_tree({} if tree is None else tree, overrides)


def load_stored(path: str | Path) -> Config:
    """Read a config that a run wrote, RUN/config.yaml, perhaps under this program's names of before.

    Raises ConfigError that opens with the file, for what `load` raises it for.
    """
    tree = _read_yaml(path)
    try:
        return from_tree(today(tree) if isinstance(tree, dict) else tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_section(path: str | Path, kind: type[T]) -> T:
    """Read a YAML (or JSON) file into any frozen dataclass of knobs, as strictly as a run's config.

    Raises ConfigError that opens with the file, for what `load` raises it for and for a key that has no default and is
    missing.
    """
    tree = _read_yaml(path)
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"{path} holds {_show(tree)}, not a mapping of keys; the keys are {', '.join(get_type_hints(kind))}"
        )
    needed = [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]  # type: ignore[arg-type]
    missing = [name for name in needed if name not in tree]
    try:
        if missing and set(tree) <= set(get_type_hints(kind)):  # an unknown key comes first: it may be a missing one
            raise ConfigError(f"lacks {', '.join(missing)}; the keys are {', '.join(get_type_hints(kind))}")
        built = _build(kind, tree, "")
        check_limits(built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return built


def from_tree(tree: Any, overrides: Sequence[str] = ()) -> Config:
    """Build a config from a plain tree of dictionaries and dotted overrides; see `load`."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"a config is a mapping of keys, got {_show(tree)}")
    try:
        merged = json.loads(json.dumps(tree))  # a deep copy, and proof that it is plain data
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the config holds a value that is no plain text, number or list ({error}); put it in quotes"
        ) from error
    for override in overrides:
        _lay_over(merged, override)
    model = merged.get("model")
    # A name stands for its three numbers.
    if isinstance(model, dict) and isinstance(model.get("size"), str) and model["size"] in SIZES:
        merged["model"] = (
            dict(zip(("hidden_size", "num_blocks", "num_heads"), SIZES[model["size"]], strict=True)) | model
        )
    config = _build(Config, merged, "")
    check(config)
    return config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Lay dotted overrides over a built config."""
    return from_tree(to_tree(config), overrides)


def setting(key: str, value: Any) -> str:
    """key=value as it is written behind a command, quoted for the shell where it has to be."""
    return shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")


def to_tree(config: Any) -> dict[str, Any]:
    """Give a config (or a section) as plain data; tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def dump(config: Config) -> str:
    """Write a config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


def keys(kind: type = Config, prefix: str = "") -> Iterator[Key]:
    """Yield every key of a config."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        hint, about = hints[entry.name], entry.metadata
        if is_dataclass(hint):
            yield from keys(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            name = prefix + entry.name
            yield Key(name, _name(hint), entry.default, about["doc"], about["role"], about["by_fingerprint"])


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as dotted key -> value."""
    result: dict[str, Any] = {}
    for name, value in tree.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def _read_yaml(path: str | Path, what: str = "", example: str = "") -> Any:
    """What a YAML file holds; raises ConfigError that opens with the file."""
    try:
        return parse_yaml(read_bytes(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{what}{path} does not exist; give the path of a YAML file{example}") from error
    except OSError as error:
        raise ConfigError(
            f"{what}{path} cannot be read ({error.strerror}); give the path of a YAML file{example}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{what}{path} is not YAML: {error}") from error


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example train.steps=20")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    *path, last = key.split(".")
    place = tree
    for part in path:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    place[last] = value


def _build(kind: type[T], tree: Any, path: str) -> T:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path.rstrip('.')}: expected a section with keys, got {_show(tree)}")
    hints = get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise ConfigError(_unknown(f"{path}{key}"[:200], tree[key], list(hints)))
    return kind(**{key: _value(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _unknown(key: str, value: Any, here: Sequence[str]) -> str:
    """What to say of an unknown key; of an unknown section with a key in it, what that key is."""
    while isinstance(value, Mapping) and value and not difflib.get_close_matches(key.rpartition(".")[2], here, n=1):
        name, value = next(iter(value.items()))
        key, here = f"{key}.{name}", ()
    return answer(key, here, [each.name for each in keys()])


def _value(hint: Any, value: Any, key: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, key + ".")  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        for member in get_args(hint):
            try:
                return _value(member, value, key)
            except ConfigError:
                continue
    elif get_origin(hint) is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), [str(member) for member in get_args(hint)], n=1)
        raise ConfigError(
            f"{key}: {_show(value)} is not one of {_name(hint)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    elif get_origin(hint) is tuple:
        members = get_args(hint)
        if members[-1] is Ellipsis and isinstance(value, list | tuple):
            members = (members[0],) * len(value)
        if isinstance(value, list | tuple) and len(value) == len(members):
            return tuple(
                _value(member, item, f"{key}[{index}]")
                for index, (member, item) in enumerate(zip(members, value, strict=True))
            )
    elif hint is types.NoneType:
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{key}: expected a number, got {_show(value)}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) < LARGEST_FLOAT:
                raise ConfigError(f"{key}: expected a finite number, got {_show(value)}")
            return float(value)
    elif hint is int and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < LARGEST_INT:
            raise ConfigError(f"{key}: expected a whole number of less than 64 bits, got {_show(value)}")
        if value == int(value):
            return int(value)
    elif hint is str and isinstance(value, str):
        if "\0" in value or value != value.encode(errors="replace").decode():
            raise ConfigError(f"{key}: {_show(value)} holds a character that no file name or terminal takes")
        return value
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}: expected {_name(hint)}, got {_show(value)}")


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(str(member) for member in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_name(member) for member in get_args(hint))
    if is_dataclass(hint):
        return (
            "{" + ", ".join(f"{entry.name}: {_name(get_type_hints(hint)[entry.name])}" for entry in fields(hint)) + "}"
        )
    if hint is Ellipsis:
        return "..."
    if get_origin(hint) is tuple:
        return f"[{', '.join(_name(member) for member in get_args(hint))}]"
    return {types.NoneType: "null", bool: "true | false"}.get(hint, hint.__name__)


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"
