"""``/pyagent/kv/1`` over a simulated mesh: who is served, what is refused, what a liar can do."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.state import State
from pyagent_node.node import kv_server
from pyagent_node.node.kv_messages import (
    PROTOCOL,
    REPLIES,
    Advert,
    Done,
    Fetch,
    Had,
    Have,
    Piece,
    Put,
    Report,
    SessionHolders,
    seal,
)
from pyagent_node.node.kv_stream import REPORT_STEP
from pyagent_node.sharding.kv_keys import BlockKey

from .kv_kit import CODEC, LINKS, MODEL, A, B, C, D, nodes, placed, rank, settled

TWO = (rank(0, 0, 10, A, C), rank(1, 10, 30, B, C))


def put(number: int, layers: range, tail: bytes, sizes: tuple[int, ...], epoch: int = 4) -> Put:
    parent = LINKS[number - 1] if number else b""
    return Put(MODEL, CODEC, LINKS[number], parent, number, layers.start, sizes, 0.1, epoch)


def block(number: int, layers: range, size: int = 100) -> tuple[Put, bytes]:
    sealed = [seal(BlockKey(MODEL, layer, LINKS[number], CODEC), bytes(size)) for layer in layers]
    return put(number, layers, b"", tuple(map(len, sealed))), b"".join(sealed)


async def test_what_is_held_is_told_and_given(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        a.blocks.fill(range(10), 3)
        del a.blocks[BlockKey(MODEL, 4, LINKS[1], CODEC)]
        have = Have(MODEL, CODEC, LINKS[:5], 2, 6)
        assert await c.client.have(A, have) == (3, 3, 1, 3)
        got: dict[tuple[int, int], bytes] = {}
        fetch = Fetch(MODEL, CODEC, LINKS[:5], 2, 6)
        await c.client.fetch(A, fetch, lambda i, layer, data: got.update({(i, layer): data}))
        assert set(got) == {(i, n) for i in range(3) for n in range(2, 6)} - {(1, 4)}
        for (number, layer), data in got.items():
            assert data == a.blocks[BlockKey(MODEL, layer, LINKS[number], CODEC)]
        assert a.server.bytes_sent == sum(map(len, got.values())) == c.client.bytes_received


async def test_members_without_the_layers_are_refused_and_counted(autojump_clock):
    async with nodes(placed(*TWO), A, D) as (_, _, [a, d]):
        a.blocks.fill(range(10), 3)
        a_put, tail = block(0, range(10))
        for ask in (
            d.client.have(A, Have(MODEL, CODEC, LINKS[:2], 0, 10)),
            d.client.fetch(A, Fetch(MODEL, CODEC, LINKS[:2], 0, 10), lambda *_: None),
            d.client.tell(A, a_put, tail),
        ):
            with pytest.raises(Refused) as caught:
                await ask
            assert caught.value.code == "kv_not_yours"
        assert a.server.refused == {"kv_not_yours": 3}
        assert a.server.bytes_sent == 0


async def test_a_rank_sends_only_its_layers_and_only_to_who_was_given_them(autojump_clock):
    async with nodes(placed(*TWO), A, C, D) as (_, _, [a, c, _d]):
        mine, tail = block(0, range(10))
        assert await a.client.tell(C, mine, tail) == len(tail)
        assert len(c.blocks) == 10
        with pytest.raises(Refused) as caught:
            await a.client.tell(D, mine, tail)
        assert caught.value.code == "kv_not_wanted"
        other, tail = block(0, range(10, 11))
        with pytest.raises(Refused) as caught:
            await a.client.tell(C, other, tail)
        assert caught.value.code == "kv_not_yours"
        assert c.server.refused == {"kv_not_yours": 1}


async def test_wrong_blocks_are_not_kept(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        good, tail = block(0, range(10))
        changed = bytearray(tail)
        changed[300] ^= 1
        mislabelled, _ = block(1, range(10))
        for message, data, error in (
            (good, bytes(changed), CorruptData),
            (good, tail[:-1], InvalidRequest),
            (mislabelled, tail, CorruptData),
        ):
            with pytest.raises(error):
                await a.client.tell(C, message, data)
        assert not c.blocks
        assert c.server.refused == {"bad_kv_block": 2, "bad_kv_request": 1}


async def test_what_a_peer_sends_has_a_budget(autojump_clock, monkeypatch):
    monkeypatch.setattr(kv_server, "PUT_BURST", 2000)
    monkeypatch.setattr(kv_server, "PUT_RATE", 100)
    async with nodes(placed(*TWO), A, B, C) as (_, _, [a, b, _c]):
        for number in range(2):
            await a.client.tell(C, *block(number, range(10)))
        with pytest.raises(LimitExceeded) as caught:
            await a.client.tell(C, *block(2, range(10)))
        assert caught.value.code == "kv_budget"
        await b.client.tell(C, *block(0, range(10, 20))), "another peer has its own"
        await trio.sleep(30)
        await a.client.tell(C, *block(2, range(10)))


async def test_streams_of_a_peer_are_counted(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        streams = [await c.mesh.open(A, PROTOCOL) for _ in range(kv_server.STREAMS_PER_PEER + 1)]
        await trio.sleep(1)
        with pytest.raises(PyAgentError) as caught:
            await c.client.have(A, Have(MODEL, CODEC, LINKS[:1], 0, 1))
        assert caught.value.code in ("too_many_streams", "stream_closed")
        assert a.server.refused["too_many_streams"] >= 1
        for stream in streams:
            await stream.aclose()
        await trio.sleep(1)
        assert await c.client.have(A, Have(MODEL, CODEC, LINKS[:1], 0, 1)) == (0,)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(b"garbage"),
        Frame(b""),
        Frame(b"\x81\xa4type\xa6strange"),
        Frame(REPLIES.encode(Had((1,)))),
        Frame(b"\x82\xa4type\xa4have\xa5model\x01"),
    ],
)
async def test_what_is_no_request_ends_the_stream_by_name(frame, autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        stream = await c.mesh.open(A, PROTOCOL)
        await stream.send(frame)
        with suppress(Unavailable):  # the answer may be lost with the stream
            while (answer := await stream.receive()) is not None:
                assert b"failed" in answer.header
        assert a.mesh.metrics.handler_errors == 1
        assert await c.client.have(A, Have(MODEL, CODEC, LINKS[:1], 0, 1)) == (0,)


async def test_who_is_behind_catches_up_first(autojump_clock):
    after = placed(rank(0, 0, 10, A, D), rank(1, 10, 30, B), epoch=5, index=2)
    async with nodes(placed(*TWO), A, D) as (_, log, [a, d]):
        a.blocks.fill(range(10), 1)
        counts: list[tuple[int, ...]] = []

        async def ask() -> None:
            counts.append(await d.client.have(A, Have(MODEL, CODEC, LINKS[:1], 0, 10, epoch=5)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.5)
            assert not counts
            log.become(after)
        assert counts == [(1,) * 10]
        with pytest.raises(Refused):  # waited for in vain
            await d.client.have(A, Have(MODEL, CODEC, LINKS[:1], 0, 11, epoch=9))


async def lying(stream, answers) -> None:
    while await stream.receive() is not None:
        for reply, tail in answers:
            await stream.send(Frame(REPLIES.encode(reply), tail))


@pytest.mark.parametrize(
    "answers",
    [
        [(Piece(7, 0, (20,)), bytes(20))],
        [(Piece(-1, 0, (20,)), bytes(20))],
        [(Piece(0, 9, (20, 20)), bytes(40))],
        [(Piece(0, 0, (20,)), bytes(21))],
        [(Piece(0, 0, ()), b"")],
        [(Piece(0, 0, (20,)), bytes(20))] * 2,
        [(Had((1,)), b"")],
        [(Done(), b"")] * 2,
    ],
)
async def test_what_was_not_asked_for_is_refused(answers, autojump_clock):
    async with nodes(State(), C) as (network, _, [c]):
        liar = network.node(D)
        liar.handle(PROTOCOL, lambda stream: lying(stream, answers))
        await network.connect_all()
        got: list[object] = []
        fetch = Fetch(MODEL, CODEC, LINKS[:2], 0, 10)
        if isinstance(answers[0][0], Done):
            await c.client.fetch(D, fetch, lambda *each: got.append(each))
            with pytest.raises(CorruptData):
                await c.client.have(D, Have(MODEL, CODEC, LINKS[:2], 0, 10))
            return
        with pytest.raises(CorruptData) as caught:
            await c.client.fetch(D, fetch, lambda *each: got.append(each))
        assert caught.value.code in ("unexpected_reply", "bad_kv_piece")
        assert len(got) <= 1


async def test_a_peer_that_says_nothing_is_not_waited_for_long(autojump_clock):
    async with nodes(State(), C) as (network, _, [c]):
        mute = network.node(D)

        async def say_nothing(_stream: object) -> None:
            await trio.sleep_forever()

        mute.handle(PROTOCOL, say_nothing)
        await network.connect_all()
        start = trio.current_time()
        with pytest.raises(Unavailable) as caught:
            await c.client.have(D, Have(MODEL, CODEC, LINKS[:2], 0, 10))
        assert caught.value.code == "peer_slow"
        assert trio.current_time() - start < 30
        with pytest.raises(Unavailable):
            await c.client.have(B, Have(MODEL, CODEC, LINKS[:2], 0, 10))


async def test_adverts_and_reports_are_handed_on(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        await c.client.tell(A, Advert(), b"summary")
        report = Report((SessionHolders(SessionId("5" * 32), MODEL, 0, 10, ((C, 3),)),))
        await c.client.tell(A, report)
        assert a.adverts == [(C, b"summary")]
        assert a.reports == [(C, report)]


# ---- the checkpoint stream -----------------------------------------------------------------------


def make(node, count: int, start: int = 0, layers: range = range(10)) -> None:
    for number in range(start, start + count):
        node.stream.settled(settled(number, layers=layers), CODEC)
        node.stream.ready(settled(number, layers=layers), 0.1)


async def test_blocks_of_a_running_session_get_to_the_standby_and_the_next_rank(autojump_clock):
    async with nodes(placed(*TWO), A, B, C) as (_, _, [a, b, c]):
        a.blocks.fill(range(10), 5)
        make(a, 3)
        await trio.sleep(2)
        assert c.blocks == {k: v for k, v in a.blocks.items() if k.chain in LINKS[:3]}
        assert b.blocks == c.blocks
        assert a.stream.blocks_sent == 6
        make(a, 2, start=3)
        await trio.sleep(2)
        assert len(c.blocks) == 50
        assert a.reports[-1][1].sessions[0].holders in (
            ((A, 3), (B, 3), (C, 3)),
            ((A, 5), (B, 5), (C, 5)),
        )
        a.stream.ended(SessionId("5" * 32))
        assert len(a.stream.book) == 0


async def test_what_a_target_has_is_not_sent_again(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (network, _, [a, c]):
        a.blocks.fill(range(10), 6)
        c.blocks.fill(range(10), 4)
        make(a, 6)
        await trio.sleep(2)
        assert len(c.blocks) == 60
        assert a.stream.blocks_sent == 2
        network.cut(A, C)
        await trio.sleep(1)
        c.blocks.pop(BlockKey(MODEL, 3, LINKS[5], CODEC))
        network.heal(A, C)
        await trio.sleep(5)
        assert len(c.blocks) == 60
        assert a.stream.blocks_sent == 3


async def test_a_prompt_that_comes_again_is_not_sent_again(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        a.blocks.fill(range(10), 5)
        for session in ("5" * 32, "6" * 32):
            for number in range(5):
                block = settled(number, session)
                a.stream.settled(block, CODEC)
                a.stream.ready(block, 0.1)
                await trio.sleep(0.2)
        await trio.sleep(2)
        assert len(c.blocks) == 50
        assert a.stream.blocks_sent == 5
        assert [part.marks[C].held for part in a.stream.book] == [5, 5]


async def test_older_blocks_follow_to_a_prepared_node(autojump_clock):
    async with nodes(placed(*TWO), A, C, D) as (_, log, [a, _c, d]):
        a.blocks.fill(range(10), 4)
        make(a, 4)
        await trio.sleep(2)
        assert not d.blocks
        coming = (rank(0, 0, 6, A), rank(1, 6, 30, D))
        log.become(placed(*TWO, prepared=coming, index=2))
        await trio.sleep(2)
        assert {key.layer for key in d.blocks} == {6, 7, 8, 9}
        assert len(d.blocks) == 16
        log.become(placed(*TWO, index=3))
        await trio.sleep(1)
        assert a.stream.book.targets() == {B, C}


async def test_the_stream_keeps_to_its_budget(autojump_clock):
    async with nodes(placed(*TWO), A, C, rate=10_000) as (_, _, [a, _c]):
        a.blocks.fill(range(10), 60, size=1000)
        make(a, 60)
        await trio.sleep(20)
        sent = a.stream.bytes_sent
        assert 150_000 < sent < 230_000
        await trio.sleep(10)
        assert 80_000 < a.stream.bytes_sent - sent < 120_000


async def test_no_budget_no_stream(autojump_clock):
    async with nodes(placed(*TWO), A, C, rate=0) as (_, _, [a, c]):
        a.blocks.fill(range(10), 3)
        make(a, 3)
        await trio.sleep(5)
        assert not c.blocks


async def test_a_target_that_refuses_is_tried_again_later(autojump_clock):
    async with nodes(placed(*TWO), A) as (network, log, [a]):
        from .kv_kit import KvNode, Log

        behind = Log(State())
        c = KvNode(network.node(C), behind)
        await network.connect_all()
        a.blocks.fill(range(10), 3)
        make(a, 3)
        await trio.sleep(10)
        assert not c.blocks
        assert a.stream.failed["kv_not_yours"] >= 2
        behind.become(log.state)
        await trio.sleep(40)
        assert len(c.blocks) == 30


async def test_what_the_store_has_let_go_of_is_not_sent(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, c]):
        a.blocks.fill(range(10), 2)
        make(a, 4)
        await trio.sleep(5)
        assert len(c.blocks) == 20
        [part] = a.stream.book
        assert part.marks[C].held == 2
        a.blocks.fill(range(10), 4)
        a.stream.ready(settled(2), 0.1)
        await trio.sleep(5)
        assert len(c.blocks) == 40


async def test_heads_are_told_seldom(autojump_clock):
    async with nodes(placed(*TWO), A, C) as (_, _, [a, _c]):
        a.blocks.fill(range(10), 60)
        for number in range(60):
            make(a, 1, start=number)
            await trio.sleep(0.5)
        await trio.sleep(2)
        assert 60 / REPORT_STEP <= len(a.reports) <= 60 / REPORT_STEP + 5
