"""How a key is declared: default, manual line, limits, and its role: what a change of it means for a run that goes on.

identity    what is computed, or which data in which order: another value is another run, a resume refuses it
recipe      may change at a resume and changes the steps that follow: printed, and kept with the run
execution   how the same numbers are computed, and by what means the data come: passes in silence
reporting   what is written, where and how often; how samples are drawn: passes in silence
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """A mistake that the user can mend: its message names key or file, value and remedy, and is shown as it is, without
    a traceback.
    """

    exit_code = 2  # of a process that ends with it
    alone = False  # whether it is this rank's, though ranks have not joined yet; else such mistakes are those of all
    said = False  # whether another rank shows it
    named = False  # whether the message says which rank it is about

    def __init__(self, message: str, everywhere: bool = False) -> None:
        """everywhere: all ranks raise it alike, so that one of them is enough to show it."""
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """A mistake in a run's configuration."""


Role = Literal["identity", "recipe", "execution", "reporting"]
Limits = tuple[Callable[[Any], bool], str]

POSITIVE: Limits = (lambda value: value > 0, "greater than 0")
NON_NEGATIVE: Limits = (lambda value: value >= 0, "at least 0")
UNIT_INTERVAL: Limits = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


@dataclass(frozen=True)
class Key:
    """One key of a config, as `keys` lists them."""

    name: str
    """Dotted: train.optimizer.lr."""
    kind: str
    """Its type, as a user writes it."""
    default: Any
    doc: str
    """The manual line."""
    role: Role | None
    """None: in a file that describes no run, such as a cluster's."""
    by_fingerprint: bool
    """An identity whose value is only a place: what is found there decides, by its fingerprint."""


def knob(
    default: Any, doc: str, limits: Limits | None = None, role: Role | None = None, by_fingerprint: bool = False
) -> Any:
    """Declare a field with its default, its manual line, the numbers that it may hold, and its role."""
    described = {"doc": doc, "limits": limits, "role": role, "by_fingerprint": by_fingerprint}
    return field(default=default, metadata=described)


def identity(default: Any, doc: str, limits: Limits | None = None, by_fingerprint: bool = False) -> Any:
    """Declare a key whose change is another run."""
    return knob(default, doc, limits, "identity", by_fingerprint)


def recipe(default: Any, doc: str, limits: Limits | None = None) -> Any:
    """Declare a key that may change at a resume, for the steps that follow."""
    return knob(default, doc, limits, "recipe")


def execution(default: Any, doc: str, limits: Limits | None = None) -> Any:
    """Declare a key of how the same numbers are computed."""
    return knob(default, doc, limits, "execution")


def reporting(default: Any, doc: str, limits: Limits | None = None) -> Any:
    """Declare a key of what is written."""
    return knob(default, doc, limits, "reporting")


def section(kind: type) -> Any:
    """Declare a nested section with all its defaults."""
    return field(default_factory=kind, metadata={"doc": (kind.__doc__ or "").strip().splitlines()[0]})
