"""Events, gossip's filter, announcements, smoothing, the light import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import DeadlineExceeded
from pyagent_node.base.mesh import PeerEvent
from pyagent_node.base.types import PeerId
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh import gossip, mdns, ping
from pyagent_node.node.mesh.book import MAX_ADDRESSES
from pyagent_node.node.mesh.events import Change, EventFeed, EventHub
from pyagent_node.node.nurseries import background, deadline

A, B = PeerId("A"), PeerId("B")


async def read_all(feed: EventFeed) -> list[tuple[str, str]]:
    seen = []
    while feed._pending:
        event = await anext(feed)
        seen.append((str(event.peer_id), str(event.change)))
    return seen


async def test_a_subscriber_sees_the_present_first_and_then_changes() -> None:
    hub = EventHub()
    async with hub.subscribe([A]) as feed:
        hub.put(B, "up")
        hub.put(A, "down")
        assert await read_all(feed) == [("B", "up")]
        hub.put(B, "down")
        assert await anext(feed) == PeerEvent(B, "down")
    hub.put(A, "up")
    assert not feed._pending


@given(st.lists(st.booleans(), max_size=40))
async def test_what_a_lagging_subscriber_sees_is_a_true_story(reads: list[bool]) -> None:
    """Ups and downs alternate, what is missed is only what is over, and the end is right."""
    feed = EventFeed([])
    state, seen = False, []
    for read in reads:
        if read:
            seen += await read_all(feed)
        else:
            state = not state
            change: Change = "up" if state else "down"
            feed.put(A, change)
        assert sum(len(waiting) for waiting in feed._pending.values()) <= 2
    seen += await read_all(feed)
    changes = [change for _, change in seen]
    assert changes == ["up", "down"] * (len(changes) // 2) + ["up"] * (len(changes) % 2)
    assert (changes[-1:] == ["up"]) == state


def record(*addresses: str, peer: str | None = None) -> gossip.PeerExchange:
    return gossip.PeerExchange((gossip.PeerRecord(peer or NodeKey.generate().peer_id, addresses),))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/ip4/10.0.0.1/tcp/0",
        "/ip4/0.0.0.0/tcp/4810",
        "/ip6/::/tcp/4810",
        "/ip4/10.0.0.1/udp/4810",
        "/ip4/10.0.0.1/tcp/4810/p2p/12D3KooW",
        "/ip4/10.0.0.1/tcp/99999",
        "/unix/socket/tcp/1",
        "/dns4/bad host/tcp/1",
        "/ip4/127.0.0.1/tcp/4810",
        "/ip6/::1/tcp/4810",
        "/dns4/localhost/tcp/4810",
    ],
)
def test_addresses_that_are_not_worth_dialling_are_left_out(address: str) -> None:
    assert gossip.usable_records(record(address), "10.0.0.9", A) == []


def test_only_this_machine_may_speak_of_its_loopback() -> None:
    message = record("/ip4/127.0.0.1/tcp/4810", "/dns4/node.example/tcp/1")
    ((_, near),) = gossip.usable_records(message, "127.0.0.1", A)
    ((_, far),) = gossip.usable_records(message, "192.168.1.9", A)
    assert near == ["/ip4/127.0.0.1/tcp/4810", "/dns4/node.example/tcp/1"]
    assert far == ["/dns4/node.example/tcp/1"]


def test_records_are_bounded_and_must_name_another_peer() -> None:
    me = NodeKey.generate().peer_id
    good = [f"/ip4/10.0.0.{n}/tcp/1" for n in range(50)]
    assert gossip.usable_records(record(*good, peer=me), "10.0.0.9", me) == []
    assert gossip.usable_records(record(*good, peer="not a peer"), "10.0.0.9", me) == []
    ((_, kept),) = gossip.usable_records(record(*good), "10.0.0.9", me)
    assert len(kept) == MAX_ADDRESSES
    many = gossip.PeerExchange(record(good[0]).records * 500)
    assert len(gossip.usable_records(many, "10.0.0.9", me)) == gossip.MAX_RECORDS


def test_an_announcement_is_read_by_its_own_mesh_only() -> None:
    peer = NodeKey.generate().peer_id
    ours, other = "a" * 64, "b" * 64
    addresses = ["/ip4/10.0.0.1/tcp/4810", "/dns4/" + "x" * 242 + "/tcp/1", "/ip6/fd00::1/tcp/1"]
    text = mdns.properties(ours, peer, addresses)
    assert all(len(f"{key}={value}") <= 255 for key, value in text.items())
    raw: dict[bytes, bytes | None] = {k.encode(): v.encode() for k, v in text.items()}
    assert mdns.read_properties(raw, ours) == (peer, [addresses[0], addresses[2]])
    assert mdns.read_properties(raw, other) is None
    assert mdns.read_properties({**raw, b"id": b"\xff\xfe"}, ours) is None
    assert mdns.read_properties({**raw, b"id": None}, ours) is None
    assert mdns.read_properties({b"mesh": ours.encode(), b"id": peer.encode()}, ours) is None
    assert mdns.read_properties({}, ours) is None
    name = mdns.instance_name(ours, peer)
    assert len(name.removesuffix("." + mdns.SERVICE)) <= 63


def test_round_trips_are_smoothed() -> None:
    assert ping.smoothed(None, 8.0) == 8.0
    assert ping.smoothed(8.0, 16.0) == 10.0


@pytest.mark.parametrize(("peers", "pause"), [(0, 5.0), (50, 5.0), (100, 10.0), (255, 25.5)])
def test_pings_to_many_peers_are_spread(peers: int, pause: float) -> None:
    assert ping.pause(5.0, peers) == pause
    assert peers / ping.pause(5.0, peers) <= ping.PINGS_A_SECOND


async def test_a_background_nursery_keeps_its_users_exception_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
        async with background() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise ZeroDivisionError
    with trio.CancelScope() as scope:
        async with background():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_deadline_becomes_an_error_of_ours() -> None:
    with (
        pytest.raises(DeadlineExceeded, match="too late") as caught,
        deadline(0.0, "too late", code="late", who="me"),
    ):
        await trio.sleep_forever()
    assert caught.value.code == "late"
    assert caught.value.facts == {"seconds": 0.0, "who": "me"}


@pytest.mark.slow
def test_libp2p_is_loaded_in_part_and_leaves_logging_alone() -> None:
    program = """
import logging, sys
import pyagent_node.node.mesh.service
for heavy in ("aioquic", "httpx", "requests", "rich", "sqlite3", "zeroconf", "dns", "h2"):
    assert heavy not in sys.modules, heavy
assert not logging.getLogger().handlers
assert not logging.getLogger("libp2p").handlers
assert logging.getLogger("libp2p").propagate
import libp2p.peer.id
from pyagent_node.node.mesh.libp2p_light import ID
assert libp2p.peer.id.ID is ID
assert "aioquic" not in sys.modules
from libp2p import new_host
from libp2p.transport.quic.stream import QUICStream
assert callable(new_host) and "aioquic" in sys.modules
assert libp2p.transport.TCP and QUICStream.__module__ == "libp2p.transport.quic.stream"
print("good")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "good\n", done.stderr


@pytest.mark.slow
def test_libp2p_may_be_there_already() -> None:
    program = "import libp2p; import pyagent_node.node.mesh.service; print('good')"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "good\n", done.stderr
