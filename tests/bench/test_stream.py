"""The stream's bench: it compares readers of the same bytes, and what it says of them is told whole."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ep.bench import stream as bench_stream
from diffmoe_ep.cli import data
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.order import Order
from diffmoe_ep.data.sample import read_sample
from diffmoe_ep.data.shards import Dataset


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "set"
    bench_stream.write_synthetic(folder, 150, (4, 4, 4), shard_size=64)
    return folder


def test_the_synthetic_set_is_a_dataset_and_is_written_once(synthetic: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in synthetic.iterdir()}
    bench_stream.write_synthetic(synthetic, 150, (4, 4, 4), shard_size=64)
    assert {path.name: path.stat().st_mtime_ns for path in synthetic.iterdir()} == before
    dataset = Dataset.open(synthetic)
    dataset.verify()
    assert dataset.sizes == (64, 64, 22)
    assert dataset.manifest.stored_shape == (2, 8, 4, 4)


def test_the_raw_reader_reads_the_stream_s_bytes(synthetic: Path) -> None:
    import os

    dataset = Dataset.open(synthetic)
    order = Order(dataset.sizes, bench_stream.SEED, bench_stream.BLOCK)
    for position in (0, 1, 149):
        place = order.locate(position)
        descriptor, begin, size, label = bench_stream._place(dataset, *place)
        array, expected = read_sample(dataset, *place)
        assert label == expected
        np.testing.assert_array_equal(
            np.frombuffer(os.pread(descriptor, size, begin), np.float16).reshape(2, 8, 4, 4), array
        )


def test_the_stream_that_draws_nothing_makes_the_same_samples_with_noise_1(synthetic: Path) -> None:
    dataset = Dataset.open(synthetic)
    order, undrawn = Order(dataset.sizes, bench_stream.SEED, bench_stream.BLOCK), bench_stream._undrawn(dataset)
    for step in range(2):
        batch, faults = next(undrawn)
        assert faults == ()
        assert batch.position.tolist() == list(range(64 * step, 64 * step + 64))
        for row, position in enumerate(batch.position.tolist()):
            array, label = read_sample(dataset, *order.locate(position))
            mean, log_variance = np.split(array[position % 2].astype(np.float64), 2)
            expected = (mean + np.exp(log_variance / 2)) * 0.18215
            np.testing.assert_allclose(batch.latent[row].numpy(), expected, rtol=1e-5, atol=1e-6)
            assert batch.condition[row] == label


def test_bench_stream_measures_and_tells(synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data.add_bench(parser.add_subparsers())
    words = ["stream", str(synthetic), "--turns", "1", "--workers", "1", "--step-seconds", "0.01", "--steps", "2"]
    options = parser.parse_args([*words, "--json", str(tmp_path / "bench.json")])
    options.run(options)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["samples"], found["sample_bytes"], found["turns"], found["workers"]) == (128, 2 * 8 * 4 * 4 * 2, 1, 1)
    rates = ("pread", "webdataset", "stream", "draws", "undrawn", "arithmetic", "difference", "start_seconds")
    assert all(found[name] > 0 for name in rates)
    assert found["checksum"] in ("zlib", "isal")
    assert 0 <= found["wait"] <= 1
    assert len(found["worker_bytes"]) == 1 and found["worker_bytes"][0] > 0
    told = capsys.readouterr().out
    assert "128 samples of 512 bytes, 1 turns" in told
    assert f"{found['pread']:,.0f}" in told
    assert f"{found['undrawn'] / found['pread']:.2f} of (a), goal 0.6; " in told
    assert f"{found['undrawn'] / found['webdataset']:.1f} times (b), goal 4\n" in told
    options = parser.parse_args([*words[:2], "--turns", "0"])
    with pytest.raises(ConfigError, match="--turns is 0"):
        options.run(options)


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    bench_stream.write_synthetic(tmp_path / "few", 20, (4, 4, 4), shard_size=64)
    with pytest.raises(ConfigError, match="of 0 samples; give at least 1 turn and 64 samples"):
        bench_stream.bench(tmp_path / "few")
