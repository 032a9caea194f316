"""A checkpoint of the published reference implementation, read into the exported form.

It is a `torch.save` dictionary of `model`, `ema`, `opt` and `args`. What is imported keeps its weights untouched: names
change, each expert's matrices are transposed and stacked, and the time convention is said to be reversed (see
`time_convention`). So the way back is bit for bit.

    FOLDER/model.safetensors, config.json    the requested set (ema or model) in the exported form
    FOLDER/reference.safetensors             what that form has no place for, for the way back alone: constants and
                                             the other set

The optimizer's state (`opt`) is not carried.
"""

import argparse  # a published checkpoint holds its arguments as an argparse.Namespace
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.exported import (
    POSITIONS,
    TYPES,
    Kind,
    check_positions,
    compare_kinds,
    kinds_of,
    new_folder,
    write_exported,
    write_tensors,
)
from diffmoe_ep.checkpoint.published_names import (
    REST,
    STACKED,
    THEIR_DECAY,
    THEIR_POSITIONS,
    their_names,
    their_shape,
    to_ours,
)
from diffmoe_ep.checkpoint.store import CheckpointError
from diffmoe_ep.checkpoint.time_convention import TimeConvention
from diffmoe_ep.config import SIZES, Config, ConfigError, ModelConfig, from_tree
from diffmoe_ep.data.info import DataInfo

Weights = Literal["ema", "model"]

WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)*")  # of models in DistributedDataParallel or torch.compile
UNREADABLE = (  # what torch.load and zipfile raise for a damaged file
    OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError, AssertionError,
    MemoryError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
DECAY = 0.95
LATENT = (0.18215, 0.0)  # scale and shift of the VAE's latents that the published models draw


def import_published(
    file: str | Path,
    out: str | Path,
    *,
    heads: int | None = None,
    input_size: int | None = None,
    weights: Weights = "ema",
    objective: Literal["flow", "ddpm"] = "flow",
    both: bool = True,
) -> Path:
    """Read a published checkpoint into a new folder that `load_model` reads, and return that folder.

    The sizes follow from the tensors' shapes; `heads` does not, nor `input_size` of a file without positions, nor what
    a model was trained to predict (`objective`). weights: which of the two sets; both: keep the other one too, for the
    way back. Raises CheckpointError.
    """
    where = str(file)
    content = _read(Path(file))
    if weights not in content:
        there = ", ".join(str(key) for key in content)
        raise CheckpointError(f"{where} holds no {weights} (it holds {there}); ask for what it has with --weights")
    tensors, prefix = _tensors(content[weights], f"{where}: {weights}")
    config = _config(tensors, where, heads, input_size, weights, objective)
    _check(tensors, config.model, f"{where}: {weights}")
    ours = to_ours(tensors, config.model)
    prefixes: dict[str, str] = {weights: prefix}
    positions, other = None, "model" if weights == "ema" else "ema"
    if THEIR_POSITIONS in tensors:
        positions = list(tensors[THEIR_POSITIONS].shape)
        ours[POSITIONS] = tensors[THEIR_POSITIONS].reshape(-1, config.model.hidden_size)
    rest = {f"{weights}.{name}": tensor for name, tensor in tensors.items() if name.endswith(f".{THEIR_DECAY}")}
    if both and other in content:
        others, prefixes[other] = _tensors(content[other], f"{where}: {other}")
        _check(others, config.model, f"{where}: {other}")
        rest |= {f"{other}.{name}": tensor for name, tensor in others.items()}
    args = content.get("args")
    provenance = {
        "source": "reference",
        "file": Path(file).name,
        "weights": weights,
        "prefixes": prefixes,
        "positions": positions,
        "args": _plain(vars(args) if isinstance(args, argparse.Namespace) else args),
        "left_out": [str(key) for key in content if key not in ("args", *prefixes)],
    }
    model = config.model
    scale, shift = LATENT if model.in_channels == 4 else (None, None)
    data_info = DataInfo(
        name="reference",
        kind="moments",
        shape=(model.in_channels, model.input_size, model.input_size),
        scale=scale,
        shift=shift,
        num_classes=model.num_classes,
    )
    with new_folder(Path(out)) as partial:
        convention: TimeConvention = "reversed" if objective == "flow" else "forward"
        if rest:
            write_tensors(partial / REST, rest)
        write_exported(partial, ours, config, data_info, time_convention=convention, provenance=provenance)
    return Path(out)


@contextmanager
def _only_namespaces() -> Iterator[None]:
    """Let torch.load rebuild tensors and argparse.Namespace, and nothing that some library has allowed besides."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _read(file: Path) -> dict[str, Any]:
    """The dictionary in a reference file; its tensors stay on the disk until they are used."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file: name a checkpoint of the reference implementation (.pt)")
    _check_records(file)
    try:
        with _only_namespaces():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|function) (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is no plain pickle"
        raise CheckpointError(
            f"{file} holds more than tensors and plain arguments: {reason}. It was not run; use a file that was made "
            "by the "
            "reference's training, from a source that you trust"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{file} cannot be read as a file of torch.save ({type(error).__name__}): use a sound copy"
        ) from error
    if not isinstance(content, dict) or not ({"ema", "model"} & content.keys()):
        raise CheckpointError(
            f"{file} is no checkpoint of the reference implementation: it is no dictionary with model, ema and args"
        )
    return content


def _check_records(file: Path) -> None:
    """Raise CheckpointError unless all in a zip of torch.save has its checksum, at which torch.load does not look."""
    if not zipfile.is_zipfile(file):
        return  # the form before it, which has none
    try:
        with zipfile.ZipFile(file) as records:
            damaged = records.testzip()
    except UNREADABLE as error:
        raise CheckpointError(f"{file} cannot be read as a file of torch.save ({error}): use a sound copy") from error
    if damaged:
        raise CheckpointError(f"{file} is damaged: {damaged} in it has not its checksum; use a sound copy")


def _tensors(state: Any, where: str) -> tuple[dict[str, Tensor], str]:
    """A state by plain names, and what a wrapper had put before each."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{where} is no state of a model, names -> tensors")
    prefix = WRAPPERS.match(str(next(iter(state))))
    assert prefix is not None
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not name.startswith(prefix[0]):
            raise CheckpointError(f"{where}: {name} does not begin with {prefix[0]!r}, as the first name does")
        backed = (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and not tensor.is_quantized
            and tensor.device.type == "cpu"
        )
        if not backed or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise CheckpointError(f"{where}: {name} is no plain tensor")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite; use a sound copy")
        tensors[name[len(prefix[0]) :]] = tensor.detach()
    return tensors, prefix[0]


def _config(
    tensors: Mapping[str, Tensor],
    where: str,
    heads: int | None,
    input_size: int | None,
    weights: Weights,
    objective: str,
) -> Config:
    """The config that follows from the shapes, with what was requested; raises CheckpointError."""
    hidden, in_channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, where)
    features, _ = _shape(tensors, "final_layer.linear.weight", 2, where)
    rows, _ = _shape(tensors, "y_embedder.embedding_table.weight", 2, where)
    numbers = {int(match[1]) for match in (re.match(r"blocks\.(\d{1,6})\.", name) for name in tensors) if match}
    blocks = len(numbers)
    if numbers != set(range(blocks)) or not blocks:
        raise CheckpointError(f"{where}: its blocks are not numbered 0, 1, 2, ... without gaps")
    moe = [block for block in range(blocks) if f"blocks.{block}.mlp.gate_weight" in tensors]
    if moe not in ([], list(range(1, blocks, 2)), list(range(blocks))):
        raise CheckpointError(
            f"{where}: blocks {', '.join(map(str, moe))} are MoE; only every odd block, every block or none can be"
        )
    for block in moe:
        if f"blocks.{block}.mlp.capacity_predictor.0.weight" not in tensors:
            raise CheckpointError(
                f"{where} has no blocks.{block}.mlp.capacity_predictor.0.weight, so its experts are not DiffMoE's "
                "(TC-DiT or EC-DiT); "
                "DiffMoE and Dense can be imported"
            )
    size = _input_size(tensors, patch, where, input_size)
    missing = [name for name, value in (("--heads", heads), ("--input-size", size)) if value is None]
    if missing:
        known = {width: count for width, _, count in SIZES.values()}
        hint = (
            f" (of the published models, the one of hidden size {hidden} has {known[hidden]} heads)"
            if hidden in known
            else ""
        )
        raise CheckpointError(
            f"{where}: the tensors' shapes do not tell {' and '.join(missing)}; give {' and '.join(missing)}{hint}"
        )
    assert heads is not None
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"{where}: --heads {heads} does not divide the hidden size {hidden}")
    if features % patch**2:
        raise CheckpointError(
            f"{where}: final_layer.linear.weight has {features} rows, no multiple of the patch's {patch} x {patch} "
            "pixels"
        )
    model: dict[str, Any] = {
        "family": "diffmoe" if moe else "dense",
        "input_size": size,
        "in_channels": in_channels,
        "out_channels": features // patch**2,
        "patch": patch,
        "hidden_size": hidden,
        "num_blocks": blocks,
        "num_heads": heads,
        "num_classes": rows - 1,
    }
    if moe:
        model["interleave"] = len(moe) < blocks
        model["num_experts"] = _shape(tensors, f"blocks.{moe[0]}.mlp.gate_weight", 2, where)[0]
        model["threshold_decay"] = _decay(tensors, where)
    sample = {"weights": weights} | (
        {"selection": "count", "threshold": "raw"} if moe else {}
    )  # as the reference samples
    tree = {
        "model": model,
        "pool": {"span": "all"},
        "train": {"objective": objective, "precision": "float32"},
        "sample": sample,
    }
    try:
        return from_tree(tree)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _input_size(tensors: Mapping[str, Tensor], patch: int, where: str, asked: int | None) -> int | None:
    """Height and width of the latent, from the number of positions."""
    if THEIR_POSITIONS not in tensors:
        return asked
    positions = tensors[THEIR_POSITIONS]
    tokens = positions.shape[-2] if positions.dim() in (2, 3) else 0
    side = math.isqrt(tokens)
    if not tokens or side**2 != tokens or positions.numel() != tokens * positions.shape[-1]:
        raise CheckpointError(
            f"{where}: {THEIR_POSITIONS} has shape {tuple(positions.shape)}; it is (1, T, D) of a square of T tokens"
        )
    if asked not in (None, side * patch):
        raise CheckpointError(
            f"{where} is of --input-size {side * patch} by its {THEIR_POSITIONS}, not {asked}; leave it out"
        )
    return side * patch


def _decay(tensors: Mapping[str, Tensor], where: str) -> float:
    """The thresholds' decay: what the file says, or the published one; averaging may have moved a stored constant by a
    little.
    """
    decay = DECAY
    for name, tensor in tensors.items():
        if name.endswith(f".{THEIR_DECAY}"):
            value = float(tensor) if tensor.numel() == 1 else math.nan
            if not 0 < value < 1:
                raise CheckpointError(f"{where}: {name} is {value:g}; it is one number between 0 and 1")
            if abs(value - decay) > 1e-3:
                decay = value
    return decay


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{where} has no tensor {name}: it is no checkpoint of the reference implementation")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{where}: {name} has shape {shape}; it has {dimensions} dimensions, none empty")
    return shape


def _check(tensors: Mapping[str, Tensor], model: ModelConfig, where: str) -> None:
    """Raise CheckpointError, naming the first differing key, unless the tensors are all that a reference model of these
    sizes has.
    """
    wanted: dict[str, Kind] = {}
    for name, (shape, kind) in kinds_of(model).items():
        for their in their_names(name, model):
            wanted[their] = (their_shape(name, shape[1:]) if STACKED.fullmatch(name) else shape, kind)
    moe = [name.removesuffix("gate_weight") for name in wanted if name.endswith(".gate_weight")]
    optional: dict[str, Kind | None] = dict.fromkeys([*(name + THEIR_DECAY for name in moe), THEIR_POSITIONS])
    stored = {
        name: (tuple(tensor.shape), TYPES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()
    }
    compare_kinds(stored, wanted, optional, where)
    if THEIR_POSITIONS in tensors:
        positions = tensors[THEIR_POSITIONS]
        if positions.shape[-1] != model.hidden_size or positions.dtype != torch.float32:
            raise CheckpointError(
                f"{where}: {THEIR_POSITIONS} is {tuple(positions.shape)} {positions.dtype}; it is (1, T, D) float32"
            )
        check_positions(positions.reshape(-1, model.hidden_size), model, f"{where}: {THEIR_POSITIONS}")


def _plain(value: Any) -> Any:
    """An argument as JSON holds it; what is no plain value is kept as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return repr(value)
