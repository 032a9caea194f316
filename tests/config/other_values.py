"""For every key of a config two valid configs that differ in it: what the laws of roles go through."""

import json
from collections.abc import Iterator
from typing import Any

from diffmoe_ep.config import Config, ConfigError, Key, flat, from_tree, to_tree

# What has to stand beside a key so that two of its values are valid.
BESIDE = {
    "model.family": ["pool.span=1"],
    "model.predictor": ["model.family=ec", "pool.span=1"],
    "sample.sampler": ["train.objective=ddpm"],
    "init_from": ["folder=runs/other"],
    "sample.prompts": ["model.condition=text"],
}
# What has to stand beside a key so that it has an effect on training at all: beside the defaults it has none.
EFFECTIVE = {
    "init_weights": ["init_from=runs/another"],
    "text.encoder": ["model.condition=text"],
    "text.online": ["model.condition=text"],
    "text.precision": ["model.condition=text", "text.online=true"],
    "model.text_width": ["model.condition=text"],
    "model.text_length": ["model.condition=text"],
    "model.top_k": ["model.family=tc"],
    "model.balance_weight": ["model.family=tc"],
    "train.optimizer.momentum": ["train.optimizer.kind=sgd"],
    "train.schedule.final": ["train.schedule.kind=linear"],
    "train.steps": ["train.schedule.kind=cosine"],
} | {f"data.plain.{name}": ["data.mode=resampled"] for name in ("kind", "array", "label", "scale", "shift", "shuffle")}
# Values where the one next to the default would not be valid, or would be the same run.
CHOSEN: dict[str, Any] = {
    "data.mixture": [{"folder": "a", "weight": 2.0}, {"folder": "b", "weight": 1.0}],
    "train.optimizer.betas": [0.8, 0.9],
    "train.freeze": ["time.*"],
    "sample.guidance_interval": [0.2, 0.8],
    "model.size": "B",
    "sample.prompts": ["a fox", "a hen"],
    "log.profile": [10, 13],
}


def two_configs(key: Key, *more: str) -> tuple[Config, Config]:
    """Two valid configs that differ in this key alone, which has an effect in them; in model.size, a name of three
    others, in these too. more: overrides of both.
    """
    beside = [*BESIDE.get(key.name, []), *EFFECTIVE.get(key.name, []), *more]
    base = from_tree({}, beside)
    for value in [CHOSEN[key.name]] if key.name in CHOSEN else _candidates(key):
        try:
            changed = from_tree({}, [*beside, f"{key.name}={json.dumps(value)}"])
        except ConfigError:
            continue
        if flat(to_tree(changed))[key.name] != flat(to_tree(base))[key.name]:
            return base, changed
    raise AssertionError(
        f"no other valid value of {key.name} was found: give one in CHOSEN, or what it needs in BESIDE"
    )


def _candidates(key: Key) -> Iterator[Any]:
    for kind in key.kind.split(" | "):
        match kind:
            case "true":
                yield from (True, False)
            case "false" | "null":
                pass
            case "int" | "float":
                default = 1 if not isinstance(key.default, int | float) else key.default
                yield from (default * 2, default / 2, default + 1, 0.5, 1, 2)
            case "str":
                yield "another/place"
            case choice:
                yield choice
