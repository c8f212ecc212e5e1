"""The address that others connect to, from interfaces and names that are only made up here; sockets are real."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from megatron_rest import network
from megatron_rest.config import ConfigError


def interface(*addresses: str) -> list[SimpleNamespace]:
    families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
    return [SimpleNamespace(family=f, address=a) for f, a in zip(families, addresses, strict=True)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {
        "lo": interface("127.0.0.1", "::1"),
        "eth0": interface("fe80::1%eth0", "2001:db8::7", "10.0.0.7"),
        "ib0": interface("2001:db8:1::7"),
        "down": interface(),
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)


@pytest.mark.parametrize(("name", "address"), [("eth0", "10.0.0.7"), ("ib0", "2001:db8:1::7")])
def test_the_interface_that_is_named_counts(name: str, address: str, machine: None) -> None:
    environ = {"REST_INTERFACE": name, "MASTER_ADDR": "127.0.0.1"}
    assert network.own_address(several_machines=True, environ=environ) == address


def test_an_interface_without_an_address_is_refused_with_those_that_have_one(machine: None) -> None:
    with pytest.raises(
        ConfigError, match=r"REST_INTERFACE=down: .* no such interface with an address; it has eth0, ib0"
    ):
        network.own_address(several_machines=False, environ={"REST_INTERFACE": "down"})


@pytest.mark.parametrize("name", ["127.0.1.1", "::1", "localhost"])
def test_a_loopback_address_serves_one_machine_and_is_refused_for_several(name: str, machine: None) -> None:
    environ = {"MASTER_ADDR": name}
    if name == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert network.is_loopback(network.own_address(several_machines=False, environ=environ))
    with pytest.raises(ConfigError, match=r"where other machines of this job cannot reach it: export REST_INTERFACE="):
        network.own_address(several_machines=True, environ=environ)
    with pytest.raises(ConfigError, match="REST_INTERFACE"):
        network.own_address(several_machines=True, environ={"REST_INTERFACE": "lo"})


def test_a_name_that_nobody_knows_is_one_line(machine: None) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.invalid is not known on .*: export REST_INTERFACE"):
        network.own_address(several_machines=True, environ={"MASTER_ADDR": "nowhere.invalid"})


def test_gloo_and_nccl_use_the_same_network_and_a_choice_is_kept(machine: None) -> None:
    environ = {"REST_INTERFACE": "eth0"}
    network.use_one_network(several_machines=True, environ=environ)
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == "eth0"
    environ = {"REST_INTERFACE": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}
    network.use_one_network(several_machines=True, environ=environ)
    assert environ["NCCL_SOCKET_IFNAME"] == "ib0"
    environ = {}
    network.use_one_network(several_machines=False, environ=environ)
    assert environ == {}


def test_a_port_that_is_announced_is_taken_and_a_port_in_use_is_named() -> None:
    with network.listen("127.0.0.1") as one:
        port = one.getsockname()[1]
        with pytest.raises(OSError):
            network.listen("127.0.0.1", port)
        with socket.create_server(("", 0)) as other, pytest.raises(ConfigError, match=r"MASTER_PORT=\d+ cannot be"):
            network.check_port(other.getsockname()[1])
