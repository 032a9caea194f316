"""One YAML file describes a run: `load` reads it, `schema` lists every knob, `check` says which numbers cannot work
together.

An unknown key, a wrong type or numbers that cannot work together raise `ConfigError`, whose message names key, value
and remedy.
"""

from diffmoe_ep.config.check import (
    check,
    check_world,
    has_experts,
    has_predictor,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)
from diffmoe_ep.config.read import dump, from_tree, keys, load, override, read_section, to_tree
from diffmoe_ep.config.schema import (
    SIZES,
    CheckpointConfig,
    ComputeConfig,
    Config,
    ConfigError,
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
    TrainConfig,
    UserError,
)

__all__ = [
    "SIZES", "CheckpointConfig", "ComputeConfig", "Config", "ConfigError", "DataConfig", "EmaConfig", "LogConfig", "ModelConfig", "OptimizerConfig",
    "ParallelConfig", "PartConfig", "PoolConfig", "SampleConfig", "ScheduleConfig", "TrainConfig", "UserError", "check", "check_world",
    "dump", "from_tree", "has_experts", "has_predictor", "keys", "load", "num_tokens", "override", "pool_samples", "read_section",
    "to_tree", "tokens_per_expert",
]  # fmt: skip
