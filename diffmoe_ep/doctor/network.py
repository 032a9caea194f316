"""This host among others: interfaces, names, ports, and the variables that say which of them to use."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import psutil

from diffmoe_ep.doctor.finding import Finding, State

_found = partial(Finding, "network")
Resolve = Callable[[str], list[str]]  # from a name to its addresses; OSError where it has none
PORT = 29500  # where the first rank listens unless another is given


@dataclass(frozen=True)
class Interface:
    """One of this host's ways to others."""

    name: str
    addresses: tuple[str, ...]  # IPv4 first
    is_up: bool
    megabits: int  # per second; 0 where it does not say

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this host alone."""
        return bool(self.addresses) and all(is_loopback(address) for address in self.addresses)

    def __str__(self) -> str:
        speed = f" {self.megabits / 1000:g} Gb/s" if self.megabits else ""
        return f"{self.name} {self.addresses[0] if self.addresses else 'without an address'}{speed}"


def interfaces() -> list[Interface]:
    """The interfaces of this host."""
    status = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        addresses = [
            entry.address for kind in (socket.AF_INET, socket.AF_INET6) for entry in entries if entry.family == kind
        ]
        usable = tuple(address for address in addresses if "%" not in address)
        known = status.get(name)
        found.append(Interface(name, usable, known is None or known.isup, known.speed if known else 0))
    return found


def check_interfaces(known: Sequence[Interface], variables: Mapping[str, str]) -> Iterator[Finding]:
    """What there is, and whether the interfaces that gloo and NCCL are told to use are there, up, and have an
    address.
    """
    others = [one for one in known if one.is_up and one.addresses and not one.is_loopback]
    listed = ", ".join(map(str, others)) or "none to other hosts"
    yield _found("interfaces", "ok", listed, values={"interfaces": [one.name for one in others]})
    names = ", ".join(one.name for one in others or known)
    said = variables.get("GLOO_SOCKET_IFNAME", "")
    for name in said.split(",") if said else ():
        one = next((one for one in known if one.name == name), None)
        problem = "is not there" if one is None else "is down" if not one.is_up else "has no address"
        if one is None or not one.is_up or not one.addresses:
            remedy = f"set GLOO_SOCKET_IFNAME to one of {names}, or unset it (launch/environment.sh finds one)"
            yield _found("GLOO_SOCKET_IFNAME", "problem", f"{said}: {name} {problem}", remedy)
    said = variables.get("NCCL_SOCKET_IFNAME", "")
    if said and unmatched(said, [one.name for one in known if one.is_up and one.addresses]):
        remedy = f"set NCCL_SOCKET_IFNAME to one of {names}, or unset it (launch/environment.sh finds one)"
        yield _found("NCCL_SOCKET_IFNAME", "problem", f"{said}: no interface that is up has such a name", remedy)


def check_names(host: str, several: bool, variables: Mapping[str, str], resolve: Resolve) -> Iterator[Finding]:
    """Whether MASTER_ADDR leads somewhere, and this host's own name, at which gloo listens unless told an interface."""
    told = bool(variables.get("GLOO_SOCKET_IFNAME"))
    state: State = "ok" if told else "problem" if several else "note"
    remedy = "export GLOO_SOCKET_IFNAME with the interface to the other hosts, or give the host's name its address in "
    remedy += "/etc/hosts"
    try:
        addresses = resolve(host)
    except OSError as error:
        text = f"does not resolve ({error.strerror})" + (", and nobody asks" if told else "")
        yield _found("own name", state, text, "" if told else remedy, {"addresses": []})
    else:
        text, values = f"{host} is {', '.join(addresses)}", {"addresses": addresses}
        if told or not all(is_loopback(address) for address in addresses):
            yield _found("own name", "ok", text, values=values)
        elif several:
            text = f"means {', '.join(addresses)}, the host alone: gloo would listen where no other host comes"
            yield _found("own name", state, text, remedy, values)
        else:
            yield _found("own name", "ok", f"{text}: enough for one host, not for several", values=values)
    master = variables.get("MASTER_ADDR")
    if master:
        try:
            addresses = resolve(master)
        except OSError as error:
            text = f"{master} does not resolve here ({error.strerror})"
            yield _found("MASTER_ADDR", "problem", text, "give an address that all hosts reach with --master-addr")
        else:
            text = master if addresses == [master] else f"{master} is {', '.join(addresses)}"
            yield _found("MASTER_ADDR", "ok", text, values={"addresses": addresses})


def check_port(port: int) -> Iterator[Finding]:
    """Whether the first rank could listen here."""
    name, values = f"port {port}", {"port": port}
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = "is taken, perhaps by another run" if error.errno == errno.EADDRINUSE else "is not yours to open"
            yield _found(name, "note", f"{reason}", "start with --master-port and a free one", values)
            return
    yield _found(name, "ok", "free for the first rank", values=values)


def check_variables(variables: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that change how ranks compute or talk, and those among them that are known to surprise."""
    shown = [f"{name}={value}" for name, value in variables.items() if name.startswith(WATCHED)]
    yield _found("variables", "ok", " ".join(shown) or "none that ranks heed", values=dict(variables))
    for name, (value, text, remedy) in SURPRISES.items():
        if variables.get(name) == value:
            yield _found(name, "note", f"{value}: {text}", remedy)


WATCHED = ("CUDA_", "DS_ACCELERATOR", "GLOO_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_ALLOW", "TORCH_NCCL", "UCX_")
SURPRISES = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for", "unset CUDA_LAUNCH_BLOCKING"),
    "NCCL_DEBUG": ("INFO", "every rank prints pages at its start", "export NCCL_DEBUG=WARN"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (
        "1",
        "float32 matmuls, routers' too, lose 13 of 23 bits",
        "export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0",
    ),
}


def listening_addresses(
    known: Sequence[Interface], variables: Mapping[str, str], host: str, with_nccl: bool, resolve: Resolve
) -> dict[str, str]:
    """Where the ranks of this host will listen, and for which back end: gloo's address and, on GPUs, NCCL's."""
    usable = [one for one in known if one.is_up and one.addresses]
    named = variables.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        gloo = next((one.addresses[0] for one in usable if one.name == named), "127.0.0.1")
    else:
        try:
            gloo = resolve(host)[0]
        except OSError:
            gloo = "127.0.0.1"  # what gloo falls back on
    found = {gloo: "gloo"}
    if with_nccl:
        said = variables.get("NCCL_SOCKET_IFNAME", "")
        chosen = [one for one in usable if said and not unmatched(said, [one.name])] if said else _as_nccl(usable)
        if chosen:
            address = chosen[0].addresses[0]
            found[address] = "gloo and NCCL" if address in found else "NCCL"
    return found


def _as_nccl(usable: Sequence[Interface]) -> list[Interface]:
    """In NCCL's own order: names that begin with ib, all others, those of Docker, loopback."""

    def place(one: Interface) -> int:
        return 3 if one.is_loopback else 2 if one.name.startswith("docker") else 0 if one.name.startswith("ib") else 1

    return sorted(usable, key=place)


def unmatched(said: str, names: Sequence[str]) -> bool:
    """Whether none of the names fits a list as NCCL reads it: beginnings of names, `=` for whole names, `^` for all
    but these.
    """
    inverse, said = said.startswith("^"), said.removeprefix("^")
    exact, said = said.startswith("="), said.removeprefix("=")
    wanted = [one.split(":")[0] for one in said.split(",") if one]

    def fits(name: str) -> bool:
        return any(name == one if exact else name.startswith(one) for one in wanted)

    return not any(fits(name) != inverse for name in names)


def resolved(name: str) -> list[str]:
    """The addresses of a name, in the system's order; OSError where it has none."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]).split("%")[0] for entry in found))


def is_loopback(address: str) -> bool:
    """Whether an address leads to its own host alone."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
