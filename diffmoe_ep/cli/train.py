"""Verbs about a config: train, plan, keys."""

import argparse
import json
from pathlib import Path
from typing import Any

from diffmoe_ep.config import (
    Config,
    ConfigError,
    check_world,
    dump,
    has_experts,
    keys,
    load,
    num_tokens,
    pool_samples,
    tokens_per_expert,
)


def add(verbs: Any) -> None:
    """Declare train, plan and keys."""
    train = verbs.add_parser(
        "train", help="train a model, or continue its run", epilog="Keys and defaults: diffmoe keys"
    )
    train.add_argument("config", help="YAML file, for example configs/digits.yaml")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides, for example train.steps=20 parallel.expert_parallel=2",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the parameter counts and the layout of ranks, and stop",
    )
    train.set_defaults(run=_train)

    plan = verbs.add_parser(
        "plan", help="print parameters by module, activated parameters and FLOPs of a config; builds nothing"
    )
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--capacity", type=float, default=None, help="inference capacity C (default: training's)")
    plan.add_argument(
        "--cluster",
        type=Path,
        default=None,
        metavar="FILE",
        help="also memory, traffic and time on a cluster, for example configs/cluster/h800x8.yaml",
    )
    plan.add_argument(
        "--measured", type=Path, default=None, metavar="FILE", help="measured rates that replace the cluster file's"
    )
    plan.add_argument(
        "--samples", type=int, default=None, help="samples for which days are told (default: the config's)"
    )
    plan.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers to FILE")
    plan.set_defaults(run=_plan)

    every = verbs.add_parser("keys", help="print every config key with its type, default and meaning")
    every.set_defaults(run=_keys)


def _train(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)
    if options.dry_run:
        _dry_run(config)
        return
    from diffmoe_ep.train.trainer import train

    train(config)


def _dry_run(config: Config) -> None:
    """Print what a run would be: its config, its size and its layout over the launched ranks (or the fewest it
    needs).
    """
    from diffmoe_ep.model.count import count
    from diffmoe_ep.parallel.mesh import launched_rank, launched_world

    world = max(launched_world(), config.parallel.expert_parallel if launched_world() == 1 else 1)
    check_world(config, world)
    if launched_rank() != 0:
        return
    sizes, expert = count(config.model), config.parallel.expert_parallel
    print(dump(config), end="")
    print("---")
    rows = [
        ("FFN of dense blocks", sizes.dense_ffn),
        ("experts", sizes.experts),
        ("shared experts", sizes.shared),
        ("router", sizes.router),
        ("capacity predictor", sizes.predictor),
        ("attention", sizes.attention),
        ("adaLN", sizes.modulation),
        ("embeddings and head", sizes.other),
        ("total", sizes.total),
        ("activated at C = 1", round(sizes.activated())),
    ]
    for name, number in rows:
        print(f"{name:<22}{number:>16,}")
    local = config.train.micro_step_samples // world
    print("---")
    print(
        f"{world} rank{'s' * (world > 1)}: each {local} of the {config.train.micro_step_samples} samples of a micro-step, "
        f"{config.train.grad_accumulation} micro-step{'s' * (config.train.grad_accumulation > 1)} a step"
    )
    if has_experts(config.model):
        span, each = pool_samples(config), config.model.num_experts // expert
        pool = span * num_tokens(config.model)
        over = f"pool of {span} samples, {pool} tokens, over {max(1, span // local)} rank{'s' * (span > local)}"
        if config.model.family == "tc":
            print(f"{over}; each token takes {config.model.top_k} of {config.model.num_experts} experts")
        else:
            k = tokens_per_expert(
                pool, config.pool.capacity, config.model.num_experts, granularity=config.model.granularity
            )
            print(f"{over}; each expert takes {k}")
        for rank in range(min(world, 64)):
            first = rank % expert * each
            print(f"  rank {rank}: experts {first} to {first + each - 1}, copy {rank // expert} of {world // expert}")
    if world != launched_world():
        print(
            f"parallel.expert_parallel={expert} needs at least {expert} processes, this is one: "
            f"start with deepspeed --num_gpus {expert} --module diffmoe_ep train ..."
        )


def _plan(options: argparse.Namespace) -> None:
    from diffmoe_ep.planner.plan import plan

    config = load(options.config, options.overrides)
    held = plan(config, options.capacity)
    print("\n".join(held.lines()))
    content = held.as_dict()
    if options.cluster is not None:
        from diffmoe_ep.planner.cluster import load_cluster
        from diffmoe_ep.planner.cluster_plan import plan_cluster

        laid = plan_cluster(config, load_cluster(options.cluster, options.measured), options.samples)
        print("\n".join(["", *laid.lines()]))
        content = {"model": content, "cluster": laid.as_dict()}
    elif options.measured is not None or options.samples is not None:
        raise ConfigError(
            "--measured and --samples go with --cluster FILE; give one, for example configs/cluster/h800x8.yaml"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {options.json}")


def _keys(_: argparse.Namespace) -> None:
    for key in keys():
        print(f"{key.role:<11}{key.name}: {key.kind} = {json.dumps(key.default)}\n           {key.doc}")
