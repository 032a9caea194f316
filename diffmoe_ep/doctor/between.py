"""What findings over several hosts and ranks say, in words: differences, pairs, clocks."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from diffmoe_ep.doctor import network
from diffmoe_ep.doctor.finding import Finding

SHOWN_PAIRS = 8
_found = partial(Finding, "communication")


def pairs(bad: Mapping[tuple[int, int], str], hosts: Mapping[int, str], world: int) -> Iterator[Finding]:
    """The pairs of ranks that do not reach each other, with the reason; that all do, if there are none."""
    for (low, high), reason in list(bad.items())[:SHOWN_PAIRS]:
        text = f"ranks {low} ({hosts[low]}) and {high} ({hosts[high]}): {reason}; what these two had left was not tried"
        remedy = "look at the link between them: nvidia-smi topo -m on one host, ibstat and the firewall between two"
        yield _found("pair of ranks", "problem", text, remedy, {"ranks": [low, high], "reason": reason})
    if len(bad) > SHOWN_PAIRS:
        text = f"{len(bad) - SHOWN_PAIRS} more do not reach each other"
        yield _found("pair of ranks", "problem", text, "mend the first ones first", {"failed": len(bad)})
    if not bad:
        pairs = world * (world - 1) // 2
        yield _found("pairs of ranks", "ok", f"{pairs} of {pairs} exchanged a number", values={"pairs": pairs})


def differences(findings: Sequence[Finding]) -> Iterator[Finding]:
    """What should be the same on all hosts and is not: versions, variables, devices."""
    for name, only in (("packages", None), ("torch", ("cuda",)), ("GPUs", ("gpus", "driver")), ("variables", None)):
        by_host = {one.host: one.values for one in findings if one.name == name and one.host}
        keys = only or sorted({key for values in by_host.values() for key in values if key not in PER_HOST})
        for key in keys:
            said: dict[str, list[str]] = {}
            for where, values in by_host.items():
                said.setdefault(str(values.get(key, "not set")), []).append(where)
            if len(said) > 1:
                text = "; ".join(f"{value} on {', '.join(hosts[:4])}" for value, hosts in said.items())
                if name == "variables":
                    remedy = (
                        f"export {key} before launch/deepspeed.sh, which hands it to all hosts, or unset it everywhere"
                    )
                    yield _found(key, "note", text, remedy, {"by_host": said})
                elif name == "GPUs":
                    remedy = "let all hosts of a run have as many GPUs and one driver"
                    yield _found(f"{key} of hosts", "note", text, remedy, {"by_host": said})
                else:
                    remedy = "let all hosts use one environment, on a shared disk or from one image"
                    yield _found(f"{key} of hosts", "problem", text, remedy, {"by_host": said})


PER_HOST = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # may differ


def remedy_of(reason: str, address: str) -> str:
    """What to do about a connection to an address that failed."""
    if network.is_loopback(address):
        return "set GLOO_SOCKET_IFNAME to the interface that leads to the other hosts, or mend /etc/hosts there"
    if "another" in reason:
        return (
            f"{address} means another host there: choose an interface with addresses of its own on each host (not "
            "docker0) with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
    if "refused" in reason or "no answer" in reason:
        return (
            "open all ports between the hosts of a run (NCCL and gloo choose theirs), or choose another network with "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
    return "see ip route on both; choose a network that both are in with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words, the first sixteen."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', ...' * (len(ranks) > 16)}"
