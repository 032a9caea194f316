"""The learning rate as a pure function of the step."""

import math

from diffmoe_ep.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant or falling to `final` times the peak at the
    last step.
    """
    peak, schedule = train.optimizer.lr, train.schedule
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, train.steps - schedule.warmup)
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - (1 - schedule.final) * progress)
        case "cosine":
            return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2)
