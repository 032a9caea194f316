"""Law 3: a few steps of real training over the launched ranks, against a plain loop in one process over the same
samples.

The trainer is the one that trains; only its data are drawn here. The plain loop knows neither DeepSpeed nor ranks: one
model, autograd, torch's own optimizer, and the global norm as the norm of all gradients.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffmoe_ep.config import Config, from_tree
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.sources import Content
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import is_expert
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.metrics import Clock
from diffmoe_ep.train.schedule import learning_rate
from diffmoe_ep.train.thresholds import predictors_of
from diffmoe_ep.train.trainer import Trainer
from diffmoe_ep.verify.difference import Difference, compare, largest, over_ranks
from diffmoe_ep.verify.layer import num_experts

STEPS = 4
BATCH = 8  # samples of a step on each rank
SHAPE = (1, 8, 8)
CLASSES = 10

# SGD without clipping moves each weight by its gradient, so a wrong scale shows by itself; AdamW with clipping is what
# people train with.
KINDS = {
    "sgd": ["train.optimizer.kind=sgd", "train.optimizer.lr=0.05", "train.max_grad_norm=0"],
    "adamw": ["train.optimizer.kind=adamw", "train.optimizer.lr=1e-3", "train.max_grad_norm=0.3"],
}
ACCUMULATION = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class Trace:
    """What training did."""

    losses: Tensor  # (steps,)
    norms: Tensor  # (steps,) of the gradients, before clipping
    thresholds: Tensor  # (steps, layers, N)
    moved: dict[str, Tensor]  # how far the first step moved each parameter


class RandomImages:
    """A `SampleStore` of images made up as they are read, in the place of a dataset on disk."""

    name, fingerprint, problems, sizes, is_remote = "random images", "", (), (4096,), False
    manifest = Manifest("verify", "pixels", SHAPE, "float32", 1.0, 0.0, CLASSES, (), "none", num_samples=4096)

    def read(self, shard: int, sample: int, fields: Sequence[str] | None = None) -> dict[str, Content]:  # noqa: ARG002
        """All fields of a sample."""
        generator = np.random.Generator(np.random.Philox(key=[shard, sample]))
        image = generator.standard_normal(SHAPE, dtype=np.float32)
        return dict[str, Content](encode(image, sample % CLASSES, self.manifest))

    def address(self, shard: int, sample: int) -> tuple[str, str]:  # noqa: ARG002
        """What names a sample."""
        return self.name, str(sample)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing is fetched."""

    def close(self) -> None:
        """Nothing is open."""


def config_of(kind: str, mesh: Mesh, expert: int, zero: int, timeout_minutes: float = 1.0) -> Config:
    """A tiny DiffMoE, four or eight samples of a micro-step to each rank, with pools over the ranks of the mesh's pool
    group.
    """
    pools = BATCH // ACCUMULATION[kind] * mesh.pool.size
    tree = {
        "folder": "verify writes nothing",
        "data": {"workers": 0, "flip": False},
        "model": {
            "input_size": SHAPE[1], "in_channels": 1, "out_channels": 1, "hidden_size": 32, "num_blocks": 4,
            "num_heads": 2, "num_classes": CLASSES, "num_experts": num_experts(mesh.size),
        },
        "pool": {"span": pools},
        "train": {
            "steps": STEPS, "global_batch": BATCH * mesh.size, "grad_accumulation": ACCUMULATION[kind],
            "precision": "float32",
        },
        "parallel": {
            "expert_parallel": expert, "zero_stage": zero, "timeout_minutes": max(1, math.ceil(timeout_minutes)),
        },
    }  # fmt: skip
    return from_tree(tree, KINDS[kind])


@torch.no_grad()
def randomize_zero_weights(model: DiT) -> DiT:
    """Give what starts at zero, and the routers, weights at which everything shows; the same whatever part of the model
    this is.
    """
    for name, parameter in model.named_parameters():
        std = 0.3 if "router" in name else 0.1 if "modulation" in name or name.startswith("head.") else 0.0
        if std:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def train_alone(mesh: Mesh) -> dict[str, Trace]:
    """The plain loop, on the first rank; all ranks get what it found."""
    found = {kind: _plain_loop(config_of(kind, mesh, 1, 0), mesh.device) for kind in KINDS} if mesh.is_first else None
    return cast(dict[str, Trace], mesh.same(found))


def _plain_loop(config: Config, device: torch.device) -> Trace:
    model = randomize_zero_weights(initialize(DiT(config.model, config.pool), config.seed)).to(device)
    named = dict(model.named_parameters())
    settings, objective = config.train.optimizer, objective_of(config.train.objective)
    optimizer: torch.optim.Optimizer
    if settings.kind == "sgd":
        optimizer = torch.optim.SGD(named.values(), lr=settings.lr)
    else:
        optimizer = torch.optim.AdamW(
            named.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=False,
        )
    stream, losses, norms, thresholds = _stream(config), list[float](), list[float](), list[Tensor]()
    moved = {name: parameter.detach().clone() for name, parameter in named.items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, quantiles = torch.zeros((), device=device), []
        for _ in range(config.train.grad_accumulation):
            batch = next(stream).to(device)
            noised = objective.noised(batch.latent, batch.noise, batch.u)
            output = model(noised.x, noised.t, batch.condition)
            part = (objective.loss(output.prediction, noised) + output.auxiliary) / config.train.grad_accumulation
            part.backward()
            loss += part.detach()
            quantiles.append(torch.stack([report.quantile for report in output.layers if report.quantile is not None]))
        gradients = [parameter.grad for parameter in named.values() if parameter.grad is not None]
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
        if config.train.max_grad_norm and norm > config.train.max_grad_norm:
            for gradient in gradients:
                gradient *= config.train.max_grad_norm / float(norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.step()
        if not step:
            moved = {name: (parameter.detach() - moved[name]).cpu() for name, parameter in named.items()}
        taus = thresholds[-1] if thresholds else torch.zeros_like(quantiles[0])
        decay = config.model.threshold_decay
        thresholds.append(taus * decay + torch.stack(quantiles).mean(0) * (1 - decay))
        losses.append(float(loss))
        norms.append(float(norm))
    return Trace(torch.tensor(losses), torch.tensor(norms), torch.stack(thresholds).cpu(), moved)


def _stream(config: Config) -> Stream:
    """All samples of every micro-step."""
    return Stream(
        Mixture([RandomImages()]), config.data, seed=config.seed, batch=config.train.global_batch,
        accumulation=config.train.grad_accumulation,
    )  # fmt: skip


def train_over_ranks(config: Config, mesh: Mesh) -> Trace:
    """The same by the trainer, on all ranks of the mesh; what this rank saw of it."""
    trainer = Trainer(config, mesh, Mixture([RandomImages()]))
    randomize_zero_weights(trainer.model)
    trainer.engine.moments()  # makes the optimizer's state, which the next line sets to the start
    trainer.engine.continue_from(0)  # brings the flat copies of the weights up to date
    named = trainer.engine.named
    moved = {name: parameter.detach().clone() for name, parameter in named.items()}
    losses, norms, thresholds, clock = [], [], [], Clock(0)
    for step in range(STEPS):
        values: dict[str, Any] = trainer.measure(trainer.train_step(clock))
        if not step:
            moved = {name: (parameter.detach() - moved[name]).cpu() for name, parameter in named.items()}
        losses.append(values["loss"])
        norms.append(values["grad_norm"])
        thresholds.append(torch.stack([predictor.threshold.clone() for predictor in predictors_of(trainer.model)]))
    trainer.stream.close()
    return Trace(torch.tensor(losses), torch.tensor(norms), torch.stack(thresholds).cpu(), moved)


def check_training(
    mesh: Mesh, alone: dict[str, Trace], timeout_minutes: float, stages: Sequence[int] = (0, 1, 2)
) -> Iterator[tuple[str, Difference, float]]:
    """Every ZeRO stage on the mesh's layout, with both optimizers: name, difference to the plain loop, tolerance."""
    looser = 1.0 if mesh.device.type == "cpu" else 10.0  # a GPU's sums come in other orders for other shapes
    for zero in stages:
        found: dict[str, list[Difference]] = {
            "losses": [],
            "norms and thresholds": [],
            "moves of experts": [],
            "moves of the rest": [],
        }
        for kind, expected in alone.items():
            config = config_of(kind, mesh, mesh.expert.size, zero, timeout_minutes)
            trace = train_over_ranks(config, mesh)
            found["losses"].append(compare(f"{kind}: loss of step", trace.losses, expected.losses, relative=True))
            found["norms and thresholds"] += [
                compare(f"{kind}: gradient norm of step", trace.norms, expected.norms, relative=True),
                compare(
                    f"{kind}: threshold of step, layer, expert", trace.thresholds, expected.thresholds, relative=True
                ),
            ]
            if kind == "sgd":
                found["moves of experts"] += _moves(trace, expected, mesh, experts=True)
                found["moves of the rest"] += _moves(trace, expected, mesh, experts=False)
        for (name, differences), tolerance in zip(found.items(), (1e-6, 1e-5, 1e-3, 1e-3), strict=True):
            label = f"{name}, EP {mesh.expert.size}, ZeRO {zero}"
            yield label, over_ranks(largest(differences), mesh), tolerance * looser


def _moves(trace: Trace, expected: Trace, mesh: Mesh, experts: bool) -> Iterator[Difference]:
    """How far the first step moved each expert's, or each other, tensor, along the way that it should: off by 1 -
    factor.

    Under SGD without clipping that factor is the gradient's. Single elements move too little against their rounding to
    be compared.
    """
    for name, moved in trace.moved.items():
        if is_expert(name) != experts:
            continue
        whole = expected.moved[name]
        pieces = [(name, moved, whole)]
        if experts:
            first = mesh.expert.rank * len(moved)
            pieces = [(f"{name}, expert {first + e}", moved[e], whole[first + e]) for e in range(len(moved))]
        for label, one, other in pieces:
            square = float(other.double().square().sum())
            factor = float((one.double() * other.double()).sum()) / square if square else math.nan
            apart = abs(factor - 1) if math.isfinite(factor) else math.inf
            place = compare(f"{label}: move", one, other).where
            yield Difference(
                apart, f"{label} moves {factor:.4g} times as far as on one rank; {place.removeprefix(label + ': ')}"
            )
