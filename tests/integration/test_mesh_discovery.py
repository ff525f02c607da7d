"""Finding members, losing them and finding them again; the watch over silent peers."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Frame
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh.settings import MeshLimits

from .mesh_kit import LOOPBACK, Nodes, down, echo, nodes_of, tcp, up
from .waiting import eventually

pytestmark = pytest.mark.daemons

QUICK = MeshLimits(backoff_first=0.02, backoff_most=0.1, ping_seconds=0.05)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with nodes_of("libp2p") as nodes:
        yield nodes


async def test_three_nodes_that_know_one_become_a_full_mesh(nodes: Nodes) -> None:
    hub = await nodes.real()
    others = [await nodes.real(bootstrap=hub.addresses, limits=QUICK) for _ in range(3)]
    everyone = [hub, *others]
    for mesh in everyone:
        await up(mesh, *(other.peer_id for other in everyone if other is not mesh))
    for mesh in everyone:
        assert len(mesh.peers()) == 3


async def test_a_bootstrap_node_that_comes_later_is_found(nodes: Nodes) -> None:
    key = NodeKey.generate()
    first = await nodes.real(key=key)
    address = first.addresses[0]
    _, port = tcp(address)
    await nodes.stop(first)
    early = await nodes.real(bootstrap=(address,), limits=QUICK)
    await eventually(lambda: early.metrics.dial_failures >= 2)
    assert not early.peers()
    late = await nodes.real(key=key, listen=(f"/ip4/127.0.0.1/tcp/{port}",))
    await up(early, late.peer_id)


async def test_a_peer_that_restarts_is_connected_again(nodes: Nodes) -> None:
    key = NodeKey.generate()
    hub = await nodes.real(key=key)
    _, port = tcp(hub.addresses[0])
    mesh = await nodes.real(bootstrap=hub.addresses, limits=QUICK)
    await up(mesh, hub.peer_id)
    await nodes.stop(hub)
    await down(mesh, hub.peer_id)
    with pytest.raises(Unavailable):
        await mesh.open(hub.peer_id, "/test/echo/1")
    hub = await nodes.real(key=key, listen=(f"/ip4/127.0.0.1/tcp/{port}",))
    hub.handle("/test/echo/1", echo)
    await up(mesh, hub.peer_id)
    assert mesh.metrics.reconnects == 1
    stream = await mesh.open(hub.peer_id, "/test/echo/1")
    await stream.send(Frame(b"again"))
    assert await stream.receive() == Frame(b"again", b"")


async def test_opening_a_stream_dials_a_peer_that_is_known(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    a.handle("/test/echo/1", echo)
    await b.connect(a.addresses[0])
    await eventually(lambda: bool(a.peers()))
    for connection in b._roster.all():
        connection.link.close("for the test")
    stream = await b.open(a.peer_id, "/test/echo/1")
    await stream.send(Frame(b"x"))
    assert await stream.receive() == Frame(b"x", b"")


async def test_addresses_are_tried_one_after_the_other(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    good = a.addresses[0].partition("/p2p/")[0]
    dead = [f"/ip4/127.0.0.1/tcp/{port}" for port in (1, 2, 3, 4)]
    connection = await b._dialler.dial(a.peer_id, [*dead, good])
    assert connection.peer == a.peer_id


async def test_diallers_that_cross_end_up_with_one_connection(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyagent_node.node.mesh.roster.RETIRE_SECONDS", 0.05)
    a, b = await nodes.real(), await nodes.real()
    a.handle("/test/echo/1", echo)
    for _ in range(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.addresses[0])
            nursery.start_soon(b.connect, a.addresses[0])
        stream = await b.open(a.peer_id, "/test/echo/1")
        await stream.send(Frame(b"x"))
        assert await stream.receive() == Frame(b"x", b"")
        await stream.aclose()
        await eventually(lambda: len(a._roster.all()) == len(b._roster.all()) == 1)
        smaller = min(a, b, key=lambda mesh: mesh.peer_id)
        (info,) = smaller.peers()
        if a.metrics.connections_in and b.metrics.connections_in:
            assert info.outbound
        a.disconnect(b.peer_id, "again")
        b.disconnect(a.peer_id, "again")
        await eventually(lambda: not a.peers() and not b.peers())


async def test_many_callers_share_one_dial(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    a.handle("/test/echo/1", echo)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(b.connect, a.addresses[0])
    assert b.metrics.connections_out == 1


async def test_round_trips_are_measured_with_the_clock_we_give(nodes: Nodes) -> None:
    ticks = iter(range(10_000))
    a = await nodes.real()
    b = await nodes.real(clock=lambda: next(ticks) * 0.25, limits=QUICK)
    await b.connect(a.addresses[0])
    await eventually(lambda: b.peers()[0].rtt_ms is not None)
    assert b.peers()[0].rtt_ms == 250.0


async def test_a_peer_that_answers_no_ping_is_taken_for_gone(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await nodes.real()
    b = await nodes.real(limits=MeshLimits(silence_seconds=0.2, backoff_first=60.0))

    async def silent(stream: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setitem(a.system, "/pyagent/ping/1", silent)
    await b.connect(a.addresses[0])
    await eventually(lambda: bool(b.peers()))
    await eventually(lambda: not b.peers())


async def test_leaving_takes_no_time_whatever_goes_on(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()

    async def stuck(stream: object) -> None:
        await trio.sleep_forever()

    a.handle("/test/stuck/1", stuck)
    await b.connect(a.addresses[0])
    stream = await b.open(a.peer_id, "/test/stuck/1")
    async with trio.open_nursery() as nursery:

        async def push() -> None:
            with pytest.raises(Unavailable):
                await stream.send(Frame(b"", bytes(20_000_000)))

        nursery.start_soon(push)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await nodes.stop(a)
    await down(b, a.peer_id)
    await nodes.stop(b)


async def test_what_was_sent_before_leaving_arrives(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    got = 0
    ended = trio.Event()

    async def sink(stream: FrameStream) -> None:
        nonlocal got
        try:
            while await stream.receive() is not None:
                got += 1
        finally:
            ended.set()

    a.handle("/test/sink/1", sink)
    await b.connect(a.addresses[0])
    stream = await b.open(a.peer_id, "/test/sink/1")
    for _ in range(100):
        await stream.send(Frame(b"h", bytes(60_000)))
    await stream.aclose()
    await nodes.stop(b)
    with trio.fail_after(20):
        await ended.wait()
    assert got == 100


async def test_the_same_seed_gives_the_same_waits(nodes: Nodes) -> None:
    mesh = await nodes.real(rng=random.Random(7))
    again = await nodes.real(rng=random.Random(7))
    assert mesh._book._wait(3) == again._book._wait(3)


async def test_what_is_announced_is_told_instead_of_what_is_listened_on(nodes: Nodes) -> None:
    a = await nodes.real(announce=("/dns4/home.example/tcp/4810",), listen=(LOOPBACK,))
    b = await nodes.real()
    assert a.addresses == (f"/dns4/home.example/tcp/4810/p2p/{a.peer_id}",)
    await a.connect(b.addresses[0])
    await eventually(lambda: bool(b.peers()) and bool(b.peers()[0].addresses))
    assert b.peers()[0].addresses == a.addresses
