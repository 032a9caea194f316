"""What differs between two configs, by the role of each key (see `knob`)."""

from dataclasses import dataclass
from typing import Any

from diffmoe_ep.config.check import has_experts, has_predictor, pool_samples
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
    """The keys of a role whose effect differs between the config of before and that of now, in the schema's order."""
    before, now = flat(to_tree(there)), flat(to_tree(here))
    effect_before, effect_now = effective(there, role), effective(here, role)
    return [
        Change(key, before[key.name], now[key.name])
        for key in keys()
        if key.role == role
        and before[key.name] != now[key.name]
        and effect_before.get(key.name) != effect_now.get(key.name)
    ]


def of_role(config: Config, *roles: Role) -> dict[str, Any]:
    """The keys of these roles with their values, as plain data."""
    values = flat(to_tree(config))
    return {key.name: values[key.name] for key in keys() if key.role in roles}


def effective(config: Config, *roles: Role) -> dict[str, Any]:
    """`of_role` without the keys that have no effect beside the others, and with what a value stands for: all samples
    of a micro-step in a pool are as many, a predictor left to the family is there or not.
    """
    resolved = {"pool.span": pool_samples(config), "model.predictor": has_predictor(config.model)}
    unused = _without_effect(config)
    return {key: resolved.get(key, value) for key, value in of_role(config, *roles).items() if key not in unused}


def _without_effect(config: Config) -> set[str]:
    """Of the identity and the recipe, the keys that change nothing in a training with this config."""
    model, train = config.model, config.train
    text, experts = model.condition == "text", has_experts(model)
    rules = (  # which keys count, and where
        (False, "model.size"),  # a name of three others
        (config.init_from is not None, "init_weights"),
        (config.data.mode == "indexed", "data.mixture data.shuffle_block data.lanes"),
        (
            config.data.mode == "resampled",
            "data.plain.kind data.plain.array data.plain.label data.plain.scale data.plain.shift data.plain.shuffle",
        ),
        (text, "text.encoder text.online model.text_width model.text_length"),
        (text and config.text.online, "text.precision"),
        (not text, "model.num_classes"),
        (
            experts,
            "model.interleave model.num_experts model.granularity model.shared_experts model.predictor "
            "train.optimizer.expert_lr_scale train.optimizer.router_lr_scale",
        ),
        (experts and model.family != "ec", "pool.span"),
        (experts and model.family != "tc", "pool.capacity"),
        (model.family == "tc", "model.top_k model.balance_weight"),
        (
            has_predictor(model),
            "model.predictor_weight model.predictor_reduction model.threshold_decay train.ema.thresholds",
        ),
        (train.optimizer.kind == "adamw", "train.optimizer.betas train.optimizer.eps"),
        (train.optimizer.kind == "sgd", "train.optimizer.momentum"),
        (train.schedule.kind != "constant", "train.schedule.final train.steps"),
    )
    return {key for counts, names in rules if not counts for key in names.split()}
