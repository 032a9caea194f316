"""What differs between two configs, by the role of each key (see `knob`)."""

from dataclasses import dataclass
from typing import Any

from diffmoe_ep.config.knob import Key, Role
from diffmoe_ep.config.read import flat, keys, to_tree
from diffmoe_ep.config.schema import Config


@dataclass(frozen=True)
class Change:
    """A key whose value differs."""

    key: Key
    there: Any
    """Its value in the config of before, as plain data."""
    here: Any
    """Its value in the config of now."""


def changes(there: Config, here: Config, role: Role) -> list[Change]:
    """The keys of a role that differ between the config of before and that of now, in the schema's order."""
    before, now = flat(to_tree(there)), flat(to_tree(here))
    return [
        Change(key, before[key.name], now[key.name])
        for key in keys()
        if key.role == role and before[key.name] != now[key.name]
    ]


def of_role(config: Config, *roles: Role) -> dict[str, Any]:
    """The keys of these roles with their values, as plain data."""
    values = flat(to_tree(config))
    return {key.name: values[key.name] for key in keys() if key.role in roles}
