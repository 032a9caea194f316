"""Bytes that one rank receives from others in a training step, by purpose and by link, and the rounds that it takes.

Legend: W ranks, EP of them share a copy of the experts, EDP = W / EP copies; S tokens of a rank, D hidden size, N
experts, R rows, c bytes of the compute type. Expert groups are runs of EP neighbouring ranks; a rank's copies are EP
ranks apart.

A row crosses ranks only within its expert group, there and back, and so do the gradients. Dense gradients are reduced
over all ranks, experts' over their copies, in float32: an all-reduce also at ZeRO 1 and 2 (a ring: each byte is
received twice but for one rank's share), once a step, at ZeRO 2 once a micro-step. After the step ZeRO 1 and 2 gather
the parts of the weights.
"""

from dataclasses import dataclass

from diffmoe_ep.config import Config, has_experts, has_predictor
from diffmoe_ep.model.count import moe_blocks
from diffmoe_ep.moe.topk.cost import ALGORITHMS, Algorithm, SearchCost, cheapest, link_between, search_cost
from diffmoe_ep.planner.cluster import Cluster
from diffmoe_ep.planner.layout import Layout, share
from diffmoe_ep.planner.weights import partitions, weights


@dataclass(frozen=True)
class Flow:
    """What one rank receives for one purpose in one go."""

    inside: float = 0.0  # bytes from ranks of its node
    across: float = 0.0  # bytes over its network link
    rounds: int = 0  # collectives, one after the other
    over_nodes: bool = False  # whether the ranks stand on several nodes

    def seconds(self, cluster: Cluster) -> float:
        """Both links work at once; a round costs the latency of the widest."""
        latency = cluster.network_us if self.over_nodes else cluster.node_us
        return (
            max(self.inside / (1e9 * cluster.node_gbs), self.across / (1e9 * cluster.network_gbs))
            + self.rounds * latency * 1e-6
        )


@dataclass(frozen=True)
class Traffic:
    """A rank's traffic in a layout."""

    algorithm: Algorithm | None  # that selects; None: pools lie inside ranks
    selections: dict[Algorithm, Flow]  # one layer's selection by each algorithm
    search: float  # seconds of the selection, searching included, by the algorithm that is used
    dispatch: Flow  # one layer's rows in one direction
    dense_gradients: Flow  # of a step
    expert_gradients: Flow
    gather: Flow  # of the moved weights, ZeRO 1 and 2

    @property
    def selection(self) -> Flow:
        """One layer's selection."""
        return Flow() if self.algorithm is None else self.selections[self.algorithm]


def traffic(config: Config, layout: Layout, cluster: Cluster) -> Traffic:
    """A rank's traffic in the mean over ranks, for the gradients of one reduction."""
    part, held = share(config, layout), weights(config.model, layout.expert)
    compute = 2 if config.train.precision == "bf16" else 4
    algorithm, selections, search = _selection(config, part.tokens, part.pool_ranks, cluster)
    dispatch = Flow()
    if layout.expert > 1 and moe_blocks(config.model):
        received = part.rows * config.model.hidden_size * compute
        near = min(layout.expert, cluster.ranks_per_node)  # ranks of an expert group on one node
        far = layout.expert - near
        dispatch = Flow(received * (near - 1) / layout.expert, received * far / layout.expert, 1, far > 0)
    dense = 4.0 * sum(weight.numel for weight in held if not weight.expert)
    experts = 4.0 * sum(weight.numel for weight in held if weight.expert)
    gathered = Flow()
    if layout.zero:
        for group in partitions(held, layout):
            stride = 1 if group.ranks == layout.world else layout.expert
            gathered = _plus(gathered, _ring(4.0 * group.padded, group.ranks, stride, cluster, times=1))
    return Traffic(
        algorithm, selections, search, dispatch,
        dense_gradients=_ring(dense, layout.world, 1, cluster, times=2),
        expert_gradients=_ring(experts, layout.replicas, layout.expert, cluster, times=2),
        gather=gathered,
    )  # fmt: skip


def _selection(
    config: Config, tokens: int, ranks: int, cluster: Cluster
) -> tuple[Algorithm | None, dict[Algorithm, Flow], float]:
    model = config.model
    if ranks == 1 or not has_experts(model) or model.family == "tc":
        return None, {}, 0.0
    columns = model.num_experts * (2 if has_predictor(model) else 1)  # the predictor's scores ride along
    nodes = -(-ranks // cluster.ranks_per_node)
    link = link_between(cluster.kind, nodes)
    near = min(ranks, cluster.ranks_per_node)
    flows, seconds = {}, {}
    for name in ALGORITHMS:
        cost: SearchCost = search_cost(name, tokens, columns, ranks, link, experts=model.num_experts)
        inside = cost.received * (near - 1) / (ranks - 1)
        flows[name], seconds[name] = Flow(inside, cost.received - inside, cost.rounds, nodes > 1), cost.seconds
    chosen = config.compute.topk
    algorithm = cheapest(tokens, columns, ranks, link, experts=model.num_experts) if chosen == "auto" else chosen
    return algorithm, flows, seconds[algorithm]


def _ring(size: float, ranks: int, stride: int, cluster: Cluster, times: int) -> Flow:
    """All-reduce (times 2) or all-gather (times 1) of `size` bytes over ranks that stand `stride` apart.

    Every rank's own link carries a ring of its share, so what crosses nodes is divided by the ranks that a node has in
    the group.
    """
    if ranks == 1 or not size:
        return Flow()
    near = min(ranks, max(1, cluster.ranks_per_node // stride))
    nodes = -(-ranks // near)
    moved = times * size * (ranks - 1) / ranks
    across = moved / near if nodes > 1 else 0.0
    return Flow(moved if near > 1 else 0.0, across, 1, nodes > 1)


def _plus(one: Flow, other: Flow) -> Flow:
    return Flow(
        one.inside + other.inside,
        one.across + other.across,
        one.rounds + other.rounds,
        one.over_nodes or other.over_nodes,
    )
