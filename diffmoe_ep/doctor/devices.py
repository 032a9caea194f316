"""GPUs, their driver, NCCL and InfiniBand; where there are none, that is said and is no problem."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from diffmoe_ep.doctor.finding import Finding, State
from diffmoe_ep.doctor.network import unmatched
from diffmoe_ep.tables import size

_found = partial(Finding, "devices")
DRIVER = Path("/proc/driver/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")


def gpus(needed: int = 0, driver: Path = DRIVER) -> Iterator[Finding]:
    """The GPUs of this host, and why torch sees none where there are some. needed: bytes of a rank."""
    version = driver_version(driver)
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    values = {"gpus": number, "driver": version, "cuda": torch.version.cuda}
    if not number and version is None:
        yield _found("GPUs", "ok", "none; ranks compute on the CPU", values=values)
    elif not number and torch.version.cuda is None:
        remedy = "install a torch built for CUDA: the command is at pytorch.org/get-started"
        text = f"none that torch sees: it was built for the CPU, and driver {version} is there"
        yield _found("GPUs", "note", text, remedy, values)
    elif not number:
        remedy = (
            f"see nvidia-smi: install a driver for CUDA {torch.version.cuda}, or a torch for an older CUDA; unset an "
            "empty CUDA_VISIBLE_DEVICES; start containers with --gpus all"
        )
        text = f"none that torch sees, with driver {version} and torch built for CUDA {torch.version.cuda}"
        yield _found("GPUs", "problem", text, remedy, values)
    for text, several in _kinds(number).items():
        yield _found("GPUs", "ok", f"{len(several)} x {text}, driver {version}", values=values)
    for index in range(number):
        yield from _memory(index, needed)
    if number > 1:
        apart = [
            (one, other)
            for one in range(number)
            for other in range(number)
            if one < other and not torch.cuda.can_device_access_peer(one, other)
        ]
        if apart:
            remedy = "see nvidia-smi topo -m; traffic between them goes through the host's memory"
            text = (
                f"{len(apart)} pairs of GPUs cannot read each other's memory, the first {apart[0][0]} and {apart[0][1]}"
            )
            yield _found("GPU to GPU", "note", text, remedy, {"pairs": apart})
        else:
            yield _found("GPU to GPU", "ok", "each reads each other's memory")


def _kinds(number: int) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for index in range(number):
        found = torch.cuda.get_device_properties(index)
        kinds.setdefault(f"{found.name}, {size(found.total_memory)}, {found.major}.{found.minor}", []).append(index)
    return kinds


def _memory(index: int, needed: int) -> Iterator[Finding]:
    free, total = torch.cuda.mem_get_info(index)
    values = {"gpu": index, "free_bytes": free, "total_bytes": total, "needed_bytes": needed or None}
    if needed > total:
        remedy = "see diffmoe plan CONFIG --cluster FILE for a layout that fits"
        text = f"{size(total)}, and the config plans {size(needed)} for a rank"
        yield _found(f"memory of GPU {index}", "problem", text, remedy, values)
    elif free < 0.9 * total:
        remedy = f"see nvidia-smi for who has it (kill what is left of an earlier run), or leave GPU {index} out"
        text = f"{size(total - free)} of {size(total)} are in use already"
        yield _found(f"memory of GPU {index}", "note", text, remedy, values)


def nccl(variables: Mapping[str, str], adapters: Sequence[str]) -> Iterator[Finding]:
    """NCCL's version, and settings of it that make it slow or name what is not there."""
    if not torch.cuda.is_available():
        yield _found("NCCL", "ok", "none; ranks talk by gloo")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield _found("NCCL", "ok", version, values={"version": version})
    for name, what in (
        ("NCCL_P2P_DISABLE", "GPUs of a host talk through its memory"),
        ("NCCL_IB_DISABLE", "hosts talk by TCP"),
        ("NCCL_SHM_DISABLE", "GPUs without NVLink talk by the network"),
    ):
        if variables.get(name, "0") != "0":
            yield _found(name, "note", f"{variables[name]}: {what}", f"unset {name}, unless it is set for a reason")
    said = variables.get("NCCL_IB_HCA", "")
    if said and unmatched(said, adapters):
        text = f"NCCL_IB_HCA={said} names none of this host's adapters: {', '.join(adapters) or 'it has none'}"
        yield _found("NCCL_IB_HCA", "problem", text, "unset NCCL_IB_HCA, or name adapters that all hosts have")


def infiniband(folder: Path = INFINIBAND) -> Iterator[Finding]:
    """Adapters of InfiniBand or RoCE, and ports that are down."""
    found = adapters(folder)
    if not found:
        yield _found("InfiniBand", "ok", "none", values={"adapters": []})
        return
    ports = [
        (f"{name}:{port.name}", _line(port / "state"), _line(port / "rate"))
        for name in found
        for port in sorted((folder / name / "ports").iterdir())
    ]
    up = [f"{name} {rate}" for name, state, rate in ports if "ACTIVE" in state]
    down = [f"{name} ({state or 'unknown'})" for name, state, _ in ports if "ACTIVE" not in state]
    if up:
        yield _found("InfiniBand", "ok", ", ".join(up), values={"adapters": list(found)})
    if down:
        remedy = "see ibstat and the cable, or leave them out: NCCL_IB_HCA=" + ",".join(name.split()[0] for name in up)
        state: State = "note" if up else "problem"
        yield _found("InfiniBand", state, f"not active: {', '.join(down)}", remedy, {"adapters": list(found)})


def adapters(folder: Path = INFINIBAND) -> list[str]:
    """Names of this host's adapters of InfiniBand or RoCE."""
    return sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []


def driver_version(file: Path = DRIVER) -> str | None:
    """The NVIDIA driver's version; None without one."""
    if not file.is_file():
        return None
    words = file.read_text(encoding="utf-8", errors="replace").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _line(file: Path) -> str:
    return file.read_text(encoding="ascii", errors="replace").strip() if file.is_file() else ""
