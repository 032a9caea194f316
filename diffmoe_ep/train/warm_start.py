"""A warm start: the weights of another run, and which parameters are frozen.

`init_from` is for the first start only. A run that has a checkpoint of its own continues it, and keeps its recorded
ancestry. Freezing is of parameters: thresholds go on following the predictors, frozen or not, since they describe the
tokens that come.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from diffmoe_ep.checkpoint.exported import is_exported, read_exported
from diffmoe_ep.checkpoint.load import config_of, fingerprint_of, load_into, resolve_model_path
from diffmoe_ep.checkpoint.same_run import check_starts
from diffmoe_ep.checkpoint.store import CheckpointError, read_meta
from diffmoe_ep.config import Config, ConfigError
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.sources import BatchSource
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train.thresholds import rescale_thresholds

# path, step (None: not known), weights (ema or model), fingerprint: sha256 of the file that vouches for it
Ancestor = dict[str, Any]


@dataclass(frozen=True)
class WarmStart:
    """Where a run's first weights come from, and what is frozen."""

    source: Path | None = None
    """Checkpoint or exported folder that is loaded; None: weights are drawn from the seed, or the run is resumed."""
    ancestry: tuple[Ancestor, ...] = ()
    """Where its first weights came from, and where those had come from, and so on."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that are not trained."""
    num_parameters: int = 0
    """All parameters (tensors), frozen or not."""

    def source_line(self) -> str:
        """A line for the banner; empty where weights are drawn and nothing is frozen."""
        parts = []
        if self.ancestry:
            parts.append("initialized from the " + " <- ".join(_in_words(ancestor) for ancestor in self.ancestry))
        if self.frozen:
            parts.append(f"{len(self.frozen)} of {self.num_parameters} parameter tensors are frozen")
        return ", ".join(parts)


def resolve_init(config: Config, mesh: Mesh, dataset: BatchSource, checkpoint: Path | None) -> WarmStart:
    """Resolve `init_from` and `train.freeze`, before anything is built; collective.

    checkpoint: the run's own, if it has one; then init_from is ignored. Raises ConfigError on every rank if they do not
    fit the config.
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
    start = WarmStart()
    try:
        names = parameter_names(config)
        frozen = frozenset(match(config.train.freeze, names))
        ancestry: tuple[Ancestor, ...] = ()
        if checkpoint is not None:
            ancestry = ancestry_of(checkpoint)
        elif source is not None:
            check_starts(source, config, DataInfo.of(dataset.manifest))
            ancestry = ancestry_of(source, config.init_weights)
        start = WarmStart(source, ancestry, frozen, len(names))
    except CheckpointError as error:
        problem = f"init_from {error}" if checkpoint is None else str(error)
    except ConfigError as error:
        problem = str(error)
    mesh.agree(problem)
    return start


def load_initial_weights(model: DiT, start: WarmStart, config: Config, mesh: Mesh) -> DiT:
    """Load the warm start's weights and thresholds, if any, into a newly built model, its experts sharded over the
    mesh, and freeze what is not trained; returns the model.
    """
    if start.source is not None:
        load_into(model, start.source, config.init_weights, mesh)
        rescale_thresholds(model, config_of(start.source).model.threshold_decay)
    for name, parameter in model.named_parameters():
        if name in start.frozen:
            parameter.requires_grad_(False)
    return model


# -- freezing ----------------------------------------------------------------------------------------------------------


def parameter_names(config: Config) -> list[str]:
    """Canonical names of a model's parameters, from a build without memory."""
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
            f"train.freeze {list(patterns)} matches all {len(names)} parameters, so that nothing is trained; "
            "freeze fewer"
        )
    return found


# -- where weights come from -------------------------------------------------------------------------------------------


def ancestry_of(folder: Path, weights: str | None = None) -> tuple[Ancestor, ...]:
    """What a checkpoint or an exported folder descends from, the nearest first.

    weights: put the folder itself before them, as the ancestor from which these weights are taken.
    """
    content = read_exported(folder).provenance if is_exported(folder) else read_meta(folder)["meta"]
    known = content.get("ancestry", ())
    older = tuple(ancestor for ancestor in known if isinstance(ancestor, dict)) if isinstance(known, list) else ()
    if weights is None:
        return older
    step = None if is_exported(folder) else read_meta(folder)["step"]
    return {"path": str(folder), "step": step, "weights": weights, "fingerprint": fingerprint_of(folder)}, *older


def _in_words(ancestor: Ancestor) -> str:
    step = ancestor.get("step")
    return f"{ancestor.get('weights')} weights of {ancestor.get('path')}" + (
        f" (step {step})" if step is not None else ""
    )
