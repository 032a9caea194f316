"""The verb: a page or JSON, and an exit code that says whether there is a problem."""

import json
import os
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from cli.test_cli import call


class Space(NamedTuple):
    f_frsize: int
    f_blocks: int
    f_bavail: int
    f_files: int
    f_favail: int


def test_this_host_as_json(tmp_path: Path) -> None:
    code, out, err = call(0, "doctor", "--json", "--run", str(tmp_path / "run"))
    said = json.loads(out)  # and nothing else
    assert err == ""
    assert code == (0 if said["well"] else 1) == (1 if said["problems"] else 0)
    assert (said["schema"], said["ranks"], len(said["hosts"]), said["speeds"]) == (1, 1, 1, [])
    sections = {one["section"] for one in said["checks"]}
    assert sections == {"software", "devices", "host", "network", "run folder"}
    assert all(one["remedy"] for one in said["checks"] if one["state"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_told_last_and_by_the_exit_code(digits: Path, tmp_path: Path) -> None:
    small = Space(4096, 16384, 16384, 10**6, 10**6)  # 64 MiB, everywhere
    settings = [f"data.folder={digits / 'train'}", f"folder={tmp_path}", "parallel.expert_parallel=1"]
    with mock.patch.object(os, "statvfs", return_value=small):
        code, out, _ = call(0, "doctor", "configs/digits.yaml", *settings)
    assert code == 1
    problems = " ".join(out[out.index("PROBLEMS, and what to do") :].split())
    assert f"67.1 MB free of 67.1 MB at {tmp_path}" in problems
    assert "checkpoints to come: 225 MB -> make room at" in problems
    assert "this config\n  ok       ranks" in out


def test_a_lock_that_holds_the_run_folder_is_told(tmp_path: Path) -> None:
    lock = {"host": "elsewhere", "process": 7, "since": "2026-11-27"}
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    code, out, _ = call(0, "doctor", "--json", "--run", str(tmp_path))
    (found,) = [one for one in json.loads(out)["checks"] if one["name"] == "in use"]
    assert found["state"] == "note"
    assert "process 7 on elsewhere has trained there since 2026-11-27" in found["found"]
    assert code == (1 if json.loads(out)["problems"] else 0)


def test_mistakes_are_one_line() -> None:
    assert call(0, "doctor", "folder=runs/x")[2].endswith("give the config's file before it\n")
    assert "--timeout-seconds is 0" in call(0, "doctor", "--timeout-seconds", "0")[2]
    assert "there is no verb diagnose; did you mean doctor?" in call(0, "diagnose")[2]
