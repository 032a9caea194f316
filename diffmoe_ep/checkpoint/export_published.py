"""A model in the exported form, written as a checkpoint of the published implementation."""

import argparse  # a published checkpoint holds its arguments as an argparse.Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.exported import (
    POSITIONS,
    WEIGHTS,
    Exported,
    check_sums,
    opened,
    read_exported,
    stored_tensors,
)
from diffmoe_ep.checkpoint.published_names import REST, THEIR_DECAY, THEIR_POSITIONS, to_theirs
from diffmoe_ep.checkpoint.store import PARTIAL, CheckpointError
from diffmoe_ep.checkpoint.time_convention import reverse_time
from diffmoe_ep.config import ModelConfig, has_predictor, to_tree
from diffmoe_ep.model.embed import sine_positions
from diffmoe_ep.parallel.mesh import Mesh


def export_published(folder: str | Path, file: str | Path) -> None:
    """Write a model in the exported form as a new published checkpoint.

    What was imported comes back bit for bit: every tensor of both sets, or of the one that was kept, and args. A flow
    model of ours is rewritten to its time convention by an exact rewrite of two layers, whose weights are rounded
    to float32 again; a DDPM model needs none. `expert_threshold` is what `dynamic` sampling uses. Where only one set is
    known, it stands under both `ema` and `model`. `opt` is not carried: such a file can be sampled from, its training
    cannot be continued. Raises CheckpointError.
    """
    folder, file = Path(folder), Path(file)
    exported = read_exported(folder)
    _check_family(exported.config.model, folder)
    if file.exists():
        raise CheckpointError(f"{file} exists: give the name of a new file")
    check_sums(folder, exported, Mesh(), (WEIGHTS, REST))
    ours = dict(stored_tensors(folder, exported))
    sets = _sets(folder, exported, ours)
    only = next(iter(sets.values()))
    content: dict[str, Any] = {name: sets.get(name, only) for name in ("model", "ema")}
    args = exported.provenance.get("args") if _is_imported(exported) else to_tree(exported.config.model)
    if args is not None:
        content["args"] = argparse.Namespace(**args)
    partial = file.with_name(file.name + PARTIAL)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.rename(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error}); it needs permission and enough space") from error
    finally:
        if partial.exists():
            partial.unlink()


def _is_imported(exported: Exported) -> bool:
    return exported.provenance.get("source") == "reference"


def _check_family(model: ModelConfig, folder: Path) -> None:
    strange = {
        "family": model.family not in ("dense", "diffmoe"),
        "granularity": model.granularity != 1,
        "shared_experts": model.shared_experts != 0,
        "predictor": model.family == "diffmoe" and not has_predictor(model),
    }
    for key, differs in strange.items():
        if differs and (key == "family" or model.family != "dense"):
            raise CheckpointError(
                f"{folder} has model.{key} {getattr(model, key)}, which the reference's DiffMoE and Dense models do "
                "not have"
            )


def _sets(folder: Path, exported: Exported, ours: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The sets of tensors by their names: the one of the exported form, and what the import laid beside it."""
    model, provenance = exported.config.model, exported.provenance
    weights = str(provenance.get("weights", "ema"))
    if exported.time_convention == "forward" and exported.config.train.objective == "flow":
        ours = reverse_time(ours, model)
    sets = {weights: to_theirs(ours, model)}
    shape = provenance.get("positions") if _is_imported(exported) else (1, -1, model.hidden_size)
    if shape is not None:
        positions = ours.get(POSITIONS, sine_positions(model.hidden_size, model.input_size // model.patch))
        sets[weights][THEIR_POSITIONS] = positions.view(tuple(shape))
    if not _is_imported(exported):
        decay = torch.tensor(model.threshold_decay)
        names = [name.removesuffix("gate_weight") for name in sets[weights] if name.endswith(".gate_weight")]
        sets[weights] |= {f"{name}{THEIR_DECAY}": decay for name in names}
    elif (folder / REST).is_file():
        with opened(folder / REST) as source:
            names = source.keys()
            for name in names:
                which, _, key = name.partition(".")
                sets.setdefault(which, {})[key] = source.get_tensor(name)
    prefixes = provenance.get("prefixes", {}) if _is_imported(exported) else {}
    return {
        which: {prefixes.get(which, "") + name: tensor for name, tensor in tensors.items()}
        for which, tensors in sets.items()
    }
