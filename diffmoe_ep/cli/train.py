"""The verb that trains: train."""

from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, overrides, positional
from diffmoe_ep.config import (
    Config,
    check_world,
    dump,
    fit_world,
    has_experts,
    load,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a model, or continue its run. Keys and defaults: diffmoe keys. Exit code 75: it was told to stop, and is
    saved.
    """

    config: Path = positional("YAML file, for example configs/digits.yaml")
    overrides: tuple[str, ...] = overrides("train.steps=20 parallel.expert_parallel=2")
    dry_run: bool = option(False, "print the resolved config, the plan and the layout of ranks, and stop")


def _train(options: Options) -> None:
    config = load(options.config, options.overrides)
    if options.dry_run:
        _dry_run(config)
        return
    from diffmoe_ep.train.stopping import leave
    from diffmoe_ep.train.trainer import train

    if not train(config):
        leave()


def _dry_run(config: Config) -> None:
    """Print what a run would be: its config, its plan and its layout over the launched ranks (or the fewest it
    needs).
    """
    from diffmoe_ep.parallel.mesh import launched_rank, launched_world
    from diffmoe_ep.planner.plan import plan

    world = max(launched_world(), config.parallel.expert_parallel if launched_world() == 1 else 1)
    config = fit_world(config, world)
    check_world(config, world)
    if launched_rank() != 0:
        return
    print(dump(config), end="")
    print("---")
    print("\n".join(plan(config).lines()))
    print("---")
    print("\n".join(_layout(config, world)))
    expert = config.parallel.expert_parallel
    if world != launched_world():
        print(
            f"parallel.expert_parallel={expert} needs at least {expert} processes, this is one: "
            f"start with deepspeed --num_gpus {expert} --module diffmoe_ep train ..."
        )


def _layout(config: Config, world: int) -> list[str]:
    """How samples, pools and experts lie over the ranks."""
    train, model, expert = config.train, config.model, config.parallel.expert_parallel
    local = train.micro_step_samples // world
    lines = [
        f"{world} rank{'s' * (world > 1)}: each {local} of the {train.micro_step_samples} samples of a micro-step, "
        f"{train.grad_accumulation} micro-step{'s' * (train.grad_accumulation > 1)} a step"
    ]
    if not has_experts(model):
        return lines
    span, each = pool_samples(config), model.num_experts // expert
    pool = span * num_tokens(model)
    over = f"pool of {span} samples, {pool} tokens, over {max(1, span // local)} rank{'s' * (span > local)}"
    if model.family == "tc":
        lines.append(f"{over}; each token takes {model.top_k} of {model.num_experts} experts")
    else:
        k = tokens_per_expert(pool, config.pool.capacity, model.num_experts, granularity=model.granularity)
        lines.append(f"{over}; each expert takes {k}")
    for rank in range(min(world, 64)):
        first = rank % expert * each
        lines.append(
            f"  rank {rank}: experts {first} to {first + each - 1}, copy {rank // expert} of {world // expert}"
        )
    return lines


VERBS = (Verb(("train",), Options, _train),)
