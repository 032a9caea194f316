"""What launch/deepspeed.sh and launch/slurm.sbatch would start, and what they say when something is missing. No other
host is asked.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "DS_",
    "SLURM_",
    "SRUN_",
    "MASTER_",
    "CUDA_",
    "DIFFMOE_",
    "FI_",
    "UCX_",
)
HOSTS = "# two hosts\n\nnode-a.invalid slots=2\n  node-b.invalid   slots=4   # more\n"


def start(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script on a machine without GPUs, with no variable that concerns ranks but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    ours = {"DIFFMOE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=kept | ours | environment, capture_output=True, text=True, timeout=120)


def printed(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> tuple[dict[str, str], list[str]]:
    """What --print shows: the variables, and the other lines."""
    done = start(script, "--print", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    exports = [word for line in lines if line.startswith("export ") for word in line.removeprefix("export ").split()]
    return dict(word.split("=", 1) for word in exports), [line for line in lines if not line.startswith("export ")]


def hostfile(folder: Path, text: str = HOSTS) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


# -- deepspeed.sh ------------------------------------------------------------------------------------------------------


def test_one_machine(tmp_path: Path) -> None:
    variables, lines = printed(
        "deepspeed.sh", "--gpus", "2", "configs/digits.yaml", "train.schedule={kind: cosine}", cwd=ROOT
    )
    assert variables["DS_ACCELERATOR"] == "cpu"
    assert variables["NCCL_DEBUG"] == "WARN"
    assert int(variables["OMP_NUM_THREADS"]) >= 1
    assert "GLOO_SOCKET_IFNAME" not in variables
    assert lines[0] == f"cd {ROOT}"
    words = lines[1].split()
    assert words[:6] == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--hostfile",
        "''",
    ]  # no /job/hostfile
    assert words[-6:-2] == ["--module", "diffmoe_ep", "train", f"{ROOT}/configs/digits.yaml"]
    assert "--num_gpus 2 --no_local_rank" in lines[1]
    assert lines[1].endswith(r"train.schedule=\{kind:\ cosine\}")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_gpus_gets_one_rank_and_one_with_chosen_gpus_those() -> None:
    assert "--num_gpus 1 " in printed("deepspeed.sh", "configs/digits.yaml")[1][1]
    variables, lines = printed("deepspeed.sh", "configs/digits.yaml", CUDA_VISIBLE_DEVICES="2,5,7")
    assert r"--include localhost:2\,5\,7 " in lines[1]
    assert "DS_ACCELERATOR" not in variables
    assert (
        r"--include localhost:2\,5 "
        in printed("deepspeed.sh", "--gpus=2", "configs/digits.yaml", CUDA_VISIBLE_DEVICES="2,5,7")[1][1]
    )


def test_two_hosts(tmp_path: Path) -> None:
    settings = [
        "configs/digits.yaml",
        "train.schedule={kind: cosine, warmup: 3}",
        "folder=it's $HOME",
        "sample.guidance_interval=[0.1,0.9]",
        "a=5%n",
    ]
    variables, lines = printed(
        "deepspeed.sh", "--hostfile", hostfile(tmp_path), "--ssh-port", "2200", *settings, NCCL_DEBUG="INFO", cwd=ROOT
    )
    assert variables["NCCL_DEBUG"] == "INFO"  # the user's own value wins
    assert "DS_ACCELERATOR" not in variables  # this machine is none of the hosts, and knows nothing of their devices
    command = next(line for line in lines if line.startswith("DS_ENV_FILE="))
    assert (
        "--hostfile HOSTS --force_multi --no_ssh_check --master_addr node-a.invalid --master_port 29500 --ssh_port "
        "2200 " in command
    )
    # as the program gets it, DeepSpeed quotes words with spaces and no others; see what two shells and pdsh make of
    # that in test_two_hosts
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.split(' train ', 1)[1]}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == [
        str(ROOT / "configs/digits.yaml"), "train.schedule={kind: cosine, warmup: 3}", r"folder=it's \$HOME",
        "'sample.guidance_interval=[0.1,0.9]'", "a=5%%n",
    ]  # fmt: skip
    shown = "\n".join(lines)
    assert "# HOSTS is a temporary file of\nnode-a.invalid slots=2\nnode-b.invalid slots=4\n" in shown
    assert "NCCL_DEBUG=INFO" in shown.split("# VARIABLES is one of\n")[1].splitlines()
    assert lines[-2:] == ["#   node-a.invalid: 0 1", "#   node-b.invalid: 2 3 4 5"]


def test_hosts_and_slots_can_be_cut(tmp_path: Path) -> None:
    _, lines = printed(
        "deepspeed.sh", "--hostfile", hostfile(tmp_path), "--nodes", "1", "--gpus", "1", "--verb", "verify"
    )
    assert lines[-1] == "#   node-a.invalid: 0"
    assert any(line.endswith("--module diffmoe_ep verify") for line in lines)


def test_a_config_is_found_from_the_callers_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert printed("deepspeed.sh", "mine.yaml", cwd=tmp_path)[1][1].endswith(f" train {tmp_path}/mine.yaml")
    assert printed("slurm.sbatch", "mine.yaml", cwd=tmp_path)[1][1].endswith(f" train {tmp_path}/mine.yaml")


def test_the_interface_that_leads_to_the_other_hosts_is_found(tmp_path: Path) -> None:
    """Where there is a route; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        here = probe.getsockname()[0]
    given = hostfile(tmp_path, f"{here} slots=2\n192.0.2.1 slots=2\n")
    variables, _ = printed("deepspeed.sh", "--hostfile", given, "configs/digits.yaml")
    assert (Path("/sys/class/net") / variables["GLOO_SOCKET_IFNAME"]).exists()
    assert variables["GLOO_SOCKET_IFNAME"] != "lo"
    assert variables["NCCL_SOCKET_IFNAME"] == variables["GLOO_SOCKET_IFNAME"]
    assert variables["DS_ACCELERATOR"] == "cpu"
    chosen, _ = printed(
        "deepspeed.sh", "--hostfile", given, "configs/digits.yaml", GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="ib"
    )
    assert (chosen["GLOO_SOCKET_IFNAME"], chosen["NCCL_SOCKET_IFNAME"]) == ("lo", "ib")
    done = start("deepspeed.sh", "--print", "--hostfile", given, "configs/digits.yaml", GLOO_SOCKET_IFNAME="nonesuch0")
    assert done.returncode == 1
    assert (
        "launch: GLOO_SOCKET_IFNAME names the interface nonesuch0, which this machine has not; it has " in done.stderr
    )


def test_variables_reach_the_hosts_by_prefix_and_by_name(tmp_path: Path) -> None:
    given = {
        "NCCL_IB_HCA": "mlx5",
        "FI_PROVIDER": 'a "b" $c',
        "PROXY": "http://x",
        "SECRET": "s",
        "DIFFMOE_EXPORT": "PROXY",
    }
    done = start("deepspeed.sh", "--print", "--hostfile", hostfile(tmp_path), "configs/digits.yaml", **given)
    assert {"NCCL_IB_HCA=mlx5", r"FI_PROVIDER=a \"b\" \$c", "PROXY=http://x"} <= set(done.stdout.splitlines())
    assert "SECRET" not in done.stdout
    done = start(
        "deepspeed.sh", "--print", "--hostfile", hostfile(tmp_path), "configs/digits.yaml", DIFFMOE_EXPORT="NONESUCH"
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "launch: DIFFMOE_EXPORT names NONESUCH, which is not set; export it, or take it out",
    )


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "there is no hostfile {file}; write one with a line 'name slots=8' for each host"),
        ("", [], "the hostfile {file} names no host"),
        (
            "a slots=2\nb\n",
            [],
            "{file}, line 2: 'b' does not say how many ranks the host takes; write for example 'b slots=8'",
        ),
        ("a slots=0\n", [], "{file}, line 1: 'a slots=0' does not say"),
        ("a slots=2\na slots=2\n", [], "{file}, line 2: a stands there twice"),
        ("../x slots=2\n", [], "{file}, line 1: '../x' is no name or address of a host"),
        ("-oProxyCommand=x slots=2\n", [], "{file}, line 1: '-oProxyCommand=x' is no name or address of a host"),
        ("a@-oProxyCommand=x slots=2\n", [], "{file}, line 1: 'a@-oProxyCommand=x' is no name or address"),
        ("^hosts slots=2\n", [], "{file}, line 1: '^hosts' is no name or address"),
        ("n[1-9] slots=2\n", [], "{file}, line 1: 'n[1-9]' is no name or address"),
        ("a,b slots=2\n", [], "{file}, line 1: 'a,b' is no name or address"),
        ("$(id) slots=2\n", [], "{file}, line 1: '$(id)' is no name or address"),
        ("a slots=18446744073709551618\n", [], "{file}, line 1: slots is 18446744073709551618; a host takes at most"),
        ("a\0b slots=2\n", [], "{file} is no text"),
        ("a" * 300 + " slots=2\n", [], "{file}, line 1: '" + "a" * 60 + "'... is longer than any host's line"),
        (
            "localhost slots=2\nb slots=2\n",
            [],
            "{file} names localhost beside other hosts; give the name or address by which they reach it",
        ),
        ("a slots=2\n", ["--nodes", "2"], "--nodes is 2, but {file} names 1 hosts"),
        ("a slots=2\n", ["--gpus", "3"], "--gpus is 3, but a has 2 slots in {file}"),
        ("a slots=2\n", ["--gpus", "many"], "--gpus is many; give a whole number"),
        ("a slots=2\n", ["--num_gpus", "2"], "unknown option --num_gpus; see ./launch/deepspeed.sh --help"),
        ("a slots=2\n", ["--master-addr"], "--master-addr wants a value"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str | None, options: list[str], message: str) -> None:
    file = str(tmp_path / "hosts") if text is None else hostfile(tmp_path, text)
    config = [] if options == ["--master-addr"] else ["configs/digits.yaml"]
    done = start("deepspeed.sh", "--hostfile", file, *options, *config)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("launch: " + message.format(file=file))


@pytest.mark.parametrize("script", ["deepspeed.sh", "slurm.sbatch"])
def test_a_training_wants_a_config_and_help_starts_nothing(script: str) -> None:
    done = start(script)
    assert (done.returncode, done.stdout) == (1, "")
    assert "which config? For example: " in done.stderr
    done = start(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--print" in done.stdout


# -- slurm.sbatch ------------------------------------------------------------------------------------------------------

SCONTROL = '#!/bin/sh\n[ "$1 $2 $3" != "show hostnames node[1-2]" ] || printf "node1\\nnode2\\n"\n'
SRUN = """#!/usr/bin/env bash
# A Slurm of this machine: the job's tasks, node by node, one after the other.
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"
done
"""
STAND_IN = """#!/usr/bin/env bash
if [[ "$1" != -u ]]; then exec %s "$@"; fi
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $SRUN_CPUS_PER_TASK|$PWD|${*:2}"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A Slurm job of two nodes with two tasks each, as its script sees it."""
    programs = {"scontrol": SCONTROL, "srun": SRUN, "python": STAND_IN % sys.executable}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "70001",
        "SLURM_NTASKS": "4",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "3",
    }
    slurm["SLURM_SUBMIT_DIR"] = str(ROOT)
    return slurm | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DIFFMOE_PYTHON": str(tmp_path / "python")}


@pytest.mark.slow
def test_each_task_of_a_job_is_a_rank(job: dict[str, str]) -> None:
    done = start("slurm.sbatch", "configs/digits.yaml", "train.schedule={kind: cosine}", **job)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [f"{rank} {rank % 2} 4 node1:22001 3" for rank in range(4)]
    wanted = f"-m diffmoe_ep train {ROOT}/configs/digits.yaml train.schedule={{kind: cosine}}"
    assert {(row[1], row[2]) for row in rows} == {(str(ROOT), wanted)}


@pytest.mark.slow
def test_a_task_that_sees_one_gpu_has_it_as_its_first(job: dict[str, str]) -> None:
    done = start("slurm.sbatch", "configs/digits.yaml", **job | {"CUDA_VISIBLE_DEVICES": "1"})
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0"] * 4


@pytest.mark.slow
def test_the_script_finds_the_project_from_slurms_copy(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(ROOT / "launch/slurm.sbatch", tmp_path / "spool/slurm_script")
    environment = os.environ | job
    done = subprocess.run(
        ["bash", copy, "configs/digits.yaml"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.count(f"|{ROOT}|") == 4, done.stderr
    del environment["SLURM_SUBMIT_DIR"]
    done = subprocess.run(
        ["bash", copy, "x"], cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "name it with DIFFMOE_ROOT" in done.stderr


def test_a_job_shows_what_it_would_start(job: dict[str, str]) -> None:
    variables, lines = printed("slurm.sbatch", "configs/digits.yaml", **job)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"], variables["SRUN_CPUS_PER_TASK"]) == (
        "node1",
        "22001",
        "3",
    )
    assert lines[0] == f"cd {ROOT}"
    assert lines[1].startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert lines[-2:] == ["#   node1: 0 1", "#   node2: 2 3"]


def test_outside_a_job_it_is_shown_and_not_started() -> None:
    _, lines = printed("slurm.sbatch", "configs/digits.yaml")
    assert lines[-1].startswith("# This is no Slurm job")
    done = start("slurm.sbatch", "configs/digits.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("launch: this is no Slurm job; submit it with sbatch")


def test_jobs_of_an_array_differ_by_their_number(job: dict[str, str]) -> None:
    array = job | {"SLURM_ARRAY_TASK_ID": "7"}
    _, lines = printed("slurm.sbatch", "configs/digits.yaml", "seed=%a", "folder=runs/a-%a", **array)
    assert lines[1].endswith(f" {ROOT}/configs/digits.yaml seed=7 folder=runs/a-7")
    done = start("slurm.sbatch", "--print", "configs/digits.yaml", "folder=runs/a", "seed=%a", **array)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(
        "launch: the jobs of an array would share one run folder; give each its own with folder="
    )
    assert printed("slurm.sbatch", "--verb", "verify", **array)[1][1].endswith(" diffmoe_ep verify")


@pytest.mark.slow
def test_ranks_run_in_the_container_that_is_named(job: dict[str, str], tmp_path: Path) -> None:
    """By apptainer or pyxis; nothing of the machine's own Python is asked."""
    named = job | {"DIFFMOE_PYTHON": "python3.12", "DIFFMOE_MOUNTS": "/data:/data"}
    _, lines = printed("slurm.sbatch", "configs/digits.yaml", **named, DIFFMOE_CONTAINER="/images/a.sif")
    assert f" task apptainer exec --nv --bind {ROOT}:{ROOT}\\,/data:/data --pwd {ROOT} /images/a.sif " in lines[1]
    ends = f" python3.12 -u -m diffmoe_ep train {ROOT}/configs/digits.yaml"
    assert lines[1].endswith(ends)
    _, lines = printed("slurm.sbatch", "configs/digits.yaml", **named, DIFFMOE_CONTAINER="nvcr.io#team/diffmoe:1")
    options = f"--container-image=nvcr.io#team/diffmoe:1 --container-mounts={ROOT}:{ROOT}\\,/data:/data"
    assert lines[1].startswith(f"srun --kill-on-bad-exit=1 {options} --container-workdir={ROOT} bash -c ")
    assert lines[1].endswith(f" task{ends}")

    (tmp_path / "srun").write_text("#!/bin/sh\necho --cpu-bind\n")
    done = start("slurm.sbatch", "configs/digits.yaml", **named, DIFFMOE_CONTAINER="team/diffmoe:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "but this Slurm has no pyxis (srun knows no --container-image); give a .sif file" in done.stderr
    done = start("slurm.sbatch", "configs/digits.yaml", **named, DIFFMOE_CONTAINER="/images/a.sif")
    assert (done.returncode, done.stdout) == (1, "")
    assert "but there is no apptainer on " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code", "requeued"),
    [(["USR1"], 75, True), (["USR1"], 137, True), (["USR1"], 1, False), ([], 75, False), (["USR1", "TERM"], 75, False)],
)
def test_a_job_goes_back_into_the_queue_when_its_time_is_up_and_never_else(
    job: dict[str, str], tmp_path: Path, signals: list[str], code: int, requeued: bool
) -> None:
    """The ranks' stand-in tells the job's shell, as Slurm does, and leaves with a code."""
    told = "".join(f"kill -{name} $PPID; sleep 0.3; " for name in signals)
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\ntrap '' USR1\n{told}exit {code}\n")
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f'{SCONTROL}[ "$1" != requeue ] || echo "$@" >>{asked}\n')
    done = start("slurm.sbatch", "configs/digits.yaml", **job)
    assert done.returncode == code, done.stderr
    assert asked.exists() == requeued
    if requeued:
        assert asked.read_text() == "requeue 70001\n"
        assert "launch: the time is up: job 70001 goes into the queue again" in done.stderr
    assert ("is not put into the queue again" in done.stderr) == (code == 1)


# -- environment.sh ----------------------------------------------------------------------------------------------------


def test_the_environment_is_shown() -> None:
    done = start("environment.sh", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert {"export DS_ACCELERATOR=cpu", "export NCCL_DEBUG=WARN", "export OMP_NUM_THREADS=3"} <= set(
        done.stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({}, ["PYTORCH_ALLOC_CONF=expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, ["PYTORCH_ALLOC_CONF=a:1"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, ["PYTORCH_CUDA_ALLOC_CONF=a:1"]),
    ],
)
def test_memory_of_gpus_can_grow_unless_the_user_says_otherwise(own: dict[str, str], shown: list[str]) -> None:
    lines = start("environment.sh", **own).stdout.splitlines()
    assert [line.removeprefix("export ") for line in lines if "ALLOC_CONF" in line] == shown
