"""Rates of their own for experts and routers, against torch's optimisers with one group per parameter."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from diffmoe_ep.config import Config
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.train import trainer as training
from diffmoe_ep.train.engine import learning_rates
from diffmoe_ep.train.schedule import learning_rate
from ranks import run
from train.runs import busy, config, layout

pytestmark = pytest.mark.slow

LAYOUTS = [(1, 1, 0), (1, 1, 2), (2, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2)]
STEPS = 4
KINDS = {
    "sgd": [
        "train.optimizer.kind=sgd",
        "train.optimizer.momentum=0.9",
        "train.optimizer.lr=0.05",
        "train.optimizer.weight_decay=0.1",
    ],
    # eps as large as the gradients: without it Adam's first step is a sign, which rounding turns over
    "adamw": [
        "train.optimizer.kind=adamw",
        "train.optimizer.lr=0.01",
        "train.optimizer.weight_decay=0.1",
        "train.optimizer.eps=0.01",
    ],
}


def given_for(digits: Path, folder: Path, kind: str, expert_lr_scale: float, router_lr_scale: float) -> Config:
    groups = (
        f"train.optimizer.expert_lr_scale={expert_lr_scale}",
        f"train.optimizer.router_lr_scale={router_lr_scale}",
    )
    schedule = ("train.schedule.kind=cosine", "train.schedule.warmup=2", "train.steps=8", "train.grad_accumulation=2")
    return config(digits / "train", folder, *KINDS[kind], *groups, *schedule)


def plain(given: Config) -> dict[str, torch.Tensor]:
    """The same run on one device by torch alone; a parameter's rate is decided here by its module's path."""
    model = busy(0.1)(DiT(given.model, given.pool), given.seed)
    settings, objective, micro_steps = given.train.optimizer, objective_of("flow"), given.train.grad_accumulation
    groups, factors = [], []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        factors.append(
            settings.expert_lr_scale if "experts" in parts else settings.router_lr_scale if "router" in parts else 1.0
        )
        groups.append({"params": [parameter]})
    optimizer: torch.optim.Optimizer
    if settings.kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=1.0, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
    stream = Stream(
        Mixture.open(given.data), given.data, seed=given.seed, batch=given.train.global_batch, accumulation=micro_steps
    )  # fmt: skip
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(micro_steps):
            batch = next(stream)
            noised = objective.noised(batch.latent, batch.noise, batch.u)
            output = model(noised.x, noised.t, batch.condition)
            ((objective.loss(output.prediction, noised) + output.auxiliary) / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given.train.max_grad_norm)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * learning_rate(given.train, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def by_engine(rank: int, given: Config) -> dict[str, Any]:
    with mock.patch.object(training, "initialize", busy(0.1)):
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, Mixture.open(given.data))
    for _ in range(STEPS):
        values = trainer.measure(trainer.train_step(training.Clock(0)))
    trainer.stream.close()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return {"weights": weights, "expert": mesh.expert.rank, "told": values}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("expert_lr_scale", "router_lr_scale"), [(3.0, 0.25), (0.0, 1.0)])
def test_weights_move_as_by_torch_with_a_rate_for_each(
    digits: Path, tmp_path: Path, kind: str, expert_lr_scale: float, router_lr_scale: float
) -> None:
    given = given_for(digits, tmp_path / "run", kind, expert_lr_scale, router_lr_scale)
    wanted, start = plain(given), dict(busy(0.1)(DiT(given.model, given.pool), given.seed).named_parameters())
    for world, expert, zero in LAYOUTS:
        for found in run(world, by_engine, layout(given, expert, zero)):
            for name, tensor in found["weights"].items():
                here, before = wanted[name], start[name].detach()
                if ".experts." in name:
                    here, before = (whole.chunk(expert)[found["expert"]] for whole in (here, before))
                    assert torch.equal(tensor, before) == (expert_lr_scale == 0), name
                moved = float((here - before).abs().max())
                torch.testing.assert_close(
                    tensor, here, rtol=1e-6, atol=2e-3 * moved, msg=lambda text, name=name: f"{name}: {text}"
                )
            common = learning_rate(given.train, STEPS - 1)
            assert found["told"]["lr"] == common
            assert found["told"]["lr_experts"] == expert_lr_scale * common
            assert found["told"].get("lr_routers") == (None if router_lr_scale == 1 else router_lr_scale * common)


def test_equal_rates_are_not_told_apart() -> None:
    assert learning_rates(Config().train.optimizer, 0.1) == {}
