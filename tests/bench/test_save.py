"""The bench of saves measures all ways, over all ranks, and leaves nothing behind."""

from pathlib import Path

import pytest

from diffmoe_ep.bench.save import SaveBench, bench_save
from diffmoe_ep.config import ConfigError
from diffmoe_ep.parallel.mesh import Mesh, init_mesh
from ranks import run

pytestmark = pytest.mark.slow


def measured(rank: int, out: Path) -> SaveBench:
    return bench_save(init_mesh(1, 1, 1.0), out, 0.04, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_is_measured_in_all_ways(tmp_path: Path, world: int) -> None:
    found = run(world, measured, tmp_path)
    assert found == [found[0]] * world
    assert found[0].size == 40_000_000
    assert len(found[0].seconds) == 5
    assert all(len(turns) == 2 and min(turns) > 0 for turns in found[0].seconds.values())
    waits, complete = (found[0].seconds[f"in the background: {what}"] for what in ("training waits", "until complete"))
    assert all(one < other for one, other in zip(waits, complete, strict=True))
    assert found[0].lines()[0] == f"40.0 MB from cpu over {world} rank{'s' * (world > 1)}, 2 turns"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "bench_save").mkdir()
    with pytest.raises(ConfigError, match="bench_save is there already; give another folder with --out"):
        bench_save(Mesh(), tmp_path, 0.04, 2)
