"""What is fuzzed: small sound files of each kind, how their checksums are made good again after a change, how they are
read, and what may be said of a file that reads as something else.
"""

import hashlib
import io
import json
import math
import os
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint.published import saved
from data_prep.write import write_dataset
from diffmoe_ep.checkpoint.exported import load_exported, read_exported, save_exported
from diffmoe_ep.checkpoint.fragments import whole
from diffmoe_ep.checkpoint.import_published import import_published
from diffmoe_ep.checkpoint.load import config_of, data_info_of, load_model
from diffmoe_ep.checkpoint.same_run import recipe_of
from diffmoe_ep.checkpoint.saving import save
from diffmoe_ep.checkpoint.store import read_meta, resolve
from diffmoe_ep.config import Config, ConfigError, dump, from_tree, load, load_stored, override, to_tree
from diffmoe_ep.data.captions import CaptionSpec
from diffmoe_ep.data.checked import read_chosen, read_sample
from diffmoe_ep.data.codec import Caption, encode
from diffmoe_ep.data.index import MemberSpec, index_folder
from diffmoe_ep.data.info import DataInfo
from diffmoe_ep.data.inspect import stats
from diffmoe_ep.data.integrity import check_folder
from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.resampled import PlainTars
from diffmoe_ep.data.manifest import NPY_ERRORS, Manifest, TextEncoderInfo
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.shards import MEMBER, Dataset
from diffmoe_ep.encoders.local_folder import read_config, weight_files
from diffmoe_ep.evaluate.compare import read_run
from diffmoe_ep.model.dit import DiT
from diffmoe_ep.model.initialize import initialize
from diffmoe_ep.planner.cluster import load_cluster
from diffmoe_ep.planner.memory import reduce_bucket
from diffmoe_ep.sampling.prompts import read_prompts
from diffmoe_ep.train.curves import _records, _series
from diffmoe_ep.train.run_folder import MetricsFile
from diffmoe_ep.train.run_lock import _holder, _read

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes]
MODEL = {
    "input_size": 4, "in_channels": 2, "out_channels": 4, "hidden_size": 8, "num_heads": 2, "num_blocks": 2,
    "num_classes": 3, "num_experts": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One kind of files, and its loader."""

    name: str
    files: Files
    """Sound ones, by path."""
    changed: tuple[str, ...]
    """Those that are damaged."""
    read: Callable[[Path], Any]
    """What a folder of such files means; values that compare equal where it is the same."""
    valid: Callable[[Any], bool]
    """Whether another meaning is one that the format allows."""
    sign: Callable[[Files], None] | None = None
    """Makes checksums good again, so that what was changed gets past them."""
    aims: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """Of files that are mostly padding, where their contents lie."""


def subjects() -> list[Subject]:
    """All, made anew."""
    with tempfile.TemporaryDirectory() as folder:
        return [make(Path(folder) / str(number)) for number, make in enumerate(MAKERS)]


def _files(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# -- settings ----------------------------------------------------------------------------------------------------------


def _config(folder: Path) -> Subject:
    text = "# a run\n" + dump(from_tree({"model": MODEL, "data": {"mixture": [{"folder": "a", "weight": 2}]}}))
    short = b"a: &x {lr: 1.0e-3}\n".replace(b"a: &x ", b"train: {optimizer: ").replace(b"}\n", b"}}\nseed: 3\n")
    files = {"config.yaml": text.encode(), "short.yaml": short}
    return Subject(
        "config", files, tuple(files),
        lambda folder: (load(folder / "config.yaml"), load_stored(folder / "short.yaml")),
        lambda found: all(override(config, []) == config for config in found),
    )  # fmt: skip


def _settings(folder: Path) -> Subject:
    files = {"words": b"train.steps=20 data.flip=true model.size=null train.optimizer.betas=[0.9,0.95] folder=runs/a"}

    def read(folder: Path) -> Config:
        path = folder / "words"
        return override(Config(), path.read_bytes().decode(errors="replace").split() if path.is_file() else [])

    return Subject("key=value", files, ("words",), read, lambda found: override(found, []) == found)


def _cluster(folder: Path) -> Subject:
    files = {
        "cluster.yaml": (ROOT / "configs/cluster/h800x8.yaml").read_bytes(),
        "ds.json": b'{"a": {"b": [1, 2.5]}, "c": ""}',
    }
    files["ds.json"] = b'{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}'

    def read(folder: Path) -> Any:
        bucket = reduce_bucket(
            replace(Config(), parallel=replace(Config().parallel, deepspeed=str(folder / "ds.json")))
        )
        return load_cluster(folder / "cluster.yaml"), bucket

    return Subject(
        "cluster, DeepSpeed", files, tuple(files), read,
        lambda found: found[0].nodes > 0 and math.isfinite(found[0].memory_gb) and 0 < found[1] < 2**63,
    )  # fmt: skip


def _encoder(folder: Path) -> Subject:
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    files = {
        "config.json": json.dumps({"model_type": "t5", "d_model": 8}).encode(), "m-1.safetensors": b"1",
        "m-2.safetensors": b"2", "model.safetensors.index.json": json.dumps(index).encode(),
    }  # fmt: skip

    def read(folder: Path) -> Any:
        found = weight_files(folder, "model")
        assert all(path.parent == folder for path in found)
        return read_config(folder, "text.folder", "a T5"), [path.name for path in found]

    return Subject(
        "encoder's folder", files, ("config.json", "model.safetensors.index.json"), read,
        lambda found: isinstance(found[0], dict) and all("/" not in name for name in found[1]),
    )  # fmt: skip


def _prompts(folder: Path) -> Subject:
    files = {"prompts": b"# of a test\na red fox\n\n  a house by the sea\na cat on a mat\n"}
    return Subject(
        "prompts", files, ("prompts",), lambda folder: read_prompts(folder / "prompts"),
        lambda found: bool(found) and all(text.strip() and text.encode() for text in found),
    )  # fmt: skip


@cache
def _bash() -> "subprocess.Popen[str]":
    """A shell that answers, for each path of a hostfile, with what launch/deepspeed.sh reads there."""
    text = (ROOT / "launch/deepspeed.sh").read_text()
    function = text[text.index("read_hostfile() {") : text.index("\n}\n", text.index("read_hostfile() {"))] + "\n}\n"
    program = function + (
        'fail_launch() { printf "launch: %s\\n" "$*"; exit 1; }\n'
        'while IFS= read -r hostfile; do (hosts=() slots=() nodes="" gpus=""; read_hostfile; '
        'for index in "${!hosts[@]}"; do printf "%s %s\\n" "${hosts[index]}" "${slots[index]}"; done); '
        'echo "end $?"; done'
    )
    return subprocess.Popen(
        ["bash", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip


def _hostfile(folder: Path) -> Subject:
    files = {"hosts": b"# two racks\nnode-1 slots=8\nnode-2.example.org slots=8  # the second\nme@192.0.2.7 slots=4\n"}

    def read(folder: Path) -> list[str]:
        shell = _bash()
        assert shell.stdin is not None and shell.stdout is not None
        shell.stdin.write(f"{folder / 'hosts'}\n")
        shell.stdin.flush()
        lines: list[str] = []
        while not (line := shell.stdout.readline()).startswith("end "):
            assert line, "the shell ended"
            lines.append(line.rstrip("\n"))
        if line != "end 0\n":
            assert lines[-1].startswith("launch: "), lines
            raise ConfigError(lines[-1])
        return lines

    def valid(found: list[str]) -> bool:
        hosts = [line.split(" ") for line in found]
        return bool(hosts) and all(
            len(host) == 2 and host[0].replace("@", "a", 1).translate(PLAIN) == "" and host[0][0] not in "-."
            and 0 < int(host[1]) < 10_000 for host in hosts
        )  # fmt: skip

    return Subject("hostfile", files, ("hosts",), read, valid)


PLAIN = str.maketrans("", "", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-")


# -- a run's folder ----------------------------------------------------------------------------------------------------


def _metrics(folder: Path) -> Subject:
    lines = [
        {"step": 5 * n, "samples": 80 * n, "loss": 1 / n, "diffusion_loss": 0.9 / n, "capacity_per_layer": [1.0, 0.5]}
        for n in range(1, 5)
    ]  # fmt: skip
    files = {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode() + b'{"step": 25, "lo'}

    def read(folder: Path) -> Any:
        path = folder / "metrics.jsonl"
        if path.exists() and not path.is_file():
            raise ConfigError("RunFolder.problem tells it")
        if path.exists():
            records = _records(path)
            drawn = [_series(records, key)[1].tolist() for key in ("loss", "diffusion_loss", "capacity_per_layer")]
        else:
            drawn = []
        before = path.read_bytes() if path.exists() else b""
        with redirect_stderr(io.StringIO()):
            MetricsFile(path, 15).close()
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        aside = [other.read_bytes() for other in folder.glob("metrics.jsonl.damaged-*")]
        assert aside in ([], [before])
        return repr((drawn[0][:3] if drawn else [], kept))

    def valid(found: str) -> bool:
        return len(found) < 100_000

    return Subject("metrics.jsonl", files, ("metrics.jsonl",), read, valid)


def _run(folder: Path) -> Subject:
    files = {
        "config.yaml": dump(from_tree({"model": MODEL})).encode(),
        "metrics.jsonl": b'{"step": 5, "diffusion_loss": 0.5}\n{"step": 10, "diffusion_loss": 0.4}\n',
        "scores/scores.json": b'{"accuracy": 0.5, "frechet": 10.0, "capacity": 0.7}\n',
        "recipe.jsonl": b'{"key": "train.optimizer.lr", "step": 5, "was": 0.001, "now": 0.0001}\n',
    }
    return Subject(
        "compared run", files, ("metrics.jsonl", "scores/scores.json", "recipe.jsonl"),
        lambda folder: repr(read_run(folder)), lambda found: found.startswith("Found("),
    )  # fmt: skip


def _notes(folder: Path) -> Subject:
    fault = quarantine.Fault("a.tar", "k1", "it is damaged", 17, "a.tar, key k2")
    files = {
        "lock.json": b'{"host": "node-1", "process": 4711, "since": "2026-11-27 09:00:00 +0000"}\n',
        "quarantine-rank0.jsonl": 2 * (json.dumps(asdict(fault)).encode() + b"\n"),
    }

    def read(folder: Path) -> Any:
        listed = quarantine.read(folder)
        quarantine.join(folder)
        descriptor = (
            os.open(folder / "lock.json", os.O_RDONLY | os.O_NONBLOCK) if (folder / "lock.json").is_file() else None
        )
        if descriptor is None:
            return listed, {}
        try:
            _holder(descriptor).encode()
            return listed, repr(_read(descriptor))
        finally:
            os.close(descriptor)

    return Subject(
        "lock, quarantine", files, tuple(files), read, lambda found: all(each.positions for each in found[0])
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> Subject:
    config = from_tree({"model": MODEL, "train": {"precision": "float32"}})
    model = initialize(DiT(config.model), 1)
    info = DataInfo("tiny", "moments", (2, 4, 4), "float16", 0.18, 0.0, 3, ("a", "b", "c"), "none")
    meta = {
        "config": to_tree(config), "samples_consumed": 8, "data": info.to_json(), "fingerprint": "0" * 64,
        "text_encoder": None, "ancestry": [{"path": "runs/a", "step": 3}],
        "recipe": [{"key": "train.optimizer.lr", "step": 1, "was": 1e-3, "now": 1e-4}],
    }  # fmt: skip
    pieces = [
        whole(f"{which}.{name}", tensor) for which in ("model", "ema") for name, tensor in model.state_dict().items()
    ]
    for step in (1, 2):
        save(folder, step, pieces, meta)
    files = {name: content for name, content in _files(folder).items() if "0000002" in name or name == "latest"}
    inner = "step-0000002/"

    def sign(files: Files) -> None:
        sums = {
            name: hashlib.sha256(files[inner + name]).hexdigest() for name in (".metadata", "meta.json", "__0_0.distcp")
        }
        files[inner + "SHA256SUMS"] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()

    def read(folder: Path) -> Any:
        found = resolve(folder)
        state = load_model(found).state_dict()
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        told = repr((config_of(found), data_info_of(found), recipe_of(found), read_meta(found)["step"]))
        return shapes == SHAPES, told, digest

    SHAPES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    changed = (
        "latest",
        *(inner + name for name in ("meta.json", "meta.json", ".metadata", ".metadata", "__0_0.distcp", "SHA256SUMS")),
    )
    return Subject("checkpoint", files, changed, read, lambda found: found[0] and len(found[1]) < 100_000, sign)


def _exported(folder: Path) -> Subject:
    config = from_tree({"model": MODEL, "train": {"precision": "float32"}})
    model = initialize(DiT(config.model), 1)
    info = DataInfo("tiny", "moments", (2, 4, 4), "float16", 0.18, 0.0, 3, ("a", "b", "c"), "none")
    save_exported(model, config, info, folder, provenance={"ancestry": []})
    files = _files(folder)
    SHAPES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}

    def read(folder: Path) -> Any:
        state = load_exported(folder).state_dict()
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
        same = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()} == SHAPES
        told = read_exported(folder)
        return same, repr(replace(told, sha256={})), digest

    def sign(files: Files) -> None:
        try:
            tree = json.loads(files["config.json"])
            tree["sha256"]["model.safetensors"] = hashlib.sha256(files["model.safetensors"]).hexdigest()
            files["config.json"] = json.dumps(tree).encode()
        except (ValueError, LookupError, TypeError, RecursionError):
            return

    return Subject("exported folder", files, tuple(files), read, lambda found: found[0], sign)


def _published(folder: Path, old: bool) -> Subject:
    """A file of torch.save, in its form of today (a zip) or in the one before it."""
    folder.mkdir()
    file = saved(folder)
    if old:
        content = torch.load(file, weights_only=False)  # made above
        torch.save(content, file, _use_new_zipfile_serialization=False)

    def read(folder: Path) -> Any:
        out = import_published(folder / "file.pt", folder / "out", heads=3, both=False)
        state = load_exported(out).state_dict()
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
        finite = all(tensor.isfinite().all() for tensor in state.values())
        return finite, repr(read_exported(out).config), digest

    def sign(files: Files) -> None:
        files["file.pt"] = files["file.pt"] if old else _with_sums_of_today(files["file.pt"])

    name = f"published file{', old form' if old else ''}"
    return Subject(name, {"file.pt": file.read_bytes()}, ("file.pt",), read, lambda found: found[0], sign)


def _with_sums_of_today(content: bytes) -> bytes:
    """A zip with the checksums of what its records now hold, as far as it can still be read as one."""
    made = bytearray(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as records:
            place = records.start_dir
            for record in records.infolist():
                name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)
                first = record.header_offset + 30 + name + extra
                sum_ = struct.pack("<I", zlib.crc32(content[first : first + record.file_size]))
                made[record.header_offset + 14 : record.header_offset + 18] = sum_
                made[place + 16 : place + 20] = sum_
                place += 46 + sum(struct.unpack_from("<HHH", content, place + 28))
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError):
        return content
    return bytes(made)


# -- datasets ----------------------------------------------------------------------------------------------------------


TEXT = (TextEncoderInfo("t5", 4, 8, "float32", "a" * 64),)


def _dataset(folder: Path, text: bool) -> Subject:
    drawn = np.random.default_rng(0)
    manifest = Manifest(
        "tiny", "moments", (2, 4, 4), "float16", 0.5, 0.0, 0 if text else 3, () if text else ("a", "b", "c"), "none",
        condition="text" if text else "class", text=TEXT if text else (),
    )  # fmt: skip
    samples: list[Any] = []
    for number in range(4):
        array = drawn.standard_normal(manifest.stored_shape).astype(np.float16)
        captions = (
            Caption("a fox", 1.0, (np.ones((2, 4), np.float16),)),
            Caption("a red fox", 2.0, (np.ones((3, 4), np.float16),)),
        )
        samples.append((f"k{number}", encode(array, captions if text else number % 3, manifest)))
    made = write_dataset(folder, samples, manifest, 3)
    files = {name: content for name, content in _files(folder).items() if name.endswith((".tar", ".npy", ".json"))}
    tars = [shard.name for shard in made.manifest.shards]
    indexes = [shard.index_name for shard in made.manifest.shards]
    spec = CaptionSpec("t5", 4, 4) if text else None

    def sign(files: Files) -> None:
        shards = {shard.name: shard for shard in made.manifest.shards}
        for tar, shard in shards.items():
            index, content = _as_index(files[shard.index_name], manifest.fields), files[tar]
            if index is not None:
                for row in index:
                    for field in manifest.fields:
                        begin, size = int(row[field]["offset"]), int(row[field]["size"])
                        if begin + size <= len(content):
                            row[field]["crc32"] = zlib.crc32(content[begin : begin + size])
                file = io.BytesIO()
                np.lib.format.write_array(file, index, version=(1, 0))
                files[shard.index_name] = file.getvalue()
        try:
            tree = json.loads(files["manifest.json"])
            for entry in tree["shards"]:
                shard = shards[entry["name"]]
                entry["sha256"] = hashlib.sha256(files[shard.name]).hexdigest()
                entry["index_sha256"] = hashlib.sha256(files[shard.index_name]).hexdigest()
                if entry["bytes"] == shard.bytes:
                    entry["bytes"] = len(files[shard.name])
            files["manifest.json"] = json.dumps(tree).encode()
        except (ValueError, LookupError, TypeError, RecursionError):
            return

    def read(folder: Path) -> Any:
        check_folder(folder)
        dataset = Dataset.open(folder, tolerant=True)
        dataset.close()
        dataset = Dataset.open(folder)
        found: list[Any] = []
        for shard, size in enumerate(dataset.sizes):
            for sample in range(size):
                array, condition = read_sample(dataset, shard, sample)
                if spec is not None:
                    condition = repr((condition, read_chosen(dataset, shard, sample, spec, 0.5)[1]))  # type: ignore[assignment]
                found.append((array.shape, array.tobytes(), condition))
        dataset.close()
        stats(dataset, 2).lines()
        dataset.close()
        return replace(dataset.manifest, shards=()), found

    def valid(found: Any) -> bool:
        told, samples = found
        held = sum(map(len, files.values()))
        return told.num_samples == len(samples) and all(
            shape == told.stored_shape and len(array) <= 10 * held
            and (isinstance(condition, str) or 0 <= condition < told.num_classes) for shape, array, condition in samples
        )  # fmt: skip

    changed = ("manifest.json", "manifest.json", *tars, *indexes)
    return Subject(f"dataset of {'captions' if text else 'labels'}", files, changed, read, valid, sign, _members(files))


def _members(files: Files) -> dict[str, list[tuple[int, int]]]:
    """Where contents lie: in a tar headers and values of its members, in an index its rows."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, content in files.items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                members = tar.getmembers()
            found[name] = [(member.offset, member.offset_data) for member in members[:2]]
            for member in members:
                begin, end = member.offset_data, member.offset_data + member.size
                values = begin + 128 if member.size > 128 and member.name.endswith(".npy") else begin
                found[name] += [(begin, end), (values, end)]
        elif name.endswith(".index.npy"):
            found[name] = [(content.index(b"\n") + 1, len(content))]
    return found


def _as_index(content: bytes, fields: Sequence[str]) -> np.ndarray | None:
    """An index whose checksums can be made good."""
    try:
        array: np.ndarray = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except NPY_ERRORS:
        return None
    sound = array.dtype.names == ("key", *fields) and all(array.dtype[field] == MEMBER for field in fields)
    return array if sound and array.ndim == 1 else None


def _foreign_tars(folder: Path) -> Subject:
    files = _dataset(folder, text=False).files
    tar = next(name for name in files if name.endswith(".tar"))
    spec = MemberSpec("moments", array="moments.npy", scale=0.5)

    def read(folder: Path) -> Any:
        found = index_folder(folder, folder / "out", spec)
        indexed = Dataset.open(folder / "out")
        samples = [read_sample(indexed, 0, sample) for sample in range(found.manifest.num_samples)]
        indexed.close()
        "\n".join(found.problems).encode()
        return [(array.tobytes(), label) for array, label in samples], found.manifest.num_classes

    given = {"a.tar": files[tar]}
    return Subject(
        "tars to index", given, ("a.tar",), read, lambda found: 0 < len(found[0]) < 100, aims=_members(given)
    )


def _plain_tars(folder: Path) -> Subject:
    files = _dataset(folder, text=False).files
    tar = next(name for name in files if name.endswith(".tar"))
    spec = MemberSpec("moments", array="moments.npy", scale=0.5, num_classes=3)

    def read(folder: Path) -> Any:
        tars = PlainTars.open(str(folder), spec, Access(retries=0, pause=0.0))
        drawn = tars.draw(0)
        found = [next(drawn) for _ in range(3)]
        drawn.close()  # type: ignore[attr-defined]
        return tars.manifest, found

    given = {"a.tar": files[tar]}
    return Subject("tars at random", given, ("a.tar",), read, lambda found: len(found[1]) == 3, aims=_members(given))


MAKERS: list[Callable[[Path], Subject]] = [
    _config, _settings, _cluster, _encoder, _prompts, _hostfile, _metrics, _run, _notes, _checkpoint, _exported,
    lambda folder: _published(folder, False), lambda folder: _published(folder, True),
    lambda folder: _dataset(folder, False), lambda folder: _dataset(folder, True), _foreign_tars, _plain_tars,
]  # fmt: skip
