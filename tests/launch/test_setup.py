"""What the launch scripts do before anything is installed, and what they say when something is missing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the scripts read, without an environment, in a folder whose name has a space."""
    project = tmp_path / "a project"
    shutil.copytree(ROOT / "launch", project / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    return project


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A virtual environment with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "bare"


def start(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script from a folder that is not the project's, with none of the variables that choose an environment but
    those given.
    """
    chosen = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "DIFFMOE_PYTHON", "PYTHON", "RUN", "DATA")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    return subprocess.run(
        [script, *arguments], cwd="/", env=kept | environment, capture_output=True, text=True, timeout=120
    )


INSTALLED = ("prep", "sample", "eval", "encode", "fast", "log", "dev")  # the extras that the scripts install


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, by these extras or by all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [
        Requirement(one)
        for one in (*project["dependencies"], *(one for extra in extras or optional for one in optional[extra]))
    ]


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_can_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="there is no shellcheck (Debian's package shellcheck)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean(script: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["setup.sh", "quickstart.sh", "test.sh"])
def test_help_is_the_opening_comment(name: str) -> None:
    done = start(ROOT / "launch" / name, "--help")
    assert done.returncode == 0
    assert f"./launch/{name}" in done.stdout


def test_constraints_pin_every_dependency_within_its_range() -> None:
    pinned = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert all(re.fullmatch(r"[0-9][0-9.]*", version) for version in pinned.values())  # no local parts, no addresses


def test_a_python_that_is_not_there_is_named(project: Path) -> None:
    done = start(project / "launch" / "setup.sh", "--check", DIFFMOE_PYTHON="/nonexistent/python")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "set-up: DIFFMOE_PYTHON=/nonexistent/python is no program; name a Python, or unset it"
    )


@pytest.mark.parametrize("variable", ["DIFFMOE_PYTHON", "VIRTUAL_ENV"])
def test_an_environment_that_lacks_packages_hears_which_and_both_ways_out(
    project: Path, bare: Path, variable: str
) -> None:
    value = str(bare / "bin" / "python") if variable == "DIFFMOE_PYTHON" else str(bare)
    done = start(project / "launch" / "test.sh", **{variable: value})
    assert done.returncode == 1
    lacks, install, leave = done.stderr.splitlines()
    assert variable in lacks
    names = {canonicalize_name(requirement.name) for requirement in requirements(*INSTALLED)}
    assert set(lacks.split(" lacks ")[1].split(". ")[0].split(", ")) == names
    assert f"-m pip install torch=={pins()['torch']} && " in install  # first, alone
    assert {part.split("==")[0] for part in install.split() if "==" in part} == names
    assert str(project / ".venv") in leave
    assert not (project / ".venv").exists()


def test_an_environment_that_has_the_packages_is_used(project: Path, bare: Path) -> None:
    (packages,) = bare.glob("lib/python*/site-packages")
    for requirement in requirements("prep", "sample", "eval", "log"):
        folder = packages / f"{requirement.name.replace('-', '_')}-1.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: 1\n")
    script = project / "launch" / "setup.sh"
    done = start(script, "--check", VIRTUAL_ENV=str(bare), extras="prep,sample,eval,log")
    assert (done.returncode, done.stderr) == (
        0,
        f"set-up: {bare}/bin/python, from the activated VIRTUAL_ENV, has all that is needed\n",
    )
    done = start(script, "--check", VIRTUAL_ENV=str(bare))
    assert done.returncode == 1
    assert "mypy" in done.stderr
    assert "torch" not in done.stderr


def test_every_python_that_was_tried_is_named_with_its_reason(project: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "env"):
        (programs / name).symlink_to(str(shutil.which(name)))
    old = programs / "python3"
    old.write_text("#!/bin/sh\necho is Python 3.9\nexit 1\n")
    old.chmod(0o755)
    done = start(project / "launch" / "setup.sh", "--check", PATH=str(programs), PYTHON="/opt/none")
    assert done.returncode == 1
    for reason in (
        "  /opt/none: not found",
        "  python3.11: not found",
        "  python3: is Python 3.9",
        "PYTHON=/path/to/python",
    ):
        assert reason in done.stderr


def test_what_was_set_up_counts_until_the_pins_change(project: Path) -> None:
    script = project / "launch" / "setup.sh"
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = subprocess.run(
        ["bash", "-c", f"source '{script}'; wanted_stamp"], check=True, capture_output=True, text=True
    ).stdout
    (project / ".venv" / "stamp").write_text(stamp)
    assert start(script, "--check").stderr == f"set-up: {project}/.venv is ready\n"
    assert start(script).stderr == ""
    (project / "constraints.txt").write_text("numpy==1.0\n")
    done = start(script, "--check")
    assert done.returncode == 1
    assert "is not set up yet" in done.stderr


@pytest.mark.slow
def test_a_failed_installation_shows_why_and_counts_for_nothing(project: Path, tmp_path: Path) -> None:
    nowhere = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHON": sys.executable,
    }
    done = start(project / "launch" / "setup.sh", **nowhere)
    assert done.returncode == 1
    torch = f"torch=={pins()['torch']}"
    assert any(line.startswith("ERROR: ") and "torch" in line for line in done.stderr.splitlines())
    assert (
        done.stderr.splitlines()[-1]
        == f"set-up: pip install {torch} failed; the lines above are the end of {project}/.venv.log"
    )
    assert "is not set up yet" in start(project / "launch" / "setup.sh", "--check").stderr


# -- before anything is installed --------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A PATH on which the one Python has its standard library alone."""
    programs = tmp_path / "plain"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')  # type: ignore[attr-defined]
    (programs / "python3").chmod(0o755)
    for name in ("bash", "dirname", "cat", "cksum", "env", "nproc", "awk", "cut", "sed", "grep", "seq", "hostname"):
        (programs / name).symlink_to(str(shutil.which(name)))
    for name in ("mktemp", "rm", "tail", "realpath", "sh", "echo"):
        (programs / name).symlink_to(str(shutil.which(name)))
    return str(programs)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("deepspeed.sh", []),
        ("deepspeed.sh", ["--hostfile", "hosts"]),
        ("torchrun.sh", ["--gpus", "2"]),
        ("torchrun.sh", ["--nnodes", "2", "--rdzv-endpoint", "localhost"]),
        ("slurm.sbatch", []),
    ],
)
def test_what_would_be_started_is_shown_before_anything_is_installed(
    project: Path, plain: str, script: str, options: list[str]
) -> None:
    (project / "hosts").write_text("localhost slots=2\n" if "torchrun" in script else "127.0.0.1 slots=2\n")
    options = [str(project / word) if word == "hosts" else word for word in options]
    done = start(project / "launch" / script, "--print", *options, "configs/digits.yaml", PATH=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"a\\ project/\.venv/bin/python .*diffmoe_ep train configs/digits\.yaml", done.stdout)
    assert not (project / ".venv").exists()


def test_hosts_are_asked_before_anything_is_installed(project: Path, plain: str) -> None:
    (project / "hosts").write_text("127.0.0.1 slots=1\nnode-b.invalid slots=1\n")
    (Path(plain) / "pdsh").symlink_to("/bin/true")
    (Path(plain) / "ssh").write_text('#!/bin/sh\necho "No route to host" >&2\nexit 255\n')
    (Path(plain) / "ssh").chmod(0o755)
    done = start(
        project / "launch/deepspeed.sh", "--hostfile", str(project / "hosts"), "configs/digits.yaml", PATH=plain
    )
    assert done.returncode == 1
    assert done.stderr.startswith("launch: host 127.0.0.1 cannot be used over ssh (No route to host); ")
    assert not (project / ".venv").exists()
    assert not (project / ".venv.log").exists()
