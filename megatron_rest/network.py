"""The one address of this machine that others of the job connect to, and ports that are bound before anybody is told.

``REST_INTERFACE`` names the network interface; without it the address is the one from which this machine reaches
``MASTER_ADDR`` (or, without a job, its own name).  A loopback address serves where all processes are on one machine and
nowhere else: /etc/hosts of Debian and Ubuntu gives it to a machine's own name.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from megatron_rest.config import ConfigError

__all__ = ["INTERFACE", "check_port", "is_loopback", "listen", "own_address", "use_one_network"]

INTERFACE = "REST_INTERFACE"
_ANY_PORT = 9  # nothing is sent to it


def own_address(*, several_machines: bool, environ: Mapping[str, str] | None = None) -> str:
    """IPv4 or IPv6 address of this machine, for others to connect to.

    Raises ConfigError where the interface has none, where ``MASTER_ADDR`` is unknown here, and for a loopback address
    if the job has several machines.
    """
    environ = os.environ if environ is None else environ
    if name := environ.get(INTERFACE, ""):
        address, origin = _of_interface(name), f"{INTERFACE}={name}"
    else:
        target = environ.get("MASTER_ADDR") or socket.gethostname()
        address = _towards(target)
        origin = f"MASTER_ADDR={target}" if "MASTER_ADDR" in environ else f"this machine's name {target}"
    if several_machines and is_loopback(address):
        raise ConfigError(
            f"{origin} leads to {address} on {socket.gethostname()}, where other machines of this job cannot reach it: "
            f"export {INTERFACE}=NAME of the network between the nodes (here: {', '.join(_interfaces()) or 'none'})"
        )
    return address


def is_loopback(address: str) -> bool:
    """Whether only processes of the same machine reach ``address``."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def use_one_network(*, several_machines: bool, environ: MutableMapping[str, str] | None = None) -> None:
    """Let gloo, and with ``REST_INTERFACE`` NCCL, use the interface of :func:`own_address`; call it before they start.

    Left to itself gloo takes what this machine's name resolves to.  A choice that is already made is kept.
    """
    environ = os.environ if environ is None else environ
    if not several_machines:
        return
    interface = _interface_with(own_address(several_machines=True, environ=environ))
    if interface:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if INTERFACE in environ:
            environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on ``address`` alone; its port is its own from here on, so it may be announced."""
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def check_port(port: int) -> None:
    """Raises ConfigError if something of this machine listens on ``port`` already."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT={port} cannot be listened on at {socket.gethostname()} ({error.strerror}): another job may "
            "be there; export another MASTER_PORT, or wait for it to end"
        ) from error


def _towards(host: str) -> str:
    """Address of this machine on its way to ``host``; one that is no loopback if there is one."""
    try:
        targets = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ConfigError(
            f"{host} is not known on {socket.gethostname()} ({error.strerror}): export {INTERFACE}=NAME of the network "
            f"between the nodes (here: {', '.join(_interfaces()) or 'none'})"
        ) from error
    found = []
    for family, kind, protocol, _, place in targets:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(place)  # of a datagram socket: asks the kernel for the way, and sends nothing
            except OSError:
                continue
            found.append(str(probe.getsockname()[0]))
    if not found:
        raise ConfigError(f"{socket.gethostname()} has no way to {host}: export {INTERFACE}=NAME of the right network")
    return next((address for address in found if not is_loopback(address)), found[0])


def _of_interface(name: str) -> str:
    addresses = _usable(name)
    if not addresses:
        raise ConfigError(
            f"{INTERFACE}={name}: {socket.gethostname()} has no such interface with an address; it has "
            f"{', '.join(_interfaces()) or 'none'}"
        )
    return addresses[0]


def _usable(name: str) -> list[str]:
    """IPv4 before IPv6; addresses that are valid on one link only need more than themselves to be reached."""
    entries = psutil.net_if_addrs().get(name, [])
    by_family = [e.address for family in (socket.AF_INET, socket.AF_INET6) for e in entries if e.family == family]
    return [a for a in by_family if not ipaddress.ip_address(a.partition("%")[0]).is_link_local]


def _interfaces() -> list[str]:
    """Those that other machines might reach."""
    return [name for name in sorted(psutil.net_if_addrs()) if any(not is_loopback(a) for a in _usable(name))]


def _interface_with(address: str) -> str:
    return next((name for name in psutil.net_if_addrs() if address in _usable(name)), "")
