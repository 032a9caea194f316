"""The list of bad samples: appended by ranks, cut short by kills, joined into one line a sample."""

import json
import os
from pathlib import Path

import pytest

from diffmoe_ep.data.loader import quarantine
from diffmoe_ep.data.loader.quarantine import BadSample, Fault
from diffmoe_ep.data.manifest import DataError


def fault(key: str, position: int, shard: str = "a.tar") -> Fault:
    return Fault(shard, key, "damaged", position, "b.tar, k9")


def test_files_of_ranks_are_joined_by_sample(tmp_path: Path) -> None:
    quarantine.append(quarantine.rank_file(tmp_path, 0), [fault("k2", 70), fault("k1", 3)])
    quarantine.append(quarantine.rank_file(tmp_path, 0), [fault("k1", 3)])  # met again by a run that was continued
    quarantine.append(quarantine.rank_file(tmp_path, 11), [fault("k1", 40), fault("k1", 5, "b.tar")])
    expected = [
        BadSample("a.tar", "k1", "damaged", (3, 40)),
        BadSample("a.tar", "k2", "damaged", (70,)),
        BadSample("b.tar", "k1", "damaged", (5,)),
    ]
    assert quarantine.read(tmp_path) == expected
    quarantine.join(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines[0] == {"shard": "a.tar", "key": "k1", "reason": "damaged", "positions": [3, 40]}
    assert len(lines) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quarantine-rank0.jsonl",
        "quarantine-rank11.jsonl",
        "quarantine.jsonl",
    ]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_spoils_no_other(tmp_path: Path, cut: int) -> None:
    path = quarantine.rank_file(tmp_path, 2)
    quarantine.append(path, [fault("k1", 3), fault("k2", 4)])
    path.write_bytes(path.read_bytes()[:-cut])
    quarantine.append(path, [fault("k3", 5)])
    assert [sample.key for sample in quarantine.read(tmp_path)] == (["k1", "k2", "k3"] if cut == 1 else ["k1", "k3"])


def test_nothing_listed_is_an_empty_list(tmp_path: Path) -> None:
    assert quarantine.read(tmp_path) == []
    quarantine.join(tmp_path)
    assert (tmp_path / "quarantine.jsonl").read_text() == ""


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(DataError, match=r"quarantine-rank0\.jsonl: cannot list a bad sample .*; make room"):
        quarantine.append(quarantine.rank_file(tmp_path / "run", 0), [fault("k", 1)])


def test_lines_that_are_no_faults_are_passed_over(tmp_path: Path) -> None:
    path = quarantine.rank_file(tmp_path, 0)
    quarantine.append(path, [fault("k1", 3)])
    known = json.loads(path.read_text())
    strange = [known | {"key": [1]}, known | {"position": "3"}, known | {"more": 1}, {"position": 3}, [], 5]
    path.write_bytes(path.read_bytes() + b"".join(json.dumps(line).encode() + b"\n" for line in strange) + b"\xff\n")
    path.write_bytes(path.read_bytes() + b"[" * 5000 + b"\n")
    assert quarantine.read(tmp_path) == [BadSample("a.tar", "k1", "damaged", (3,))]


def test_a_pipe_in_place_of_a_list_is_named(tmp_path: Path) -> None:
    os.mkfifo(quarantine.rank_file(tmp_path, 1))
    with pytest.raises(DataError, match=r"quarantine-rank1\.jsonl: cannot be read \(it is a named pipe, not a file\)"):
        quarantine.join(tmp_path)
