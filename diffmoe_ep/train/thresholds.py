"""The dynamic thresholds of a model in training: moved once per optimizer step, and the capacity that they would spend.

Legend: N experts; layers are the MoE layers, first to last; reports hold, for each micro-step, one report per layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.moe.layer_report import LayerReport
from diffmoe_ep.parallel.collectives import all_sum
from diffmoe_ep.parallel.mesh import Mesh

Reports = Sequence[tuple[LayerReport, ...]]


def predictors_of(model: DiT) -> list[CapacityPredictor]:
    """The capacity predictors, first layer to last; none in a family without."""
    return [layer.predictor for layer in model.moe_layers() if layer.predictor is not None]


def update_thresholds(model: DiT, reports: Reports, mesh: Mesh) -> None:
    """Move each expert's threshold once towards the mean k-th largest prediction of all the step's pools (Eq. 17).

    Collective over the world, where there are predictors. The mean is over ranks and micro-steps alike: a threshold
    that moved once per micro-step would decay faster under more accumulation, and one that moved by its own rank's
    pools would differ between the replicas of an expert.
    """
    predictors = predictors_of(model)
    if not predictors:
        return
    quantiles = torch.stack(
        [torch.stack([layer.quantile for layer in step if layer.quantile is not None]) for step in reports]
    )  # (micro-steps, layers, N)
    mean = all_sum(quantiles.mean(0), mesh.world) / mesh.size  # (layers, N)
    for predictor, quantile in zip(predictors, mean, strict=True):
        predictor.update(quantile)


def threshold_capacity(reports: Reports) -> dict[str, Tensor]:
    """Capacity (layers, N) that the dynamic thresholds would spend on this rank's tokens of the step (Eq. 8), by name.

    Empty for a dense model.
    """
    if not reports[0]:
        return {}
    counts = torch.stack([torch.stack([layer.over_threshold.float() for layer in step]) for step in reports]).mean(0)
    return {"capacity": counts * counts.shape[1] / reports[0][0].num_tokens}  # (layers, N)


def rescale_thresholds(model: DiT, decay: float, averaged: Mapping[str, Tensor] | None = None) -> None:
    """Rescale thresholds that were averaged with another decay, so that their bias-corrected values stay the same.

    averaged: averaged weights by name, whose thresholds are rescaled likewise.
    """
    for name, predictor in model.named_modules():
        if isinstance(predictor, CapacityPredictor) and predictor.decay != decay and predictor.updates > 0:
            updates = int(predictor.updates)
            factor = (1 - predictor.decay**updates) / (1 - decay**updates)
            predictor.threshold.mul_(factor)
            if averaged is not None and f"{name}.threshold" in averaged:
                averaged[f"{name}.threshold"].mul_(factor)
