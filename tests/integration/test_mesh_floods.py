"""What a member that lost its manners may do with streams and frames; each is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from pyagent_node.base.errors import (
    DeadlineExceeded,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.limits import MAX_HEADER, MAX_STREAMS_PER_PEER
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import PREFIX, Frame
from pyagent_node.node.mesh import auth, yamux
from pyagent_node.node.mesh.channels import Channel, Link
from pyagent_node.node.mesh.negotiation import propose
from pyagent_node.node.mesh.service import Libp2pMesh
from pyagent_node.node.mesh.settings import MeshLimits
from pyagent_node.node.mesh.wire import WireClosed

from .mesh_kit import (
    Guard,
    Nodes,
    attacker,
    echo,
    frames,
    nodes_of,
    serves,
)
from .waiting import eventually

pytestmark = pytest.mark.daemons


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with nodes_of("libp2p") as nodes:
        yield nodes


async def member(link: Link, mesh: Libp2pMesh) -> None:
    """Authorise an attacker: it is a member that lost its manners."""
    stream = await frames(link, auth.PROTOCOL, mesh)
    await auth.exchange(stream, Guard())
    await eventually(lambda: len(mesh.peers()) == 1)


async def test_a_flood_of_streams_is_cut_off(nodes: Nodes) -> None:
    mesh = await nodes.real()
    mesh.handle("/test/echo/1", echo)
    async with attacker(mesh.addresses[0]) as link:
        await member(link, mesh)
        for _ in range(1000):
            link.mux.open()
        link.flush()
        await eventually(
            lambda: mesh.metrics.refused["too_many_streams"] >= 1000 - MAX_STREAMS_PER_PEER
        )
        assert len(link.mux.streams) - link.mux.inbound <= MAX_STREAMS_PER_PEER
        assert not link.ended.is_set()
    await serves(mesh, nodes)


async def test_a_flood_before_authorisation_is_cut_off_sooner(nodes: Nodes) -> None:
    mesh = await nodes.real()
    async with attacker(mesh.addresses[0]) as link:
        for _ in range(200):
            link.mux.open()
        link.flush()
        await eventually(lambda: mesh.metrics.refused["too_many_streams"] >= 190)
    await serves(mesh, nodes)


async def taken(nodes: Nodes) -> tuple[Libp2pMesh, list[str]]:
    """Start a node that notes how the streams of ``/test/sink/1`` end."""
    mesh = await nodes.real()
    ends: list[str] = []

    async def sink(stream: FrameStream) -> None:
        try:
            while await stream.receive() is not None:
                pass
            ends.append("end")
        except PyAgentError as error:
            ends.append(error.code)
            raise

    mesh.handle("/test/sink/1", sink)
    return mesh, ends


async def opened(link: Link, mesh: Libp2pMesh) -> Channel:
    await member(link, mesh)
    channel = link.open()
    await propose(channel, "/test/sink/1")
    return channel


async def test_an_oversized_frame_is_refused_at_its_prefix(nodes: Nodes) -> None:
    mesh, ends = await taken(nodes)
    async with attacker(mesh.addresses[0]) as link:
        channel = await opened(link, mesh)
        await channel.write(PREFIX.pack(MAX_HEADER + 1, 0))
        with pytest.raises(Unavailable), trio.fail_after(20):
            await channel.read()
        await eventually(lambda: bool(ends))
    assert ends == ["frame_too_large"]
    assert mesh.metrics.refused["frame_too_large"] == 1


async def test_good_frames_before_an_oversized_one_are_served(nodes: Nodes) -> None:
    mesh, ends = await taken(nodes)
    before = mesh.metrics.frames_in
    async with attacker(mesh.addresses[0]) as link:
        channel = await opened(link, mesh)
        count = mesh.metrics.frames_in
        await channel.write(PREFIX.pack(1, 0) + b"a" + PREFIX.pack(1, 0xFFFFFFFF))
        await eventually(lambda: bool(ends))
        assert mesh.metrics.frames_in >= count + 1 > before
    assert ends == ["frame_too_large"]


async def test_a_half_written_frame_is_an_error_of_its_stream(nodes: Nodes) -> None:
    mesh, ends = await taken(nodes)
    async with attacker(mesh.addresses[0]) as link:
        channel = await opened(link, mesh)
        await channel.write(PREFIX.pack(10, 0) + b"half")
        channel.finish()
        await eventually(lambda: bool(ends))
        assert ends == ["stream_closed"]
        assert not link.ended.is_set()


async def test_a_connection_cut_in_a_frame_ends_its_streams(nodes: Nodes) -> None:
    mesh, ends = await taken(nodes)
    async with attacker(mesh.addresses[0]) as link:
        channel = await opened(link, mesh)
        await channel.write(PREFIX.pack(10, 0) + b"half")
        await trio.testing.wait_all_tasks_blocked(0.02)
        link.wire.close()
        await eventually(lambda: bool(ends))
    assert ends == ["stream_closed"]
    await eventually(lambda: not mesh.peers())
    await serves(mesh, nodes)


@pytest.mark.parametrize(
    "packets",
    [
        yamux.HEADER.pack(1, yamux.PING, yamux.SYN, 0, 0),
        yamux.HEADER.pack(0, 9, 0, 0, 0),
        yamux.HEADER.pack(0, yamux.DATA, yamux.SYN, 2, 0),
        yamux.HEADER.pack(0, yamux.DATA, yamux.SYN, 9999, 2**32 - 1),
        yamux.HEADER.pack(0, yamux.DATA, 0, 7777, 2**31),
    ],
)
async def test_a_peer_that_breaks_the_muxer_is_disconnected(nodes: Nodes, packets: bytes) -> None:
    mesh, _ = await taken(nodes)
    async with attacker(mesh.addresses[0]) as link:
        await member(link, mesh)
        link.send(packets)
        with trio.fail_after(20):
            await link.ended.wait()
        assert link.mux.gone_away == yamux.PROTOCOL_ERROR
    await eventually(lambda: not mesh.peers())
    await serves(mesh, nodes)


async def test_data_past_the_window_is_disconnected(nodes: Nodes) -> None:
    mesh, _ = await taken(nodes)
    stuck = trio.Event()

    async def never_reads(stream: FrameStream) -> None:
        await stuck.wait()

    mesh.handle("/test/stuck/1", never_reads)
    async with attacker(mesh.addresses[0]) as link:
        await member(link, mesh)
        channel = link.open()
        await propose(channel, "/test/stuck/1")
        packet = yamux.HEADER.pack(0, yamux.DATA, 0, channel._stream.id, 60_000) + bytes(60_000)
        with trio.fail_after(20), contextlib.suppress(WireClosed):
            while not link.ended.is_set():
                if not link.wire.congested:
                    link.send(packet)
                await trio.lowlevel.checkpoint()
    await eventually(lambda: not mesh.peers())


async def test_a_peer_that_asks_and_never_reads_is_dropped(nodes: Nodes) -> None:
    """A flood of pings must not fill our memory with answers."""
    mesh, _ = await taken(nodes)
    async with attacker(mesh.addresses[0]) as link:
        await member(link, mesh)
        pings = yamux.HEADER.pack(0, yamux.PING, yamux.SYN, 0, 1) * 5000

        async def deaf(scratch: bytearray | None = None) -> bytes:
            await trio.sleep_forever()
            return b""

        link.wire.receive = deaf  # type: ignore[method-assign]
        link.send(yamux.HEADER.pack(0, yamux.PING, yamux.SYN, 0, 1))  # wakes its last receive
        with trio.fail_after(30):
            while mesh.peers():
                if not link.wire.closed and not link.wire.congested:
                    link.send(pings)
                await trio.testing.wait_all_tasks_blocked(0.0)
    await serves(mesh, nodes)


async def test_a_send_cancelled_inside_a_frame_resets_its_stream(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    codes: list[str] = []
    proceed = trio.Event()

    async def slow(stream: FrameStream) -> None:
        await proceed.wait()
        try:
            while await stream.receive() is not None:
                pass
        except PyAgentError as error:
            codes.append(error.code)

    a.handle("/test/slow/1", slow)
    await b.connect(a.addresses[0])
    stream = await b.open(a.peer_id, "/test/slow/1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, Frame(b"big", bytes(8_000_000)))
        await trio.testing.wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    with pytest.raises(Unavailable) as caught:
        await stream.send(Frame(b"next"))
    assert caught.value.code == "stream_closed"
    proceed.set()
    await eventually(lambda: bool(codes))
    assert codes == ["stream_closed"]


async def test_a_peer_that_takes_a_stream_and_says_nothing_runs_into_the_deadline(
    nodes: Nodes,
) -> None:
    mesh = await nodes.real(limits=MeshLimits(handshake_seconds=0.3, dial_seconds=0.2))
    channels: list[Channel] = []
    async with attacker(mesh.addresses[0], on_accept=channels.append) as link:
        await member(link, mesh)
        with pytest.raises(DeadlineExceeded) as caught:
            await mesh.open(link_peer(mesh), "/test/echo/1")
        assert caught.value.code == "peer_timeout"


def link_peer(mesh: Libp2pMesh) -> PeerId:
    (info,) = mesh.peers()
    return info.peer_id
