"""What a run says of where it comes from: the commit, and the command without what gives access to anything."""

import subprocess
from pathlib import Path
from unittest import mock

import pytest

from diffmoe_ep.parallel.mesh import Mesh
from diffmoe_ep.train import provenance
from diffmoe_ep.train.provenance import command_line, environment, redacted, source


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("train.steps=20", "train.steps=20"),
        ("data.folder=s3://bucket/data", "data.folder=s3://bucket/data"),
        ("text.encoder=t5", "text.encoder=t5"),
        ("data.folder=https://me:word@host/x", "data.folder=https://***@host/x"),
        ("data.folder=https://host/x?sig=abc%3D&se=2026", "data.folder=https://host/x?sig=***&se=2026"),
        ("https://host/x?X-Amz-Credential=A&X-Amz-Date=1", "https://host/x?X-Amz-Credential=***&X-Amz-Date=1"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://h", "pipe:curl -H 'Authorization: ***' https://h"),
        ("AWS_SECRET_ACCESS_KEY=abc", "AWS_SECRET_ACCESS_KEY=***"),
        ('{"api_key": "abc", "b": 1}', '{"api_key": "***", "b": 1}'),
        ("--password=abc", "--password=***"),
    ],
)
def test_credentials_are_not_kept(word: str, kept: str) -> None:
    assert redacted(word) == kept
    assert redacted({"a": [word, 1, None]}) == {"a": [kept, 1, None]}


def test_the_value_behind_an_option_is_not_kept() -> None:
    words = ["diffmoe", "train", "--hf-token", "abc", "--dry-run", "folder=runs/a"]
    assert command_line(words) == ["diffmoe", "train", "--hf-token", "***", "--dry-run", "folder=runs/a"]


def git(place: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", place, *who, *words], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_source(tmp_path: Path) -> None:
    file = tmp_path / "diffmoe_ep/train/provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    with mock.patch.object(provenance, "__file__", str(file)):
        assert source()["commit"] is None  # in no repository
        (tmp_path / ".git").write_text("nonsense")
        assert source()["commit"] is None
        (tmp_path / ".git").unlink()
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", "one")
        commit = git(tmp_path, "rev-parse", "HEAD")
        assert source() | {"version": ""} == {"version": "", "commit": commit, "modified": False}
        (tmp_path / "new").write_text("what is not tracked does not count")
        assert source()["modified"] is False
        file.write_text("1")
        assert source()["modified"] is True


def test_a_machine_without_git_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert source()["commit"] is None


def test_the_environment_names_the_host_of_every_rank() -> None:
    found = environment(Mesh(), [("b", "cuda:0"), ("a", "cuda:0"), ("b", "cuda:1")])
    assert found["hosts"] == ["a", "b"]
    assert found["rank_hosts"] == ["b", "a", "b"]
    assert found["rank_devices"] == ["cuda:0", "cuda:0", "cuda:1"]
    assert found["packages"]["torch"][0].isdigit()
