"""The predictor's choice beside that of a top-k over the same sample's tokens, at batch 1 (Figure 6)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffmoe_ep.config import ConfigError, ModelConfig, SampleConfig, has_predictor, num_tokens, tokens_per_expert
from diffmoe_ep.evaluate.capacity.sample_fn import Requested, SampleFn
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.pool import Pools, topk_per_expert
from diffmoe_ep.moe.routing import Routing
from diffmoe_ep.parallel.collectives import collect_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.sample import Samples


@dataclass(frozen=True)
class AgainstTopK:
    """The predictor's choice beside that of a top-k over the same sample's tokens, at batch 1 (Figure 6)."""

    names: tuple[str, ...]  # of the samples' classes, or their prompts
    k: int  # tokens that the top-k lets an expert take of a sample's
    # (steps, layers, 3) float64 (token, expert) pairs along the predictor's samples: predictor's, top-k's, those of
    # both
    counts: Tensor
    predictor: Samples  # sampled with the predictor
    topk: Samples  # the same sampled with the top-k

    def agreement(self) -> Tensor:
        """Pairs that both take as a share of those that either takes, (steps, layers); 1 where neither takes any."""
        return _shared(self.counts)

    def agreement_per_step(self) -> Tensor:
        """The same over all layers, (steps,)."""
        return _shared(self.counts.sum(1))

    def overall(self) -> float:
        """The same over all steps and layers."""
        return float(_shared(self.counts.sum((0, 1))))


def _shared(counts: Tensor) -> Tensor:
    ours, theirs, both = counts.unbind(-1)
    either = ours + theirs - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


class _Watch:
    """Stands before the layer's `route` and counts, sample by sample, what it chose and what a top-k would have."""

    def __init__(self, layer: MoELayer, tokens: int, k: int, counts: Tensor) -> None:
        self.route, self.pools, self.k = layer.route, Pools(tokens), k
        self.counts = counts  # (steps, 3) a layer's part of AgainstTopK.counts
        self.step = 0

    def __call__(self, scores: Tensor, logits: Tensor | None) -> Routing:
        """See `MoELayer.route`."""
        routing = self.route(scores, logits)
        if scores.shape[0]:
            ours, theirs = routing.chosen, topk_per_expert(scores, self.k, self.pools).chosen
            self.counts[self.step] += (
                torch.stack([chosen.sum() for chosen in (ours, theirs, ours & theirs)]).double().cpu()
            )
        return routing


@contextlib.contextmanager
def _watched(module: DiT, k: int, counts: Tensor) -> Iterator[list[_Watch]]:
    """Count each layer's choices into counts (steps, layers, 3) for as long as it lasts."""
    layers = module.moe_layers()
    watches = [
        _Watch(layer, num_tokens(module.config), k, part) for layer, part in zip(layers, counts.unbind(1), strict=True)
    ]
    for layer, watch in zip(layers, watches, strict=True):
        layer.route = watch  # type: ignore[method-assign]
    try:
        yield watches
    finally:
        for layer in layers:
            del layer.route  # the method again


@contextlib.contextmanager
def _choosing_from_one_sample(module: DiT) -> Iterator[None]:
    """Let every layer choose from one sample's tokens for as long as it lasts; then pools and inference rule are as
    before.
    """
    layers = module.moe_layers()
    before = [(layer.pools, layer.rule) for layer in layers]
    for layer in layers:
        layer.pools = Pools(num_tokens(module.config))
    try:
        yield
    finally:
        for layer, (pools, rule) in zip(layers, before, strict=True):
            layer.pools, layer.rule = pools, rule


def topk_of_a_sample(model: ModelConfig, config: SampleConfig) -> int | None:
    """Tokens that an expert takes of one sample by the training rule; None where there is nothing to compare or nothing
    to take.
    """
    if not has_predictor(model) or config.selection == "topk":
        return None
    try:
        return tokens_per_expert(
            num_tokens(model), config.capacity, model.num_experts, "sample.capacity", model.granularity
        )
    except ConfigError:  # fewer tokens than experts: such a top-k cannot be
        return None


def against_topk(
    module: DiT, sample_fn: SampleFn, requested: Requested, names: list[str], config: SampleConfig, mesh: Mesh, k: int
) -> AgainstTopK | None:
    """Sample each requested class or prompt, one at a time, with the predictor and with a top-k; collective, None but
    on the first rank.
    """
    alone = replace(config, chunk=1)
    counts = torch.zeros(config.steps, len(module.moe_layers()), 3, dtype=torch.float64)
    with _watched(module, k, counts) as watches:

        def follow(done: int, _: int) -> None:
            for watch in watches:
                watch.step = done % config.steps

        predictor = sample_fn(requested, alone, follow)
    with _choosing_from_one_sample(module):
        topk = sample_fn(requested, replace(alone, selection="topk"), None)
    parts: list[Tensor] | None = collect_objects(counts, mesh.world)
    if parts is None or predictor is None or topk is None:
        return None
    return AgainstTopK(tuple(names), k, torch.stack(parts).sum(0), predictor, topk)
