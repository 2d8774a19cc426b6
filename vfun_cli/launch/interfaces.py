"""By which of its network interfaces a machine reaches machine 0.

gloo otherwise takes the one of the host's name, which many systems have as 127.0.1.1 or on another network.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface

from vfun_cli.errors import ConfigError

ANY_PORT = 9
"""A datagram's address is connected to, and nothing is sent."""

_HEADER, _ADDRESS, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBI"), struct.Struct("=HH")
"""Of netlink: of a message, of one about an address, of what follows that."""
_ASK_FOR_ALL, _ABOUT_ADDRESSES, _AN_ADDRESS, _END = 0x301, 22, 20, 3
_ITS_ADDRESS, _ITS_OWN_END = 1, 2


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
    """The interface that has an address; of loopback addresses that nobody has given, the one of their network."""
    address = ip_address(own.partition("%")[0])
    having = [name for name, interface in addresses() if interface.ip == address]
    having += [name for name, interface in addresses() if address.is_loopback and address in interface.network]
    if not having:
        raise ConfigError(
            f"no network interface of this machine has {own}, by which it reaches machine 0.",
            hint="Name the interface: export GLOO_SOCKET_IFNAME=eth0.",
        )
    return having[0]


def _listed() -> str:
    return ", ".join(str(interface.ip) for _, interface in addresses() if not interface.ip.is_loopback) or "it has none"


def addresses() -> Iterator[tuple[str, IPv4Interface | IPv6Interface]]:
    """The names of all interfaces and the addresses that they have, as the kernel tells them."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        kernel.send(_HEADER.pack(_HEADER.size + _ADDRESS.size, _ABOUT_ADDRESSES, _ASK_FOR_ALL, 1, 0) + bytes(8))
        while True:
            answer = kernel.recv(1 << 16)
            while answer:
                length, kind, *_ = _HEADER.unpack_from(answer)
                if kind == _END:
                    return
                if kind == _AN_ADDRESS:
                    yield _told(answer[_HEADER.size : length])
                answer = answer[-(-length // 4) * 4 :]


def _told(message: bytes) -> tuple[str, IPv4Interface | IPv6Interface]:
    _, prefix, _, _, index = _ADDRESS.unpack_from(message)
    attributes, rest = {}, message[_ADDRESS.size :]
    while rest:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        attributes[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[-(-length // 4) * 4 :]
    address = attributes.get(_ITS_OWN_END, attributes.get(_ITS_ADDRESS, b""))
    return socket.if_indextoname(index), ip_interface((address, prefix))
