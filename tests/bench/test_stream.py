"""The stream's bench: it compares readers of the same bytes, and what it says of them is told whole."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffmoe_ep.bench import stream as bench_stream
from diffmoe_ep.cli import main
from diffmoe_ep.config import ConfigError
from diffmoe_ep.data.checked import read_sample
from diffmoe_ep.data.order import Order
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


def test_bench_stream_measures_and_tells(synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "stream", str(synthetic), "--turns", "1", "--workers", "1", "--step-seconds", "0.01"]
    main([*words, "--steps", "2", "--json", str(tmp_path / "bench.json")])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["samples"], found["sample_bytes"], found["turns"], found["workers"]) == (128, 2 * 8 * 4 * 4 * 2, 1, 1)
    rates = ("pread", "webdataset", "stream", "draws", "undrawn", "start_seconds")
    assert all(found[name] > 0 for name in rates)
    assert found["checksum"] in ("zlib", "isal")
    assert 0 <= found["wait"] <= 1
    assert len(found["worker_bytes"]) == 1 and found["worker_bytes"][0] > 0
    printed = capsys.readouterr().out
    assert "128 samples of 512 bytes, 1 turns" in printed
    assert f"{found['pread']:,.0f}" in printed
    assert f"{found['undrawn'] / found['pread']:.2f} of (a); " in printed
    assert f"{found['undrawn'] / found['webdataset']:.1f} times (b)\n" in printed
    with pytest.raises(SystemExit):
        main(["bench", "stream", str(synthetic), "--turns", "0"], patience=0.0)
    assert "--turns is 0" in capsys.readouterr().err


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    bench_stream.write_synthetic(tmp_path / "few", 20, (4, 4, 4), shard_size=64)
    with pytest.raises(ConfigError, match="of 0 samples; give at least 1 turn and 64 samples"):
        bench_stream.bench(tmp_path / "few")
