"""What a config needs and how fast it trains on a cluster, in every layout of ranks: memory, traffic, time, and the
best that fits.

Nothing is built or started: the figures follow from the config, the layout and the cluster file (`layout`,
`memory`, `traffic`, `time`). Memory is exact to a few percent; time is a prediction from rates, as good
as they are.
"""

from dataclasses import replace

from diffmoe_ep.config import Config, ConfigError, check_world, has_experts
from diffmoe_ep.model.count import moe_blocks
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.layout import RECOMPUTES, Layout
from diffmoe_ep.planner.memory import memory
from diffmoe_ep.planner.report import ClusterPlan, Estimate
from diffmoe_ep.planner.time import step_time
from diffmoe_ep.planner.traffic import traffic


def plan_cluster(config: Config, cluster: Cluster, samples: int | None = None) -> ClusterPlan:
    """Plan a config on a cluster. samples: for how many days are counted (None: the config's steps times its batch).

    Raises ConfigError if no layout is possible at all: the batch does not divide over the ranks, or the pools do not
    fit them.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples is {samples}; it must be at least 1")
    own = Layout(cluster.ranks, config.parallel.expert_parallel, config.parallel.zero_stage, config.compute.recompute)
    possible = [layout for layout in layouts(config, cluster.ranks) if _problem(config, layout) is None]
    reason = _problem(config, own) or ""
    if not possible:
        raise ConfigError(_problem(config, replace(own, expert=1)) or reason)
    estimates = sorted(
        (estimate(config, layout, cluster) for layout in possible), key=lambda one: (one.step.seconds, one.memory.total)
    )
    found = next((one for one in estimates if one.layout == own), None)
    return ClusterPlan(
        config, cluster, tuple(estimates), found, reason, samples or config.train.steps * config.train.global_batch
    )


def estimate(config: Config, layout: Layout, cluster: Cluster) -> Estimate:
    """One layout's memory, traffic and time."""
    moved = traffic(config, layout, cluster)
    room = 1e9 * (cluster.memory_gb - cluster.reserve_gb)
    mean, most = (memory(config, layout, cluster.kind, most) for most in (False, True))
    return Estimate(layout, mean, most, moved, step_time(config, layout, cluster, moved), room)


def layouts(config: Config, world: int) -> list[Layout]:
    """Every expert-parallel degree that divides experts and ranks, with every ZeRO stage, keeping activations or
    computing them again.
    """
    experts = config.model.num_experts if has_experts(config.model) and moe_blocks(config.model) else 1
    degrees = [degree for degree in range(1, world + 1) if world % degree == 0 and experts % degree == 0]
    return [Layout(world, degree, zero, again) for degree in degrees for zero in (0, 1, 2) for again in RECOMPUTES]


def _problem(config: Config, layout: Layout) -> str | None:
    try:
        check_world(replace(config, parallel=replace(config.parallel, expert_parallel=layout.expert)), layout.world)
    except ConfigError as error:
        return str(error)
    return None
