"""The verb that kills a training again and again: soak."""

import sys
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, overrides, positional, required
from diffmoe_ep.cli.results import show
from diffmoe_ep.config import ConfigError, check_world, load


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill a training at drawn moments, change its shape and damage its newest checkpoint in between, and compare it
    with one that was never cut. It starts its ranks itself. Exit code 1 if more than rounding differs.
    """

    config: Path = positional("YAML file")
    overrides: tuple[str, ...] = overrides("train.steps=300 checkpoint.every=10")
    out: Path = required("folder for both runs and their logs")
    kills: int = option(30, "a third of them between the first write of a checkpoint and its rename")
    ranks: int = option(2, "most ranks of a shape")
    seed: int = option(0, "of the moments, shapes and damage")
    one_shape: bool = option(False, "always the config's own shape on --ranks ranks, so that nothing may differ")
    allowed: float | None = option(
        None, "largest difference of a step's loss (default: 0 in one shape, else 0.01: rounding may swap a choice)"
    )
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


def _soak(options: Options) -> None:
    from diffmoe_ep.parallel.mesh import launched_world
    from diffmoe_ep.verify.soak import Shape, shapes, soak

    if launched_world() > 1:
        raise ConfigError("soak starts its ranks itself; start it without a launcher")
    if options.ranks < 1:
        raise ConfigError(f"--ranks is {options.ranks}; it must be at least 1")
    config = load(options.config, options.overrides)
    among = shapes(config, options.ranks)
    if options.one_shape:
        check_world(config, options.ranks)
        among = [Shape(options.ranks, config.parallel.expert_parallel, config.parallel.zero_stage)]
    allowed = options.allowed if options.allowed is not None else 0.0 if options.one_shape else 0.01
    found = soak(
        config, options.out, options.kills, among, options.seed, allowed,
        lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    show(options.json, soaked=found)
    if not found.passed:
        sys.exit(1)


VERBS = (Verb(("soak",), Options, _soak),)
