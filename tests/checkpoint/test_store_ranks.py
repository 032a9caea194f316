"""Checkpoint folders written and read by several ranks: other layouts, and failures of one rank."""

import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffmoe_ep.checkpoint import saving, store
from diffmoe_ep.checkpoint.fragments import Fragment, expert_fragment, shard_of, whole
from diffmoe_ep.checkpoint.store import CheckpointError
from ranks import run

pytestmark = pytest.mark.slow

EXPERTS = 8


def logical() -> dict[str, torch.Tensor]:
    """What a run holds, whole."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "experts.fc1": torch.randn(EXPERTS, 5, 7, generator=generator),
        "experts.fc2": torch.randn(EXPERTS, 7, generator=generator),
    }
    weights |= {"embed": torch.randn(11, 3, 2, generator=generator), "head": torch.randn(13, generator=generator)}
    moments = {
        f"optimizer.exp_avg.{name}": torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()
    }
    others = {"threshold.0": torch.randn(EXPERTS, generator=generator).bfloat16(), "step": torch.tensor(2**60 + 1)}
    return {f"model.{name}": tensor for name, tensor in weights.items()} | moments | others


def holding(tensors: dict[str, torch.Tensor], rank: int, world: int, expert: int) -> list[Fragment]:
    """A rank's own copies: its experts, all of the other weights, and its part of moments that were flattened and cut
    into equal parts.
    """
    flat = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    total = sum(tensor.numel() for tensor in flat.values())
    begin, end = total * rank // world, total * (rank + 1) // world
    result, at = [], 0
    for name, tensor in tensors.items():
        if name in flat:
            first, last = (min(max(edge - at, 0), tensor.numel()) for edge in (begin, end))
            result.append(Fragment(name, tuple(tensor.shape), first, tensor.view(-1)[first:last].clone()))
            at += tensor.numel()
        elif ".experts." in name:
            result.append(expert_fragment(name, tensor.chunk(expert)[rank % expert].clone(), rank % expert, EXPERTS))
        else:
            result.append(whole(name, tensor.clone()))
    return result


def given(held: list[Fragment], rank: int, world: int, expert: int) -> list[Fragment]:
    """What a rank writes of what it holds: replicas one share each."""
    result = []
    for fragment in held:
        if ".experts." in fragment.name and fragment.name.startswith("model."):
            fragment = shard_of(fragment, rank // expert, world // expert, smallest=1)
        elif not fragment.name.startswith("optimizer."):
            fragment = shard_of(fragment, rank, world, smallest=1)
        result.append(fragment)
    return result


def reshard(rank: int, world: int, expert: int, source: Path | None, root: Path) -> list[Fragment]:
    """Load what `source` has (or make it) in this layout, save it from this layout, and return what this rank held."""
    if world > 1:
        dist.init_process_group("gloo")
    held = holding(
        logical() if source is None else {name: torch.zeros_like(t) for name, t in logical().items()},
        rank,
        world,
        expert,
    )
    if source is not None:
        store.load(source, held, world=world)
    saving.save(root, 5, given(held, rank, world, expert), {"world": world}, rank=rank, world=world)
    return held


def test_resharding_is_bitwise_identity(tmp_path: Path) -> None:
    expected = logical()
    source = None
    for number, (world, expert) in enumerate([(4, 2), (1, 1), (2, 2), (4, 4), (4, 1)]):
        root = tmp_path / str(number)
        args = (world, expert, source, root)
        held = run(world, reshard, *args) if world > 1 else [reshard(0, *args)]
        for fragment in (fragment for rank in held for fragment in rank):
            assert torch.equal(fragment.data, expected[fragment.name].view(-1)[fragment.start : fragment.stop]), (
                fragment.name
            )
        source = root / "step-0000005"
        loaded = store.read(source, list(expected))
        assert all(
            torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
            for name, tensor in expected.items()
        )
        assert store.tensors(source).keys() == expected.keys()
        assert store.read_meta(source)["meta"] == {"world": world}
        assert {f"__{rank}_0.distcp" for rank in range(world)} <= {path.name for path in source.iterdir()}


def failures(rank: int, root: Path) -> dict[str, str]:
    """The message that this rank gets for each kind of failure that happens to one of two."""
    dist.init_process_group("gloo")
    half = Fragment("x", (4, 50_000), rank * 100_000, torch.full((100_000,), float(rank)))
    messages = {}

    def attempt(name: str, *fragments: Fragment, meta: object = 1, step: int = 2) -> None:
        with pytest.raises(CheckpointError) as caught:
            saving.save(root, step, fragments, {"meta": meta}, rank=rank, world=2)
        messages[name] = str(caught.value)
        assert store.latest(root) == first

    def attempt_load(name: str, folder: Path, fragment: Fragment) -> None:
        with pytest.raises(CheckpointError) as caught:
            store.load(folder, [fragment], world=2)
        messages[name] = str(caught.value)

    first = saving.save(root, 1, [half], {}, rank=rank, world=2)
    attempt("overlap", whole("x", torch.zeros(3)))
    attempt("scalar overlap", whole("x", torch.zeros(())))
    attempt("gap", half if rank == 0 else Fragment("x", half.shape, 100_001, half.data[1:]))
    attempt("shapes", half if rank == 0 else Fragment("x", (2, 100_000), half.start, half.data))
    attempt("meta", half, meta=object() if rank == 0 else 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:  # no file of this rank may grow as large as its share
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    attempt("disk", half)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    second = saving.save(root, 2, [half], {}, rank=rank, world=2)
    assert not list(root.glob("*.partial"))

    attempt_load("shape", second, half if rank == 0 else Fragment("x", (2, 100_000), half.start, half.data))
    attempt_load("name", second, Fragment("x" if rank == 0 else "y", half.shape, half.start, half.data))
    if rank == 0:
        path = second / "__1_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)
    dist.barrier()
    attempt_load("flipped", second, half)
    store.load(first, [half], world=2)
    assert half.data.unique().tolist() == [float(rank)]
    return messages


def test_what_fails_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    first, second = run(2, failures, tmp_path)
    assert first == second
    saving, folder = f"cannot save the checkpoint {tmp_path / 'step-0000002'}: ", tmp_path / "step-0000002"
    assert first["overlap"] == f"{saving}of x, torch.float32 of shape (3,), elements 0 to 2 are given twice"
    assert first["scalar overlap"] == f"{saving}of x, torch.float32 of shape (), elements 0 to 0 are given twice"
    assert (
        first["gap"]
        == f"{saving}of x, torch.float32 of shape (4, 50000), elements 100000 to 100000 are given by no rank"
    )
    assert first["shapes"].startswith(
        f"{saving}x is torch.float32 of shape (2, 100000) on rank 1 and torch.float32 of shape (4, 50000)"
    )
    assert first["meta"] == f"{saving}TypeError: Object of type object is not JSON serializable"
    assert first["disk"].startswith(saving)
    assert "File too large" in first["disk"]
    another = f"{folder} is a checkpoint of another model or optimizer: "
    assert first["shape"].startswith(f"{another}x has shape (4, 50000) there and (2, 100000) here")
    assert first["name"].startswith(f"{another}it has no tensor y")
    assert first["flipped"].startswith(f"{folder} is damaged: its file __1_0.distcp")
