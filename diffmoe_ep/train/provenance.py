"""Where a run comes from: the code's commit, the command line, the machines; without what gives access to anything."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from diffmoe_ep.parallel.mesh import Mesh

PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "numpy")
GIT_SECONDS = 20.0  # that git may take on a slow disk

_NAMES = r"[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|credential|api[_-]?key|access[_-]?key|signature)[\w.-]*"
_CREDENTIAL = re.compile(rf"-*(?:{_NAMES}|sig|authorization)", re.IGNORECASE)  # what is called so is not written down
_VALUE = r"""(?:(?:bearer|basic)\s+)?[^\s&;,'"}]+"""
_ASSIGNED = re.compile(rf"""((?<![\w-])(?:{_NAMES}|sig|authorization)['"]?\s*[=:]\s*['"]?){_VALUE}""", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def environment(mesh: Mesh, machines: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What computes a run; machines: host and device of each rank."""
    return {
        "command": command_line(sys.orig_argv),
        "source": source(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(mesh.device)
        if mesh.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads a rank",
        "ranks": mesh.size,
        "expert_parallel": mesh.expert.size,
        "hosts": sorted({host for host, _ in machines}),
        "rank_hosts": [host for host, _ in machines],
        "rank_devices": [device for _, device in machines],
    }


def command_line(words: Sequence[str]) -> list[str]:
    """A command line without the values of what is called a token, a password and the like."""
    kept, hides_next = [], False
    for word in words:
        kept.append("***" if hides_next else redacted(word))
        hides_next = word.startswith("-") and _CREDENTIAL.fullmatch(word) is not None
    return kept


def redacted(value: Any) -> Any:
    """Plain data whose texts do not hold logins of URLs, tokens, passwords and the like; *** stands in their place."""
    match value:
        case str():
            return _ASSIGNED.sub(r"\1***", _LOGIN.sub("***@", value))
        case dict():
            return {key: redacted(inner) for key, inner in value.items()}
        case list():
            return [redacted(inner) for inner in value]
    return value


def source() -> dict[str, Any]:
    """Version of this package, and, where it is known, the commit that it is and whether files differ from that."""
    place = Path(__file__).parents[2]
    known: dict[str, Any] = {"version": _version("diffmoe_ep"), "commit": None, "modified": None}
    if (place / ".git").exists():  # not that of a project around an installed package
        commit = _git(place, "rev-parse", "HEAD")
        changes = _git(place, "status", "--porcelain", "--untracked-files=no")
        return known | {"commit": commit, "modified": None if changes is None else bool(changes)}
    try:  # pip keeps the commit of what it installed from a repository
        told = json.loads(metadata.distribution("diffmoe_ep").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, json.JSONDecodeError):
        return known
    commit = told.get("vcs_info", {}).get("commit_id")
    return known | {"commit": commit, "modified": None if commit is None else False}


def _git(place: Path, *words: str) -> str | None:
    """What git says; None where there is no git, or it fails."""
    command = ["git", "--no-optional-locks", "-C", str(place), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
