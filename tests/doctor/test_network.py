"""Interfaces, names and ports as gloo and NCCL take them, and each that does not lead to the other hosts."""

import socket

import pytest

from diffmoe_ep.doctor.network import (
    Interface,
    check_interfaces,
    check_names,
    check_port,
    check_variables,
    interfaces,
    listening_addresses,
    unmatched,
)

LO = Interface("lo", ("127.0.0.1", "::1"), True, 0)
ETH = Interface("eth0", ("10.0.0.2",), True, 25_000)
IB = Interface("ib0", ("10.1.0.2",), True, 200_000)
DOCKER = Interface("docker0", ("172.17.0.1",), True, 0)
DOWN = Interface("eth1", ("10.2.0.2",), False, 0)
BARE = Interface("eth2", (), True, 0)
KNOWN = [LO, DOCKER, ETH, IB, DOWN, BARE]


def resolve(name: str) -> list[str]:
    if name == "nobody":
        raise socket.gaierror(-2, "Name or service not known")
    return {"node1": ["127.0.1.1"], "node2": ["10.0.0.2"]}[name]


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", None),
        ("GLOO_SOCKET_IFNAME", "eth7", "eth7: eth7 is not there"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth1", "eth0,eth1: eth1 is down"),
        ("GLOO_SOCKET_IFNAME", "eth2", "eth2: eth2 has no address"),
        ("NCCL_SOCKET_IFNAME", "ib,eth", None),
        ("NCCL_SOCKET_IFNAME", "enp", "enp: no interface that is up has such a name"),
        ("NCCL_SOCKET_IFNAME", "=eth", "=eth: no interface that is up has such a name"),
    ],
)
def test_named_interfaces(variable: str, value: str, problem: str | None) -> None:
    found = [one for one in check_interfaces(KNOWN, {variable: value}) if one.state != "ok"]
    assert [one.found for one in found] == ([problem] if problem else [])
    assert all("docker0, eth0, ib0" in one.remedy for one in found)


def test_this_machine_has_a_loopback() -> None:
    assert any(one.is_loopback for one in interfaces())
    (found,) = check_interfaces(interfaces(), {})
    assert found.state == "ok"


@pytest.mark.parametrize(
    ("said", "fits"),
    [("eth", True), ("=eth", False), ("=eth0", True), ("^eth", True), ("^eth,lo,docker,ib", False), ("en,ib0:1", True)],
)
def test_lists_of_names_are_read_as_nccl_reads_them(said: str, fits: bool) -> None:
    assert unmatched(said, ["lo", "docker0", "eth0", "ib0"]) is not fits


@pytest.mark.parametrize(
    ("name", "several", "told", "state"),
    [
        ("node2", True, False, "ok"),
        ("node1", True, False, "problem"),
        ("node1", True, True, "ok"),
        ("node1", False, False, "ok"),
        ("nobody", True, False, "problem"),
        ("nobody", False, False, "note"),
        ("nobody", True, True, "ok"),
    ],
)
def test_a_host_whose_name_leads_nowhere(name: str, several: bool, told: bool, state: str) -> None:
    (found,) = check_names(name, several, {"GLOO_SOCKET_IFNAME": "eth0"} if told else {}, resolve)
    assert found.state == state
    assert state == "ok" or "GLOO_SOCKET_IFNAME" in found.remedy


def test_a_master_without_an_address() -> None:
    found = list(check_names("node2", True, {"MASTER_ADDR": "nobody"}, resolve))[1]
    assert (found.name, found.state) == ("MASTER_ADDR", "problem")


def test_a_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (found,) = check_port(port)
    assert found.state == "note"
    assert found.found == "is taken, perhaps by another run"
    assert next(check_port(port)).state == "ok"


def test_variables_that_surprise() -> None:
    found = {one.name: one for one in check_variables({"CUDA_LAUNCH_BLOCKING": "1", "NCCL_DEBUG": "WARN"})}
    assert {name: one.state for name, one in found.items()} == {"variables": "ok", "CUDA_LAUNCH_BLOCKING": "note"}


def test_where_ranks_will_listen() -> None:
    assert listening_addresses(KNOWN, {}, "node1", False, resolve) == {"127.0.1.1": "gloo"}
    assert listening_addresses(KNOWN, {}, "nobody", False, resolve) == {"127.0.0.1": "gloo"}
    assert listening_addresses(KNOWN, {}, "node2", True, resolve) == {"10.0.0.2": "gloo", "10.1.0.2": "NCCL"}
    named = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"}
    assert listening_addresses(KNOWN, named, "node1", True, resolve) == {"10.0.0.2": "gloo and NCCL"}
    assert listening_addresses([LO, DOCKER, ETH], {}, "node2", True, resolve) == {"10.0.0.2": "gloo and NCCL"}
