"""What findings over several hosts and ranks say, in words: differences, pairs, clocks."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from diffmoe_ep.doctor import network
from diffmoe_ep.doctor.finding import Finding
from diffmoe_ep.doctor.reach import Contact, skew

SHOWN_PAIRS = 8
CLOCK_NOTE, CLOCK_PROBLEM = 1.0, 5.0  # seconds between clocks
_found = partial(Finding, "communication")


def reached(
    made: Mapping[tuple[int, int, str], Contact],
    unable: Mapping[int, str],
    purposes: Mapping[tuple[int, str], str],
    names: Mapping[int, str],
) -> Iterator[Finding]:
    """What came of every host's connections to every other. made: by (from, to, address); unable: hosts that could not
    listen; purposes: who will listen at a host's address; names: of hosts.
    """
    failed = {key: one.problem for key, one in made.items() if one.problem}
    for rank, problem in unable.items():
        remedy = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or give the host its address in /etc/hosts"
        yield _found("pair of hosts", "problem", f"{names[rank]}: {problem}", remedy)
    ways: dict[tuple[int, str, str], list[int]] = {}
    for (one, other, address), reason in failed.items():
        ways.setdefault((other, address, reason), []).append(one)
    for (other, address, reason), ones in list(ways.items())[:SHOWN_PAIRS]:
        who = ", ".join(names[one] for one in ones[:4]) + f" and {len(ones) - 4} more" * (len(ones) > 4)
        text = f"{who} {'do' if len(ones) > 1 else 'does'} not reach {names[other]} at {address}, where "
        text += f"{purposes[other, address]} listens: {reason}"
        values = {"from": [names[one] for one in ones], "to": names[other], "address": address}
        yield _found("pair of hosts", "problem", text, remedy_of(reason, address), values | {"reason": reason})
    if len(ways) > SHOWN_PAIRS:
        rest = sorted({names[other] for other, _, _ in list(ways)[SHOWN_PAIRS:]})
        text = f"nor are {', '.join(rest[:SHOWN_PAIRS])}{', ...' * (len(rest) > SHOWN_PAIRS)} reached by all"
        yield _found("pair of hosts", "problem", text, "mend the first ones first", {"to": rest})
    if not failed and not unable:
        slowest = max(made, key=lambda key: made[key].seconds)
        text = f"each of {len(names)} reaches each other, in {made[slowest].seconds * 1e6:,.0f} us there and "
        text += f"back at most ({names[slowest[0]]} to {names[slowest[1]]})"
        yield _found("hosts", "ok", text, values={"seconds": made[slowest].seconds})
    else:
        text = "ranks do not join: they would wait for those pairs"
        yield _found("collectives", "note", f"not measured; {text}", "mend what is named above, and start again")


def clocks(made: Mapping[tuple[int, int, str], Contact], names: Mapping[int, str]) -> Iterator[Finding]:
    """From what the first host saw of the others' clocks."""
    first = next(iter(names))
    seen = {other: one for (asked, other, _), one in made.items() if asked == first and not one.problem}
    if not seen:
        return
    ranks, ahead = [first, *seen], [0.0, *(one.ahead for one in seen.values())]
    number, by = skew(ahead)
    exact = max(one.seconds for one in seen.values()) / 2
    who = names[ranks[number]]
    values = {"ahead_seconds": {names[rank]: one for rank, one in zip(ranks, ahead, strict=True)}}
    text = f"that of {who} is {abs(by):.3g} s {'ahead of' if by > 0 else 'behind'} the others"
    remedy = f"let {who} follow the others' clock (chrony or ntpd: timedatectl set-ntp true): launchers and locks of "
    remedy += "run folders go by it"
    if abs(by) > CLOCK_NOTE:
        yield _found("clocks", "problem" if abs(by) > CLOCK_PROBLEM else "note", text, remedy, values)
    else:
        yield _found("clocks", "ok", f"within {max(abs(by), exact) * 1e3:.2g} ms", values=values)


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
