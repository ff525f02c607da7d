"""Finding members on the local network with multicast DNS (RFC 6762, RFC 6763).

The service is ``_pyagent._tcp.local.``; an instance is named after the mesh's fingerprint and the
peer, and its TXT record carries both with the addresses.  Only instances of our own mesh are
looked at.  The fingerprint is a hash: it tells a stranger on the network that two nodes belong
together, and nothing else.

``zeroconf`` runs an asyncio loop in a thread of its own; registering takes a second or more, so
that too happens off trio's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio
from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.node.addresses import MAX_ADDRESS
from pyagent_node.node.identity import public_key_of
from pyagent_node.node.mesh.book import MAX_ADDRESSES
from pyagent_node.node.mesh.gossip import usable_addresses

log = logging.getLogger("pyagent_node.mesh.mdns")

SERVICE: Final = "_pyagent._tcp.local."
MAX_WAITING: Final = 64
"""Announcements heard and not looked at yet; more are dropped (they are repeated)."""
LOOKUP_MS: Final = 3000
_MAX_TXT: Final = 255

Seen = Callable[[PeerId, list[str]], None]
"""Called on trio's thread with a member and where it can be dialled."""


def instance_name(fingerprint: str, peer: PeerId) -> str:
    """Return the instance name of a node: at most 63 bytes, by RFC 6763."""
    return f"{fingerprint[:16]}-{peer[-16:]}.{SERVICE}"


def properties(fingerprint: str, peer: PeerId, addresses: list[str]) -> dict[str, str]:
    """Return the TXT record that announces a node."""
    record = {"mesh": fingerprint, "id": peer}
    for number, address in enumerate(addresses[:MAX_ADDRESSES]):
        if len(f"a{number}={address}") <= _MAX_TXT:
            record[f"a{number}"] = address
    return record


def read_properties(
    record: dict[bytes, bytes | None], fingerprint: str
) -> tuple[PeerId, list[str]] | None:
    """Return the peer and the usable addresses in a TXT record of our mesh, else ``None``."""
    text = {
        key.decode("ascii", "replace"): value.decode("ascii", "replace")
        for key, value in record.items()
        if value is not None and len(value) <= MAX_ADDRESS
    }
    if text.get("mesh") != fingerprint:
        return None
    peer = text.get("id", "")
    try:
        public_key_of(peer)
    except InvalidRequest:
        return None
    found = tuple(text[f"a{n}"] for n in range(MAX_ADDRESSES) if f"a{n}" in text)
    # A loopback address in an announcement is this machine's own or nobody's; both are harmless
    # to try, because Noise proves whom we reach.
    addresses = usable_addresses(found, "127.0.0.1")
    return (PeerId(peer), addresses) if addresses else None


async def discover(fingerprint: str, peer: PeerId, addresses: list[str], seen: Seen) -> None:
    """Announce this node and report others of the mesh until cancelled.

    A network without multicast is reported in the log; it is no error.
    """
    try:
        zeroconf = await trio.to_thread.run_sync(Zeroconf)
    except OSError as error:
        log.warning("multicast DNS is not available: %s", error)
        return
    try:
        await _announce_and_browse(zeroconf, fingerprint, peer, addresses, seen)
    except Exception:
        log.exception("discovery on the local network failed")
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5.0):
            await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)


async def _announce_and_browse(
    zeroconf: Zeroconf, fingerprint: str, peer: PeerId, addresses: list[str], seen: Seen
) -> None:
    ours = instance_name(fingerprint, peer)
    token = trio.lowlevel.current_trio_token()
    send, receive = trio.open_memory_channel[str](MAX_WAITING)

    def changed(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Runs on the thread of zeroconf."""
        del zeroconf, service_type
        if state_change is ServiceStateChange.Removed or name == ours:
            return
        if not name.startswith(fingerprint[:16]):
            return
        try:
            token.run_sync_soon(put, name)
        except trio.RunFinishedError:
            return

    def put(name: str) -> None:
        try:
            send.send_nowait(name)
        except (trio.WouldBlock, trio.ClosedResourceError):
            return

    hosts = sorted({a.split("/")[2] for a in addresses if a.startswith("/ip")})
    if hosts:
        info = ServiceInfo(
            SERVICE,
            ours,
            port=int(addresses[0].split("/")[4]),
            properties=properties(fingerprint, peer, addresses),
            parsed_addresses=hosts,
            server=f"{peer[-32:].lower()}.local.",
        )
        await trio.to_thread.run_sync(zeroconf.register_service, info)
    browser = await trio.to_thread.run_sync(lambda: ServiceBrowser(zeroconf, SERVICE, [changed]))
    try:
        async for name in receive:
            look_up = partial(zeroconf.get_service_info, SERVICE, name, LOOKUP_MS)
            found = await trio.to_thread.run_sync(look_up)
            member = read_properties(dict(found.properties), fingerprint) if found else None
            if member is not None and member[0] != peer:
                seen(*member)
    finally:
        send.close()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(browser.cancel)
