"""Checkpoint folders written and read by one process."""

import enum
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from diffmoe_ep.checkpoint import saving, store
from diffmoe_ep.checkpoint.dcp import MetadataUnpickler
from diffmoe_ep.checkpoint.fragments import Fragment, whole
from diffmoe_ep.checkpoint.store import CheckpointError


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several types and dimensions, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(5, 7, generator=generator),
        "model.experts.fc1": torch.randn(4, 3, 2, 5, generator=generator),
        "model.bias": torch.randn(9, generator=generator).bfloat16(),
        "threshold.0": torch.randn(4, generator=generator).double(),
        "step": torch.tensor(2**53 + seed),
        "nothing": torch.zeros(0, 3),
    }


def fragments(tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    """Each tensor in two pieces, cut in the middle of a row."""
    result = []
    for name, tensor in tensors.items():
        flat, cut = tensor.view(-1), tensor.numel() // 2
        shape = tuple(tensor.shape)
        result += [Fragment(name, shape, 0, flat[:cut]), Fragment(name, shape, cut, flat[cut:])]
    return result


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether names, shapes, types and all bits agree."""
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} for tensors in (first, second)]
    return kinds[0] == kinds[1] and all(torch.equal(first[name], second[name]) for name in first)


def steps(root: Path) -> list[int]:
    """The steps of the folders there are, after a look that nothing unfinished is left."""
    assert not list(root.glob("*.partial"))
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its checksum, as a forger would."""
    (folder / name).write_bytes(content)
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    digests = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for _, file in lines}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = values()
    folder = saving.save(tmp_path / "checkpoints", 600, fragments(saved), {"samples": 76800, "rate": 1e-3})
    assert folder == tmp_path / "checkpoints" / "step-0000600"
    assert store.read_meta(folder) == {"format": 1, "step": 600, "meta": {"samples": 76800, "rate": 1e-3}}
    assert store.tensors(folder) == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.items()}
    assert same(store.read(folder, list(saved)), saved)

    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    store.load(folder, [whole(name, tensor) for name, tensor in loaded.items()])
    assert same(loaded, saved)


def test_saving_and_loading_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.read(saving.save(tmp_path, 1, fragments(values()), {}), ["step"])
    assert capfd.readouterr() == ("", "")


def test_only_the_elements_asked_for_are_written(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, [whole("x", torch.arange(60.0).view(3, 4, 5))], {})
    room = torch.full((60,), -1.0)
    store.load(folder, [Fragment("x", (3, 4, 5), 7, room[7:33]), Fragment("x", (3, 4, 5), 40, room[40:41])])
    inside = [*range(7, 33), 40]
    assert room.tolist() == [float(number) if number in inside else -1.0 for number in range(60)]


def test_plain_torch_reads_logical_tensors(tmp_path: Path) -> None:
    saved = values()
    folder = saving.save(tmp_path, 1, fragments(saved), {})
    state = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no process group
        dcp.load(state, checkpoint_id=str(folder))
    assert same(state, saved)


def test_the_folder_names_neither_paths_nor_machines(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    assert not [path.name for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert sorted(path.name for path in folder.iterdir()) == [".metadata", "SHA256SUMS", "__0_0.distcp", "meta.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "pieces", [[(0, 5)], [(1, 6)], [(0, 4), (3, 6)], [(0, 6), (0, 6)], [(0, 6), (2, 4)], []], ids=str
)
def test_every_element_is_given_once(tmp_path: Path, pieces: list[tuple[int, int]], dtype: torch.dtype) -> None:
    kept = saving.save(tmp_path, 1, fragments(values()), {})
    parts = [Fragment("x", (2, 3), start, torch.zeros(stop - start, dtype=dtype)) for start, stop in pieces or [(0, 0)]]
    with pytest.raises(
        CheckpointError, match=r"cannot save the checkpoint .*step-0000002: of x, torch.\w+ of shape \(2, 3\), elements"
    ):
        saving.save(tmp_path, 2, parts, {})
    assert store.latest(tmp_path) == kept
    assert not (tmp_path / "step-0000002").exists()


def test_scalars_are_given_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="elements 0 to 0 are given twice"):
        saving.save(tmp_path, 2, [whole("x", torch.zeros(())), whole("x", torch.zeros(()))], {})


def test_one_tensor_has_one_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x is torch.float64 of shape .* on rank 0 and torch.float32"):
        saving.save(
            tmp_path, 2, [Fragment("x", (2,), 0, torch.zeros(1)), Fragment("x", (2,), 1, torch.zeros(1).double())], {}
        )


def test_keeps_the_last_and_every_so_many(tmp_path: Path) -> None:
    for step in range(100, 1000, 100):
        saving.save(tmp_path, step, fragments(values()), {}, keep_last=2, keep_every=400)
    assert steps(tmp_path) == [400, 800, 900]
    saving.save(tmp_path, 1000, fragments(values()), {}, keep_last=1)
    assert steps(tmp_path) == [1000]


def test_a_run_that_went_back_keeps_its_own(tmp_path: Path) -> None:
    for step in (100, 200, 300, 150, 250):
        newest = saving.save(tmp_path, step, fragments(values(step)), {}, keep_last=2)
        assert store.latest(tmp_path) == newest
    assert steps(tmp_path) == [200, 250, 300]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = saving.save(tmp_path, 100, fragments(values(seed)), {"seed": seed})
    assert store.read_meta(folder)["meta"] == {"seed": 2}
    assert same(store.read(folder, list(values())), values(2))
    assert steps(tmp_path) == [100]


def dying(moment: int, root: Path, step: int) -> None:
    """Save, but be killed at the given one of the moments at which something reaches the disk."""
    count = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **options: Any) -> Any:
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args, **options)

        return instead

    for place, name in ((os, "fsync"), (os, "unlink"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")):
        setattr(place, name, deadly(getattr(place, name)))
    saving.save(root, step, fragments(values(step)), {}, keep_last=2)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_killed_save_leaves_a_complete_checkpoint(tmp_path: Path, again: bool) -> None:
    context = multiprocessing.get_context("fork")
    outcomes = []
    for step in (1, 2):
        saving.save(tmp_path / "before", step, fragments(values(step)), {})
    for moment in range(100):
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / str(moment)))
        process = context.Process(target=dying, args=(moment, root, 2 if again else 3))
        process.start()
        process.join(60)
        outcomes.append(process.exitcode)
        found = store.latest(root)
        assert found is not None
        step = store.read_meta(found)["step"]
        assert same(store.read(found, list(values())), values(step))
        saving.save(root, 4, fragments(values(4)), {})
        assert store.latest(root) == root / "step-0000004"
        assert len(steps(root)) == 2
        if process.exitcode == 0:
            break
        shutil.rmtree(root)
    assert len(outcomes) > 8
    assert outcomes == [-signal.SIGKILL] * (len(outcomes) - 1) + [0]


def test_latest_falls_back_to_the_newest_complete_folder(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert store.latest(root) is None
    first, second = (saving.save(root, step, fragments(values()), {}) for step in (9, 10))
    pointer = root / "latest"
    assert pointer.read_text() == "step-0000010\n"
    pointer.write_text("step-0000009\n")
    assert store.latest(root) == first
    shutil.copytree(second, root / "step-0000011.partial")
    shutil.copytree(second, tmp_path / "step-0000012")
    (root / "step-0000013").mkdir()
    for text in ("step-0000011", "step-0000013", "../step-0000012", "step-0000011.partial", "/etc", "", "\udcff"):
        pointer.write_text(text, errors="surrogateescape")
        assert store.latest(root) == second
    pointer.unlink()
    assert store.latest(root) == second


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = saving.save(run / "checkpoints", 7, fragments(values()), {})
    assert store.resolve(run) == store.resolve(run / "checkpoints") == store.resolve(folder) == folder
    elsewhere = Path(shutil.copytree(folder, tmp_path / "best"))
    assert store.resolve(elsewhere) == elsewhere
    with pytest.raises(
        CheckpointError, match=r"holds no complete checkpoint \(looked for .metadata, .*: name a run folder"
    ):
        store.resolve(tmp_path)
    with pytest.raises(CheckpointError, match="runs is not a folder"):
        store.resolve(tmp_path / "runs")
    unfinished = folder.rename(folder.with_name(folder.name + ".partial"))
    with pytest.raises(CheckpointError, match="was not finished when its run ended"):
        store.resolve(unfinished)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        store.read_meta(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.weight": torch.zeros(7, 5)},
            r"model.weight has shape \(5, 7\) there and \(7, 5\) here. Use the configuration",
        ),
        (
            {"model.weight": torch.zeros(5, 7).bfloat16()},
            "model.weight has type torch.float32 there and torch.bfloat16 here. Use the",
        ),
        ({"model.more": torch.zeros(2)}, r"it has no tensor model.more, here of shape \(2,\). Use the configuration"),
        ({"step": None}, "it holds step, which this run does not have. Use the configuration"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, torch.Tensor], message: str
) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    state = {name: torch.zeros_like(tensor) for name, tensor in values().items()} | change
    with pytest.raises(CheckpointError, match=f"step-0000001 is a checkpoint of another model or optimizer: {message}"):
        store.load(folder, [whole(name, tensor) for name, tensor in state.items() if tensor is not None])
    assert all(not tensor.any() for tensor in state.values() if tensor is not None)
    with pytest.raises(CheckpointError, match=r"it has no tensor model.more. Use the configuration"):
        store.read(folder, ["model.weight", "model.more"])


def test_a_part_is_loaded_if_asked_so(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    weight = torch.zeros(5, 7)
    store.load(folder, [whole("model.weight", weight)], allow_extra=True)
    assert torch.equal(weight, values()["model.weight"])


@pytest.mark.parametrize("name", [".metadata", "SHA256SUMS", "__0_0.distcp", "meta.json"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_damage_is_noticed(tmp_path: Path, name: str, fault: str) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    expected = (
        "is not a complete checkpoint" if fault == "missing" and name != "__0_0.distcp" else "is damaged: its file"
    )
    with pytest.raises(CheckpointError, match=f"step-0000001 {expected}"):
        store.load(folder, [whole(key, torch.zeros_like(tensor)) for key, tensor in values().items()])


class Forged:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_forged_description_runs_no_code(tmp_path: Path) -> None:
    folder = saving.save(tmp_path / "checkpoints", 1, fragments(values()), {})
    rewrite(folder, ".metadata", pickle.dumps(Forged(tmp_path / "proof")))
    with pytest.raises(CheckpointError, match=r"step-0000001: its .metadata cannot be read: it asks for posix.mkdir"):
        store.load(folder, [])
    with pytest.raises(CheckpointError, match=r"posix.mkdir"):
        store.tensors(folder)
    assert not (tmp_path / "proof").exists()
    pickle.loads((folder / ".metadata").read_bytes())  # the forgery is a real one
    assert (tmp_path / "proof").exists()


class ByName(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, enum.Enum) else NotImplemented


def test_a_description_by_an_early_python_3_11_is_read(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    metadata, file = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load(), io.BytesIO()
    ByName(file).dump(metadata)
    assert b"getattr" in file.getvalue()
    assert MetadataUnpickler(io.BytesIO(file.getvalue())).load() == metadata


@pytest.mark.parametrize("name", ["__class__", "__init__", "mro", "_member_map_"])
@pytest.mark.parametrize("thing", [_MEM_FORMAT_ENCODING, _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT, Metadata, "text"])
def test_getattr_reaches_nothing_but_members(thing: Any, name: str) -> None:
    class Reaching:
        def __reduce__(self) -> Any:
            return getattr, (thing, name)

    with pytest.raises(pickle.UnpicklingError, match=f"it asks for '{name}' of .*, as only a forged file would"):
        MetadataUnpickler(io.BytesIO(pickle.dumps(Reaching()))).load()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"cbuiltins\neval\n.",
        b"ctorch\nload\n.",
        b"\x80\x04\x8c\x05torch\x8c\x0ctorch.loader\x93.",
        pickle.dumps({"a": 1}),
    ],
)
def test_anything_else_is_no_description(tmp_path: Path, content: bytes) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    rewrite(folder, ".metadata", content)
    with pytest.raises(CheckpointError, match=r"step-0000001: its .metadata (cannot be read|does not describe)"):
        store.tensors(folder)


def test_a_description_leads_to_no_other_file(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    metadata = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    for place in metadata.storage_data.values():
        place.relative_path = "../step-0000001/__0_0.distcp"
    rewrite(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not describe tensors in the files of its folder"):
        store.read(folder, ["step"])


def test_a_description_with_gaps_is_refused(tmp_path: Path) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    metadata = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    metadata.state_dict_metadata["model.weight"].chunks.pop()
    rewrite(folder, ".metadata", pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"cannot load the checkpoint .*: it has \d+ of the 35 elements of model.weight"
    ):
        store.read(folder, ["model.weight"])


def test_tensors_are_no_pickles_either(tmp_path: Path) -> None:
    folder = saving.save(tmp_path / "checkpoints", 1, [whole("x", torch.zeros(2))], {})
    buffer = io.BytesIO()
    torch.save(Forged(tmp_path / "proof"), buffer)
    metadata = MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(buffer.getvalue())
    rewrite(folder, ".metadata", pickle.dumps(metadata))
    rewrite(folder, "__0_0.distcp", buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"cannot load the checkpoint .*step-0000001"):
        store.read(folder, ["x"])
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "step": 1, "meta": {}}', "has format 2, this version reads up to 1: install a newer"),
        ('{"format": 1, "step": 1}', "its meta.json lacks format, step or meta"),
        ("[1]", "its meta.json lacks format, step or meta"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = saving.save(tmp_path, 1, fragments(values()), {})
    rewrite(folder, "meta.json", content.encode())
    with pytest.raises(CheckpointError, match=message):
        store.load(folder, [], allow_extra=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot save the checkpoint .*/file/checkpoints/step-0000001: .*Not a directory"
    ):
        saving.save(tmp_path / "file" / "checkpoints", 1, fragments(values()), {})
