"""What a run begins with: the weights of another run, and which parameters stay as they are.

`init_from` is for the first start only. A run that has a checkpoint of its own continues it, and keeps the ancestry
that it began with. Freezing is of parameters: thresholds go on following what the predictors say, frozen or not, for
they describe the tokens that come.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.exported import CONFIG, is_exported, read_exported
from diffmoe_ep.checkpoint.load import config_of, load_into, resolve_model_path
from diffmoe_ep.checkpoint.same_run import check_starts
from diffmoe_ep.checkpoint.store import SUMS, CheckpointError, read_meta
from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.moe.capacity import CapacityPredictor
from diffmoe_ep.parallel.mesh import Mesh

Ancestor = dict[
    str, Any
]  # path, step (None: not known), weights (ema or model), fingerprint: sha256 of the file that vouches for it


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    source: Path | None = None
    """Checkpoint, or folder in the single-file form, that is loaded; None: weights are drawn, or taken up from the
    run's own checkpoint.
    """
    ancestry: tuple[Ancestor, ...] = ()
    """Where its first weights came from, and where those had come from, and so on."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that stay as they are."""
    num_parameters: int = 0
    """All parameters (tensors), frozen or not."""

    def told(self) -> str:
        """A line on what it begins with; empty where there is nothing to say."""
        facts = (
            ["begun with the " + " <- ".join(_told(ancestor) for ancestor in self.ancestry)] if self.ancestry else []
        )
        facts += [f"{len(self.frozen)} of {self.num_parameters} parameter tensors are frozen"] if self.frozen else []
        return ", ".join(facts)


def resolve_init(config: Config, mesh: Mesh, dataset: BatchSource, checkpoint: Path | None) -> Start:
    """Find what a run begins with, before anything is built; ConfigError on every rank if that does not fit.

    checkpoint: the run's own, if it has one; then init_from is not looked at.
    """
    problem: str | None = None
    found: Path | None = None
    if checkpoint is None and config.init_from is not None:
        try:
            found = resolve_model_path(Path(config.init_from)) if mesh.is_first else None
        except CheckpointError as error:
            problem = f"init_from {error}"
        mesh.agree(problem)
    source = mesh.same(found)  # one view: a run that still trains may save another checkpoint meanwhile
    assert source is None or isinstance(source, Path)
    start = Start()
    try:
        names = parameter_names(config)
        frozen = frozenset(match(config.train.freeze, names))
        ancestry: tuple[Ancestor, ...] = ()
        if checkpoint is not None:
            ancestry = ancestry_of(checkpoint)
        elif source is not None:
            check_starts(source, config, DataInfo.of(dataset.manifest))
            ancestry = ancestry_of(source, config.init_weights)
        start = Start(source, ancestry, frozen, len(names))
    except CheckpointError as error:
        problem = f"init_from {error}" if checkpoint is None else str(error)
    except ConfigError as error:
        problem = str(error)
    mesh.agree(problem)
    return start


def begin(model: DiT, start: Start, config: Config, mesh: Mesh) -> DiT:
    """Give a freshly built model, its experts sharded over the mesh, its first weights and thresholds, and freeze what
    is to stay.
    """
    if start.source is not None:
        load_into(model, start.source, config.init_weights, mesh)
        keep_thresholds(model, config_of(start.source).model.threshold_decay)
    for name, parameter in model.named_parameters():
        if name in start.frozen:
            parameter.requires_grad_(False)
    return model


def keep_thresholds(model: DiT, decay: float, averaged: Mapping[str, Tensor] | None = None) -> None:
    """Let thresholds that were averaged with another decay mean what they meant, once corrected for their start at
    0; so too those of averaged weights, by name.
    """
    for name, predictor in model.named_modules():
        if isinstance(predictor, CapacityPredictor) and predictor.decay != decay and predictor.updates > 0:
            moved = int(predictor.updates)
            factor = (1 - predictor.decay**moved) / (1 - decay**moved)
            predictor.threshold.mul_(factor)
            if averaged is not None and f"{name}.threshold" in averaged:
                averaged[f"{name}.threshold"].mul_(factor)


# -- what stays as it is -----------------------------------------------------------------------------------------------


def parameter_names(config: Config) -> list[str]:
    """Canonical names of a model's parameters; takes no memory."""
    with torch.device("meta"):
        return [name for name, _ in DiT(config.model).named_parameters()]


def match(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that any of the patterns (*, ?, [abc]) matches.

    Raises ConfigError for a pattern that matches none, with the nearest names, and for patterns that leave nothing to
    train.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise ConfigError(
                f"train.freeze: {pattern} matches none of the {len(names)} parameters; near are {', '.join(near)}"
            )
        found |= matched
    if len(found) == len(names):
        raise ConfigError(
            f"train.freeze {list(patterns)} matches all {len(names)} parameters, so that nothing is trained; freeze fewer"
        )
    return found


# -- where weights come from -------------------------------------------------------------------------------------------


def ancestry_of(folder: Path, weights: str | None = None) -> tuple[Ancestor, ...]:
    """What a checkpoint or a folder in the single-file form descends from, the nearest first.

    weights: put the folder itself before them, as the ancestor from which these weights are taken.
    """
    single = is_exported(folder)
    content = read_exported(folder).provenance if single else read_meta(folder)["meta"]
    known = content.get("ancestry", ())
    older = tuple(ancestor for ancestor in known if isinstance(ancestor, dict)) if isinstance(known, list) else ()
    if weights is None:
        return older
    vouching = folder / (CONFIG if single else SUMS)
    step = None if single else read_meta(folder)["step"]
    itself = {
        "path": str(folder),
        "step": step,
        "weights": weights,
        "fingerprint": hashlib.sha256(vouching.read_bytes()).hexdigest(),
    }
    return itself, *older


def _told(ancestor: Ancestor) -> str:
    step = ancestor.get("step")
    return f"{ancestor.get('weights')} weights of {ancestor.get('path')}" + (
        f" (step {step})" if step is not None else ""
    )
