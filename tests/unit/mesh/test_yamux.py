"""The muxer against its specification, against itself, and against noise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.node.mesh.yamux import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    MAX_LINGERING,
    MAX_PAYLOAD,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW,
    WINDOW_UPDATE,
    Yamux,
    YamuxError,
    YamuxStream,
)


def pair() -> tuple[Yamux, Yamux]:
    return Yamux(initiator=True, max_inbound=4), Yamux(initiator=False, max_inbound=4)


def pump(*muxes: Yamux) -> None:
    """Carry what two muxers have to send until both are silent."""
    a, b = muxes
    while a.outbox or b.outbox:
        for source, target in ((a, b), (b, a)):
            data, source.outbox = b"".join(source.outbox), []
            target.feed(data)


def send(mux: Yamux, stream: YamuxStream, data: bytes) -> None:
    mux.outbox.append(mux.packet(stream, [data], len(data)))


def opened(a: Yamux, b: Yamux) -> tuple[YamuxStream, YamuxStream]:
    ours = a.open()
    pump(a, b)
    return ours, b.accepted.pop()


def packet(kind: int, flags: int, stream: int, length: int, version: int = 0) -> bytes:
    return HEADER.pack(version, kind, flags, stream, length)


def test_opening_follows_the_specification() -> None:
    a, b = pair()
    stream = a.open()
    assert stream.id == 1
    assert a.outbox == [packet(WINDOW_UPDATE, SYN, 1, WINDOW - INITIAL_WINDOW)]
    b.feed(a.outbox.pop())
    (accepted,) = b.accepted
    assert accepted.id == 1
    assert accepted.window == WINDOW
    assert b.outbox == [packet(WINDOW_UPDATE, ACK, 1, WINDOW - INITIAL_WINDOW)]
    assert a.open().id == 3
    assert b.open().id == 2


def test_data_goes_both_ways_and_ends_half_by_half() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    send(a, ours, b"question")
    a.finish(ours)
    pump(a, b)
    assert bytes(b.take(theirs)) == b"question"
    assert theirs.remote_finished
    assert not theirs.reset
    send(b, theirs, b"answer")
    b.finish(theirs)
    pump(a, b)
    assert bytes(a.take(ours)) == b"answer"
    assert not a.streams
    assert not b.streams
    assert b.inbound == 0


def test_taking_grants_window_once_half_of_it_is_consumed() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    for _ in range(WINDOW // 2 // 32_768):
        send(a, ours, bytes(32_768))
    pump(a, b)
    assert ours.window == WINDOW // 2
    assert len(b.take(theirs, 1000)) == 1000
    assert not b.outbox
    b.take(theirs)
    assert b.outbox == [packet(WINDOW_UPDATE, 0, 1, WINDOW // 2)]
    pump(a, b)
    assert ours.window == WINDOW
    assert theirs.credit == WINDOW


def test_small_frames_cost_no_window_updates() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    for _ in range(100):
        send(a, ours, bytes(2304))
        pump(a, b)
        b.take(theirs)
        assert not b.outbox


def test_closing_discards_and_resets_whoever_goes_on() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    send(a, ours, b"before")
    pump(a, b)
    b.close(theirs)
    pump(a, b)
    assert ours.remote_finished
    send(a, ours, b"after")
    pump(a, b)
    assert ours.reset
    assert not b.streams
    assert b.inbound == 0


def test_what_arrived_before_a_reset_can_be_taken() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    send(a, ours, b"data")
    a.reset(ours)
    pump(a, b)
    assert theirs.reset
    assert bytes(b.take(theirs)) == b"data"
    assert not b.outbox


def test_hooks_are_called() -> None:
    a, b = pair()
    ours, theirs = opened(a, b)
    calls: list[str] = []
    theirs.on_readable = lambda: calls.append("readable")
    ours.on_writable = lambda: calls.append("writable")
    send(a, ours, b"x")
    pump(a, b)
    assert calls == ["readable"]
    for _ in range(WINDOW // 2 // 65_000 + 1):
        send(a, ours, bytes(65_000))
    pump(a, b)
    b.take(theirs)
    pump(a, b)
    assert calls[-1] == "writable"
    calls.clear()
    a.end()
    assert calls == ["writable"]
    assert ours.reset


def test_one_stream_too_many_is_reset() -> None:
    a, b = pair()
    streams = [a.open() for _ in range(6)]
    pump(a, b)
    assert [stream.reset for stream in streams] == [False] * 4 + [True] * 2
    assert b.refused == 2
    assert b.inbound == 4
    a.close(streams[0])
    pump(a, b)
    b.close(b.accepted[0])
    pump(a, b)
    last = a.open()
    pump(a, b)
    assert not last.reset


def test_streams_that_the_peer_never_finishes_do_not_pile_up() -> None:
    mux = Yamux(initiator=False, max_inbound=10_000)
    for number in range(MAX_LINGERING + 50):
        mux.feed(packet(WINDOW_UPDATE, SYN, 2 * number + 1, 0))
        mux.close(mux.accepted.pop())
    assert len(mux.streams) == MAX_LINGERING
    assert mux.inbound == MAX_LINGERING


def test_pings_are_answered_and_going_away_is_noted() -> None:
    a, b = pair()
    a.feed(packet(PING, SYN, 0, 77))
    assert a.outbox == [packet(PING, ACK, 0, 77)]
    a.outbox.clear()
    a.feed(packet(PING, ACK, 0, 77))
    assert not a.outbox
    b.go_away(PROTOCOL_ERROR)
    pump(a, b)
    assert a.gone_away == PROTOCOL_ERROR
    with pytest.raises(YamuxError):
        a.open()


@pytest.mark.parametrize(
    "data",
    [
        packet(PING, SYN, 0, 1, version=1),
        packet(GO_AWAY + 1, 0, 0, 0),
        packet(WINDOW_UPDATE, SYN, 2, 0),
        packet(WINDOW_UPDATE, SYN, 1, 0) * 2,
        packet(WINDOW_UPDATE, SYN, 5, 0) + packet(WINDOW_UPDATE, SYN, 3, 0),
        packet(WINDOW_UPDATE, SYN, 1, 0) + packet(DATA, 0, 1, WINDOW + 1),
        packet(WINDOW_UPDATE, SYN | FIN, 1, 0) + packet(DATA, 0, 1, 1),
        packet(WINDOW_UPDATE, SYN, 1, 0) + packet(WINDOW_UPDATE, 0, 1, 2**32 - 1),
        packet(DATA, 0, 99, WINDOW + 1),
    ],
)
def test_a_broken_protocol_is_an_error(data: bytes) -> None:
    with pytest.raises(YamuxError):
        Yamux(initiator=False, max_inbound=4).feed(data)


def test_data_for_a_stream_that_is_gone_is_skipped() -> None:
    a, b = pair()
    b.feed(packet(DATA, 0, 41, 5) + b"stray" + packet(PING, SYN, 0, 3))
    assert b.outbox == [packet(PING, ACK, 0, 3)]
    b.outbox.clear()
    a.feed(packet(WINDOW_UPDATE, RST, 41, 0) + packet(WINDOW_UPDATE, 0, 41, 100))
    assert not a.outbox


def test_data_may_come_with_syn_and_fin() -> None:
    mux = Yamux(initiator=False, max_inbound=4)
    mux.feed(packet(DATA, SYN | FIN, 1, 5) + b"hello")
    (stream,) = mux.accepted
    assert bytes(mux.take(stream)) == b"hello"
    assert stream.remote_finished


@given(st.binary(max_size=400), st.integers(1, 20))
def test_noise_is_refused_or_ignored_but_never_kept(data: bytes, cut: int) -> None:
    mux = Yamux(initiator=False, max_inbound=4)
    try:
        for at in range(0, len(data), cut):
            mux.feed(data[at : at + cut])
    except YamuxError:
        pass
    assert mux.inbound <= 4
    assert sum(len(stream.buffer) for stream in mux.streams.values()) <= len(data)


@given(st.integers(0, 2**32), st.integers(1, 2000))
def test_any_conversation_arrives_whole_however_it_is_cut(seed: int, most: int) -> None:
    """Two muxers exchange random data on random streams over a pipe that cuts at random."""
    rng = random.Random(seed)
    a, b = pair()
    wire = {a: bytearray(), b: bytearray()}
    other = {a: b, b: a}
    sent: dict[tuple[Yamux, int], bytearray] = {}
    got: dict[tuple[Yamux, int], bytearray] = {}
    streams: dict[Yamux, list[YamuxStream]] = {a: [], b: []}
    for _ in range(200):
        mux = rng.choice((a, b))
        step = rng.random()
        if step < 0.1 and len(streams[mux]) < 4:
            streams[mux].append(mux.open())
        elif step < 0.5 and streams[mux]:
            stream = rng.choice(streams[mux])
            if not stream.finished and not stream.reset:
                size = min(rng.randrange(1, 30_000), stream.window, MAX_PAYLOAD)
                if size:
                    data = rng.randbytes(size)
                    sent.setdefault((mux, stream.id), bytearray()).extend(data)
                    send(mux, stream, data)
        elif step < 0.55 and streams[mux]:
            mux.finish(rng.choice(streams[mux]))
        elif step < 0.7 and streams[mux]:
            stream = rng.choice(streams[mux])
            got.setdefault((mux, stream.id), bytearray()).extend(mux.take(stream))
        wire[mux] += b"".join(mux.outbox)
        mux.outbox.clear()
        size = rng.randrange(0, most * 20)
        other[mux].feed(bytes(wire[mux][:size]))
        del wire[mux][:size]
        streams[other[mux]] += other[mux].accepted
        other[mux].accepted.clear()
    while wire[a] or wire[b] or a.outbox or b.outbox:
        for mux in (a, b):
            wire[mux] += b"".join(mux.outbox)
            mux.outbox.clear()
            other[mux].feed(bytes(wire[mux]))
            wire[mux].clear()
            streams[other[mux]] += other[mux].accepted
            other[mux].accepted.clear()
    for mux in (a, b):
        for stream in streams[mux]:
            got.setdefault((mux, stream.id), bytearray()).extend(mux.take(stream))
    for (mux, stream_id), data in sent.items():
        assert got.get((other[mux], stream_id), bytearray()) == data
