"""What one optimizer step measures and moves: means over all micro-steps, thresholds once and before the averages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import Config, EmaConfig, ModelConfig, PoolConfig, from_tree
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.ema import Ema
from diffmoe_ep.train.metrics import Clock
from diffmoe_ep.train.thresholds import predictors_of, rescale_thresholds, threshold_capacity, update_thresholds
from diffmoe_ep.train.trainer import Trainer
from train.runs import busy

EXPERTS, TOKENS = 4, 10
MODEL = ModelConfig(
    input_size=4, in_channels=1, out_channels=1, hidden_size=8, num_heads=2, num_blocks=4, num_classes=3,
    num_experts=EXPERTS, threshold_decay=0.9,
)  # fmt: skip


def report(quantile: float, over: float) -> Any:
    """A layer's report whose experts count 1, 2, 3, 4 times so much."""
    scale = torch.arange(1.0, EXPERTS + 1)
    return SimpleNamespace(quantile=quantile * scale, over_threshold=over * scale, num_tokens=TOKENS)


# two micro-steps of two MoE layers
REPORTS = [(report(0.01, 1.0), report(0.02, 2.0)), (report(0.05, 5.0), report(0.1, 4.0))]
SCALE = torch.arange(1.0, EXPERTS + 1)


class FakeEngine:
    """Returns what micro-steps are said to have measured."""

    def __init__(self, losses: list[tuple[float, float]]) -> None:
        self.outputs = iter(
            SimpleNamespace(prediction=torch.tensor(diffusion), auxiliary=torch.tensor(auxiliary), layers=layers)
            for (diffusion, auxiliary), layers in zip(losses, REPORTS, strict=True)
        )
        self.backwards: list[float] = []
        self.steps: list[float] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Any:
        return next(self.outputs)

    passed_over, norm_on_device = False, None

    def backward(self, loss: Tensor) -> None:
        self.backwards.append(float(loss))

    def step(self, lr: float) -> None:
        self.steps.append(lr)


def trainer(given: Config) -> Trainer:
    """A trainer whose engine and data are made up; its thresholds and averages are real."""
    made = object.__new__(Trainer)
    made.config, made.mesh, made.step = given, Mesh(), 0
    made.model = DiT(MODEL)
    made.engine = FakeEngine([(1.0, 10.0), (3.0, 20.0)])  # type: ignore[assignment]
    made.ema = Ema(made.model, given.train.ema)
    batch = SimpleNamespace(latent=None, noise=None, u=None)
    batch.to = lambda device: batch
    made.stream = iter([batch, batch])  # type: ignore[assignment]
    made.objective = SimpleNamespace(  # type: ignore[assignment]
        noised=lambda *_: SimpleNamespace(x=None, t=None), losses=lambda prediction, noised: prediction.reshape(1)
    )
    made.conditioner = lambda batch: None  # type: ignore[assignment, method-assign]
    made.divergence = SimpleNamespace(guarded=lambda loss: loss, note=lambda *_: None)  # type: ignore[assignment]
    return made


GIVEN = from_tree({"train": {"grad_accumulation": 2, "global_batch": 2, "optimizer": {"lr": 0.5}}}, [])


def test_losses_and_capacities_are_means_over_the_micro_steps() -> None:
    made = trainer(GIVEN)
    measured = made.train_step(Clock(0))
    assert measured["losses"].tolist() == [2.0, 15.0]
    expected = torch.stack([3.0 * SCALE, 3.0 * SCALE]) * EXPERTS / TOKENS  # (1 + 5) / 2, (2 + 4) / 2
    torch.testing.assert_close(measured["capacity"], expected)
    engine: Any = made.engine
    assert engine.backwards == [11.0, 23.0] and engine.steps == [0.5, 0.5]
    assert made.step == 1


def test_thresholds_move_once_towards_the_mean_quantile() -> None:
    made = trainer(GIVEN)
    made.train_step(Clock(0))
    for predictor, mean in zip(predictors_of(made.model), (0.03, 0.06), strict=True):
        torch.testing.assert_close(predictor.threshold, 0.1 * mean * SCALE)
        assert int(predictor.updates) == 1


def test_averaged_thresholds_see_the_moved_ones() -> None:
    """With a decay of 0.5, the average of the first step is half of what the thresholds moved to."""
    train = {"grad_accumulation": 2, "global_batch": 2, "ema": {"decay": 0.5, "thresholds": "averaged"}}
    made = trainer(from_tree({"train": train}, []))
    made.train_step(Clock(0))
    for name, mean in (("blocks.1.ffn.predictor.threshold", 0.03), ("blocks.3.ffn.predictor.threshold", 0.06)):
        torch.testing.assert_close(made.ema.tensors[name], 0.5 * 0.1 * mean * SCALE)


def test_a_changed_decay_leaves_the_corrected_thresholds_where_they_are() -> None:
    """As at a resume with another model.threshold_decay: live and averaged ones alike, after any number of updates."""
    model, other = (DiT(ModelConfig(**{**vars(MODEL), "threshold_decay": decay})) for decay in (0.95, 0.8))
    for predictor, follower, updates in zip(predictors_of(model), predictors_of(other), (1, 40), strict=True):
        for step in range(updates):
            predictor.update((0.1 + 0.01 * step) * SCALE)
        follower.threshold.copy_(predictor.threshold)
        follower.updates.copy_(predictor.updates)
    averaged = {f"blocks.{i}.ffn.predictor.threshold": 0.5 * predictors_of(other)[i // 2].threshold for i in (1, 3)}
    rescale_thresholds(other, 0.95, averaged)
    for number, (predictor, follower) in enumerate(zip(predictors_of(model), predictors_of(other), strict=True)):
        wanted = predictor.threshold_for(InferenceRule())
        torch.testing.assert_close(follower.threshold_for(InferenceRule()), wanted)
        half = averaged[f"blocks.{2 * number + 1}.ffn.predictor.threshold"] / (1 - 0.8 ** int(follower.updates))
        torch.testing.assert_close(half, 0.5 * wanted)
    unmoved = DiT(MODEL)
    rescale_thresholds(unmoved, 0.5)  # a threshold that never moved stays at its start
    assert all(predictor.threshold.tolist() == [0.0] * EXPERTS for predictor in predictors_of(unmoved))


def test_a_dense_model_has_neither_thresholds_nor_capacity() -> None:
    assert threshold_capacity([(), ()]) == {}
    update_thresholds(DiT(ModelConfig(**{**vars(MODEL), "family": "dense"})), [(), ()], Mesh())


@pytest.mark.parametrize("granularity", [1, 2])
def test_logged_capacity_counts_by_corrected_thresholds_in_experts_as_wide_as_a_dense_ffn(granularity: int) -> None:
    """Token by token: over tau / (1 - decay^updates), at granularity m each row as 1/m of compute."""
    model = busy(0.5)(DiT(ModelConfig(**{**vars(MODEL), "granularity": granularity}), PoolConfig()), 0).train()
    seen: list[Tensor] = []
    for layer in model.moe_layers():
        layer.predictor.fc2.weight.data.normal_(0.0, 1.5, generator=torch.Generator().manual_seed(1))
        layer.predictor.threshold.copy_(0.1 * torch.tensor([1.0, 0.9, 1.1, 1.2]))
        layer.predictor.updates.fill_(3)
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, 1)))
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(6, 1, 4, 4, generator=generator), torch.rand(6, generator=generator)
    output = model(x, t, torch.arange(6) % 3)
    found = threshold_capacity([output.layers])["capacity"]
    for number, layer in enumerate(model.moe_layers()):
        chances = torch.sigmoid(layer.predictor(seen[number])).detach()  # (S, N)
        tau = layer.predictor.threshold / (1 - 0.9**3)
        counts = torch.tensor([sum(float(chances[s, e]) > float(tau[e]) for s in range(24)) for e in range(EXPERTS)])
        raw = (chances > layer.predictor.threshold).sum(0)
        assert 0 < counts.sum() < 24 * EXPERTS and not torch.equal(raw, counts)
        torch.testing.assert_close(found[number], EXPERTS * counts / granularity / 24)


def test_the_decay_of_the_averages_is_that_of_the_step() -> None:
    assert Ema(DiT(MODEL), EmaConfig(decay=0.9, ramp=True)).decay(1) == 2 / 11
