"""Jobs of launch/slurm.sbatch in a real Slurm, whose controller and two nodes are this machine: Debian's slurm-wlm,
without munge.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from end_to_end.hosts import PATH, ROOT, metrics

pytestmark = pytest.mark.slow

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""
SMALL = {
    "model": {"hidden_size": 32, "num_blocks": 4},
    "data": {"workers": 0},
    "train": {"global_batch": 24, "steps": 1_000_000},
    "log": {"every": 1},
    "checkpoint": {"every": 1_000_000},
    "sample": {"grid_every": 0},
    "parallel": {"timeout_minutes": 1},
}


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdin=-3, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str) -> str:
        """The number of a job of launch/slurm.sbatch, for CPUs, with further options of sbatch before `--`."""
        place = arguments.index("--")
        options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/%j.log", *arguments[:place]]
        return self.ask("sbatch", "--parsable", *options, "launch/slurm.sbatch", *arguments[place + 1 :]).strip()

    def says(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def starts(self, job: str) -> bool:
        """Whether a job in the queue has started. Slurm lets it rest there for two minutes, of which five seconds do:
        sooner a node takes it for the one that it has just ended.
        """
        said = self.says(job)
        if said["JobState"] == "PENDING":
            rest = datetime.fromisoformat(said["EligibleTime"]) - datetime.now()
            if rest > timedelta(seconds=10):
                self.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60", "StartTime=now+5")
        return said["JobState"] in ("RUNNING", "COMPLETED")

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Waits until it happened."""
        deadline = time.monotonic() + 120
        while not happened():
            logs = "\n".join(f"{path}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log")))
            assert time.monotonic() < deadline, f"{what}: not in two minutes\n{logs}"
            time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    for program in PROGRAMS:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"there is no {program} (Debian's package slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    text = CONF.format(host=host, user=getpass.getuser(), ports=free_ports(3), folder=folder)
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    kept = {name: value for name, value in os.environ.items() if name not in foreign and "SLURM" not in name}
    ours = {
        "SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH, "DIFFMOE_PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",  # no name server knows n1
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    made = Cluster(folder, kept | ours)
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    running = []
    try:
        for command in daemons:
            running.append(subprocess.Popen(command, env=made.environment, stdout=-3, stderr=-3, stdin=-3))
        deadline = time.monotonic() + 60
        idle: subprocess.CompletedProcess[str] | None = None
        while idle is None or idle.stdout.split() != ["2"]:
            ended = [command[0] for command, daemon in zip(daemons, running, strict=True) if daemon.poll() is not None]
            if ended:
                last = (folder / "slurmctld.log").read_text().splitlines()[-1:]
                pytest.skip(f"this Slurm cannot be started for a test: {' '.join(ended)} ended ({' '.join(last)})")
            assert time.monotonic() < deadline, "\n".join(path.read_text()[-4000:] for path in folder.glob("*.log"))
            time.sleep(0.2)
            idle = subprocess.run(
                ["sinfo", "--noheader", "--states=idle", "--format=%D"],
                env=made.environment, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
        yield made
        user = getpass.getuser()
        made.ask("scancel", "--quiet", f"--user={user}")
        made.until(lambda: made.ask("squeue", "--noheader", f"--user={user}") == "", "the end of all jobs")
    finally:
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def config(place: Path, digits: Path, **more: object) -> Path:
    path = place / "run.yaml"
    tree = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    for key, value in SMALL.items():
        tree[key] = tree.get(key, {}) | value
    tree["data"]["folder"] = str(digits / "train")
    tree["train"]["schedule"] = {"kind": "constant", "warmup": 0}
    path.write_text(yaml.safe_dump(tree | more))
    return path


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in metrics(folder)] if (folder / "metrics.jsonl").exists() else []


@pytest.mark.timeout(400)
def test_a_job_whose_time_is_up_is_saved_and_goes_on_in_the_queue(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    path = config(tmp_path, digits, folder=str(folder))
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--time=60", "--", str(path), "parallel.expert_parallel=2")
    cluster.until(lambda: len(steps(folder)) >= 3, "the first steps")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # so that less is left than --signal names
    cluster.until(lambda: cluster.says(job)["Restarts"] == "1", "the job's return to the queue")
    saved = int((folder / "checkpoints/latest").read_text().strip().removeprefix("step-"))
    assert steps(folder)[-1] == saved
    log = cluster.folder / f"{job}.log"
    assert f"stopped at step {saved} of 1000000, as it was told" in log.read_text()
    assert f"launch: the time is up: job {job} goes into the queue again" in log.read_text()

    path.write_text(path.read_text().replace("steps: 1000000", f"steps: {saved + 5}"))
    cluster.until(lambda: cluster.starts(job), "the job's new start")
    cluster.until(lambda: cluster.says(job)["JobState"] == "COMPLETED", "the job's end")
    assert steps(folder) == list(range(1, saved + 6))
    assert cluster.says(job)["ExitCode"] == "0:0"
    assert log.read_text().count(f"continues at step {saved}") == 1  # below what it said before


@pytest.mark.timeout(400)
def test_jobs_of_an_array_have_folders_of_their_own_and_what_is_ended_by_hand_stays_ended(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, digits)
    array = cluster.submit(
        "--nodes=1", "--ntasks-per-node=1", "--array=3,5", "--time=60", "--",
        str(path), "parallel.expert_parallel=1", "seed=%a", f"folder={tmp_path}/run-%a",
    )  # fmt: skip
    folders = [tmp_path / "run-3", tmp_path / "run-5"]
    cluster.until(lambda: all(len(steps(folder)) >= 2 for folder in folders), "the first steps")
    for number, folder in zip((3, 5), folders, strict=True):
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == number
    cluster.ask("scancel", f"{array}_3")
    cluster.ask("scancel", "--signal=USR1", f"{array}_5")
    ended = ("CANCELLED", "FAILED")
    for number, state, folder in zip((3, 5), ended, folders, strict=True):
        cluster.until(lambda: cluster.says(f"{array}_{number}")["JobState"] == state, f"{state} of {number}")  # noqa: B023
        assert (folder / "checkpoints/latest").read_text().strip() == f"step-{steps(folder)[-1]:07d}"
        assert cluster.says(f"{array}_{number}")["Restarts"] == "0"
    assert cluster.says(f"{array}_5")["ExitCode"] == "75:0"
