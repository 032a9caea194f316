"""The exported form of a model: its weights in one safetensors file, and beside it what must be known to use them.

    FOLDER/model.safetensors    canonical names of parameters and persistent buffers; `positions` where they are not
                                the computed ones
    FOLDER/config.json          the config (model, pool, training recipe, how to sample), time convention, what is known
                                of the data, provenance, SHA-256 of each file of weights, which is checked on load

Nothing in it is ever unpickled. A loaded model is in our time convention (see `time_convention`), whichever the stored
weights have.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ep.checkpoint.store import PARTIAL, CheckpointError
from diffmoe_ep.checkpoint.time_convention import REWRITTEN, TimeConvention, reverse_time
from diffmoe_ep.config import Config, ConfigError, ModelConfig, from_tree, nested, of_role, to_tree, today
from diffmoe_ep.config.foreign import open_binary, parse_json, read_bytes
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.embed import sine_positions
from diffmoe_ep.model.parallelize import build_sharded, is_expert
from diffmoe_ep.parallel.mesh import Mesh

Kind = tuple[tuple[int, ...], str]  # shape and type, in the words of safetensors

FORMAT = 3  # 2 had no checksums; 1 called the time convention clock, and config keys by other names
CONFIG, WEIGHTS = "config.json", "model.safetensors"
READABLE = 0o644  # by others, whatever the library that writes a file thinks
POSITIONS = "positions"
TYPES = {torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True)
class Exported:
    """What a folder's config.json says."""

    config: Config
    """Model, pool, training recipe and how to sample; folders and ranks are at their defaults."""
    time_convention: TimeConvention
    """The convention in which the weights predict."""
    data_info: DataInfo
    """What is known of the data: kind, shape, scale, shift, class names; may be empty."""
    provenance: dict[str, Any]
    """Where the weights come from."""
    sha256: dict[str, str]
    """Checksum of each file of weights, by name; none where an earlier version wrote the folder."""


def save_exported(
    source: DiT | Mapping[str, Tensor],
    config: Config,
    data_info: DataInfo,
    folder: str | Path,
    *,
    time_convention: TimeConvention = "forward",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole model (not a rank's slice), or its tensors by canonical name, as a new folder, complete or not at
    all.

    time_convention: of the tensors; a model's is forward. Raises CheckpointError if the tensors are not those of
    config.model, or the folder holds something.
    """
    with new_folder(Path(folder)) as partial:
        write_exported(partial, source, config, data_info, time_convention=time_convention, provenance=provenance)
    return Path(folder)


def write_exported(
    folder: Path,
    source: DiT | Mapping[str, Tensor],
    config: Config,
    data_info: DataInfo,
    *,
    time_convention: TimeConvention = "forward",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files into an existing folder, and vouch for those of weights that are there already; see
    `save_exported`.
    """
    if isinstance(source, DiT) and time_convention != "forward":
        raise CheckpointError(f"{folder}: a model in memory is of the time convention forward, not {time_convention}")
    tensors = _state(source) if isinstance(source, DiT) else dict(source)
    stored = {
        name: (tuple(tensor.shape), TYPES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()
    }
    compare(stored, config.model, str(folder))
    content = {
        "format": FORMAT,
        "time_convention": time_convention,
        "config": _kept(config),
        "data": data_info.to_json(),
        "provenance": dict(provenance or {}),
    }
    write_tensors(folder / WEIGHTS, tensors)
    content["sha256"] = {file.name: _sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG).chmod(READABLE)


def _kept(config: Config) -> dict[str, Any]:
    """What of a config says what the model is, how it was trained and how it is sampled; not where things lie."""
    made = of_role(config, "identity", "recipe")
    trained = {key: value for key, value in made.items() if not key.startswith(("data.", "init_"))}
    return nested(trained | {f"sample.{key}": value for key, value in to_tree(config.sample).items()})


def is_exported(path: Path) -> bool:
    """Whether a path is a folder of this form."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read_exported(folder: str | Path) -> Exported:
    """Read and check config.json; raises CheckpointError."""
    path = Path(folder) / CONFIG
    if not is_exported(Path(folder)):
        raise CheckpointError(
            f"{folder} does not hold {CONFIG} and {WEIGHTS}: name a folder with a model in the exported form"
        )
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): use a sound copy") from error
    if isinstance(content, dict) and content.get("format") == 1:
        content["time_convention"] = content.pop("clock", None)
        content["config"] = today(content["config"]) if isinstance(content.get("config"), dict) else None
    if isinstance(content, dict) and content.get("format") in (1, 2):
        content["sha256"] = {}
    expected = {"format": int, "time_convention": str, "config": dict, "data": dict, "provenance": dict, "sha256": dict}
    for key, kind in expected.items():
        if not isinstance(content, dict) or type(content.get(key)) is not kind:
            raise CheckpointError(
                f"{path} lacks {key}, or it is no {kind.__name__}: the folder was not saved by this program"
            )
    if content["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this version reads up to {FORMAT}: install a newer diffmoe_ep"
        )
    try:
        config = from_tree(content["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    convention: TimeConvention = "reversed" if content["time_convention"] == "reversed" else "forward"
    if convention != content["time_convention"]:
        raise CheckpointError(f"{path}: time_convention is {content['time_convention']!r}; it is forward or reversed")
    if convention == "reversed" and config.train.objective != "flow":
        raise CheckpointError(
            f"{path}: time_convention reversed is for objective flow, not {config.train.objective}; set it to forward"
        )
    try:
        data_info = DataInfo.from_json(content["data"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; use a sound copy") from error
    sums = content["sha256"]
    if content["format"] == FORMAT and WEIGHTS not in sums:
        raise CheckpointError(f"{path}: sha256 has no sum of {WEIGHTS}: use a sound copy")
    return Exported(config, convention, data_info, content["provenance"], sums)


def load_exported(folder: str | Path, config: Config | None = None, mesh: Mesh | None = None) -> DiT:
    """Load a model in eval mode; it predicts eps - x_0 at t (under flow) whatever the convention of the stored weights.

    config: the folder's own, or one of the same model that computes it another way (precision, kernel). mesh: this
    rank's device, and the ranks over which the experts are sharded; each reads only its own. The checksum and names,
    shapes and types are compared before anything is read; raises CheckpointError that names the first differing key.
    """
    exported, mesh = read_exported(folder), mesh or Mesh()
    check_sums(Path(folder), exported, mesh)
    next(stored_tensors(Path(folder), exported))  # names, shapes and types are compared before a model takes memory
    model = build_sharded(config or exported.config, mesh)
    fill(model, Path(folder), exported, mesh, model.state_dict() | {POSITIONS: model.positions})
    return model.to(mesh.device).eval()


def check_sums(folder: Path, exported: Exported, mesh: Mesh, files: tuple[str, ...] = (WEIGHTS,)) -> None:
    """Raise CheckpointError on all ranks unless files have the sums in config.json; collective, the first one looks."""
    problem: object = None
    for name in files if mesh.is_first else ():
        try:
            if name in exported.sha256 and _sha256(folder / name) != exported.sha256[name]:
                problem = f"{folder / name} is damaged: it has not the SHA-256 that {CONFIG} names; use a sound copy"
        except OSError as error:
            problem = f"{folder / name} cannot be read ({error}): use a sound copy"
    problem = mesh.same(problem)
    if problem:
        raise CheckpointError(str(problem), everywhere=True)


def _sha256(path: Path) -> str:
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def fill(model: DiT, folder: Path, exported: Exported, mesh: Mesh, into: Mapping[str, Tensor]) -> None:
    """Copy stored weights into a model's tensors by name, as far as they are given, in our time convention; of experts
    those of this rank.
    """
    here = model.config.num_experts // mesh.expert.size
    experts = slice(mesh.expert.rank * here, (mesh.expert.rank + 1) * here)
    for name, tensor in stored_tensors(folder, exported, experts):
        if name in into:
            into[name].copy_(tensor)
    if exported.time_convention == "reversed":
        rewritten = reverse_time({name: into[name].cpu() for name in REWRITTEN}, model.config)
        for name, tensor in rewritten.items():
            into[name].copy_(tensor)


def stored_tensors(folder: Path, exported: Exported, experts: slice = slice(None)) -> Iterator[tuple[str, Tensor]]:
    """The weights by canonical name, one after the other, once their names, shapes and types were checked; of stacks
    only `experts`.
    """
    file = folder / WEIGHTS
    with opened(file) as source:
        names = source.keys()
        slices = {name: source.get_slice(name) for name in names}
        compare(
            {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()},
            exported.config.model,
            str(file),
        )
        for name in names:
            tensor = slices[name][experts] if is_expert(name) else source.get_tensor(name)
            if name == POSITIONS:
                check_positions(tensor, exported.config.model, f"{file}: {name}")
            yield name, tensor


# ---- What is stored ----


def kinds_of(model: ModelConfig) -> dict[str, Kind]:
    """Shape and type of every tensor of a model's state, by canonical name."""
    with torch.device("meta"):
        built = DiT(model)
    return {name: (tuple(tensor.shape), TYPES[tensor.dtype]) for name, tensor in built.state_dict().items()}


def compare(stored: Mapping[str, Kind], model: ModelConfig, where: str) -> None:
    """Raise CheckpointError that names the first key in which stored tensors are not those of a model."""
    tokens = (model.input_size // model.patch) ** 2
    check_blocks(model, len(stored), where)
    wanted = kinds_of(model)
    compare_kinds(stored, wanted, {POSITIONS: ((tokens, model.hidden_size), "F32")}, where)


def check_blocks(model: ModelConfig, num_tensors: int, where: str) -> None:
    """Raise CheckpointError where a config has more blocks than there are tensors: each would have to be built before
    anything could be compared.
    """
    if model.num_blocks > num_tensors:
        raise CheckpointError(
            f"{where} has {num_tensors} tensors, too few for the {model.num_blocks} blocks of its config, which is of "
            "another model"
        )


def compare_kinds(
    stored: Mapping[str, Kind], wanted: Mapping[str, Kind], optional: Mapping[str, Kind | None], where: str
) -> None:
    """Raise CheckpointError unless the stored tensors are the wanted ones, and perhaps optional ones (of None: any
    kind).
    """
    for name, kind in {**wanted, **optional}.items():
        if name in wanted and name not in stored:
            raise CheckpointError(
                f"{where} has no tensor {name}, of shape {kind and kind[0]} here; its config is of another model"
            )
        if name in stored and kind is not None and stored[name] != kind:
            number, what = (0, "shape") if stored[name][0] != kind[0] else (1, "type")
            raise CheckpointError(
                f"{where}: {name} has {what} {stored[name][number]} there and {kind[number]} in a model of its config"
            )
    for name in stored:
        if name not in wanted and name not in optional:
            raise CheckpointError(f"{where} holds {name}, which a model of its config does not have")


def check_positions(positions: Tensor, model: ModelConfig, where: str) -> None:
    """Raise CheckpointError unless stored positions (T, D) are the computed ones, up to what averaging in float32 does
    to a constant.
    """
    computed = sine_positions(model.hidden_size, model.input_size // model.patch)
    distance = float((positions.float() - computed).abs().max())
    if not distance < 1e-3:
        reason = "there the first half of D codes the column, the second the row, each as sines and then cosines"
        raise CheckpointError(
            f"{where} are not the fixed sine-cosine positions (they differ by {distance:.2g}): {reason}"
        )


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, each with memory of its own, as that form wants it."""
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen
        plain[name] = tensor.clone() if shared else tensor
        seen.add(tensor.data_ptr())
    save_file(plain, file, metadata={"format": "pt"})
    file.chmod(READABLE)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors are read one by one; raises CheckpointError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as source:
            yield source
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): use a sound copy") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name once it is complete; raises CheckpointError if something is there
    already.
    """
    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder: give another one")
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); it needs permission and enough space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _state(model: DiT) -> dict[str, Tensor]:
    """A model's state, and its positions where they are not the computed ones to the bit."""
    computed = sine_positions(model.config.hidden_size, math.isqrt(len(model.positions)))
    same = torch.equal(model.positions.detach().cpu(), computed)
    return dict(model.state_dict()) | ({} if same else {POSITIONS: model.positions})
