"""Every key has a role, and for every key there is another value to try the laws of roles with."""

import pytest

from config.other_values import two_configs
from diffmoe_ep.config import Key, changes, keys

ROLES = ("identity", "recipe", "execution", "reporting")


def test_every_key_has_a_role() -> None:
    assert [key.name for key in keys() if key.role not in ROLES] == []
    assert {key.role for key in keys()} == set(ROLES)


def test_only_places_of_data_are_known_by_their_fingerprint() -> None:
    assert {key.name for key in keys() if key.by_fingerprint} == {"data.folder", "data.mixture"}


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.name)
def test_a_change_is_found_under_its_role_alone(key: Key) -> None:
    before, now = two_configs(key)
    for role in ROLES:
        found = [change.key.name for change in changes(before, now, role)]  # type: ignore[arg-type]
        assert (key.name in found) == (role == key.role)
        assert len(found) == (role == key.role) or key.name == "model.size"
    assert changes(now, now, key.role or "identity") == []
