"""A training run from config to checkpoint: what a newcomer reads first.

A run is a function of its config. Which samples a step sees, their noise, times and dropped conditions depend on their
positions; which tokens an expert takes depends on the pool; so ranks, expert parallelism, ZeRO stage and workers change
how it is computed, never what.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.fragments import Fragment
from diffmoe_ep.checkpoint.load import config_of, fragments, persistent_buffers
from diffmoe_ep.checkpoint.same_run import check_continues, recipe_changes
from diffmoe_ep.checkpoint.store import latest, load, read_meta, save
from diffmoe_ep.config import Config, ConfigError, check_world, has_experts, pool_samples, to_tree
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import build_sharded, is_expert, widen_pools
from diffmoe_ep.moe.capacity import CapacityPredictor, InferenceRule
from diffmoe_ep.moe.layer import LayerReport
from diffmoe_ep.parallel.collectives import all_sum
from diffmoe_ep.parallel.mesh import Mesh, destroy_mesh, init_mesh, launched_world, pool_ranks
from diffmoe_ep.sampling.decode import load_decoder
from diffmoe_ep.sampling.sample import draw, write_grid
from diffmoe_ep.train.conditions import Conditions
from diffmoe_ep.train.dataset import open_data
from diffmoe_ep.train.ema import Ema
from diffmoe_ep.train.engine import Engine, rates
from diffmoe_ep.train.log import Clock, Meter, Metrics, Progress, RunFolder, greeting
from diffmoe_ep.train.schedule import rate
from diffmoe_ep.train.start import begin, keep_thresholds, resolve_init


def train(config: Config) -> None:
    """Train, or continue, the run that the config describes; returns when its last step is saved.

    Raises ConfigError, DataError or CheckpointError, the same on every rank, before anything is built if something does
    not fit.
    """
    check_world(config, launched_world())
    mesh = start_mesh(config)
    dataset, checkpoint = prepare(config, mesh)
    step = read_meta(checkpoint)["step"] if checkpoint else 0
    if step < config.train.steps:
        Trainer(config, mesh, dataset, checkpoint).run()
    elif mesh.is_first:
        print(
            f"{config.folder} is finished: step {step} of {config.train.steps}. "
            "To go on, raise train.steps; to start anew, give another folder."
        )
    destroy_mesh()  # not when something failed: leaving a group can wait for peers that wait for this rank


def start_mesh(config: Config) -> Mesh:
    """Join the other ranks in the grid that the config asks for."""
    local = config.train.micro_step_samples // launched_world()
    ranks = pool_ranks(pool_samples(config), local) if has_experts(config.model) else 1
    return init_mesh(config.parallel.expert_parallel, ranks, config.parallel.timeout_minutes)


def prepare(config: Config, mesh: Mesh) -> tuple[BatchSource, Path | None]:
    """Look at everything outside this process that could fail, on every rank, and agree before going on."""
    run = RunFolder(Path(config.folder))
    mesh.agree(run.problem())
    found = latest(run.checkpoints) if mesh.is_first else None
    checkpoint = mesh.same(found)
    assert checkpoint is None or isinstance(checkpoint, Path)
    problem: str | None = None
    dataset: BatchSource | None = None
    try:
        dataset = open_data(config)
        if checkpoint is not None and config.resume == "never":
            raise ConfigError(
                f"{config.folder} holds the checkpoint {checkpoint.name} and resume is never; set resume=auto or give another folder"
            )
        if checkpoint is not None:
            check_continues(checkpoint, config, dataset.fingerprint)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: told on all ranks
        problem = str(error)
    mesh.agree(problem)
    assert dataset is not None
    for damage in dataset.problems if mesh.is_first else ():
        print(f"{damage}; its bad samples will be replaced", file=sys.stderr, flush=True)
    return dataset, checkpoint


class Trainer:
    """One run in progress. Everything that changes while it trains is here: engine, averaged weights, stream, step."""

    def __init__(self, config: Config, mesh: Mesh, dataset: BatchSource, checkpoint: Path | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.dataset = dataset
        self.folder = RunFolder(Path(config.folder))
        self.conditions = Conditions(config, self.dataset, mesh)
        self.decode = (
            load_decoder(config.sample, DataInfo.of(self.dataset.manifest), mesh) if config.sample.grid_every else None
        )
        self.start = resolve_init(config, mesh, dataset, checkpoint)
        self.recipe = recipe_changes(checkpoint, config)
        self.model = begin(self.build_model(), self.start, config, mesh)
        self.engine = Engine(self.model, config, mesh)
        self.ema = Ema(self.model, config.train.ema)
        self.objective = objective_of(config.train.objective)
        self.meter = Meter(mesh)
        self.step = 0
        self.num_bad = 0  # samples replaced on all ranks, as far as told
        if checkpoint is not None:
            self.load(checkpoint)
        self.stream = Stream(
            self.dataset, config.data, seed=config.seed, batch=config.train.global_batch, accumulation=config.train.grad_accumulation,
            rank=mesh.rank, world=mesh.size, samples_consumed=self.step * config.train.global_batch,
            text=CaptionSpec.of(config.model, config.text), quarantine_file=quarantine.rank_file(self.folder.path, mesh.rank),
        )  # fmt: skip

    def build_model(self) -> DiT:
        """This rank's part of the model, with its initial weights."""
        config = self.config
        channels = (
            config.model.in_channels if config.train.objective == "flow" else None
        )  # flow has no use for the variance half
        model = build_sharded(config, self.mesh, channels)
        if config.compute.compile:
            model.compile_parts()
        return initialize(widen_pools(model, self.mesh), config.seed)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step, telling, sampling and saving on the way."""
        config = self.config
        self.folder.describe(config, self.mesh, self.start.ancestry, self.recipe)
        metrics = Metrics(self.folder.metrics, self.step) if self.mesh.is_first else None
        begun = greeting(config, self.mesh, self.step, self.start.told(), self.recipe)
        progress = Progress(begun, self.step, config.train.steps) if self.mesh.is_first else None
        clock = Clock(self.step)
        while self.step < config.train.steps:
            with self.meter.step():
                told = self.train_step(clock)
            if self.due(config.log.every) or self.due(
                config.checkpoint.every
            ):  # what is saved was measured: no diverged run is kept
                values = self.measure(told)
            if self.due(config.log.every):
                values |= self.measure_data() | clock.lap(self.step, config.train.global_batch) | self.meter.lap()
                self.engine.tell(values)
                if metrics is not None and progress is not None:
                    metrics.write(values)
                    progress.show(self.step, values["loss"], values.get("capacity"), values["samples_per_second"])
            if self.due(config.checkpoint.every):
                clock.pause(self.save)
            if config.sample.grid_every and self.due(config.sample.grid_every):
                clock.pause(self.sample_grid)
        self.stream.close()
        if metrics is not None and progress is not None:
            metrics.close()
            progress.close()
            self.folder.draw_curves()

    def train_step(self, clock: Clock) -> dict[str, Tensor]:
        """One optimiser step over `accumulation` micro-steps; gives what it measured, still on the device."""
        accumulation, losses, reports = self.config.train.grad_accumulation, [], []
        for _ in range(accumulation):
            batch = clock.wait(lambda: next(self.stream)).to(self.mesh.device)
            noised = self.objective.noised(batch.latent, batch.noise, batch.u)
            output = self.engine.forward(noised.x, noised.t, self.conditions.of(batch))
            diffusion = self.objective.loss(output.prediction, noised)
            self.engine.backward(diffusion + output.auxiliary)
            self.engine.step(rate(self.config.train, self.step))
            losses.append(torch.stack([diffusion.detach(), output.auxiliary.detach()]))
            reports.append(output.layers)
        self.step += 1
        self.move_thresholds(reports)
        self.ema.update(self.step)
        return {"losses": torch.stack(losses).mean(0), **wanted_capacity(reports)}

    def move_thresholds(self, reports: list[tuple[LayerReport, ...]]) -> None:
        """Move each expert's threshold once, towards the mean k-th largest prediction of all the step's pools (ranks,
        micro-steps).
        """
        predictors = self.predictors()
        if not predictors:
            return
        quantiles = torch.stack(
            [torch.stack([report.quantile for report in step if report.quantile is not None]) for step in reports]
        )
        mean = all_sum(quantiles.mean(0), self.mesh.world) / self.mesh.size  # (layers, N)
        for predictor, quantile in zip(predictors, mean, strict=True):
            predictor.update(quantile)

    def predictors(self) -> list[CapacityPredictor]:
        """The capacity predictors, first layer to last; none in a family without."""
        return [layer.predictor for layer in self.model.moe_layers() if layer.predictor is not None]

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step always counts."""
        return self.step % every == 0 or self.step == self.config.train.steps

    # -- telling -------------------------------------------------------------------------------------------------------

    def measure(self, told: dict[str, Tensor]) -> dict[str, Any]:
        """Bring a step's measurements to the host, over all ranks; stops the run when the loss is no number any
        more.
        """
        losses = (all_sum(told["losses"], self.mesh.world) / self.mesh.size).tolist()
        norm = self.engine.gradient_norm
        skipped = self.engine.skipped  # ZeRO 1 and 2 pass over a step whose gradients are no numbers
        if not math.isfinite(sum(losses)) or not math.isfinite(norm) or skipped:
            raise ConfigError(
                f"step {self.step}: the loss is {sum(losses)} with a gradient norm of {norm}; the run has diverged and is not saved. "
                "Resume from the last checkpoint with a lower train.optimizer.lr, or with train.max_grad_norm=1",
                everywhere=True,
            )
        values: dict[str, Any] = {
            "step": self.step, "samples": self.step * self.config.train.global_batch, "loss": sum(losses), "diffusion_loss": losses[0],
            "predictor_loss": losses[1], "grad_norm": norm, "lr": rate(self.config.train, self.step - 1),
        }  # fmt: skip
        values |= rates(self.config.train.optimizer, values["lr"])
        if "capacity" in told:
            experts = all_sum(told["capacity"], self.mesh.world) / self.mesh.size  # (layers, N)
            values |= {
                "capacity": float(experts.mean()),
                "capacity_per_layer": experts.mean(1).tolist(),
                "capacity_per_expert": experts.tolist(),
            }
        if predictors := self.predictors():
            values["threshold"] = float(
                torch.stack([predictor.threshold_for(InferenceRule()).mean() for predictor in predictors]).mean()
            )
        return values

    def measure_data(self) -> dict[str, Any]:
        """Bring to the host how often the data were gone through and how many samples had to be replaced since the run
        (re)started.

        DataError on all ranks alike when these are too many.
        """
        num_bad = int(all_sum(torch.tensor(self.stream.num_bad, device=self.mesh.device), self.mesh.world))
        if num_bad > self.num_bad and self.mesh.is_first:
            quarantine.join(self.folder.path)
        self.num_bad = num_bad
        self.stream.check_bad(num_bad, everywhere=True)
        passes = self.stream.passes()
        epoch = {} if not passes else {"epoch": passes if len(passes) > 1 else next(iter(passes.values()))}
        return {**epoch, "bad_samples": num_bad}

    def sample_grid(self) -> None:
        """Draw the grid of this step with the averaged weights: classes in turn, the same noise at every step."""
        config = self.config.sample
        asked = self.conditions.for_grid(config.grid_size)
        weights = self.ema if config.weights == "ema" else None
        drawn = draw(
            self.model, asked, config, self.mesh, seed=self.config.seed, objective=self.config.train.objective, weights=weights,
            decode=self.decode,
        )  # fmt: skip
        if drawn is not None:
            self.folder.picture(
                f"samples/step-{self.step:07d}.png",
                lambda path: write_grid(drawn, DataInfo.of(self.dataset.manifest), path),
            )
            self.folder.draw_curves()

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint: weights, thresholds, averaged weights, moments; each element by one rank."""
        config, mesh = self.config, self.mesh
        replicated = self.weights()
        pieces = [
            self.engine.shard_to_write(fragment, is_expert(fragment.name)) for fragment in replicated
        ] + self.engine.moments_to_save()
        meta = {
            "config": to_tree(config),
            "samples_consumed": self.step * config.train.global_batch,
            "data": DataInfo.of(self.dataset.manifest).to_json(),
            "fingerprint": self.dataset.fingerprint,
            "ancestry": self.start.ancestry,
            "recipe": [asdict(change) for change in self.recipe],
        }
        save(
            self.folder.checkpoints,
            self.step,
            pieces,
            meta,
            group=mesh.world.handle,
            rank=mesh.rank,
            world=mesh.size,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
        )

    def load(self, checkpoint: Path) -> None:
        """Take up a checkpoint's state; the stream is made afterwards, at the position that follows from the step."""
        step = int(read_meta(checkpoint)["step"])
        load(checkpoint, self.weights() + self.engine.moments(), group=self.mesh.world.handle, world=self.mesh.size)
        keep_thresholds(self.model, config_of(checkpoint).model.threshold_decay, self.ema.tensors)
        self.engine.continue_from(step)
        self.step = step

    def weights(self) -> list[Fragment]:
        """What this rank holds of weights, thresholds and averaged weights."""
        named = dict(self.model.named_parameters()) | persistent_buffers(self.model)
        return fragments(named, "model", self.model, self.mesh) + fragments(
            self.ema.tensors, "ema", self.model, self.mesh
        )


def wanted_capacity(reports: list[tuple[LayerReport, ...]]) -> dict[str, Tensor]:
    """Capacity (layers, N) that the dynamic thresholds would spend on this step's tokens (Eq. 8); empty for a dense
    model.
    """
    if not reports[0]:
        return {}
    wanted = torch.stack(
        [torch.stack([report.over_threshold.float() for report in micro_step]) for micro_step in reports]
    ).mean(0)
    return {"capacity": wanted * wanted.shape[1] / reports[0][0].num_tokens}
