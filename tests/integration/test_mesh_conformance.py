"""What every ``Mesh`` promises: the real one (with and without a PSK) and the simulated."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Refused,
    Unavailable,
)
from pyagent_node.base.limits import MAX_HEADER, MAX_STREAMS_PER_PEER, MAX_TAIL
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Frame
from pyagent_node.node.identity import NodeKey

from .mesh_kit import Guard, Nodes, down, echo, next_event, nodes_of, up
from .waiting import eventually

pytestmark = pytest.mark.daemons

JOIN = "/pyagent/join/1"


@pytest.fixture(params=["libp2p", "libp2p-psk", "simulated"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    async with nodes_of(request.param) as nodes:
        yield nodes


async def test_both_sides_see_each_other(nodes: Nodes) -> None:
    a, b = await nodes.start(), await nodes.start()
    assert not a.peers()
    async with a.events() as at_a, b.events() as at_b:
        assert await b.connect(a.addresses[0]) == a.peer_id
        assert await next_event(at_a) == ("up", b.peer_id)
        assert await next_event(at_b) == ("up", a.peer_id)
    (there,) = a.peers()
    (here,) = b.peers()
    assert (there.peer_id, there.role, there.outbound) == (b.peer_id, "voter", False)
    assert (here.peer_id, here.name, here.outbound) == (a.peer_id, f"node-{a.peer_id[-4:]}", True)
    assert here.addresses == a.addresses
    async with a.events() as late:
        assert await next_event(late) == ("up", b.peer_id)
    assert await b.connect(a.addresses[0]) == a.peer_id
    assert len(b.peers()) == 1


async def test_frames_of_every_size_come_back_as_they_went(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    stream = await b.open(a.peer_id, "/test/echo/1")
    assert stream.peer == a.peer_id
    tail = bytes(range(256)) * 12_288  # 3 MiB, beyond every window
    frames = [
        Frame(b""),
        Frame(b"h"),
        Frame(b"", b"t"),
        Frame(b"h" * MAX_HEADER, b"t" * 65_000),
        Frame(b"header", bytearray(b"mutable")),
        Frame(b"header", memoryview(tail)),
    ]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for frame in frames:
                await stream.send(frame)

        nursery.start_soon(send)
        for frame in frames:
            back = await stream.receive()
            assert back is not None
            assert (back.header, bytes(back.tail)) == (frame.header, bytes(frame.tail))
    await stream.aclose()
    await stream.aclose()


async def test_a_stream_to_oneself_needs_no_network(nodes: Nodes) -> None:
    a = await nodes.start()
    a.handle("/test/echo/1", echo)
    stream = await a.open(a.peer_id, "/test/echo/1")
    buffer = bytearray(b"tail")
    await stream.send(Frame(b"me", buffer))
    buffer[:] = b"XXXX"
    assert await stream.receive() == Frame(b"me", b"tail")
    assert await a.connect(a.addresses[0]) == a.peer_id
    assert not a.peers()
    await stream.aclose()
    with pytest.raises(Unavailable) as caught:
        await a.open(a.peer_id, "/test/none/1")
    assert caught.value.code == "protocol_unsupported"


async def test_what_cannot_be_reached_is_said_so(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    stranger = NodeKey.generate().peer_id
    with pytest.raises(Unavailable) as caught:
        await a.open(stranger, "/test/echo/1")
    assert caught.value.code == "peer_unreachable"
    with pytest.raises(Unavailable) as caught:
        await b.open(a.peer_id, "/test/none/1")
    assert caught.value.code == "protocol_unsupported"
    with pytest.raises(Unavailable) as caught:
        await a.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}")
    assert caught.value.code == "peer_unreachable"
    for wrong in ("", "nonsense", "/ip4/127.0.0.1/tcp/1", f"/ip4/1.2.3.4/udp/1/p2p/{stranger}"):
        with pytest.raises(InvalidRequest) as bad:
            await a.connect(wrong)
        assert bad.value.code == "bad_address"


async def test_an_orderly_end_is_none_and_then_the_stream_is_closed(nodes: Nodes) -> None:
    a, b = await nodes.pair()

    async def one_frame(stream: FrameStream) -> None:
        await stream.send(Frame(b"only", b"t" * 100_000))

    a.handle("/test/one/1", one_frame)
    stream = await b.open(a.peer_id, "/test/one/1")
    frame = await stream.receive()
    assert frame is not None
    assert frame.header == b"only"
    assert await stream.receive() is None
    assert await stream.receive() is None
    with pytest.raises(Unavailable) as caught:  # noqa: PT012 - the peer's answer takes its time
        while True:
            await stream.send(Frame(b"more"))
            await trio.lowlevel.checkpoint()
    assert caught.value.code == "stream_closed"
    await stream.aclose()
    with pytest.raises(Unavailable):
        await stream.send(Frame(b"after"))
    with pytest.raises(Unavailable):
        await stream.receive()


async def test_frames_sent_before_closing_arrive(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    got: list[bytes] = []
    done = trio.Event()

    async def sink(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            got.append(frame.header)
        done.set()

    a.handle("/test/sink/1", sink)
    stream = await b.open(a.peer_id, "/test/sink/1")
    for number in range(50):
        await stream.send(Frame(str(number).encode(), b"x" * 3000))
    await stream.aclose()
    with trio.fail_after(20):
        await done.wait()
    assert got == [str(number).encode() for number in range(50)]


@pytest.mark.parametrize("error", [ValueError("a defect"), NotFound("no such thing")])
async def test_a_failing_handler_ends_its_own_stream_only(nodes: Nodes, error: Exception) -> None:
    a, b = await nodes.pair()

    async def fail(stream: FrameStream) -> None:
        await stream.receive()
        raise error

    a.handle("/test/fail/1", fail)
    a.handle("/test/echo/1", echo)
    good = await b.open(a.peer_id, "/test/echo/1")
    bad = await b.open(a.peer_id, "/test/fail/1")
    await bad.send(Frame(b"go"))
    with pytest.raises(Unavailable) as caught:
        await bad.receive()
    assert caught.value.code == "stream_closed"
    await good.send(Frame(b"alive"))
    assert await good.receive() == Frame(b"alive", b"")
    assert a.metrics.handler_errors == 1


async def test_an_oversized_frame_is_refused_before_it_is_sent(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    stream = await b.open(a.peer_id, "/test/echo/1")
    for frame in (Frame(b"h" * (MAX_HEADER + 1)), Frame(b"h", memoryview(bytes(MAX_TAIL + 1)))):
        with pytest.raises(LimitExceeded) as caught:
            await stream.send(frame)
        assert caught.value.code == "frame_too_large"
        assert caught.value.facts["limit"] in (MAX_HEADER, MAX_TAIL)
    await stream.send(Frame(b"fits"))
    assert await stream.receive() == Frame(b"fits", b"")


async def test_a_slow_reader_holds_its_sender_back(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    release = trio.Event()
    received = 0

    async def slow(stream: FrameStream) -> None:
        nonlocal received
        await release.wait()
        while await stream.receive() is not None:
            received += 1

    a.handle("/test/slow/1", slow)
    stream = await b.open(a.peer_id, "/test/slow/1")
    sent = 0

    async def flood() -> None:
        nonlocal sent
        for _ in range(400):
            await stream.send(Frame(b"h", b"x" * 65_536))
            sent += 1
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        before = -1
        while before != sent:
            before = sent
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert sent <= 40  # a window and what the sockets hold, far from 25 MiB
        release.set()
    with trio.fail_after(20):
        while received < 400:
            await trio.testing.wait_all_tasks_blocked(0.005)


async def test_sending_without_waiting_keeps_order_and_stops_at_a_full_window(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    release = trio.Event()
    received: list[bytes] = []

    async def slow(stream: FrameStream) -> None:
        await release.wait()
        while (frame := await stream.receive()) is not None:
            received.append(frame.header)

    a.handle("/test/slow/1", slow)
    stream = await b.open(a.peer_id, "/test/slow/1")
    with pytest.raises(LimitExceeded):
        stream.try_send(Frame(b"h" * (MAX_HEADER + 1)))
    sent = 0
    while stream.try_send(Frame(b"%d" % sent, bytes(65_000))):
        sent += 1
        assert sent < 400
    assert sent >= 1
    release.set()
    await stream.send(Frame(b"%d" % sent, bytes(65_000)))
    with trio.fail_after(20):
        while len(received) <= sent:
            await trio.testing.wait_all_tasks_blocked(0.005)
    assert received == [b"%d" % i for i in range(sent + 1)]
    await stream.aclose()
    with pytest.raises(Unavailable):
        stream.try_send(Frame(b"late"))


async def test_senders_at_once_do_not_interleave(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    stream = await b.open(a.peer_id, "/test/echo/1")
    tasks, each = 8, 12

    async def send(letter: int) -> None:
        for number in range(each):
            await stream.send(Frame(bytes([letter]), bytes([letter]) * (1 + 40_000 * (number % 4))))

    async with trio.open_nursery() as nursery:
        for letter in range(tasks):
            nursery.start_soon(send, letter)
        for _ in range(tasks * each):
            frame = await stream.receive()
            assert frame is not None
            assert set(frame.tail) == set(frame.header)


async def test_streams_are_limited_and_come_free_again(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    streams = []
    with pytest.raises(LimitExceeded) as caught:  # noqa: PT012 - how many fit is the question
        for _ in range(MAX_STREAMS_PER_PEER + 1):
            streams.append(await b.open(a.peer_id, "/test/echo/1"))
    assert caught.value.code == "too_many_streams"
    assert len(streams) >= MAX_STREAMS_PER_PEER - 4
    for stream in streams[:4]:
        await stream.aclose()
    with trio.fail_after(20):
        while True:
            try:
                again = await b.open(a.peer_id, "/test/echo/1")
                break
            except LimitExceeded:
                await trio.testing.wait_all_tasks_blocked(0.005)
    await again.send(Frame(b"x"))
    assert await again.receive() == Frame(b"x", b"")


async def test_a_protocol_has_one_handler(nodes: Nodes) -> None:
    a = await nodes.start()
    a.handle("/test/echo/1", echo)
    with pytest.raises(Conflict) as caught:
        a.handle("/test/echo/1", echo)
    assert caught.value.code == "handler_exists"


@pytest.mark.parametrize("code", ["no_certificate", "certificate_expired", "wrong_mesh"])
async def test_the_dialler_learns_by_name_why_it_is_refused(nodes: Nodes, code: str) -> None:
    strict = Guard()
    strict.code = code
    a = await nodes.start(strict)
    b = await nodes.start(Guard(shows=b""))
    a.handle("/test/echo/1", echo)
    with pytest.raises(Refused) as caught:
        await b.connect(a.addresses[0])
    assert caught.value.code == code
    assert not a.peers()
    assert not b.peers()
    await eventually(lambda: a.metrics.refused[code] == 1)
    with pytest.raises(Unavailable):
        await b.open(a.peer_id, "/test/echo/1")


async def test_the_dialler_may_refuse_too(nodes: Nodes) -> None:
    a = await nodes.start(Guard(shows=b"forged", takes=(b"member",)))
    b = await nodes.start()
    with pytest.raises(Refused) as caught:
        await b.connect(a.addresses[0])
    assert caught.value.code == "no_certificate"
    assert not a.peers()
    assert not b.peers()


async def test_join_is_served_before_authorisation_and_nothing_else(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(Guard(shows=b""))
    a.handle(JOIN, echo)
    stream = await b.open_join(a.addresses[0])
    assert stream.peer == a.peer_id
    await stream.send(Frame(b"let me in"))
    assert await stream.receive() == Frame(b"let me in", b"")
    assert not a.peers()
    assert not b.peers()
    await stream.aclose()
    with pytest.raises(Refused):
        await b.connect(a.addresses[0])


async def test_members_hear_of_each_other(nodes: Nodes) -> None:
    hub = await nodes.start()
    others = [await nodes.start() for _ in range(3)]
    for other in others:
        await other.connect(hub.addresses[0])
    everyone = [hub, *others]
    for mesh in everyone:
        await up(mesh, *(other.peer_id for other in everyone if other is not mesh))


async def test_disconnecting_ends_streams_and_is_seen(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    stream = await b.open(a.peer_id, "/test/echo/1")
    a.disconnect(b.peer_id, "for the test")
    with pytest.raises(Unavailable) as caught:
        await stream.receive()
    assert caught.value.code == "stream_closed"
    await down(a, b.peer_id)


async def test_cancelling_leaves_everything_usable(nodes: Nodes) -> None:
    a, b = await nodes.pair()
    a.handle("/test/echo/1", echo)
    stream = await b.open(a.peer_id, "/test/echo/1")
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.receive()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await b.open(a.peer_id, "/test/echo/1")
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await stream.send(Frame(b"never"))
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.receive)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await stream.send(Frame(b"still here"))
    assert await stream.receive() == Frame(b"still here", b"")
