"""``/pyagent/peers/1``: authorised members tell each other where members can be dialled.

Each side holds one stream to the other and sends what changed: its own addresses first, then those
of the peers it is connected to.  What a peer says of itself replaces what others said.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.node.addresses import check_address
from pyagent_node.node.identity import public_key_of
from pyagent_node.node.mesh.book import MAX_ADDRESSES
from pyagent_node.node.mesh.connection import Connection
from pyagent_node.node.mesh.streams import ChannelStream

log = logging.getLogger("pyagent_node.mesh")

PROTOCOL: Final = "/pyagent/peers/1"
MAX_RECORDS: Final = 128
"""Peers in one message that are looked at."""
RECORDS_A_MESSAGE: Final = 8
"""Peers in one message that we send: it fits into a frame's header whatever they are."""


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


class Gossip:
    """Tells every connected peer what we know, and hears what they tell.

    ``learn(peer, addresses)`` is called with what was heard.
    """

    def __init__(self, me: PeerId, learn: Callable[[PeerId, list[str]], None]) -> None:
        self.own: list[str] = []
        """This node's own addresses, without the ``/p2p`` part."""
        self._me = me
        self._learn = learn
        self._announced: dict[PeerId, list[str]] = {}
        self._changed = trio.Event()

    def announced(self, peer: PeerId) -> list[str]:
        """Return the addresses that a connected peer gives for itself."""
        return self._announced.get(peer, [])

    def forget(self, peer: PeerId) -> None:
        """Tell nobody of ``peer`` any more."""
        self._announced.pop(peer, None)

    async def tell(self, connection: Connection) -> None:
        """Tell one peer, now and at every change, until its connection ends."""
        told: dict[PeerId, list[str]] = {}
        try:
            stream = await connection.open(PROTOCOL)
            while True:
                changed = self._changed
                known = {self._me: self.own} | self._announced
                known.pop(connection.peer, None)
                news = [(p, a) for p, a in known.items() if a and told.get(p) != a]
                for at in range(0, len(news), RECORDS_A_MESSAGE):
                    part = news[at : at + RECORDS_A_MESSAGE]
                    records = tuple(PeerRecord(p, tuple(a)) for p, a in part)
                    await stream.send(Frame(PEERS.encode(PeerExchange(records))))
                    told.update(part)
                await changed.wait()
        except PyAgentError as error:
            log.debug("telling %s of peers ended: %s", connection.peer, error)

    async def hear(self, stream: ChannelStream) -> None:
        """Serve the protocol: take in what a peer tells."""
        while (frame := await stream.receive()) is not None:
            message = PEERS.decode(frame.header)
            for peer, addresses in usable_records(message, stream.remote, self._me):
                if peer == stream.peer and self._announced.get(peer) != addresses:
                    self._announced[peer] = addresses
                    self._changed.set()
                    self._changed = trio.Event()
                self._learn(peer, addresses)
