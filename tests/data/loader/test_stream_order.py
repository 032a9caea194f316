"""The order law: which sample stands at which position depends on data, seed, block, lanes and weights, and on nothing
else.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.loader.streams import open_stream
from data_prep.write import write_dataset
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.batch import Batch
from diffmoe_ep.data.codec import encode
from diffmoe_ep.data.manifest import Manifest
from diffmoe_ep.data.mixture import Mixture
from diffmoe_ep.data.remote.fetch import Access
from diffmoe_ep.data.shards import Dataset

MANIFEST = Manifest("tiny", "pixels", (1, 1, 1), "uint8", 1.0, 0.0, 200, (), "made up")
SIZES = (40, 27, 33)  # samples of three datasets; labels count on from one to the next
SEEDS = st.integers(0, 2**63 - 1)
WORLDS = st.sampled_from([1, 2, 3, 4, 6])
LANES = st.sampled_from([1, 2, 3, 12])


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    found, first = [], 0
    for number, size in enumerate(SIZES):
        array = np.zeros((1, 1, 1), np.uint8)
        samples = [(f"k{label:03d}", encode(array, label, MANIFEST)) for label in range(first, first + size)]
        found.append(write_dataset(tmp_path_factory.mktemp("data") / str(number), samples, MANIFEST, shard_size=7))
        first += size
    return found


def batches(source: Dataset | Mixture, count: int, **changes: Any) -> list[Batch]:
    given_: dict[str, Any] = {"accumulation": 1, "condition_dropout": 0.0, "flip": False, "workers": 0, "prefetch": 2}
    stream = open_stream(source, **given_ | changes)
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def keys(source: Dataset | Mixture, count: int, world: int = 1, **changes: Any) -> list[int]:
    """The sample at each of the first `count` positions, read by `world` ranks."""
    micro_step = changes["batch"] // changes.get("accumulation", 1)
    ranks = [batches(source, -(-count // micro_step), rank=rank, world=world, **changes) for rank in range(world)]
    return torch.cat([batch.condition for step in zip(*ranks, strict=True) for batch in step]).tolist()[:count]


@settings(deadline=None, max_examples=25)
@given(SEEDS, WORLDS, st.integers(0, 4), LANES, st.sampled_from([12, 24, 36]), st.sampled_from([1, 2, 3]))
def test_every_epoch_visits_every_sample_once(
    datasets: list[Dataset], seed: int, world: int, block: int, lanes: int, micro_step: int, accumulation: int
) -> None:
    found = keys(
        datasets[0],
        120,
        world,
        seed=seed,
        shuffle_block=block,
        lanes=lanes,
        batch=micro_step * accumulation,
        accumulation=accumulation,
    )
    for first in range(0, 120, 40):
        assert sorted(found[first : first + 40]) == list(range(40))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    SEEDS, WORLDS, st.integers(0, 4), LANES, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 200)
)
def test_ranks_and_resumption_change_nothing(
    datasets: list[Dataset], seed: int, world: int, block: int, lanes: int, weights: list[int], start: int
) -> None:
    """A run of any number of ranks, begun anywhere, is the tail of the uncut run of one rank; samples and draws."""
    source = Mixture(datasets[: len(weights)], weights)
    same: dict[str, Any] = {"seed": seed, "shuffle_block": block, "lanes": lanes, "batch": 24, "condition_dropout": 0.3}
    whole = batches(source, start + 3, rank=0, world=1, **same)[start:]
    ranks = [batches(source, 3, rank=rank, world=world, samples_consumed=24 * start, **same) for rank in range(world)]
    for number, expected in enumerate(whole):
        for name in ("latent", "noise", "u", "condition", "position"):
            joined = torch.cat([getattr(rank[number], name) for rank in ranks])
            assert torch.equal(joined, getattr(expected, name)), name


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(0, 4), st.sampled_from([12, 24, 48]), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_without_lanes_the_batch_changes_nothing(
    datasets: list[Dataset], seed: int, block: int, batch: int, weights: list[int]
) -> None:
    source = Mixture(datasets[: len(weights)], weights)
    expected = keys(source, 96, seed=seed, shuffle_block=block, batch=96)
    assert keys(source, 96, seed=seed, shuffle_block=block, batch=batch) == expected


@settings(deadline=None, max_examples=15)
@given(SEEDS, WORLDS, st.integers(0, 4), LANES)
def test_a_mixture_of_one_is_that_one(datasets: list[Dataset], seed: int, world: int, block: int, lanes: int) -> None:
    same: dict[str, Any] = {"seed": seed, "shuffle_block": block, "lanes": lanes, "batch": 12}
    assert keys(Mixture(datasets[:1], [0.7]), 60, world, **same) == keys(datasets[0], 60, world, **same)


@pytest.mark.parametrize(("workers", "world", "lanes"), [(1, 2, 1), (2, 1, 3), (2, 2, 4)])
def test_workers_change_nothing(datasets: list[Dataset], workers: int, world: int, lanes: int) -> None:
    source = Mixture(datasets, [3, 1, 1])
    same: dict[str, Any] = {"seed": 8, "shuffle_block": 2, "lanes": lanes, "batch": 24, "accumulation": 2}
    assert keys(source, 96, world, workers=workers, **same) == keys(source, 96, **same)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([2, 3, 4, 6, 12]))
def test_a_rank_of_a_lane_keeps_to_its_shards(datasets: list[Dataset], lanes: int, world: int) -> None:
    """Where each rank has whole lanes, ranks of an epoch share no shard but the one within which their lanes meet."""
    assume(lanes % world == 0)
    found = [
        batches(datasets[0], 3, rank=rank, world=world, seed=1, shuffle_block=1, lanes=lanes, batch=12)
        for rank in range(world)
    ]
    shards = [{label // 7 for batch in rank for label in batch.condition.tolist()} for rank in found]
    assert sum(map(len, shards)) <= 6 + lanes - 1 + world


def test_remote_shards_are_fetched_ahead(
    datasets: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples as from the folder, and each shard is asked for in the background, at the latest with the block
    before its own.
    """
    asked: list[list[int]] = []
    original = Dataset.prefetch

    def recorded(self: Dataset, shards: list[int]) -> None:
        asked.append(list(shards))
        original(self, shards)

    monkeypatch.setattr(Dataset, "prefetch", recorded)
    access = Access(cache=str(tmp_path / "cache"), allow_commands=True)
    remote = Dataset.open(f"pipe:cat {datasets[1].folder}/{{name}}", access)
    same: dict[str, Any] = {"seed": 4, "shuffle_block": 1, "batch": 9, "lanes": 3}
    assert keys(Mixture([datasets[0], remote]), 90, **same) == keys(Mixture(datasets[:2]), 90, **same)
    assert asked
    count = len(asked)
    same = {"seed": 4, "shuffle_block": 2, "batch": 3}
    assert keys(remote, 90, **same) == keys(datasets[1], 90, **same)
    assert len(asked) - count == 7  # once for each block, of two shards each, that was begun
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(datasets[1].sizes)


def test_passes_count_the_epochs(datasets: list[Dataset]) -> None:
    same: dict[str, Any] = {
        "batch": 24,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "condition_dropout": 0.0,
        "flip": False,
        "workers": 0,
    }
    single = open_stream(datasets[0], seed=1, shuffle_block=2, prefetch=2, **same)
    assert single.passes() == {str(datasets[0].folder): 0.0}
    list(islice(single, 5))
    single.close()
    assert single.passes() == {str(datasets[0].folder): 3.0}
    mixed = open_stream(
        Mixture(datasets, [3, 1, 1]), seed=1, shuffle_block=2, prefetch=2, samples_consumed=24 * 10**6, **same
    )
    assert list(mixed.passes().values()) == pytest.approx([24e6 * 0.6 / 40, 24e6 * 0.2 / 27, 24e6 * 0.2 / 33], rel=1e-6)


@pytest.mark.parametrize("lanes", [5, 48])
def test_lanes_that_do_not_divide_are_refused(datasets: list[Dataset], lanes: int) -> None:
    with pytest.raises(ConfigError, match=f"data.lanes = {lanes} does not divide the 24 samples of a micro-step"):
        batches(datasets[0], 1, seed=1, shuffle_block=2, lanes=lanes, batch=24, rank=0, world=1)


def test_captions_are_not_read_as_labels(datasets: list[Dataset]) -> None:
    texts = Dataset(Path(datasets[0].folder), replace(datasets[0].manifest, condition="text", num_classes=0))
    with pytest.raises(ConfigError, match="holds captions, but model.condition is class"):
        batches(texts, 1, seed=1, shuffle_block=2, batch=24, rank=0, world=1)
