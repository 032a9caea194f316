"""The images as far as can be told without building one: their files are here, their commands are sound, and what
NGC's image has stays as it is.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile*"))
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, the rest of it), with lines that go on joined and comments left out."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_made_of_files_that_are_here(file: Path) -> None:
    found = instructions(file)
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert next(name for name, _ in found if name != "ARG") == "FROM"
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, rest in found:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] not in ignored
        if name == "CMD":
            assert (ROOT / re.findall(r'"([^"]+)"', rest)[0]).exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_its_commands_are_sound(file: Path) -> None:
    commands = [rest for name, rest in instructions(file) if name == "RUN"]
    assert commands
    for command in commands:
        subprocess.run(["sh", "-n"], input=command, text=True, check=True)
        for script in re.findall(r"(?:\./)?(?:launch|docker)/[\w.]+", command):
            assert (ROOT / script).exists(), script
        if shutil.which("shellcheck") is not None:
            done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


def test_what_a_python_has_is_held_and_the_rest_comes_from_our_pins(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\nPyTest==0.0.1\nnot_here==1.2.3\ntyping.extensions==0.0.1\n")
    done = subprocess.run(
        [sys.executable, ROOT / "docker/constraints.py", pins], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert lines[-1] == "not_here==1.2.3"  # the one that is not installed
    for name in ("torch", "pytest", "typing-extensions"):
        assert f"{name}=={importlib.metadata.version(name)}" in lines


@pytest.mark.parametrize(("after", "code", "named"), [("a==1\nb==2\nc==3\n", 0, ""), ("a==1\nb==3\n", 1, "b==2\n")])
def test_a_changed_package_of_the_image_stops_the_build_and_is_named(
    tmp_path: Path, after: str, code: int, named: str
) -> None:
    """The last command of the Dockerfile's installation, on two lists."""
    (last,) = (rest.split("&&")[-1] for name, rest in instructions(ROOT / "docker/Dockerfile") if "/opt/before" in rest)
    (tmp_path / "before.txt").write_text("a==1\nb==2\n")
    (tmp_path / "after.txt").write_text(after)
    done = subprocess.run(["sh", "-c", last.replace("/opt", str(tmp_path))], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, named)
