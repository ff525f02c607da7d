"""Links made slow on purpose: the text of a shape, the arithmetic, and the wire that does it."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.node.mesh import sockets
from pyagent_node.node.mesh.shaped import MAX_FLIGHT, ShapedWire
from pyagent_node.node.mesh.wire import MAX_BACKLOG, Wire, WireClosed
from pyagent_node.node.shaping import (
    Pacer,
    Shape,
    parse_duration,
    parse_rate,
    parse_shape,
)


def test_a_shape_is_read() -> None:
    assert parse_shape("rtt=80ms,rate=50mbit,jitter=5ms") == Shape(0.08, 0.005, 50e6)
    assert parse_shape(" rate = 1.5Gbit/s ") == Shape(rate=1.5e9)
    assert parse_shape("rtt=0.3s") == Shape(rtt=0.3)
    assert parse_shape("  ") is None
    assert parse_duration("300us") == pytest.approx(0.0003)
    assert parse_rate("8000bit") == 8000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rtt", "NAME=VALUE"),
        ("rtt=80", "no time"),
        ("rtt=11s", "no time"),
        ("rtt=-1ms", "no time"),
        ("rtt=1e3ms", "no time"),
        ("rate=50", "no rate"),
        ("rate=1bit", "no rate"),
        ("rate=9999gbit", "no rate"),
        ("rtt=80ms,rtt=90ms", "twice"),
        ("rtt=10ms,jitter=6ms", "more than half"),
        ("jitter=1ms", "more than half"),
        ("loss=1%", "lab run"),
        ("speed=3", "not known"),
        ("rtt=80ms,,", "NAME=VALUE"),
        ("rtt=1ms" + "," * 300, "too long"),
    ],
)
def test_a_wrong_shape_says_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        parse_shape(text)
    assert caught.value.code == "bad_shape"
    assert caught.value.remedy


@given(
    st.builds(
        Shape,
        rtt=st.floats(0.2, 1),
        jitter=st.floats(0, 0.1),
        rate=st.none() | st.floats(1e5, 1e9),
    ),
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 65_535), st.floats(0, 0.999))),
)
def test_what_is_written_arrives_in_order_and_no_sooner_than_possible(
    shape: Shape, writes: list[tuple[float, int, float]]
) -> None:
    pacer, now, sent, last = Pacer(shape), 0.0, 0, 0.0
    for pause, size, draw in writes:
        now += pause
        sent += size
        sent_at, arrives_at = pacer.write(size, now, draw)
        assert now <= sent_at
        assert sent_at + shape.rtt / 2 - shape.jitter - 1e-9 <= arrives_at
        assert arrives_at >= last
        if shape.rate is not None:
            assert sent_at >= sent * 8 / shape.rate - 1e-9
        last = arrives_at


class Pair:
    """A shaped wire, and the plain socket at its other end."""

    def __init__(self, wire: ShapedWire, other: socket.socket) -> None:
        self.wire = wire
        self.other = other

    def arrived(self) -> bytes:
        """Return what has arrived by now."""
        try:
            return self.other.recv(1 << 22)
        except BlockingIOError:
            return b""


@pytest.fixture
async def shaped(nursery: trio.Nursery) -> AsyncIterator[Callable[[str], Pair]]:
    pairs = []

    def make(text: str) -> Pair:
        shape = parse_shape(text)
        assert shape is not None
        a, b = socket.socketpair()
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        b.setblocking(False)
        pair = Pair(ShapedWire(a, shape=shape, rng=random.Random(1)), b)
        pairs.append(pair)
        nursery.start_soon(pair.wire.run_writer)
        return pair

    yield make
    for pair in pairs:
        pair.wire.close()
        pair.other.close()


async def later(clock: trio.testing.MockClock, seconds: float) -> None:
    """Let virtual time pass, and everything that is due happen."""
    await trio.testing.wait_all_tasks_blocked()
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked()


async def test_bytes_arrive_after_half_of_the_round_trip(
    mock_clock: trio.testing.MockClock, shaped: Callable[[str], Pair]
) -> None:
    pair = shaped("rtt=80ms")
    pair.wire.send(b"one")
    await later(mock_clock, 0.030)
    pair.wire.send(b"two")
    await later(mock_clock, 0.009)
    assert pair.arrived() == b""
    await later(mock_clock, 0.0011)
    assert pair.arrived() == b"one"
    await later(mock_clock, 0.028)
    assert pair.arrived() == b""
    await later(mock_clock, 0.0021)
    assert pair.arrived() == b"two"


async def test_the_rate_holds_data_back_and_its_senders(
    mock_clock: trio.testing.MockClock, shaped: Callable[[str], Pair]
) -> None:
    pair = shaped("rtt=1s,rate=8mbit")  # a megabyte a second
    for _ in range(40):
        pair.wire.send(bytes(10_000))
    assert pair.wire.congested
    room = trio.Event()

    async def wait() -> None:
        await pair.wire.drained()
        room.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await later(mock_clock, 0.125)
        assert not room.is_set()
        await later(mock_clock, 0.0151)  # 260,000 bytes wait now, less than HIGH_WATER
        assert room.is_set(), "long before the first byte has arrived"
    assert pair.arrived() == b""
    await later(mock_clock, 0.48)
    assert len(pair.arrived()) == 120_000


async def test_what_is_on_its_way_is_bounded(
    mock_clock: trio.testing.MockClock, shaped: Callable[[str], Pair]
) -> None:
    pair = shaped("rtt=2s")
    while not pair.wire.congested:
        pair.wire.send(bytes(65_536))
        assert pair.wire._flight <= MAX_FLIGHT + 65_536
    with pytest.raises(WireClosed, match="does not read"):  # noqa: PT012 - how many fit varies
        for _ in range(MAX_BACKLOG // 65_536):
            pair.wire.send(bytes(65_536))
    assert pair.wire.closed


async def test_a_goodbye_waits_for_what_is_on_its_way(
    mock_clock: trio.testing.MockClock, shaped: Callable[[str], Pair]
) -> None:
    pair = shaped("rtt=80ms")
    pair.wire.send(b"last words")
    gone = trio.Event()

    async def part() -> None:
        await pair.wire.flushed()
        pair.wire.finish()
        gone.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(part)
        await later(mock_clock, 0.039)
        assert not gone.is_set()
        await later(mock_clock, 0.002)
        assert gone.is_set()
    assert pair.arrived() == b"last words"


async def test_closing_ends_the_writer_and_forgets_the_rest(
    mock_clock: trio.testing.MockClock, shaped: Callable[[str], Pair]
) -> None:
    pair = shaped("rtt=80ms")
    pair.wire.send(b"lost")
    await later(mock_clock, 0.01)
    pair.wire.close()
    pair.wire.close()
    await later(mock_clock, 1)
    assert pair.arrived() == b""
    with pytest.raises(WireClosed):
        pair.wire.send(b"more")


def test_a_mesh_without_a_shape_has_plain_wires() -> None:
    a, b = socket.socketpair()
    with b:
        assert type(sockets.shaped(None, random.Random(0))(a, None)) is Wire
        a.close()
