"""Listening and dialling on TCP, and the addresses that go with it."""

from __future__ import annotations

import errno
import functools
import ipaddress
import random
import socket
from collections.abc import Callable
from typing import Final

import psutil
import trio

from pyagent_node.base.errors import ConfigError, Unavailable
from pyagent_node.node.addresses import check_address
from pyagent_node.node.mesh.shaped import ShapedWire
from pyagent_node.node.mesh.wire import StreamCipher, Wire
from pyagent_node.node.shaping import Shape

BACKLOG: Final = 128
_FAMILIES: Final = {
    "ip4": socket.AF_INET,
    "ip6": socket.AF_INET6,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
    "dns": socket.AF_UNSPEC,
}


def split(address: str) -> tuple[str, str, int]:
    """Return kind, host and port of a checked address."""
    parts = address.split("/")
    return parts[1], parts[2], int(parts[4])


def address_of(name: object) -> str:
    """Return a socket name as a multiaddress."""
    if not isinstance(name, tuple):
        return ""
    host, port = str(name[0]).partition("%")[0], int(name[1])
    return f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"


async def listen(address: str) -> trio.SocketListener:
    """Open a listening socket.

    Raises :class:`ConfigError` (``bad_address``, ``cannot_listen``).
    """
    check_address(address, peer=False)
    kind, host, port = split(address)
    if kind not in ("ip4", "ip6"):
        raise ConfigError(
            f"{address} cannot be listened on: name an IP address of this machine.",
            code="bad_address",
        )
    sock = trio.socket.socket(_FAMILIES[kind], socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_REUSEADDR") and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if kind == "ip6":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        taken = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"Cannot listen on {address}: {error.strerror}.",
            code="cannot_listen",
            remedy="Another program holds the port; choose another one, or 0 for any."
            if taken
            else "Choose an address of this machine and a port above 1023.",
            address=address,
        ) from None
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


def listened_addresses(listener: trio.SocketListener) -> list[str]:
    """Return the addresses under which others may reach a listener.

    A listener on every interface gives one for each of this machine's addresses.
    """
    address = address_of(listener.socket.getsockname())
    kind, host, port = split(address)
    if not ipaddress.ip_address(host).is_unspecified:
        return [address]
    found = []
    for interface in psutil.net_if_addrs().values():
        for entry in interface:
            if entry.family == _FAMILIES[kind]:
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
                if not ip.is_link_local:
                    found.append((ip.is_loopback, f"/{kind}/{ip}/tcp/{port}"))
    return [text for _, text in sorted(found)]


MakeWire = Callable[[socket.socket, StreamCipher | None], Wire]
"""Makes the wire of a socket; :class:`Wire` itself is one."""


def shaped(shape: Shape | None, rng: random.Random) -> MakeWire:
    """Return what makes wires whose links are like ``shape``."""
    if shape is None:
        return Wire
    return functools.partial(ShapedWire, shape=shape, rng=rng)


def wire_of(stream: trio.SocketStream, cipher: StreamCipher | None, make: MakeWire = Wire) -> Wire:
    """Take over the socket of an accepted or dialled stream; raises :class:`OSError`."""
    inner = stream.socket
    family = inner.family
    sock = socket.socket(family, socket.SOCK_STREAM, fileno=inner.detach())
    try:
        return make(sock, cipher)
    except OSError:
        sock.close()
        raise


async def dial(address: str, cipher: StreamCipher | None, make: MakeWire = Wire) -> Wire:
    """Connect to a checked address; the caller sets the deadline.

    Raises :class:`Unavailable` (``peer_unreachable``).
    """
    kind, host, port = split(address)
    try:
        found = await trio.socket.getaddrinfo(host, port, _FAMILIES[kind], socket.SOCK_STREAM)
    except OSError as error:
        raise _unreachable(address, error) from None
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address was found")
    for family, kind_, protocol, _, name in found:
        sock = trio.socket.socket(family, kind_, protocol)
        try:
            await sock.connect(name)
            return wire_of(trio.SocketStream(sock), cipher, make)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise _unreachable(address, failure)


def _unreachable(address: str, error: OSError) -> Unavailable:
    return Unavailable(
        f"{address} cannot be reached: {error.strerror or error}.",
        code="peer_unreachable",
        remedy="Check that the node runs there and that no firewall is in between.",
        address=address,
        refused=error.errno == errno.ECONNREFUSED,
    )
