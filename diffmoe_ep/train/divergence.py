"""Steps whose loss or gradient norm is not finite: found without waiting for the device, explained, and passed over
where the config allows some.

Legend: M micro-steps of a step, B samples of a rank's micro-step.
"""

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.loader.stream import Stream
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.plausible import FAR, Spread, Usual
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.parallel.collectives import gather_objects
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.schedule import learning_rate

SHOWN = 4  # samples that a message names
USUAL_DEVIATION = (0.1, 10.0)  # of final latents; models and noise are made for about 1


@dataclass(frozen=True)
class Seen:
    """A sample of a step that was not finite."""

    position: int
    loss: float
    spread: Spread | None  # of its final latent; None where the sample cannot be read again
    address: str | None  # shard and key; None where nobody knows

    def describe(self, usual: Usual) -> str:
        """In words."""
        text = f"position {self.position} ({self.address or 'of plain tars'}; loss {self.loss:.4g}"
        if self.spread is not None:
            distance = usual.distance(self.spread)
            text += f", values from {self.spread.low:.4g} to {self.spread.high:.4g}, {distance:.3g} deviations away"
        return f"{text})"


class Divergence:
    """Watches a run's steps, counts those that are passed over, and explains the first that is not finite."""

    def __init__(self, config: Config, mesh: Mesh, source: BatchSource, stream: Stream, passed_over: int = 0) -> None:
        """passed_over: steps of the run that were, until now."""
        self.config, self.mesh, self.source, self.stream = config, mesh, source, stream
        self.passed_over = passed_over
        self._history: deque[tuple[int, float, float]] = deque(maxlen=4)  # step, loss, norm as measured
        accumulation = config.train.grad_accumulation
        local = config.train.micro_step_samples // mesh.size
        self._step = torch.zeros((), dtype=torch.int64, device=mesh.device)  # the first that was not finite; 0: none
        self._losses = torch.zeros(accumulation, local, device=mesh.device)  # (M, B) of that step

    @property
    def tolerates(self) -> bool:
        """Whether steps may be passed over."""
        return self.config.train.skip_nonfinite > 0

    def guarded(self, loss: Tensor) -> Tensor:
        """The loss, to the bit, with gradients that are not finite where it is not: squares can overflow while their
        gradients do not, and by its gradients a step is passed over, on all ranks alike.
        """
        return loss * (loss.detach() * 0 + 1) if self.tolerates else loss

    def note(self, step: int, losses: Tensor, total: Tensor, norm: Tensor) -> None:
        """Keep the step (from 1) and its losses (M, B) if it is the first that is not finite; on the device, which is
        not waited for. total: the step's loss on this rank.
        """
        new = ~(total.isfinite() & norm.isfinite()) & (self._step == 0)
        self._step = torch.where(new, step, self._step)
        self._losses = torch.where(new, losses, self._losses)

    def measured(self, step: int, loss: float, norm: float) -> None:
        """Note a finite step for explanations."""
        self._history.append((step, loss, norm))

    def pass_over(self, step: int, norm: float, broken: str | None) -> None:
        """Count a step that moved nothing, or raise ConfigError, on all ranks alike, where these are too many;
        collective.
        """
        if self.passed_over == self.config.train.skip_nonfinite:
            raise self.stop(step, norm, broken)
        self.passed_over += 1
        text = self._explanation(norm, broken)
        self._step = torch.zeros_like(self._step)
        if self.mesh.is_first:
            count = f"{self.passed_over} of train.skip_nonfinite={self.config.train.skip_nonfinite}"
            print(f"step {step} is passed over ({count}): {text}", file=sys.stderr, flush=True)

    def stop(self, step: int, norm: float, broken: str | None) -> ConfigError:
        """Why the run has diverged, found at this step; collective. broken: a tensor of the weights that is not finite,
        on some rank.
        """
        first = self._first() or step
        text = self._explanation(norm, broken)
        late = f" (seen at step {step}; log.every={self.config.log.every})" if first != step else ""
        allowed = self.config.train.skip_nonfinite
        before = f", after {allowed} steps that train.skip_nonfinite={allowed} let pass" if allowed else ""
        return ConfigError(
            f"step {first}{late}: the run has diverged and is not saved{before}: {text}", everywhere=True
        )

    def _first(self) -> int:
        """The first step that was not finite on any rank; 0 if there is none; collective."""
        return min((step for step in gather_objects(int(self._step), self.mesh.world) if step), default=0)

    def _explanation(self, norm: float, broken: str | None) -> str:
        """What was not finite, which samples, and the likely cause with its remedy; collective."""
        first = self._first()
        mine = self._samples(first) if first and int(self._step) == first else []
        samples = [each for part in gather_objects(mine, self.mesh.world) for each in part]
        broken = next((name for name in gather_objects(broken, self.mesh.world) if name), None)
        lr = learning_rate(self.config.train, max(first, 1) - 1)
        history = list(self._history)
        usual = Usual.of([each.spread for each in samples if each.spread is not None])
        lines = [f"the loss is {_mean(samples):.4g} with a gradient norm of {norm:.4g}"]
        if samples:
            worst = sorted(samples, key=lambda each: (math.isfinite(each.loss), -each.loss, each.position))[:SHOWN]
            num = sum(not math.isfinite(each.loss) for each in samples)
            what = f"{num} of {len(samples)} losses are not finite" if num else "all losses are finite; the largest"
            shown = sorted(worst[: num or SHOWN], key=lambda each: each.position)
            more = f", and {num - SHOWN} more" if num > SHOWN else ""
            lines.append(f"samples: {what}: {', '.join(each.describe(usual) for each in shown)}{more}")
        if history:
            told = ", ".join(f"{loss:.4g} and {size:.4g} at step {step}" for step, loss, size in history)
            lines.append(f"before it: loss and gradient norm {told}; learning rate {lr:.3g}")
        lines.append(f"cause: {cause(samples, usual, self.source.manifest, broken, first_of_run=first == 1)}")
        return "\n  ".join(lines)

    def _samples(self, step: int) -> list[Seen]:
        """This rank's samples of a step, with the losses that were kept."""
        seen = []
        for number, losses in enumerate(self._losses.tolist()):
            micro_step = (step - 1) * len(self._losses) + number
            batch = self.stream.again(micro_step)
            latents = [None] * len(losses) if batch is None else list(batch.latent.numpy())
            for position, loss, latent in zip(self.stream.positions(micro_step), losses, latents, strict=True):
                spread = None if latent is None else Spread.of(latent)
                seen.append(Seen(position, loss, spread, self.stream.address(position)))
        return seen


def cause(samples: Sequence[Seen], usual: Usual, manifest: Manifest, broken: str | None, first_of_run: bool) -> str:
    """The likely cause of a step that is not finite, and what can be done: the data, the weights, or the rate.

    usual: of the step's samples. broken: a tensor of the weights that is not finite though the step did not move it.
    """
    bad = [each for each in samples if not math.isfinite(each.loss)]
    far = [each for each in bad or samples if each.spread is not None and usual.distance(each.spread) > FAR]
    if far and len(far) < len(samples):
        return (
            f"the data: {len(far)} of these samples have values beyond any plausible range. `diffmoe data check` lists "
            "all such; prepare them anew or leave them out, or resume with train.skip_nonfinite=1, which passes over "
            "such a step"
        )
    low, high = USUAL_DEVIATION
    if samples and usual.deviation and not low <= usual.deviation <= high:
        fitting = manifest.scale / usual.deviation
        return (
            f"the data's scale: final latents have a standard deviation of {usual.deviation:.3g} and a mean of "
            f"{usual.mean:.3g}, and are made for 1 and 0. The manifest of {manifest.name} says scale "
            f"{manifest.scale:g}; {fitting:.3g} would give 1: prepare or index the data with the scale that is theirs"
        )
    if broken is not None:
        return (
            f"the weights: {broken} holds values that are not finite. Resume from the last checkpoint, or start from "
            "other weights (init_from)"
        )
    if samples and len(bad) == len(samples):
        whose = "those that the run started from" if first_of_run else "earlier steps had made them so"
        return (
            f"the weights: no sample's loss is finite, and their values are plausible; the weights were too large, or "
            f"not finite, before this step: {whose}. Resume from the last checkpoint with a lower train.optimizer.lr, "
            "or with train.max_grad_norm=1"
        )
    return (
        "the rate, most likely: the samples' values are plausible and the weights were finite. Resume from the last "
        "checkpoint with a lower train.optimizer.lr, or with train.max_grad_norm=1; a rare step can be passed over "
        "with train.skip_nonfinite=1"
    )


def _mean(samples: Sequence[Seen]) -> float:
    return sum(each.loss for each in samples) / len(samples) if samples else math.nan
