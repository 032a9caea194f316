"""One host: all that a process can see of it."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffmoe_ep.config import Config
from diffmoe_ep.doctor import devices, host, network, software
from diffmoe_ep.doctor.finding import Finding, looked
from diffmoe_ep.doctor.needs import Needs, check_config, check_folders, needs_of
from diffmoe_ep.parallel.mesh import variables
from diffmoe_ep.train.run_lock import holder


@dataclass(frozen=True)
class Patient:
    """What is looked at."""

    config: Config | None = None
    folder: Path | None = None  # the run folder, where one is given
    device: str | None = None  # cpu or cuda; None: GPUs where there are some
    seconds: float = 30.0  # longest wait for a peer

    @property
    def kind(self) -> str:
        """Where ranks compute."""
        wants_cpu = variables("DS_ACCELERATOR").get("DS_ACCELERATOR") == "cpu"
        return self.device or ("cuda" if torch.cuda.is_available() and not wants_cpu else "cpu")


def host_findings(patient: Patient, world: int, here: int, several: bool) -> Iterator[Finding]:
    """All that one process can see of its host. here: ranks on it; several: the run has other hosts, too."""
    said = variables("")
    device = torch.device(patient.kind)
    config, needs = patient.config, Needs()
    if config is not None:
        needs = needs_of(config, world, device.type)
    on_gpus = device.type == "cuda"
    adapters = devices.adapters()
    yield from looked(
        "software",
        (
            ("versions", software.versions),
            ("training", software.imports),
            ("providers", lambda: software.providers(device)),
        ),
    )
    yield from looked(
        "devices",
        (
            ("GPUs", lambda: devices.gpus(needs.memory if on_gpus else 0)),
            ("NCCL", lambda: devices.nccl(said, adapters)),
            ("InfiniBand", devices.infiniband),
        ),
    )
    threads = said.get("OMP_NUM_THREADS", "")
    yield from looked(
        "host",
        (
            ("cores", lambda: host.cores(int(threads) if threads.isdigit() else 0, here)),
            ("memory", lambda: host.memory(0 if on_gpus else needs.memory, here)),
            ("shared memory", lambda: host.shared_memory(needs.batches * here)),
            ("limits", lambda: host.limits(bool(adapters))),
            ("build locks", lambda: host.build_locks(build_folders(said))),
            ("temporary disk", lambda: host.disk("temporary disk", Path(said.get("TMPDIR", "/tmp")))),
        ),
    )
    known = network.interfaces()
    port = said.get("MASTER_PORT", "")
    yield from looked(
        "network",
        (
            ("interfaces", lambda: network.check_interfaces(known, said)),
            ("own name", lambda: network.check_names(platform.node(), several, said, network.resolved)),
            ("port", lambda: () if world > 1 else network.check_port(int(port) if port.isdigit() else network.PORT)),
            ("variables", lambda: network.check_variables(_watched(said))),
        ),
    )
    if patient.folder is not None:
        folder = patient.folder
        yield from looked(
            "run folder",
            (
                ("run folder", lambda: host.writable(folder)),
                ("disk", lambda: host.disk("disk", folder, needs.checkpoints, "checkpoints to come", "run folder")),
                ("in use", lambda: in_use(folder)),
            ),
        )
    if config is not None:
        launched = world > 1
        yield from looked(
            "this config",
            (
                ("config", lambda: check_config(config, needs, world, launched)),
                ("packages", lambda: software.extras(dict(needs.packages))),
                ("folders", lambda: check_folders(config)),
                (
                    "cache",
                    lambda: (
                        host.disk("cache", Path(config.data.cache), needs.cache, "data.cache_gb", "this config")
                        if needs.cache
                        else ()
                    ),
                ),
            ),
        )


def build_folders(said: Mapping[str, str]) -> list[Path]:
    """Where torch and DeepSpeed compile what they load."""
    named = said.get("TORCH_EXTENSIONS_DIR")
    cache = Path(said.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return list(dict.fromkeys([*([Path(named)] if named else []), cache / "torch_extensions"]))


def in_use(folder: Path) -> Iterator[Finding]:
    """Whether a training has the run folder."""
    found = Finding("run folder", "in use", "ok", "by no training")
    if (who := holder(folder)) is not None and who.is_alive:
        told = f"process {who.process} on {who.host} has trained there since {who.since}"
        remedy = "wait for its end, stop it, or give another folder"
        found = replace(found, state="note", found=told, remedy=remedy)
    yield found


def _watched(said: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in said.items() if name.startswith(network.WATCHED)}
