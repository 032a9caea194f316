"""Bad samples in a training run: replaced, listed and counted; too many of them stop all ranks alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffmoe_ep.config import Config
from diffmoe_ep.data.manifest import DataError
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.shards import Dataset, load_index
from diffmoe_ep.train import trainer as training
from ranks import run
from train.runs import config

pytestmark = pytest.mark.slow


def train(rank: int, given: Config) -> tuple[str, bool] | None:
    """What a rank raised, and whether it says that all do."""
    mesh = training.start_mesh(given)
    try:
        training.Trainer(given, mesh, *training.prepare(given, mesh)).run()
    except DataError as error:
        return str(error), error.everywhere
    return None


@pytest.fixture
def spoiled(digits: Path, tmp_path: Path) -> Path:
    """The digits with a flipped byte in the samples at positions 3 and 15, which two ranks meet in the first step."""
    folder = Path(shutil.copytree(digits / "train", tmp_path / "train"))
    dataset = Dataset.open(folder)
    order = Order(dataset.sizes, 0, 8)
    for shard, sample in (order.locate(3), order.locate(15)):
        facts = dataset.manifest.shards[shard]
        row = load_index(folder / facts.index_name, dataset.manifest.fields)[sample]["pixels.npy"]
        content = bytearray((folder / facts.name).read_bytes())
        content[int(row["offset"]) + int(row["size"]) - 1] ^= 1
        (folder / facts.name).write_bytes(content)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_goes_on_and_lists_them(spoiled: Path, tmp_path: Path) -> None:
    given = config(spoiled, tmp_path / "run", "data.max_bad_fraction=0.002", "train.steps=3")
    assert run(2, train, given) == [None, None]
    assert [line["positions"] for line in lines(tmp_path / "run" / "quarantine.jsonl")] in ([[3], [15]], [[15], [3]])
    told = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["bad_samples"] for line in told] == [2, 2, 2]
    total = Dataset.open(spoiled).manifest.num_samples
    assert [line["epoch"] for line in told] == [24 / total, 48 / total, 72 / total]


def test_too_many_stop_all_ranks(spoiled: Path, tmp_path: Path) -> None:
    """One on each rank is allowed, two are not: no rank alone could tell."""
    given = config(spoiled, tmp_path / "run", "data.max_bad_fraction=0.001", "train.steps=3")
    first, second = run(2, train, given)
    assert first == second
    assert first is not None
    assert "2 of 1500 samples are bad" in first[0]
    assert first[1]
    assert len(lines(tmp_path / "run" / "quarantine.jsonl")) == 2
