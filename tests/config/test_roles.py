"""Every key has a role, and for every key there is another value to try the laws of roles with."""

import json

import pytest

from config.other_values import EFFECTIVE, two_configs
from diffmoe_ep.config import Key, changes, effective, flat, from_tree, keys, to_tree

ROLES = ("identity", "recipe", "execution", "reporting")


def changed(before: list[str], now: list[str]) -> list[str]:
    """The keys of identity and recipe that differ between two configs, given by their overrides."""
    there, here = from_tree({}, before), from_tree({}, now)
    return [change.key.name for role in ("identity", "recipe") for change in changes(there, here, role)]  # type: ignore[arg-type]


def test_every_key_has_a_role() -> None:
    assert [key.name for key in keys() if key.role not in ROLES] == []
    assert {key.role for key in keys()} == set(ROLES)


def test_only_places_are_known_by_their_fingerprint() -> None:
    assert {key.name for key in keys() if key.by_fingerprint} == {"data.folder", "data.mixture", "init_from"}


@pytest.mark.parametrize("key", [key for key in keys() if key.name != "model.size"], ids=lambda key: key.name)
def test_a_change_is_found_under_its_role_alone(key: Key) -> None:
    before, now = two_configs(key)
    for role in ROLES:
        found = [change.key.name for change in changes(before, now, role)]  # type: ignore[arg-type]
        assert found == [key.name] * (role == key.role)
    assert changes(now, now, key.role or "identity") == []


@pytest.mark.parametrize("name", EFFECTIVE)
def test_a_key_without_effect_is_no_change(name: str) -> None:
    before, now = two_configs(next(key for key in keys() if key.name == name))
    one, other = ([f"{name}={json.dumps(flat(to_tree(config))[name])}"] for config in (before, now))
    assert changed(one, other) == []


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        (["model.size=S"], ["model.size=null"], []),
        (["model.size=S"], ["model.size=B"], ["model.hidden_size", "model.num_heads"]),
        (["pool.span=all"], ["pool.span=256"], []),
        (["pool.span=all"], ["pool.span=128"], ["pool.span"]),
        (["model.family=ec"], ["model.family=ec", "pool.span=1"], []),
        (["model.predictor=true"], [], []),
        (["model.predictor=false"], [], ["model.predictor"]),
        (["train.steps=10"], ["train.steps=20"], []),
        (["train.schedule.final=0.1"], [], []),
        (
            ["train.steps=10"],
            ["train.steps=20", "train.schedule={kind: cosine, final: 0.1}"],
            ["train.steps", "train.schedule.kind", "train.schedule.final"],
        ),
        (["train.schedule.kind=linear", "train.steps=10"], ["train.schedule.kind=linear"], ["train.steps"]),
        (["text.precision=bfloat16", "model.condition=text"], ["model.condition=text"], []),
        (["model.family=dense", "model.num_experts=8"], ["model.family=dense"], []),
        (["model.family=dense", "pool.span=1", "pool.capacity=2"], ["model.family=dense"], []),
        (["data.shuffle_block=3", "data.mode=resampled"], ["data.mode=resampled"], []),
    ],
)
def test_what_counts_is_the_effect(before: list[str], now: list[str], found: list[str]) -> None:
    assert changed(before, now) == found
    assert sorted(changed(now, before)) == sorted(found)


def test_effects_are_what_shorthands_stand_for() -> None:
    found = effective(from_tree({}, ["model.size=B", "train.global_batch=64"]), "identity")
    assert (found["pool.span"], found["model.predictor"], found["model.num_heads"]) == (64, True, 12)
    assert "model.size" not in found and "train.optimizer.momentum" not in found
