"""Multiaddresses as text: checked here without importing the library that dials them."""

from __future__ import annotations

import ipaddress
import re

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.node.identity import public_key_of

MAX_ADDRESS = 512
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9_-]+)*\.?")
_NAMES = ("dns", "dns4", "dns6")


def check_address(text: str, *, peer: bool | None = None) -> str:
    """Return ``text`` if it is ``/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>[/p2p/<peer id>]``.

    ``peer`` says whether the ``/p2p`` part must be there (``True``), must not (``False``) or
    may.  Raises :class:`InvalidRequest` (``bad_address``).
    """
    why = _fault(text, peer)
    if why:
        raise InvalidRequest(
            f"{text[:128]!r} is not an address to use here: {why}.",
            code="bad_address",
            remedy="An address looks like /ip4/192.168.1.7/tcp/4810"
            + ("" if peer is False else "/p2p/12D3KooW..."),
        )
    return text


def peer_of(address: str) -> PeerId | None:
    """Return the peer id that a checked address ends in, if it does."""
    head, _, tail = address.partition("/p2p/")
    return PeerId(tail) if head and tail else None


def without_peer(address: str) -> str:
    """Return the address without its ``/p2p`` part."""
    return address.partition("/p2p/")[0]


def _fault(text: str, peer: bool | None) -> str | None:
    if len(text) > MAX_ADDRESS:
        return f"it is longer than {MAX_ADDRESS} characters"
    parts = text.split("/")
    if len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp":
        return "it does not read /<ip4, ip6 or dns>/<host>/tcp/<port>"
    kind, host, port = parts[1], parts[2], parts[4]
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535):
        return f"the port {port[:16]!r} is not a number from 0 to 65535"
    fault = _host_fault(kind, host)
    if fault:
        return fault
    if len(parts) == 7:
        if peer is False:
            return "it must not name a peer"
        if parts[5] != "p2p":
            return "after the port only /p2p/<peer id> may come"
        try:
            public_key_of(parts[6])
        except InvalidRequest as error:
            return error.message.rstrip(".")
    elif peer:
        return "it must end in /p2p/<peer id>"
    return None


def _host_fault(kind: str, host: str) -> str | None:
    if kind in ("ip4", "ip6"):
        try:
            good = ipaddress.ip_address(host).version == int(kind[2])
        except ValueError:
            good = False
        return None if good else f"{host[:64]!r} is not an IPv{kind[2]} address"
    if kind in _NAMES:
        return None if _HOST.fullmatch(host) else f"{host[:64]!r} is not a host name"
    return f"/{kind[:16]} is not one of /ip4, /ip6, /dns, /dns4, /dns6"
