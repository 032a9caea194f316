"""The runs that the float64 reference is compared with: their data, their config and their start; and what a rank says
of one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from data_prep.write import write_dataset
from diffmoe_ep.config import Config, from_tree
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.diffusion.objective import RectifiedFlow
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.train import thresholds
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.ema import Ema

FACTS = Manifest("tiny", "moments", (2, 8, 8), "float16", 0.5, 0.25, 5, (), "made up", flips=2)
SHARD_SIZE, NUM_SAMPLES = 8, 93


def stored() -> tuple[np.ndarray, list[int]]:
    """Moments (samples, 2, 4, 8, 8) and labels; the mirrored image has log-variances of its own."""
    random = np.random.default_rng(3)
    label = random.integers(0, FACTS.num_classes, NUM_SAMPLES)
    values = random.normal(size=(NUM_SAMPLES, *FACTS.stored_shape)) + label[:, None, None, None, None]
    values[:, 1, :2] = values[:, 0, :2, :, ::-1]
    values[:, :, 2:] -= 3
    return values.astype(FACTS.dtype), label.tolist()


def sizes() -> list[int]:
    """Samples of each shard."""
    return [min(SHARD_SIZE, NUM_SAMPLES - first) for first in range(0, NUM_SAMPLES, SHARD_SIZE)]


def write(folder: Path) -> None:
    """Store them as a dataset."""
    fields = (encode(array, label, FACTS) for array, label in zip(*stored(), strict=True))
    write_dataset(folder, ((f"{number:03d}", each) for number, each in enumerate(fields)), FACTS, SHARD_SIZE)


def config(data: Path, *overrides: str) -> Config:
    """Everything that could be forgotten is on, and unlike its default: 2 of 4 blocks are MoE, 24 samples in 3
    micro-steps, pools of 4 samples.
    """
    tree = {
        "folder": "unused",
        "seed": 2,  # of these runs no choice is a near one: `Trace.margin`
        "data": {"folder": str(data), "workers": 0, "condition_dropout": 0.2, "shuffle_block": 2, "lanes": 4},
        "model": {
            "input_size": 8, "in_channels": 2, "out_channels": 4, "num_classes": 5,
            "hidden_size": 32, "num_blocks": 4, "num_heads": 2,
            "num_experts": 8, "granularity": 2, "shared_experts": 1,
            "predictor_weight": 0.7, "threshold_decay": 0.8,
        },
        "pool": {"span": 4, "capacity": 1.25},
        "train": {
            "steps": 10, "global_batch": 24, "grad_accumulation": 3, "precision": "float32", "max_grad_norm": 0.5,
            "optimizer": {
                "lr": 2e-3, "betas": [0.8, 0.95], "eps": 1e-5, "weight_decay": 0.1,
                "expert_lr_scale": 0.5, "router_lr_scale": 2.0,
            },
            "schedule": {"kind": "cosine", "warmup": 3, "final": 0.1},
            "ema": {"decay": 0.4, "ramp": True, "thresholds": "averaged"},
        },
    }  # fmt: skip
    return from_tree(tree, overrides)


def begin(model: DiT, seed: int) -> DiT:
    """Initial weights with which everything shows: adaLN and head are N(0, 0.02), routers N(0, 0.3).

    The last router is so large that its scores are 0 or 1 and stay so: most tokens of a pool are tied there.
    """
    initialize(model, seed)
    generator = torch.Generator().manual_seed(11)
    routers = [name for name, _ in model.named_parameters() if ".router." in name]
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("head."):
            parameter.data.normal_(0.0, 0.02, generator=generator)
        elif name in routers:
            parameter.data.normal_(0.0, 1e12 if name == routers[-1] else 0.3, generator=generator)
    return model


def first_weights(given: Config) -> dict[str, torch.Tensor]:
    """The same by name, whole."""
    whole = begin(DiT(given.model, given.pool), given.seed)
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


def trace(rank: int, given: Config, steps: int, fault: str | None = None) -> dict[str, Any]:
    """Train `steps` steps: what is logged of each, and thresholds and averaged weights as this rank holds them."""
    logged, taus = [], []
    with mock.patch.object(training, "initialize", begin), FAULTS[fault]():
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, Mixture.open(given.data))
        clock = training.Clock(0)
        for _ in range(steps):
            logged.append(trainer.measure(trainer.train_step(clock)))
            buffers = trainer.model.named_buffers()
            taus.append({name: buffer.clone() for name, buffer in buffers if name.endswith("threshold")})
        ema = {name: tensor.clone() for name, tensor in trainer.ema.tensors.items()}
        trainer.stream.close()
    return {"logged": logged, "thresholds": taus, "ema": ema}


def layout(given: Config, expert: int, zero: int) -> Config:
    """The same run, laid out otherwise."""
    parallel = dataclasses.replace(given.parallel, expert_parallel=expert, zero_stage=zero)
    return dataclasses.replace(given, parallel=parallel)


# -- faults in the code, planted on every rank -------------------------------------------------------------------------


def _quantiles_of_the_last_micro_step() -> Any:
    update = training.update_thresholds
    return mock.patch.object(
        training, "update_thresholds", lambda model, reports, mesh: update(model, reports[-1:], mesh)
    )


def _capacities_of_the_last_micro_step() -> Any:
    capacity = training.threshold_capacity
    return mock.patch.object(training, "threshold_capacity", lambda reports: capacity(reports[-1:]))


@contextmanager
def _losses_of_the_last_micro_step() -> Iterator[None]:
    losses_of, forward, step = RectifiedFlow.losses, DiT.forward, training.Trainer.train_step
    last: dict[str, Any] = {}

    def losses(self: Any, prediction: Any, noised: Any) -> Any:
        found = losses_of(self, prediction, noised)  # (B,)
        last["diffusion"] = found.mean()
        return found

    def outputs(self: Any, *inputs: Any) -> Any:
        output = forward(self, *inputs)
        last["auxiliary"] = output.auxiliary
        return output

    def steps(self: Any, clock: Any) -> Any:
        return step(self, clock) | {"losses": torch.stack([last["diffusion"], last["auxiliary"]]).detach()}

    with (
        mock.patch.object(RectifiedFlow, "losses", losses),
        mock.patch.object(DiT, "forward", outputs),
        mock.patch.object(training.Trainer, "train_step", steps),
    ):
        yield


def _thresholds_of_the_expert_group() -> Any:
    update, all_sum = training.update_thresholds, thresholds.all_sum

    def updated(model: Any, reports: Any, mesh: Any) -> None:
        def within(tensor: Any, group: Any) -> Any:
            return all_sum(tensor, mesh.expert) * (mesh.size / mesh.expert.size)

        with mock.patch.object(thresholds, "all_sum", within):
            update(model, reports, mesh)

    return mock.patch.object(training, "update_thresholds", updated)


@contextmanager
def _averages_before_thresholds() -> Iterator[None]:
    update, average, step = training.update_thresholds, Ema.update, training.Trainer.train_step
    trainers: list[Any] = []

    def steps(self: Any, clock: Any) -> Any:
        trainers[:] = [self]
        return step(self, clock)

    def updated(model: Any, reports: Any, mesh: Any) -> None:
        average(trainers[0].ema, trainers[0].step)
        update(model, reports, mesh)

    with (
        mock.patch.object(training.Trainer, "train_step", steps),
        mock.patch.object(training, "update_thresholds", updated),
        mock.patch.object(Ema, "update"),
    ):
        yield


def _capacity_by_raw_thresholds() -> Any:
    return mock.patch.object(CapacityPredictor, "threshold_for", lambda self, rule: self.threshold)


def _capacity_of_narrow_experts() -> Any:
    capacity = training.threshold_capacity
    return mock.patch.object(
        training, "threshold_capacity", lambda reports: {key: 2 * value for key, value in capacity(reports).items()}
    )


FAULTS: dict[str | None, Callable[[], Any]] = {
    None: nullcontext,
    "quantiles of the last micro-step alone": _quantiles_of_the_last_micro_step,
    "losses of the last micro-step alone": _losses_of_the_last_micro_step,
    "capacities of the last micro-step alone": _capacities_of_the_last_micro_step,
    "thresholds averaged over the expert group": _thresholds_of_the_expert_group,
    "averages moved before the thresholds": _averages_before_thresholds,
    "capacity by raw thresholds": _capacity_by_raw_thresholds,
    "capacity not divided by granularity": _capacity_of_narrow_experts,
}
