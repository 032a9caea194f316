"""One YAML file describes a run: `load` reads it, `schema` lists every key, `check` says which numbers cannot work
together, `roles` what a changed key means for a run that goes on.

An unknown key, a wrong type or numbers that cannot work together raise `ConfigError`, whose message names key, value
and remedy.
"""

from diffmoe_ep.config.check import (
    check,
    check_limits,
    check_world,
    fit_world,
    has_experts,
    has_predictor,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)
from diffmoe_ep.config.knob import ConfigError, Key, Role, UserError
from diffmoe_ep.config.names import today
from diffmoe_ep.config.read import (
    dump,
    flat,
    from_tree,
    keys,
    load,
    load_stored,
    nested,
    override,
    read_section,
    setting,
    to_tree,
)
from diffmoe_ep.config.roles import Change, changes, effective, of_role
from diffmoe_ep.config.schema import (
    SIZES,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EmaConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PartConfig,
    PoolConfig,
    SampleConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
)

__all__ = [
    "SIZES", "Change", "CheckpointConfig", "ComputeConfig", "Config", "ConfigError", "DataConfig", "EmaConfig", "Key",
    "LogConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "PartConfig", "PoolConfig", "Role", "SampleConfig",
    "ScheduleConfig", "TextConfig", "TrainConfig", "UserError", "changes", "check", "check_limits", "check_world",
    "dump", "effective", "fit_world", "flat", "from_tree", "has_experts", "has_predictor", "keys", "load",
    "load_stored", "nested", "num_tokens", "of_role", "override", "pool_samples", "read_section", "setting", "to_tree",
    "today", "tokens_per_expert",
]  # fmt: skip
