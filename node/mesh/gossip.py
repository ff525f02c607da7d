"""``/pyagent/peers/1``: authorised members tell each other where members can be dialled.

Each side holds one stream to the other and sends what changed: its own addresses first, then those
of the peers it is connected to.  What a peer says of itself replaces what others said.
"""

from __future__ import annotations

import ipaddress
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Codec
from pyagent_node.node.addresses import check_address
from pyagent_node.node.identity import public_key_of
from pyagent_node.node.mesh.book import MAX_ADDRESSES

PROTOCOL: Final = "/pyagent/peers/1"
MAX_RECORDS: Final = 128
"""Peers in one message."""


class PeerRecord(msgspec.Struct, frozen=True, array_like=True):
    """Where a peer says it can be dialled, without the ``/p2p`` part."""

    peer_id: str
    addresses: tuple[str, ...]


class PeerExchange(msgspec.Struct, frozen=True, tag="peer_exchange"):
    """What the sender knows and has not told the receiver yet."""

    records: tuple[PeerRecord, ...]


PEERS: Final[Codec[PeerExchange]] = Codec("peer exchange", PeerExchange)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def usable_addresses(addresses: tuple[str, ...], heard_from: str) -> list[str]:
    """Return those of ``addresses`` that are worth dialling for someone who heard of them.

    ``heard_from`` is the IP address of the teller: only one on this machine may speak of loopback
    addresses.  Malformed addresses, port 0 and unspecified hosts are left out.
    """
    good = []
    for address in addresses[:MAX_ADDRESSES]:
        try:
            check_address(address, peer=False)
        except InvalidRequest:
            continue
        _, kind, host, _, port = address.split("/")
        if int(port) == 0 or (kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_unspecified):
            continue
        if _is_loopback(host) and not _is_loopback(heard_from):
            continue
        good.append(address)
    return good


def usable_records(
    message: PeerExchange, heard_from: str, me: PeerId
) -> list[tuple[PeerId, list[str]]]:
    """Return the records of ``message`` that make sense, as peer ids and addresses."""
    result = []
    for record in message.records[:MAX_RECORDS]:
        try:
            public_key_of(record.peer_id)
        except InvalidRequest:
            continue
        addresses = usable_addresses(record.addresses, heard_from)
        if addresses and record.peer_id != me:
            result.append((PeerId(record.peer_id), addresses))
    return result
