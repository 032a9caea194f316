"""The stream: bit-identical for any number of ranks and workers, resumed anywhere, and loud about bad samples."""

import math
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader.streams import open_stream
from data_prep.write import write_dataset
from diffmoe_ep.config import ConfigError, DataConfig
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.loader import stream as streaming
from diffmoe_ep.data.loader.stream import LoaderError, Stream
from diffmoe_ep.data.manifest import DataError, Manifest
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.rng import generator_for
from diffmoe_ep.data.shards import Dataset, load_index

PIXELS = Manifest("tiny", "pixels", (1, 2, 3), "uint8", 0.5, -1.0, 4, (), "made up")
MOMENTS = Manifest("tiny", "moments", (2, 2, 2), "float16", 0.18215, 0.0, 4, (), "made up", flips=2)
FIELDS = ("latent", "noise", "u", "condition", "position")
NUM_SAMPLES = 50


def stored(manifest: Manifest) -> np.ndarray:
    values = np.random.default_rng(3).normal(size=(NUM_SAMPLES, *manifest.stored_shape))
    return np.abs(values * 50).astype(np.uint8) if manifest.dtype == "uint8" else values.astype(manifest.dtype)


def write_tiny(folder: Path, manifest: Manifest) -> Dataset:
    samples = ((f"k{number:03d}", encode(array, number % 4, manifest)) for number, array in enumerate(stored(manifest)))
    return write_dataset(folder, samples, manifest, shard_size=8)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("pixels") / "tiny", PIXELS)


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_tiny(tmp_path_factory.mktemp("moments") / "tiny", MOMENTS)


def stream(dataset: Dataset, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "seed": 5, "batch": 24, "accumulation": 1, "rank": 0, "world": 1, "condition_dropout": 0.25, "flip": True,
        "shuffle_block": 2, "workers": 0, "prefetch": 2,
    }  # fmt: skip
    return open_stream(dataset, **settings | changes)


def take(source: Stream, count: int) -> list[Batch]:
    try:
        return list(islice(source, count))
    finally:
        source.close()


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS))


def assert_equal(found: Batch, expected: Batch) -> None:
    for name in FIELDS:
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def joined(
    dataset: Dataset, world: int, accumulation: int, workers: int, steps: int, samples_consumed: int = 0
) -> Batch:
    """The samples of `steps` steps, ranks joined within each micro-step."""
    changes = {"world": world, "accumulation": accumulation, "workers": workers, "samples_consumed": samples_consumed}
    ranks = [take(stream(dataset, rank=rank, **changes), steps * accumulation) for rank in range(world)]
    return join([batch for micro_step in zip(*ranks, strict=True) for batch in micro_step])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_accumulation_change_nothing(pixels: Dataset, world: int, accumulation: int) -> None:
    expected = joined(pixels, world=1, accumulation=1, workers=0, steps=5)
    assert expected.position.tolist() == list(range(120))
    assert_equal(joined(pixels, world, accumulation, workers=0, steps=5), expected)


@pytest.mark.parametrize(("workers", "world", "accumulation"), [(1, 1, 1), (2, 1, 3), (2, 2, 1), (2, 4, 3)])
def test_workers_change_nothing(moments: Dataset, workers: int, world: int, accumulation: int) -> None:
    expected = joined(moments, world=1, accumulation=1, workers=0, steps=5)
    assert_equal(joined(moments, world, accumulation, workers, steps=5), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_continues_the_uncut_one(moments: Dataset, workers: int) -> None:
    uncut = take(stream(moments), 8)
    cut = stream(moments, world=1, workers=workers)
    first = take(cut, 3)
    assert cut.samples_consumed == 72
    rest = joined(moments, world=2, accumulation=3, workers=workers, steps=5, samples_consumed=cut.samples_consumed)
    assert_equal(join([*first, rest]), join(uncut))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_stream_goes_on_where_it_stood(pixels: Dataset, workers: int) -> None:
    source = stream(pixels, workers=workers)
    batches = take(source, 2) + take(source, 2)
    assert_equal(join(batches), joined(pixels, 1, 1, 0, steps=4))
    assert not loaders()


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_is_what_its_positions_say(pixels: Dataset, flip: bool) -> None:
    """An independent reference: each draw from its own keyed stream, the sample from the order."""
    batch = join(take(stream(pixels, flip=flip), 5))
    order, content = Order(pixels.sizes, 5, 2), stored(PIXELS)
    for row, position in enumerate(range(120)):
        shard, sample = order.locate(position)
        latent = content[shard * 8 + sample].astype(np.float32) * 0.5 - 1
        if flip and generator_for(5, position, "flip").random() < 0.5:
            latent = latent[:, :, ::-1]
        dropped = generator_for(5, position, "drop").random() < 0.25
        np.testing.assert_array_equal(batch.latent[row].numpy(), latent)
        np.testing.assert_array_equal(
            batch.noise[row].numpy(), generator_for(5, position, "noise").standard_normal((1, 2, 3), dtype=np.float32)
        )
        assert batch.u[row].item() == generator_for(5, position, "time").random(dtype=np.float32)
        assert batch.condition[row].item() == (4 if dropped else (shard * 8 + sample) % 4)


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_of_moments_is_what_its_positions_say(moments: Dataset, flip: bool) -> None:
    """An independent reference in float64: mean + deviation * posterior of the stored image, or of its stored mirror
    image, scaled.
    """
    batch = join(take(stream(moments, flip=flip), 5))
    order, content = Order(moments.sizes, 5, 2), stored(MOMENTS).astype(np.float64)  # (50, flips, 2C, H, W)
    for row, position in enumerate(range(120)):
        shard, sample = order.locate(position)
        mirrored = flip and generator_for(5, position, "flip").random() < 0.5
        mean, log_variance = np.split(content[shard * 8 + sample, int(mirrored)], 2)
        drawn = generator_for(5, position, "posterior").standard_normal((2, 2, 2), dtype=np.float32)
        latent = 0.18215 * (mean + np.exp(log_variance / 2) * drawn)
        dropped = generator_for(5, position, "drop").random() < 0.25
        np.testing.assert_allclose(batch.latent[row].numpy(), latent, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            batch.noise[row].numpy(), generator_for(5, position, "noise").standard_normal((2, 2, 2), dtype=np.float32)
        )
        assert batch.u[row].item() == generator_for(5, position, "time").random(dtype=np.float32)
        assert batch.condition[row].item() == (4 if dropped else (shard * 8 + sample) % 4)


def test_draws_have_their_distributions(pixels: Dataset) -> None:
    batch = join(take(stream(pixels), 100))  # 2,400 samples
    dropped = (batch.condition == 4).float().mean().item()
    assert abs(dropped - 0.25) < 0.05
    assert abs(batch.u.mean().item() - 0.5) < 0.03
    assert batch.u.min() >= 0
    assert batch.u.max() < 1
    assert abs(batch.noise.mean().item()) < 0.04
    assert abs(batch.noise.std().item() - 1) < 0.03
    drawn = [generator_for(5, position, "flip").random() < 0.5 for position in range(2400)]
    assert abs(np.mean(drawn) - 0.5) < 0.05


@pytest.mark.parametrize(("condition_dropout", "share"), [(0.0, 0.0), (math.nextafter(1, 0), 1.0)])
def test_dropping_never_and_always(pixels: Dataset, condition_dropout: float, share: float) -> None:
    batch = join(take(stream(pixels, condition_dropout=condition_dropout), 4))
    assert (batch.condition == 4).float().mean().item() == share


def test_epochs_see_the_same_image_with_new_noise(moments: Dataset) -> None:
    batch = join(take(stream(moments, shuffle_block=0, condition_dropout=0.0, flip=False), 5))
    assert torch.equal(batch.condition[:50], batch.condition[50:100])
    assert not torch.equal(batch.noise[:50], batch.noise[50:100])
    assert not torch.equal(batch.latent[:50], batch.latent[50:100])  # the posterior is sampled anew


def test_the_stream_leaves_the_global_random_state_alone(pixels: Dataset) -> None:
    before = torch.get_rng_state()
    take(stream(pixels, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def damaged(folder: Path) -> Dataset:
    """A dataset whose sample k013 has a flipped byte."""
    dataset = write_tiny(folder, PIXELS)
    path = folder / "tiny-000001.tar"
    content = bytearray(path.read_bytes())
    content[int(load_index(folder / "tiny-000001.index.npy", PIXELS.fields)[5]["pixels.npy"]["offset"]) + 129] ^= 1
    path.write_bytes(content)
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_named_in_its_turn(tmp_path: Path, workers: int) -> None:
    source = stream(damaged(tmp_path / "tiny"), batch=4, workers=workers, shuffle_block=0)
    batches = []
    with pytest.raises(DataError, match=r"tiny-000001\.tar, key k013: pixels\.npy is damaged") as caught:
        batches.extend(source)
    assert len(caught.value.args) == 1
    assert "\n" not in str(caught.value)
    assert source.samples_consumed == 12
    assert not loaders()


@pytest.mark.parametrize("workers", [0, 1])
def test_content_that_the_manifest_does_not_announce_is_named(tmp_path: Path, workers: int) -> None:
    dataset = write_tiny(tmp_path / "tiny", PIXELS)
    wrong = Dataset(dataset.folder, replace(dataset.manifest, num_classes=3))
    with pytest.raises(
        DataError, match=r"tiny-000000\.tar, key k003: cls: label b'3' is not a number below num_classes = 3; prepare"
    ):
        take(stream(wrong, workers=workers, shuffle_block=0), 1)


def loaders() -> list[Any]:
    """The loader's processes: this process's children but for the ranks that other tests keep."""
    return [process for process in multiprocessing.active_children() if not process.name.startswith("rank ")]


KILL_A_WORKER = """
import multiprocessing, os, signal, sys
from diffmoe_ep.config import DataConfig
from diffmoe_ep.data.loader import stream as streaming
from diffmoe_ep.data.loader.stream import LoaderError, Stream
from diffmoe_ep.data.mixture import Mixture

data = DataConfig(folder=sys.argv[1], shuffle_block=2, workers=2, prefetch=1)
source = Stream(Mixture.open(data), data, seed=5, batch=24)
next(source)
try:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in range(10):
        next(source)
except LoaderError as error:
    print("told:", error)
source.close()
print("left:", multiprocessing.active_children(), "next:", source.samples_consumed, int(next(source).position[0]))
source.close()
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_reported(pixels: Dataset) -> None:
    """In a process of its own: torch raises the error from a signal handler, wherever the main thread is."""
    command = [sys.executable, "-c", KILL_A_WORKER, str(pixels.folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told = re.fullmatch(r"told: .*worker.*\nleft: \[\] next: (\d+) (\d+)\n", done.stdout, re.S)
    assert told is not None, done.stdout
    assert told[1] == told[2]  # it goes on where it stood


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch": 24, "accumulation": 5},
            r"train\.global_batch = 24 .*train\.grad_accumulation = 5 .*such as 20 or 25",
        ),
        ({"batch": 24, "world": 16}, r"train\.global_batch = 24 .*16 ranks.*such as 16 or 32"),
        ({"batch": 2, "world": 4}, "such as 4"),
        ({"samples_consumed": 25}, "25 samples are consumed, which is not a whole number of micro-steps of 24"),
        ({"samples_consumed": -24}, "-24 samples"),
        ({"batch": 0}, r"train\.global_batch is 0; it must be greater than 0"),
        ({"batch": -24}, r"train\.global_batch is -24"),
        ({"accumulation": 0}, r"train\.grad_accumulation is 0"),
        ({"world": 0}, "the number of ranks is 0"),
        ({"rank": 2, "world": 2}, "rank 2 is none of 2 ranks; they are 0 to 1"),
        ({"rank": -1}, "rank -1 is none of 1 ranks"),
        ({"condition_dropout": 1.5}, r"data\.condition_dropout is 1\.5; it must be at least 0 and less than 1"),
        ({"shuffle_block": -1}, r"data\.shuffle_block is -1; it must be at least 0"),
        ({"lanes": 0}, r"data\.lanes is 0"),
        ({"max_bad_fraction": 1.0}, r"data\.max_bad_fraction is 1\.0"),
        ({"retries": -1}, r"data\.retries is -1"),
        ({"workers": -1}, r"data\.workers is -1"),
        ({"workers": 1, "prefetch": 0}, r"data\.prefetch is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(pixels: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(pixels, **changes)


def test_what_no_stream_reads_is_refused(pixels: Dataset) -> None:
    for source in (pixels, torch.utils.data.TensorDataset(torch.zeros(4))):
        told = rf"reads a Mixture or PlainTars, not {type(source).__name__}; of one prepared dataset make Mixture"
        with pytest.raises(TypeError, match=told):
            Stream(source, DataConfig(), seed=5, batch=24)  # type: ignore[arg-type]


def test_flips_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    dataset = write_tiny(tmp_path / "tiny", replace(MOMENTS, flips=1))
    with pytest.raises(ConfigError, match=r"data\.flip = true, but .*tiny holds no mirrored moments"):
        stream(dataset)
    assert len(take(stream(dataset, flip=False), 1)[0]) == 24


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)"), "--ipc=host"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "--ipc=host"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "give the host more memory"),
    ],
)
def test_too_little_shared_memory_is_named_with_what_helps(
    pixels: Dataset, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def fails() -> Iterator[Any]:
        raise error
        yield

    reader = stream(pixels)
    monkeypatch.setattr(reader, "_start", fails)
    with pytest.raises(LoaderError, match="positions 0 to 23 were awaited .*/dev/shm has") as failure:
        next(reader)
    assert remedy in str(failure.value)


def test_a_batch_that_finds_no_room_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packs(batch: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left (28)")

    for name in ("torch_1_2_3", "torch_1_2_30"):
        (tmp_path / name).touch()
    monkeypatch.setattr(streaming, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(streaming, "pack", packs)
    assert isinstance(streaming._packed((None, ())), LoaderError)
    assert [path.name for path in tmp_path.iterdir()] == ["torch_1_2_30"]
