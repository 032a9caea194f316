"""The order of work in the scripts that train and test, seen by a stand-in for Python that writes down what it is asked
to do.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
    "- "*) exit 0 ;;  # the check of an environment
    "-c "*) echo 1; exit 0 ;;  # the number of GPUs, a free port
esac
echo "$PWD|$DS_ACCELERATOR|$OMP_NUM_THREADS|${*:2}" >>"$ASKED"
if [[ "$2" == deepspeed.launcher.runner ]]; then mkdir -p "$RUN/checkpoints"; echo step-7 >"$RUN/checkpoints/latest"; fi
for module in $FAIL; do if [[ "$2" == "$module" ]]; then echo "$module complains" >&2; exit 7; fi; done
"""


def start(
    script: str, folder: Path, *arguments: str, fail: str = "", **settings: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Runs a script with the stand-in; gives what it did and, for each call of Python, [folder, accelerator, threads,
    arguments].
    """
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    asked = folder / "asked"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}
    places = {
        "DIFFMOE_PYTHON": str(stand_in),
        "ASKED": str(asked),
        "FAIL": fail,
        "RUN": str(folder / "run"),
        "DATA": str(folder / "data"),
    }
    places |= {"RUNS": str(folder / "runs"), "ENCODER": str(folder / "t5")} if script == "text_to_image.sh" else {}
    done = subprocess.run(
        [ROOT / "launch" / script, *arguments],
        cwd=folder,
        env=kept | places | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, [line.split("|") for line in asked.read_text().splitlines()]


def test_quickstart_goes_from_data_to_scores(tmp_path: Path) -> None:
    done, asked = start("quickstart.sh", tmp_path, "train.steps=3", "pool.span=1")
    assert done.returncode == 0, done.stderr
    assert {(folder, threads) for folder, _, threads, _ in asked[1:]} == {(str(ROOT), "1")}
    data, train, sample, evaluate = (arguments for *_, arguments in asked)
    assert data == f"data_prep digits --out {tmp_path}/data"
    assert train.startswith("deepspeed.launcher.runner --quiet --hostfile  --num_gpus 2 --master_port 1 ")
    assert train.endswith(
        f" train configs/digits.yaml folder={tmp_path}/run data.folder={tmp_path}/data/train train.steps=3 pool.span=1"
    )
    assert asked[1][1] == "cpu"  # one GPU is too few for two ranks
    assert sample.startswith(f"diffmoe_ep sample {tmp_path}/run --out ")
    assert evaluate.startswith(
        f"diffmoe_ep evaluate {tmp_path}/run --reference {tmp_path}/data/train --heldout {tmp_path}/data/heldout "
    )
    assert "step-7 is the newest" in done.stdout


def test_families_share_seeds_and_settings(tmp_path: Path) -> None:
    done, asked = start("families.sh", tmp_path, "train.steps=3")
    assert done.returncode == 0, done.stderr
    trained = [arguments for *_, arguments in asked if " train " in arguments]
    assert [(line.split("model.family=")[1].split()[0], line.split(" seed=")[1].split()[0]) for line in trained] == [
        (family, seed) for seed in "012" for family in ("dense", "tc", "ec", "diffmoe")
    ]
    assert all(line.endswith("train.steps=3") for line in trained)
    assert len([line for *_, line in asked if " evaluate " in line]) == 12
    assert asked[-1][3].startswith(f"diffmoe_ep compare {ROOT}/runs/families/dense-0 ")


def test_text_to_image_goes_from_the_encoder_to_the_table(tmp_path: Path) -> None:
    done, asked = start("text_to_image.sh", tmp_path, "train.max_grad_norm=2")
    assert done.returncode == 0, done.stderr
    assert all(threads == "1" and accelerator == "cpu" for _, accelerator, threads, _ in asked[1:])
    calls = [arguments.split("--module ")[-1] for *_, arguments in asked]
    text = f"--t5 {tmp_path}/t5 --t5-length 96"
    assert calls[0] == f"data_prep tiny_t5 --out {tmp_path}/t5"
    assert calls[1] == f"data_prep digits_captions --out {tmp_path}/data --samples 12000 {text}"
    assert calls[2].startswith(f"data_prep digits_captions --out {tmp_path}/data-clean ") and "--legible" in calls[2]
    for number, family in enumerate(("dense", "diffmoe")):
        run, base = f"{tmp_path}/runs/{family}", 3 + 5 * number
        same = f"text.folder={tmp_path}/t5 train.max_grad_norm=2"
        train, score, tune, score_again, sample = calls[base : base + 5]
        verb = f"diffmoe_ep train configs/text/digits_{family}.yaml"
        assert train == f"{verb} folder={run} data.folder={tmp_path}/data/train {same}"
        assert tune.startswith(f"{verb} folder={run}-sft data.folder={tmp_path}/data-clean/train ")
        assert f" init_from={run} " in tune and tune.endswith(same)
        for call, folder in ((score, run), (score_again, f"{run}-sft")):
            data = f"--reference {tmp_path}/data/train --heldout {tmp_path}/data/heldout"
            assert call == f"diffmoe_ep evaluate {folder} --composition {data} --samples 400 --out {folder}/scores"
        assert sample.startswith(
            f"diffmoe_ep sample {run}-sft --out {run}-sft/drawn --per-prompt 6 --prompt one 3 --prompt "
        )
    runs = " ".join(f"{tmp_path}/runs/{name}" for name in ("dense", "dense-sft", "diffmoe", "diffmoe-sft"))
    assert calls[13:] == [f"diffmoe_ep compare --composition {runs} --json {tmp_path}/runs/table.json"]
    modules = [arguments.split()[0] for *_, arguments in asked]
    assert modules.count("deepspeed.launcher.runner") == 10  # data, training and scores on two ranks


def test_text_to_image_scores_once_and_takes_shorter_runs(tmp_path: Path) -> None:
    scores = tmp_path / "runs/diffmoe/scores/composition.json"
    for path in (tmp_path / "runs/diffmoe/checkpoints/latest", scores):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(scores, (2**31, 2**31))  # newer than the checkpoint
    done, asked = start("text_to_image.sh", tmp_path, FAMILIES="diffmoe", STEPS="20", SFT_STEPS="5", SAMPLES="80")
    assert done.returncode == 0, done.stderr
    calls = [arguments.split("--module ")[-1] for *_, arguments in asked]
    assert [call.split()[1] for call in calls] == [
        "tiny_t5",
        "digits_captions",
        "digits_captions",
        "train",
        "train",
        "evaluate",
        "sample",
        "compare",
    ]
    assert "train.steps=20" in calls[3] and "train.steps=5" in calls[4] and "--samples 80" in calls[5]
    assert "composition.json is there" in done.stdout


@pytest.mark.parametrize(("module", "calls"), [("data_prep", 1), ("deepspeed.launcher.runner", 2), ("diffmoe_ep", 3)])
def test_quickstart_stops_at_the_first_failure(tmp_path: Path, module: str, calls: int) -> None:
    done, asked = start("quickstart.sh", tmp_path, fail=module)
    assert (done.returncode, len(asked)) == (7, calls)
    assert done.stderr.endswith(f"{module} complains\n")
    assert "where to look" not in done.stdout


LINT = ["ruff check .", "ruff format --check .", "mypy"]


@pytest.mark.parametrize(
    ("arguments", "pytest_arguments"),
    [
        (("-x", "tests/moe"), "-q -x tests/moe"),
        (("--fast",), "-q -m not slow"),
        (("--fast", "tests/moe"), "-q -m not slow tests/moe"),
        (("--lint",), None),
    ],
)
def test_all_checks_run_and_pass_arguments_to_pytest(
    tmp_path: Path, arguments: tuple[str, ...], pytest_arguments: str | None
) -> None:
    done, asked = start("test.sh", tmp_path, *arguments, TEST_PROCESSES="1")
    assert done.returncode == 0
    tests = [f"pytest {pytest_arguments}"] if pytest_arguments else []
    assert [arguments for *_, arguments in asked] == LINT + tests
    assert {folder for folder, *_ in asked} == {str(ROOT)}
    assert done.stdout.endswith("all passed\n")


def test_processes_share_the_tests_file_by_file(tmp_path: Path) -> None:
    _, asked = start("test.sh", tmp_path, "tests/moe", TEST_PROCESSES="3")
    assert asked[-1][3] == "pytest -q -n 3 --dist loadfile tests/moe"


@pytest.mark.parametrize("fail", ["ruff", "mypy", "pytest", "ruff pytest"])
def test_all_checks_run_whichever_fails(tmp_path: Path, fail: str) -> None:
    done, asked = start("test.sh", tmp_path, fail=fail)
    assert (done.returncode, len(asked)) == (1, 4)
    assert done.stdout.endswith(f"\nfailed: {fail.replace('ruff', 'ruff format')}\n")


@pytest.mark.parametrize("broken", [False, True])
def test_ci_installs_what_skipped_tests_need_and_names_what_is_missing(tmp_path: Path, broken: bool) -> None:
    """A machine that has pdsh, ip and Slurm alone, on which apt works or does not."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "ln", "timeout", "nproc", "awk", "sort", "head"):
        (programs / name).symlink_to(str(shutil.which(name)))
    installed = "; ".join(f"ln -sf ip {programs}/{name}" for name in ("sshd", "ssh", "shellcheck"))
    apt = f'echo "$@" >>{tmp_path}/apt; ' + ("exit 100" if broken else installed)
    for name, does in {"id": "echo 0", "ip": "", "pdsh": "", "slurmctld": "", "apt-get": apt}.items():
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{does}\n")
        (programs / name).chmod(0o755)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.replace("/usr/bin/env bash", str(shutil.which("bash"))))
    stand_in.chmod(0o755)
    settings = {
        "PATH": str(programs), "DIFFMOE_PYTHON": str(stand_in), "ASKED": str(tmp_path / "asked"), "FAIL": "",
        "TEST_PROCESSES": "1",
    }  # fmt: skip
    command = [ROOT / ".ci/run", "--fast"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "apt").read_text().splitlines()
    assert calls[0].endswith(" update")
    assert broken or calls[1].endswith(" openssh-server openssh-client shellcheck")
    missing = (
        "ci: MISSING sshd ssh shellcheck: the tests that need them are skipped; install openssh-server openssh-client "
        "shellcheck as root to run them\n"
    )
    assert (missing in done.stdout, "MISSING" in done.stdout) == (broken, broken)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 4
    assert asked[-1].endswith("pytest -q -m not slow -rs")  # each skipped test says why
