"""The verb that tells what a config costs: plan."""

import json
from dataclasses import dataclass
from pathlib import Path

from diffmoe_ep.cli.options import Verb, option, overrides, positional
from diffmoe_ep.config import ConfigError, load


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print parameters by module, activated parameters and FLOPs of a config; builds nothing."""

    config: Path = positional("YAML file")
    overrides: tuple[str, ...] = overrides("model.size=L model.num_experts=16")
    capacity: float | None = option(None, "inference capacity C (default: training's)")
    cluster: Path | None = option(
        None, "also memory, traffic and time on a cluster, for example configs/cluster/h800x8.yaml", "FILE"
    )
    measured: Path | None = option(None, "measured rates that replace the cluster file's", "FILE")
    samples: int | None = option(None, "samples whose time is printed in days (default: the config's)")
    json: Path | None = option(None, "also write the numbers to FILE", "FILE")


def _plan(options: Options) -> None:
    from diffmoe_ep.planner.plan import plan

    config = load(options.config, options.overrides)
    planned = plan(config, options.capacity)
    print("\n".join(planned.lines()))
    content = planned.as_dict()
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


VERBS = (Verb(("plan",), Options, _plan),)
