"""By which of its network interfaces a machine reaches machine 0.

gloo otherwise takes the one of the host's name, which many systems have as 127.0.1.1 or on another network.
"""

import errno
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil

from vfun_cli.errors import ConfigError

ANY_PORT = 9
"""A datagram's address is connected to, and nothing is sent."""


def towards(address: str, *, own: bool) -> str:
    """The interface by which this machine reaches an address.

    Args:
        own: whether it is the address of this machine: its interface is the one that has it.

    Raises:
        ConfigError: it does not resolve, is not this machine's own, or cannot be reached.
    """
    try:
        found = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ConfigError(
            f"the address of machine 0, {address}, does not resolve here: {error.strerror or error}.",
            hint="Name it by a number with --main-process-ip, or mend the name service of this machine.",
            option="--main-process-ip",
        ) from None
    failed = OSError(errno.EADDRNOTAVAIL, "no address")
    for family, kind, _, _, place in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((place[0], 0)) if own else probe.connect(place)
            except OSError as error:
                failed = error
                continue
            return _interface_of(probe.getsockname()[0])
    if own:
        raise ConfigError(
            f"this is machine 0, and {address} is not one of its addresses: {_listed()}.",
            hint="Name one that the other machines reach with --main-process-ip, the same on all, or give this machine "
            "the --machine-rank that is its own.",
            option="--main-process-ip",
        )
    raise ConfigError(
        f"machine 0 at {address} cannot be reached from here: {failed.strerror or failed}.",
        hint="Name an address of machine 0 in a network of both with --main-process-ip.",
        option="--main-process-ip",
    )


def _interface_of(own: str) -> str:
    """The interface that has an address; of loopback addresses that nobody has given, any that has one."""
    address = ip_address(own.partition("%")[0])
    having = [name for name, each in addresses() if each == address]
    having += [name for name, each in addresses() if each.is_loopback and address.is_loopback]
    if not having:
        raise ConfigError(
            f"no network interface of this machine has {own}, by which it reaches machine 0.",
            hint="Name the interface: export GLOO_SOCKET_IFNAME=eth0.",
        )
    return having[0]


def _listed() -> str:
    return ", ".join(str(each) for _, each in addresses() if not each.is_loopback) or "it has none"


def addresses() -> Iterator[tuple[str, IPv4Address | IPv6Address]]:
    """The names of all interfaces and the addresses that they have."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                yield name, ip_address(entry.address.partition("%")[0])
