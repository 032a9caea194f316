"""What launch/gpu_check.sh starts, in which order and for how long, seen by a stand-in for Python; no GPU is needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
    "- $ROOT") echo "extras $3" >>"$ASKED"; exit 0 ;;  # the check of an environment
    "- "*) cat >/dev/null; exit 0 ;;  # the table
    "-c "*) echo "$MEMORY"; exit 0 ;;  # whether there is a GPU, and its memory
esac
echo "$PYTHONPATH|${*:2}" >>"$ASKED"
"""
TIMEOUT = """#!/usr/bin/env bash
echo "limit $2" >>"$ASKED"
exec "${@:3}"
"""


def check(folder: Path, memory: int, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the script; gives what it did and asked of Python."""
    for name, text in {"python3": STAND_IN, "timeout": TIMEOUT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given = {
        "PATH": f"{folder}:{os.environ['PATH']}", "ASKED": str(folder / "asked"), "OUT": str(folder / "out"),
        "MEMORY": str(memory), "ROOT": str(ROOT), "PYTHONPATH": "",
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "launch/gpu_check.sh"], env=os.environ | given | settings, capture_output=True, text=True, timeout=60
    )
    return done, (folder / "asked").read_text().splitlines()


def test_what_matters_most_comes_first_and_all_in_under_ten_minutes(tmp_path: Path) -> None:
    done, asked = check(tmp_path, 141, DIFFMOE_PYTHON=str(tmp_path / "python3"))
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^== (\S+)$", done.stdout, re.MULTILINE)
    assert stages[:2] == ["text", "tests"] and {"verify", "layer", "step", "digits-bf16-train"} <= set(stages)
    limits = [int(line.removeprefix("limit ")) for line in asked if line.startswith("limit ")]
    assert len(limits) == len(stages)
    assert sum(limits) <= 570  # the rest is the set-up's


def test_a_smaller_card_leaves_the_large_model_out(tmp_path: Path) -> None:
    done, asked = check(tmp_path, 80, DIFFMOE_PYTHON=str(tmp_path / "python3"))
    assert "text: left out" in done.stdout and not any("4.6b" in line for line in asked)


def test_every_test_that_needs_a_gpu_is_named(tmp_path: Path) -> None:
    _, asked = check(tmp_path, 80, DIFFMOE_PYTHON=str(tmp_path / "python3"))
    (tests,) = (line for line in asked if "|pytest" in line)
    files = [path for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark" + ".gpu" in path.read_text()]
    assert sorted(tests.split(" -m gpu ")[1].split()) == sorted(str(path.relative_to(ROOT)) for path in files)


def test_without_a_network_python3_is_taken_with_the_wheels(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one-1-py3-none-any.whl").touch()
    kept = dict.fromkeys(("DIFFMOE_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"), "")
    done, asked = check(tmp_path, 80, WHEELS=str(tmp_path / "wheels"), **kept)
    assert done.returncode == 0, done.stderr
    install, extras, *rest = asked
    assert "--no-index --no-deps" in install and install.endswith("/one-1-py3-none-any.whl")
    site = install.split("--target ")[1].split()[0]
    assert extras == "extras prep,sample"
    assert all(line.startswith((f"{site}|", "limit ")) for line in rest)
    assert not Path(site).exists()


@pytest.mark.parametrize("extra", ["prep", "sample"])
def test_the_wheels_are_what_a_bare_torch_lacks(extra: str) -> None:
    """Every package that the project or DeepSpeed asks for is carried, or said to come with torch's own environment."""
    text = (ROOT / "launch/gpu_wheels.sh").read_text()
    carried = set(" ".join(re.findall(r"^packages\+?=\((.*?)\)", text, re.MULTILINE)).split()) | {"deepspeed"}
    there = {"torch", "numpy", "pyyaml", "psutil", "pillow", "scikit-learn", "packaging"}
    from importlib.metadata import requires

    from launch.test_setup import requirements

    project = {one.name.lower() for one in requirements(extra)}
    deepspeed = {re.split(r"[^\w-]", one)[0].lower() for one in requires("deepspeed") or [] if "extra ==" not in one}
    assert project | deepspeed <= carried | there
