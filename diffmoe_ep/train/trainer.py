"""A training run from config to checkpoint: what a newcomer reads first.

A run is a function of its config. Which samples a step sees, their noise, times and dropped conditions depend on their
positions; which tokens an expert takes depends on the pool; so ranks, expert parallelism, ZeRO stage and workers change
how it is computed, never what.

Calls marked "collective" are made by every rank or by none: a rank that leaves one out lets the others wait until
their timeout.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.background import Saver
from diffmoe_ep.checkpoint.fragments import Fragment, not_finite
from diffmoe_ep.checkpoint.load import config_of, fragments, meta_of, persistent_buffers
from diffmoe_ep.checkpoint.same_run import recipe_changes
from diffmoe_ep.checkpoint.store import load, read_meta
from diffmoe_ep.config import Config, ConfigError, check_world, fit_world, has_experts, pool_samples, to_tree
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.stream import Stream, loader_failures
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.diffusion.objective import objective_of
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.model.parallelize import apply_compile, build_sharded, is_expert, widen_pools
from diffmoe_ep.moe.capacity import InferenceRule
from diffmoe_ep.parallel.allocator import keep_freed_memory
from diffmoe_ep.parallel.collectives import all_gather, all_sum, gather_objects
from diffmoe_ep.parallel.common_end import CommonEnd
from diffmoe_ep.parallel.mesh import (
    Mesh,
    compute_deterministically,
    destroy_mesh,
    init_mesh,
    launched_world,
    pool_ranks,
)
from diffmoe_ep.sampling.decode import load_decoder
from diffmoe_ep.sampling.picture import write_grid
from diffmoe_ep.sampling.sample import sample
from diffmoe_ep.train.boards import Boards
from diffmoe_ep.train.conditioner import Conditioner
from diffmoe_ep.train.divergence import Divergence
from diffmoe_ep.train.ema import Ema
from diffmoe_ep.train.engine import Engine, learning_rates
from diffmoe_ep.train.metrics import Clock, TrafficMeter, Utilization, peak_memory
from diffmoe_ep.train.preflight import prepare
from diffmoe_ep.train.progress import Progress, banner
from diffmoe_ep.train.run_folder import MetricsFile, RunFolder
from diffmoe_ep.train.run_lock import RunLock
from diffmoe_ep.train.schedule import learning_rate
from diffmoe_ep.train.step_trace import StepTrace
from diffmoe_ep.train.stopping import Stopping
from diffmoe_ep.train.thresholds import predictors_of, rescale_thresholds, threshold_capacity, update_thresholds
from diffmoe_ep.train.warm_start import load_initial_weights, resolve_init


def train(config: Config) -> bool:
    """Train, or continue, the run that the config describes; returns when its last step is saved, or, with False, the
    one after which a signal told it to stop.

    Raises ConfigError, DataError or CheckpointError, the same on every rank, before anything is built if something does
    not fit.
    """
    # -- config: what cannot work on this number of ranks is refused first ---------------------------------------------
    asked = config.parallel.expert_parallel
    config = fit_world(config, launched_world())
    check_world(config, launched_world())

    # -- mesh: join the other ranks (collective, like all that follows) ------------------------------------------------
    mesh = start_mesh(config)
    if mesh.is_first and config.parallel.expert_parallel != asked:
        over = f"{mesh.size} rank{'s' * (mesh.size > 1)}"
        now = f"parallel.expert_parallel is {config.parallel.expert_parallel}, not {asked}, on {over}"
        print(f"{now} (parallel.elastic)", file=sys.stderr, flush=True)
    if mesh.device.type == "cpu":
        keep_freed_memory()

    # -- all ranks end together, and the folder is this run's alone ----------------------------------------------------
    with CommonEnd(mesh), loader_failures(), RunLock(Path(config.folder), mesh):
        # -- checkpoint and data: the first rank finds the one, every rank opens the other, all agree ------------------
        dataset, checkpoint = prepare(config, mesh)
        step = read_meta(checkpoint)["step"] if checkpoint else 0

        # -- training --------------------------------------------------------------------------------------------------
        finished = True
        if step < config.train.steps:
            finished = Trainer(config, mesh, dataset, checkpoint).run()
        elif mesh.is_first:
            print(
                f"{config.folder} is finished: step {step} of {config.train.steps}. "
                "To go on, raise train.steps; to start anew, give another folder."
            )
    destroy_mesh()  # not when something failed: leaving a group can wait for peers that wait for this rank
    return finished


def start_mesh(config: Config) -> Mesh:
    """Join the other ranks in the grid that the config describes; collective."""
    local = config.train.micro_step_samples // launched_world()
    ranks = pool_ranks(pool_samples(config), local) if has_experts(config.model) else 1
    if config.compute.deterministic:
        compute_deterministically()
    return init_mesh(config.parallel.expert_parallel, ranks, config.parallel.timeout_minutes)


class Trainer:
    """One run in progress. Everything that changes while it trains is here: engine, averaged weights, stream, step."""

    def __init__(self, config: Config, mesh: Mesh, dataset: BatchSource, checkpoint: Path | None = None) -> None:
        """Set a run up over all ranks, at its start or where `checkpoint` left it; collective."""
        self.config, self.mesh = config, mesh

        # -- data and what becomes of it -------------------------------------------------------------------------------
        self.dataset = dataset
        self.data_info = DataInfo.of(dataset.manifest)
        self.folder = RunFolder(Path(config.folder))
        self.conditioner = Conditioner(config, dataset, mesh, checkpoint)
        self.objective = objective_of(config.train.objective)
        grids = config.sample.grid_every > 0
        self.decode = load_decoder(config.sample, self.data_info, mesh) if grids else None

        # -- weights: drawn from the seed, or those of `init_from` -----------------------------------------------------
        self.warm_start = resolve_init(config, mesh, dataset, checkpoint)
        self.model = load_initial_weights(build_model(config, mesh), self.warm_start, config, mesh)

        # -- engine and averaged weights: both take the weights as they now are ----------------------------------------
        self.engine = Engine(self.model, config, mesh)
        self.ema = Ema(self.model, config.train.ema)

        # -- resume: weights, averaged weights, thresholds, moments and the step are overwritten by the checkpoint's ---
        self.step = 0  # optimizer steps that were made, or passed over
        passed_over = meta_of(checkpoint).get("passed_over", 0) if checkpoint is not None else 0
        self.recipe = recipe_changes(checkpoint, config)
        if checkpoint is not None:
            self.load(checkpoint, passed_over)

        # -- stream: last, since its position follows from the step ----------------------------------------------------
        self.stream = Stream(
            dataset, config.data, seed=config.seed, batch=config.train.global_batch,
            accumulation=config.train.grad_accumulation, rank=mesh.rank, world=mesh.size,
            samples_consumed=self.step * config.train.global_batch, text=CaptionSpec.of(config.model, config.text),
            quarantine_file=quarantine.rank_file(self.folder.path, mesh.rank),
        )  # fmt: skip

        # -- measuring -------------------------------------------------------------------------------------------------
        self.divergence = Divergence(config, mesh, dataset, self.stream, passed_over)
        self.traffic = TrafficMeter(mesh)
        self.utilization = Utilization(config, mesh)
        self.num_bad = 0  # samples that were replaced, on all ranks, as far as logged

        # -- saving ----------------------------------------------------------------------------------------------------
        self.saver = Saver(self.folder.checkpoints, config.checkpoint, mesh, config.parallel.timeout_minutes)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step, logging, sampling and saving on the way; False where a signal stopped it before."""
        config = self.config
        self.folder.describe(config, self.mesh, self.warm_start.ancestry, self.recipe)
        banner_text = banner(config, self.mesh, self.step, self.warm_start.source_line(), self.recipe)
        metrics_file = MetricsFile(self.folder.metrics, self.step) if self.mesh.is_first else None
        progress = Progress(banner_text, self.step, config.train.steps) if self.mesh.is_first else None
        boards = Boards(config, self.mesh, self.step)
        clock = Clock(self.step)
        trace = StepTrace(config.log.profile, self.folder.path, self.mesh, clock)
        with Stopping(config.checkpoint, self.mesh, self.step) as stopping, self.saver:
            while self.step < config.train.steps and not stopping.stops:
                with self.traffic.step(), trace.step(self.step + 1):
                    measured = self.train_step(clock)
                saves = stopping.agree(self.saver.failed) or self.due(config.checkpoint.every)
                # Measure before saving: it stops a run that has diverged, so that no checkpoint ever holds one. A step
                # that moved nothing has nothing to measure.
                if self.engine.passed_over:
                    self.divergence.pass_over(self.step, self.engine.gradient_norm, not_finite(self.weights()))
                    if self.due(config.log.every):
                        self.traffic.lap()  # its line is left out, the next one begins after it
                elif self.due(config.log.every) or saves:
                    metrics = self.measure(measured)
                if self.due(config.log.every) and not self.engine.passed_over:
                    metrics |= self.measure_run() | clock.lap(self.step, config.train) | self.traffic.lap()
                    metrics |= self.utilization.of(metrics["samples_per_second"])
                    self.engine.log_to_monitor(metrics)
                    if metrics_file is not None and progress is not None:
                        metrics_file.write(metrics)
                        progress.show(metrics)
                        boards.write(metrics)
                if saves:
                    stopping.saves()
                    clock.stall(lambda: self.save(stopping.saved))
                if config.sample.grid_every and self.due(config.sample.grid_every):
                    clock.pause(self.sample_grid)
                    boards.picture("grid", self.folder.grid(self.step), self.step * config.train.global_batch)
            trace.close()
            self.saver.finish()
            self.stream.close()
            finished = self.step == config.train.steps
            if metrics_file is not None and progress is not None:
                metrics_file.close()
                progress.close()
                if finished:  # else there may be no time for it
                    self.folder.draw_curves()
            if not finished:
                stopping.part(self.step, config.train.steps, self.folder.path)
            boards.close(finished)  # last: it may wait for a network
        return finished

    def train_step(self, clock: Clock) -> dict[str, Tensor]:
        """One optimizer step over `grad_accumulation` micro-steps; returns what it measured, still on the device.

        Collective in every line that runs the model or moves its weights. On a GPU the host waits here for the copy of
        a batch, for captions that are encoded online, for a layer's row counts where experts are sharded, and for what
        DeepSpeed checks of the gradients; for no number that is only reported.
        """
        accumulation, losses, reports, each = self.config.train.grad_accumulation, [], [], []
        for _ in range(accumulation):
            batch = clock.wait(lambda: next(self.stream)).to(self.mesh.device)  # the host waits for data here alone
            noised = self.objective.noised(batch.latent, batch.noise, batch.u)
            output = self.engine.forward(noised.x, noised.t, self.conditioner(batch))
            of_samples = self.objective.losses(output.prediction, noised)  # (B,)
            diffusion = of_samples.mean()
            self.engine.backward(self.divergence.guarded(diffusion + output.auxiliary))
            self.engine.step(learning_rate(self.config.train, self.step))  # moves weights at the last micro-step alone
            losses.append(torch.stack([diffusion.detach(), output.auxiliary.detach()]))
            reports.append(output.layers)
            each.append(of_samples.detach())
        self.step += 1
        mean = torch.stack(losses).mean(0)
        self.divergence.note(self.step, torch.stack(each), mean.sum(), self.engine.norm_on_device)
        if not self.engine.passed_over:
            update_thresholds(self.model, reports, self.mesh)  # once per step, however it is cut into micro-steps
            self.ema.update(self.step)  # after the thresholds, which ema.thresholds=averaged averages too
        return {"losses": mean, **threshold_capacity(reports)}

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; the last step always counts."""
        return self.step % every == 0 or self.step == self.config.train.steps

    # -- measuring: here the host waits for the device -----------------------------------------------------------------

    def measure(self, measured: dict[str, Tensor]) -> dict[str, Any]:
        """Bring a step's measurements to the host as means over all ranks; collective.

        Raises ConfigError, on every rank alike, when loss or gradients are not finite.
        """
        losses = (all_sum(measured["losses"], self.mesh.world) / self.mesh.size).tolist()
        norm = self.engine.gradient_norm
        if not math.isfinite(sum(losses)) or not math.isfinite(norm):
            raise self.divergence.stop(self.step, norm, None)  # at ZeRO 0 the step has moved the weights
        self.divergence.measured(self.step, sum(losses), norm)
        metrics: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch,
            "loss": sum(losses),
            "diffusion_loss": losses[0],
            "predictor_loss": losses[1],
            "grad_norm": norm,
            "lr": learning_rate(self.config.train, self.step - 1),
        }
        if self.divergence.tolerates:
            metrics["passed_over"] = self.divergence.passed_over
        metrics |= learning_rates(self.config.train.optimizer, metrics["lr"])
        if "capacity" in measured:
            experts = all_sum(measured["capacity"], self.mesh.world) / self.mesh.size  # (layers, N)
            metrics["capacity"] = float(experts.mean())
            metrics["capacity_per_layer"] = experts.mean(1).tolist()
            metrics["capacity_per_expert"] = experts.tolist()
        if predictors := predictors_of(self.model):
            thresholds = torch.stack(
                [predictor.threshold_for(InferenceRule()).mean() for predictor in predictors]
            )  # (layers,)
            metrics["threshold"] = float(thresholds.mean())
        return metrics

    def measure_run(self) -> dict[str, Any]:
        """How often the data were gone through, samples replaced since the run (re)started, and memory; collective.

        Raises DataError, on every rank alike, when too many samples had to be replaced.
        """
        mine = torch.tensor([[self.stream.num_bad, peak_memory(self.mesh.device)]], dtype=torch.float64)
        ranks = all_gather(mine.to(self.mesh.device), self.mesh.world)  # (W, 2)
        num_bad = int(ranks[:, 0].sum())
        if num_bad > self.num_bad and self.mesh.is_first:
            quarantine.join(self.folder.path)
        self.num_bad = num_bad
        self.stream.check_bad(num_bad, everywhere=True)
        passes = self.stream.passes()
        epoch = {} if not passes else {"epoch": passes if len(passes) > 1 else next(iter(passes.values()))}
        return {**epoch, "bad_samples": num_bad, "peak_memory_gb": float(ranks[:, 1].max()) / 1e9}

    def sample_grid(self) -> None:
        """Sample the grid of this step: classes in turn, captions or fixed prompts, from the same noise at every step;
        collective.
        """
        config = self.config.sample
        weights = self.ema if config.weights == "ema" else None
        samples = sample(
            self.model, self.conditioner.for_grid(config.grid_size), config, self.mesh, seed=self.config.seed,
            objective=self.config.train.objective, weights=weights, decode=self.decode,
        )  # fmt: skip
        if samples is not None:
            self.folder.picture(self.folder.grid(self.step), lambda path: write_grid(samples, self.data_info, path))
            self.folder.draw_curves()

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self, then: Callable[[int], None] = lambda _: None) -> None:
        """Write a checkpoint: weights, thresholds, averaged weights, moments; each element by one rank; collective.
        Calls `then` with the step when it is complete: during `run` and in the background, after this has returned.

        Raises ConfigError, on every rank alike, when one of them is not finite: the step's loss, which was, belongs to
        the weights before its update. The newest checkpoint stays.
        """
        config, mesh = self.config, self.mesh
        pieces = [self.engine.shard_to_write(fragment, is_expert(fragment.name)) for fragment in self.weights()]
        pieces += self.engine.moments_to_save()
        broken = next((name for name in gather_objects(not_finite(pieces), mesh.world) if name), None)
        if broken is not None:
            raise ConfigError(
                f"step {self.step}: its update left {broken} with values that are not finite; the run has diverged and "
                "is not saved. Resume from the last checkpoint with a lower train.optimizer.lr, or with "
                "train.max_grad_norm=1",
                everywhere=True,
            )
        meta = {
            "config": to_tree(config),
            "samples_consumed": self.step * config.train.global_batch,
            "passed_over": self.divergence.passed_over,
            "data": self.data_info.to_json(),
            "fingerprint": self.dataset.fingerprint,
            "text_encoder": self.conditioner.encoder_fingerprint,
            "ancestry": self.warm_start.ancestry,
            "recipe": [asdict(change) for change in self.recipe],
            "ranks": mesh.size,
        }
        self.saver.save(self.step, pieces, meta, then)

    def load(self, checkpoint: Path, passed_over: int) -> None:
        """Load a checkpoint's state into this rank's shards, whatever layout wrote it; collective. passed_over: steps
        of its run that were.
        """
        step = int(read_meta(checkpoint)["step"])
        pieces = self.weights() + self.engine.moments()  # the files were verified before the model was built
        load(checkpoint, pieces, group=self.mesh.world.handle, world=self.mesh.size, verified=True)
        rescale_thresholds(self.model, config_of(checkpoint).model.threshold_decay, self.ema.tensors)
        self.engine.continue_from(step, passed_over)
        self.step = step

    def weights(self) -> list[Fragment]:
        """What this rank holds of weights, thresholds and averaged weights; views, so that loading writes into them."""
        named = dict(self.model.named_parameters()) | persistent_buffers(self.model)
        averaged = fragments(self.ema.tensors, "ema", self.model, self.mesh)
        return fragments(named, "model", self.model, self.mesh) + averaged


def build_model(config: Config, mesh: Mesh) -> DiT:
    """This rank's part of the model, with its initial weights: every expert's follow from its global number."""
    # flow does not use the half of the channels that predicts a variance
    channels = config.model.in_channels if config.train.objective == "flow" else None
    model = build_sharded(config, mesh, channels)
    if config.compute.compile:
        apply_compile(model)
    return initialize(widen_pools(model, mesh), config.seed)
