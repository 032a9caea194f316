"""Every key `sample.*` changes what its manual line says it changes; a key without a case here fails.

What is expected is computed here in plain loops, from the model's predictions alone.
"""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ep.config import ModelConfig, PoolConfig, SampleConfig
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.sampling.decode import load_decoder
from diffmoe_ep.sampling.sample import Samples, sample
from diffmoe_ep.train import trainer as training
from ranks import run
from train.runs import busy, config

CHANNELS, SIDE, SEED, NUM = 2, 4, 3, 4
TOKENS, EXPERTS, NULL = 4, 4, 3
MODEL = ModelConfig(
    input_size=SIDE, in_channels=CHANNELS, out_channels=2 * CHANNELS, hidden_size=16, num_heads=2, num_blocks=2,
    num_classes=NULL, num_experts=EXPERTS,
)  # fmt: skip
LABELS = torch.arange(NUM) % NULL
PLAIN = SampleConfig(steps=3, guidance=2.0, chunk=NUM, selection="threshold", threshold=0.5)


def build(model: ModelConfig = MODEL) -> DiT:
    """A model away from its zero start, whose predictors are sure of nothing."""
    made = busy(0.5)(DiT(model, PoolConfig(span="all")), 0).eval()
    generator = torch.Generator().manual_seed(2)
    for layer in made.moe_layers():
        layer.router.weight.data.normal_(0.0, 1.0, generator=generator)
        if layer.predictor is not None:
            layer.predictor.fc2.weight.data.normal_(0.0, 1.5, generator=generator)
            layer.predictor.threshold.fill_(0.1)
            layer.predictor.updates.fill_(4)  # bias-corrected: 0.1 / (1 - 0.95^4) = 0.54
    return made


def sampled(config: SampleConfig, objective: Any = "flow", module: DiT | None = None) -> Samples:
    """Four samples of three classes."""
    found = sample(module or build(), LABELS, config, Mesh(), seed=SEED, objective=objective)
    assert found is not None
    return found


def noise(number: int = 0) -> Tensor:
    """The first noise, or the noise of a step from 1."""
    streams = [generator_for(SEED, index, "start", number) for index in range(NUM)]
    shape = (CHANNELS, SIDE, SIDE)
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def velocity(module: DiT, x: Tensor, t: float, guidance: float = 2.0, channels: int = CHANNELS) -> Tensor:
    """The guided velocity, its halves apart."""
    times = torch.full((NUM,), t)
    with torch.no_grad():
        given = module(x, times, LABELS).prediction[:, :CHANNELS]
        null = module(x, times, torch.full_like(LABELS, NULL)).prediction[:, :CHANNELS]
    mixed = given.clone()
    mixed[:, :channels] = null[:, :channels] + guidance * (given[:, :channels] - null[:, :channels])
    return mixed


def ready(selection: str = "threshold", threshold: float = 0.5) -> DiT:
    """A model in the mode in which PLAIN samples from it."""
    module = build()
    sampled(replace(PLAIN, steps=1), module=module)
    return module


def euler(steps: int = 3, **guidance: Any) -> Tensor:
    """Plain Euler steps from noise (t = 1) to data."""
    module, x = ready(), noise()
    for step in range(steps):
        x = x - velocity(module, x, 1 - step / steps, **guidance) / steps
    return x


def close(found: Samples, expected: Tensor) -> None:
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-4)


# -- cases -------------------------------------------------------------------------------------------------------------


def sampler() -> None:
    close(sampled(PLAIN), euler())
    module, x = ready(), noise()
    for step in range(3):
        here, there = 1 - step / 3, 1 - (step + 1) / 3
        first = velocity(module, x, here)
        x = x - (first + velocity(module, x - first / 3, there)) / 2 / 3
    close(sampled(replace(PLAIN, sampler="heun")), x)
    kinds = [sampled(replace(PLAIN, sampler=kind), "ddpm").latents for kind in ("euler", "heun", "ddpm", "ddim")]
    for number, one in enumerate(kinds):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in kinds[:number])


def steps() -> None:
    for number in (2, 5):
        close(sampled(replace(PLAIN, steps=number)), euler(number))


def eta() -> None:
    """DDIM by its paper: the noise of a step has eta times the standard deviation of the posterior."""
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for share in (0.0, 0.4, 1.0):
        module, x = ready(), noise().double()
        for number, t in enumerate((999, 666, 333, 0)):
            here, before = signal[t], signal[t - 333] if t else 1.0
            both = torch.cat([x, x]).float()
            with torch.no_grad():
                prediction = module(both, torch.full((2 * NUM,), float(t)), torch.cat([LABELS, LABELS * 0 + NULL]))
            given, null = prediction.prediction[:, :CHANNELS].double().chunk(2)
            eps = null + 2.0 * (given - null)
            sigma = share * np.sqrt((1 - before) / (1 - here)) * np.sqrt(1 - here / before)
            data = (x - np.sqrt(1 - here) * eps) / np.sqrt(here)
            x = np.sqrt(before) * data + np.sqrt(max(0.0, 1 - before - sigma**2)) * eps
            x = (x + sigma * noise(number + 1) if t else x).float().double()
        close(sampled(replace(PLAIN, sampler="ddim", steps=4, eta=share), "ddpm"), x.float())


def tolerances() -> None:
    """Both reach the solver, each as itself."""
    given: dict[str, float] = {}

    def odeint(slope: Any, x: Tensor, times: Tensor, **options: Any) -> Tensor:
        given.update(options)
        return torch.stack([x, x - slope(times[0], x)])

    with mock.patch.dict(sys.modules, {"torchdiffeq": SimpleNamespace(odeint=odeint)}):
        sampled(replace(PLAIN, sampler="dopri5", rtol=1e-3, atol=1e-4))
    assert (given["rtol"], given["atol"]) == (1e-3, 1e-4)


def guidance() -> None:
    for scale in (1.0, 3.0):
        close(sampled(replace(PLAIN, guidance=scale)), euler(guidance=scale))


def guidance_interval() -> None:
    """Steps at t = 1, 2/3, 1/3: the middle one alone is guided."""
    module, x = ready(), noise()
    for step in range(3):
        x = x - velocity(module, x, 1 - step / 3, guidance=2.0 if step == 1 else 1.0) / 3
    close(sampled(replace(PLAIN, guidance_interval=(0.5, 0.8))), x)


def guidance_channels() -> None:
    close(sampled(replace(PLAIN, guidance_channels=1)), euler(channels=1))
    assert not torch.allclose(euler(channels=1), euler(), atol=1e-3)


def chunk() -> None:
    module, sizes = build(), []
    module.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[0]))
    sampled(replace(PLAIN, chunk=3, steps=1, guidance=1.0), module=module)
    assert sizes == [3, 1]


def selection() -> None:
    one = replace(PLAIN, steps=1)
    offered = 2 * NUM * TOKENS  # tokens of a step, both halves of guidance
    found = {kind: sampled(replace(one, selection=kind)) for kind in ("threshold", "count", "topk", "auto")}
    processed = {kind: each.capacity.processed for kind, each in found.items()}
    assert processed["topk"].unique().tolist() == [offered / EXPERTS]
    assert torch.equal(processed["count"], processed["threshold"])  # as many, but by score
    assert processed["threshold"].unique().numel() > 1
    for number, kind in enumerate(("threshold", "count", "topk")):
        others = ("threshold", "count", "topk")[:number]
        assert all(not torch.equal(found[kind].latents, found[other].latents) for other in others)
    assert torch.equal(found["auto"].latents, found["threshold"].latents)
    plain = build(replace(MODEL, family="ec", predictor=False))
    auto, topk = (sampled(replace(one, selection=kind), module=plain) for kind in ("auto", "topk"))
    assert torch.equal(auto.latents, topk.latents)


def threshold() -> None:
    one = replace(PLAIN, steps=1)
    taken = {
        value: float(sampled(replace(one, threshold=value)).capacity.processed.sum())
        for value in (0.0, 0.1, 0.1 / (1 - 0.95**4), 1.0, "dynamic", "raw")
    }
    assert taken[0.0] == 2 * NUM * TOKENS * EXPERTS and taken[1.0] == 0
    assert taken["raw"] == taken[0.1] > taken["dynamic"] == taken[0.1 / (1 - 0.95**4)] > 0


def capacity() -> None:
    for factor in (0.5, 1.0, 2.0):
        found = sampled(replace(PLAIN, selection="topk", capacity=factor))
        assert found.capacity.average() == factor


def vae() -> None:
    """The folder that is named is the one that is loaded."""
    loaded: list[Path] = []

    def load(folder: Path, device: torch.device) -> Any:
        loaded.append(folder)
        return SimpleNamespace(scale=0.5, shift=0.0, channels=CHANNELS, fingerprint="f")

    from diffmoe_ep.encoders import vae as encoders

    info = DataInfo(name="latents", kind="moments", shape=(CHANNELS, SIDE, SIDE), scale=0.5, shift=0.0)
    with mock.patch.object(encoders, "load_vae", load):
        assert load_decoder(replace(PLAIN, vae=None), info, Mesh()) is None
        assert load_decoder(replace(PLAIN, vae="some/vae"), info, Mesh()) is not None
        unknown = DataInfo(kind="moments")
        assert load_decoder(replace(PLAIN, vae="some/vae"), unknown, Mesh()) is not None
    assert loaded == [Path("some/vae")] * 2


def grids(rank: int, data: Path, folder: Path, weights: str) -> list[tuple[int, int, bool]]:
    """What a run of five steps samples for its grids: (step, samples, whether from averaged weights)."""
    given = config(
        data, folder, "train.steps=5", "sample.grid_every=2", "sample.grid_size=3", f"sample.weights={weights}"
    )
    calls: list[tuple[int, int, bool]] = []
    with mock.patch.object(training, "sample") as sample:
        mesh = training.start_mesh(given)
        trainer = training.Trainer(given, mesh, *training.prepare(given, mesh))
        sample.side_effect = lambda module, conditions, settings, mesh, **options: calls.append(
            (trainer.step, len(conditions), options["weights"] is trainer.ema)
        )
        trainer.run()
    return calls


CASES: dict[str, Callable[[], None] | None] = {
    "sampler": sampler,
    "steps": steps,
    "eta": eta,
    "rtol": tolerances,
    "atol": tolerances,
    "guidance": guidance,
    "guidance_interval": guidance_interval,
    "guidance_channels": guidance_channels,
    "chunk": chunk,
    "selection": selection,
    "threshold": threshold,
    "capacity": capacity,
    "vae": vae,
    # in test_grids_follow_their_keys, which trains
    "weights": None,
    "grid_every": None,
    "grid_size": None,
    "prompts": None,  # in train/test_text_run.py
}


@pytest.mark.parametrize("key", [field.name for field in fields(SampleConfig)])
def test_a_key_changes_what_it_says(key: str) -> None:
    assert key in CASES, f"sample.{key} is new: show in a case here what it changes"
    case = CASES[key]
    if case is not None:
        case()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_grids_follow_their_keys(digits: Path, tmp_path: Path, weights: str) -> None:
    """grid_every (and the last step), grid_size, weights."""
    averaged = weights == "ema"
    assert run(1, grids, digits / "train", tmp_path / "run", weights) == [[(step, 3, averaged) for step in (2, 4, 5)]]
