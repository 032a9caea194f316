"""A small training run as a function of its layout, for the laws: what is trained is fixed, how it is laid out is
given.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from diffmoe_ep.config import Config, from_tree
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.moe.layer import MoELayer
from diffmoe_ep.moe.pool import Pools
from diffmoe_ep.parallel.collectives import ALONE
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.engine import Engine
from diffmoe_ep.train.thresholds import predictors_of

STEPS = 20


def config(data: Path, folder: Path, *overrides: str) -> Config:
    """A tiny DiffMoE on the digits: 4 blocks, 2 of them MoE, 8 experts, batch 24, clipping active."""
    tree = {
        "folder": str(folder),
        "data": {"folder": str(data), "workers": 0, "flip": False},
        "model": {
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "hidden_size": 32,
            "num_blocks": 4,
            "num_heads": 2,
            "num_classes": 10,
            "num_experts": 8,
        },
        "train": {
            "steps": STEPS,
            "global_batch": 24,
            "precision": "float32",
            "max_grad_norm": 0.3,
            "optimizer": {"lr": 1e-3},
            "ema": {"decay": 0.9},
        },
        "log": {"every": 1},
        "checkpoint": {"every": 1000},
    }
    return from_tree(tree, overrides)


def busy(std: float) -> Callable[[DiT, int], DiT]:
    """Initial weights whose adaLN and head are N(0, std): at the zero start nothing would show."""

    def fill(model: DiT, seed: int) -> DiT:
        initialize(model, seed)
        generator = torch.Generator().manual_seed(11)
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.startswith("head."):
                # drawn on the CPU and copied, so that a GPU's model starts from the same numbers
                parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        return model

    return fill


def trace(rank: int, given: Config, fault: str | None = None) -> dict[str, Any]:
    """Train, and tell each step's loss, gradient norm and thresholds, and the final averaged weights of what this rank
    holds.

    The start is N(0, 0.02) under AdamW, which makes every gradient count alike. Under SGD experts get 4e-4 of the
    gradient norm from that start, so that a wrong factor on them would stay below the law's tolerance; from N(0, 0.1)
    it shows.
    """
    told: dict[str, list[Any]] = {"loss": [], "grad_norm": [], "thresholds": []}
    start = busy(0.02 if given.train.optimizer.kind == "adamw" else 0.1)
    with FAULTS[fault](), mock.patch.object(training, "initialize", start):
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, Mixture.open(given.data))
        clock = training.Clock(0)
        for _ in range(given.train.steps):
            values = trainer.measure(trainer.train_step(clock))
            told["loss"].append(values["loss"])
            told["grad_norm"].append(values["grad_norm"])
            if predictors := predictors_of(trainer.model):
                told["thresholds"].append(torch.stack([predictor.threshold.clone() for predictor in predictors]))
        ema = {name: tensor.clone() for name, tensor in trainer.ema.tensors.items()}
        trainer.stream.close()
    return {**told, "ema": ema, "expert_rank": mesh.expert.rank}


# -- faults that law 3 must see ----------------------------------------------------------------------------------------


def _pool_of_one_rank() -> Any:
    def narrow(model: DiT, mesh: Any) -> DiT:
        for layer in model.moe_layers():
            layer.pools = Pools(None, ALONE)
        return model

    return mock.patch.object(training, "widen_pools", narrow)


def _expert_gradients_times_replicas() -> Any:
    original: Callable[..., None] = Engine.backward

    def backward(self: Engine, loss: torch.Tensor) -> None:
        if not hasattr(self, "_spoiled"):
            self._spoiled = True  # type: ignore[attr-defined]
            for layer in self.module.moe_layers():
                for parameter in layer.experts.parameters():
                    parameter.register_hook(lambda gradient: gradient * self.mesh.replicas.size)
        original(self, loss)

    return mock.patch.object(Engine, "backward", backward)


def _thresholds_twice() -> Any:
    original = CapacityPredictor.update

    def update(self: CapacityPredictor, quantile: torch.Tensor) -> None:
        original(self, quantile)
        original(self, quantile)

    return mock.patch.object(CapacityPredictor, "update", update)


def _forgotten_moments() -> Any:
    """A resumed run begins with new moments."""
    original: Callable[..., None] = Engine.continue_from

    def continue_from(self: Engine, *given: Any) -> None:
        for fragment in self.moments():
            fragment.data.zero_()
        original(self, *given)

    return mock.patch.object(Engine, "continue_from", continue_from)


FAULTS: dict[str | None, Callable[[], Any]] = {
    None: lambda: mock.patch.object(MoELayer, "__doc__", MoELayer.__doc__),
    "a pool of one rank": _pool_of_one_rank,
    "expert gradients times the replicas": _expert_gradients_times_replicas,
    "thresholds moved twice": _thresholds_twice,
    "forgotten moments": _forgotten_moments,
}


def layout(given: Config, expert: int, zero: int) -> Config:
    """The same run, laid out otherwise."""
    return dataclasses.replace(
        given, parallel=dataclasses.replace(given.parallel, expert_parallel=expert, zero_stage=zero)
    )
