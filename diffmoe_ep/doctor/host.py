"""What this host gives its processes: memory, shared memory, limits, disk, a clock; and locks that were left behind."""

import os
import resource
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from diffmoe_ep.doctor.finding import Finding
from diffmoe_ep.tables import size

_found = partial(Finding, "host")
DOCKERS_SHM = 64 << 20  # what Docker gives a container by itself
STALE_BUILD_SECONDS = 600.0
UNLIMITED = resource.RLIM_INFINITY


def memory(needed: int = 0, ranks: int = 1) -> Iterator[Finding]:
    """Memory and the control group's limit on it. needed: bytes that a rank of a run on this host's CPUs holds."""
    found = psutil.virtual_memory()
    limit = _limit("memory.max")
    total = min(found.total, limit or found.total)
    values = {"total_bytes": total, "available_bytes": found.available, "limit_bytes": limit}
    text = f"{size(found.available)} free of {size(total)}" + (
        ", the limit of this container" if limit and limit < found.total else ""
    )
    if needed * ranks > min(found.available, total):
        text += f"; the config plans {size(needed)} for each of {ranks} ranks"
        yield _found("memory", "problem", text, "lower train.global_batch, or raise train.grad_accumulation", values)
    else:
        yield _found("memory", "ok", text, values=values)


def cores(threads: int, ranks: int) -> Iterator[Finding]:
    """Cores that this process may use. threads: of each of the host's ranks, 0 where OMP_NUM_THREADS is not set."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota()
    number = min(float(allowed), quota or allowed)
    values = {"cores": number, "ranks": ranks, "threads": threads or None}
    text = f"{number:g}" + (f", of {allowed} by the container's quota" if quota and quota < allowed else "")
    text += f" for {ranks} rank{'s' * (ranks > 1)}, OMP_NUM_THREADS={threads}" if threads else ""
    if threads * ranks > max(number, ranks):
        remedy = f"export OMP_NUM_THREADS={max(1, int(number) // ranks)}; more threads than cores take turns"
        yield _found("cores", "note", text, remedy, values)
    else:
        yield _found("cores", "ok", text, values=values)


def shared_memory(needed: int = 0, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Where data workers leave their batches. needed: bytes of those of all the host's ranks."""
    space = os.statvfs(folder)
    total, free = space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail
    text, values = f"{size(free)} free of {size(total)} at {folder}", {"total_bytes": total, "free_bytes": free}
    remedy = (
        "start the container with --ipc=host or --shm-size=16g (Kubernetes: mount an emptyDir of medium Memory there)"
    )
    if needed > free:
        text += f"; the config's data workers may hold {size(needed)} there"
        yield _found("shared memory", "problem", text, f"{remedy}, or lower data.workers or data.prefetch", values)
    elif total <= DOCKERS_SHM and not needed:
        text += ": Docker's default, of which data workers die with a bus error"
        yield _found("shared memory", "problem", text, f"{remedy}, or set data.workers=0", values)
    elif total < 1 << 30 and not needed:
        yield _found("shared memory", "note", f"{text}: little for batches with captions", remedy, values)
    else:
        yield _found("shared memory", "ok", text, values=values)
    left = [entry for entry in folder.glob("torch_*") if entry.stat().st_uid == os.getuid()]
    held = sum(entry.stat().st_size for entry in left)
    if held > 1 << 30:
        remedy = f"when nothing of yours trains here any more: rm {folder}/torch_*"
        yield _found("left in memory", "note", f"{len(left)} files of {size(held)} at {folder}/torch_*", remedy)


def limits(has_infiniband: bool = False, of: Mapping[int, int] | None = None) -> Iterator[Finding]:
    """The process's limits. of: other soft limits than this process's, by the number of the resource."""

    def soft(which: int) -> int:
        return (of or {}).get(which, resource.getrlimit(which)[0])

    files = soft(resource.RLIMIT_NOFILE)
    if files != UNLIMITED and files < 4096:
        remedy = "ulimit -n 65536 before the start (Docker: --ulimit nofile=65536; Slurm: LimitNOFILE of slurmd)"
        text = f"{files:,}; batches of data workers and links to ranks take one each"
        yield _found("open files", "note", text, remedy, {"soft": files})
    else:
        yield _found("open files", "ok", _number(files), values={"soft": files})
    tasks = [limit for limit in (soft(resource.RLIMIT_NPROC), _limit("pids.max")) if limit not in (None, UNLIMITED)]
    most = min((limit for limit in tasks if limit is not None), default=UNLIMITED)
    if most != UNLIMITED and most < 2048:
        remedy = "ulimit -u 65536 before the start (Docker: --pids-limit=-1); each rank has some 100 threads"
        yield _found("processes", "note", f"{most:,} processes and threads", remedy, {"soft": most})
    else:
        yield _found("processes", "ok", _number(most), values={"soft": most})
    locked = soft(resource.RLIMIT_MEMLOCK)
    if has_infiniband and locked != UNLIMITED:
        text = f"{size(locked)}; NCCL over InfiniBand locks its buffers in memory"
        remedy = "ulimit -l unlimited before the start (Docker: --ulimit memlock=-1; Slurm: LimitMEMLOCK of slurmd)"
        yield _found("locked memory", "problem", text, remedy, {"soft": locked})
    else:
        text = "unlimited" if locked == UNLIMITED else f"{size(locked)}; nothing here needs it"
        yield _found("locked memory", "ok", text, values={"soft": locked})


def build_locks(folders: Sequence[Path], now: float | None = None) -> Iterator[Finding]:
    """Locks of compilations (torch's extensions, DeepSpeed's operators): one that was left behind makes every later
    start wait for it without a word.
    """
    locks = [lock for folder in folders for depth in ("*/lock", "*/*/lock") for lock in sorted(folder.glob(depth))]
    for lock in locks:
        age = (time.time() if now is None else now) - lock.stat().st_mtime
        text, values = f"{lock}, {age / 60:.0f} minutes old", {"path": str(lock), "age_seconds": age}
        remedy = f"rm {shlex.quote(str(lock))}"
        if age > STALE_BUILD_SECONDS:
            yield _found("build lock", "problem", f"{text}: starts wait for it without a word", remedy, values)
        else:
            remedy = f"wait for the compilation that has it; if there is none: {remedy}"
            yield _found("build lock", "note", text, remedy, values)
    if not locks:
        yield _found("build locks", "ok", "none")


def disk(name: str, folder: Path, needed: int = 0, what: str = "", section: str = "host") -> Iterator[Finding]:
    """Room in a folder, which may be yet to be made. needed: bytes that `what` will take."""
    there = existing(folder)
    space = os.statvfs(there)
    free, total = space.f_frsize * space.f_bavail, space.f_frsize * space.f_blocks
    text = f"{size(free)} free of {size(total)} at {there}" + (f" ({kind})" if (kind := _kind(there)) else "")
    text += f"; {what}: {size(needed)}" if needed else ""
    values = {"path": str(there), "free_bytes": free, "total_bytes": total, "needed_bytes": needed or None}
    remedy = f"make room at {there}, or give another folder"
    if space.f_files and space.f_favail < 1000:
        yield Finding(section, name, "problem", f"{text}; room for {space.f_favail} more files only", remedy, values)
    elif free < max(needed, 1e9):
        yield Finding(section, name, "problem", text, remedy, values)
    elif free < 1e10 and not needed:
        yield Finding(section, name, "note", text, remedy, values)
    else:
        yield Finding(section, name, "ok", text, values=values)


def writable(folder: Path, now: float | None = None) -> Iterator[Finding]:
    """Whether a run folder can be written, and how far its file system's clock is from this host's."""
    there = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            before = time.time() if now is None else now
            os.utime(file.name)  # by the file system's clock, which on a network disk is the server's
            ahead = os.stat(file.name).st_mtime - before
    except OSError as error:
        remedy = "change its permissions, or give another folder with --run or folder=..."
        yield Finding("run folder", "writable", "problem", f"{there} cannot be written ({error.strerror})", remedy)
        return
    made = "" if there == folder.absolute() else "; it will be made there"
    yield Finding("run folder", "writable", "ok", f"{folder}: {there} can be written{made}")
    values = {"ahead_seconds": ahead}
    text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this host's, for files in {there}"
    if abs(ahead) > 5:
        remedy = "let hosts and file server follow one clock (chrony or ntpd: timedatectl set-ntp true)"
        text += "; whether a run folder is in use is told by the time of its lock"
        yield Finding("run folder", "clock", "problem", text, remedy, values)
    else:
        yield Finding("run folder", "clock", "ok", "this host's" if abs(ahead) < 0.5 else text, values=values)


def existing(folder: Path) -> Path:
    """The folder, or of those above it the first that is there."""
    folder = folder.absolute()
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def _kind(folder: Path) -> str:
    """The file system that a folder lies on."""
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.is_relative_to(one.mountpoint)]
    return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""


def _limit(name: str) -> int | None:
    """A limit of this process's control group; None where there is none."""
    try:
        text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
    except OSError:  # no such control groups here
        return None
    return int(text) if text.isdigit() else None


def _quota() -> float | None:
    """Cores that the control group may use, on average."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() else None


def _number(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:,}"
