"""What decides about KV blocks: messages and their bounds, rights, targets, marks, asks, trust."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError, Refused
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank, SessionId, Slice
from pyagent_node.consensus.state import State
from pyagent_node.inference.kv.port import SettledBlock
from pyagent_node.node import kv_messages
from pyagent_node.node.kv_book import BlockBook
from pyagent_node.node.kv_messages import (
    MAX_BLOCK_BYTES,
    REPLIES,
    REQUESTS,
    SEAL_BYTES,
    Fetch,
    Have,
    Piece,
    Put,
    Report,
    SessionHolders,
    check_request,
    frames_of,
    seal,
    split,
    unseal,
)
from pyagent_node.node.kv_plan import FIRST_SHUN, SHORT_SHUN, Trust, leading, share_out
from pyagent_node.node.kv_rights import (
    check_reader,
    check_writer,
    computed,
    likely_sources,
    targets,
)
from pyagent_node.node.kv_rights import (
    given as given_layers,
)
from pyagent_node.node.kv_server import ByteBudget
from pyagent_node.sharding.kv_keys import BlockKey

MODEL = Digest("ab" * 32)
A, B, C, D = (PeerId(name) for name in "ABCD")
LINKS = tuple(bytes([i]) * 32 for i in range(200))
KEY = BlockKey(MODEL, 3, LINKS[1], "f16-00000000")


# ---- messages ------------------------------------------------------------------------------------


def test_a_sealed_block_is_bound_to_its_key():
    sealed = seal(KEY, b"payload")
    assert unseal(KEY, sealed) == b"payload"
    for other in (
        BlockKey(MODEL, 4, LINKS[1], KEY.codec),
        BlockKey(Digest("cd" * 32), 3, LINKS[1], KEY.codec),
        BlockKey(MODEL, 3, LINKS[2], KEY.codec),
        BlockKey(MODEL, 3, LINKS[1], "f16-00000001"),
    ):
        with pytest.raises(CorruptData) as caught:
            unseal(other, sealed)
        assert caught.value.code == "bad_kv_block"


@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_changed_or_cut_block_is_refused(payload: bytes, data: st.DataObject):
    sealed = bytearray(seal(KEY, payload))
    at = data.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises(CorruptData):
        unseal(KEY, bytes(sealed[:at]))
    sealed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptData):
        unseal(KEY, bytes(sealed))


@given(st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=9)), max_size=12))
def test_frames_hold_every_layer_once_and_respect_the_limit(blocks: list[bytes | None]):
    found: dict[int, bytes] = {}
    for first, run in frames_of(5, blocks, limit=16):
        assert sum(map(len, run)) <= 16 or len(run) == 1
        for layer, block in enumerate(run, first):
            assert layer not in found
            found[layer] = block
    assert found == {5 + i: b for i, b in enumerate(blocks) if b is not None}


def put(**changes: object) -> Put:
    fields: dict[str, object] = {
        "model": MODEL,
        "codec": "f16-00000000",
        "chain": LINKS[1],
        "parent": LINKS[0],
        "index": 1,
        "first_layer": 0,
        "sizes": (20, 30),
        "seconds": 0.5,
    }
    return Put(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "tail"),
    [
        (Have(MODEL, "c", (), 0, 1), 0),
        (Have(MODEL, "c", LINKS[:1] * 1025, 0, 1), 0),
        (Have(MODEL, "c", (b"short",), 0, 1), 0),
        (Have(MODEL, "c", LINKS[:1], 2, 2), 0),
        (Have(MODEL, "c", LINKS[:1], -1, 2), 0),
        (Have(MODEL, "c", LINKS[:1], 0, 2000), 0),
        (Fetch(MODEL, "c" * 65, LINKS[:1], 0, 1), 0),
        (Fetch(MODEL, "c", LINKS[:1], 0, 1), 1),
        (put(), 49),
        (put(sizes=()), 0),
        (put(sizes=(SEAL_BYTES,)), SEAL_BYTES),
        (put(sizes=(-1, 51)), 50),
        (put(sizes=(MAX_BLOCK_BYTES + 1,)), MAX_BLOCK_BYTES + 1),
        (put(seconds=float("nan")), 50),
        (put(seconds=-1.0), 50),
        (put(seconds=float("inf")), 50),
        (put(index=0), 50),
        (put(index=1 << 20), 50),
        (put(parent=b""), 50),
        (put(chain=b""), 50),
        (put(first_layer=1 << 30), 50),
        (Report((SessionHolders(SessionId("0" * 32), MODEL, 0, 1, ((A, -1),)),)), 0),
        (Report((SessionHolders(SessionId("0" * 32), MODEL, 0, 1, ((A, 1),) * 17),)), 0),
        (Report((SessionHolders(SessionId("0" * 32), MODEL, 1, 1, ((A, 1),)),)), 0),
    ],
)
def test_requests_out_of_bounds_are_refused_by_name(request_, tail: int):
    with pytest.raises(InvalidRequest) as caught:
        check_request(request_, tail)
    assert caught.value.code == "bad_kv_request"


def test_the_largest_requests_fit_into_a_header():
    chain = LINKS[:1] * kv_messages.MAX_CHAIN
    for request in (Have(MODEL, "c" * 64, chain, 0, 80, 9), Fetch(MODEL, "c" * 64, chain, 0, 80)):
        check_request(request, 0)
        assert len(REQUESTS.encode(request)) < 40_000
        assert REQUESTS.decode(REQUESTS.encode(request)) == request


def test_pieces_that_lie_about_their_sizes_are_refused():
    assert split(Piece(0, 0, (17, 18)), bytes(35)) == [bytes(17), bytes(18)]
    for sizes, tail in (((17,), 18), ((), 0), ((-1, 19), 18), ((16,), 16)):
        with pytest.raises(CorruptData) as caught:
            split(Piece(0, 0, sizes), bytes(tail))
        assert caught.value.code == "bad_kv_piece"


@given(st.binary(max_size=80))
def test_garbage_is_no_message(data: bytes):
    for codec in (REQUESTS, REPLIES):
        with pytest.raises(PyAgentError):
            codec.decode(data)


# ---- who may -------------------------------------------------------------------------------------


def rank(number: int, first: int, last: int, peer: PeerId, *standbys: PeerId) -> Rank:
    return Rank(number, Slice(first, last, last == 30), peer, standbys)


def state(*ranks: Rank, prepared: tuple[Rank, ...] = (), epoch: int = 4, after: int = 4) -> State:
    placement = Placement(MODEL, epoch, ranks, 2048, 8)
    ready = {MODEL: Prepared(MODEL, 9, after, prepared, 2048, 8, A)} if prepared else {}
    return State(placements={MODEL: placement}, prepared=ready)


TWO = (rank(0, 0, 10, A, C), rank(1, 10, 30, B, C, D))


def test_blocks_go_to_standbys_and_to_whoever_will_have_the_layers():
    assert targets(state(*TWO), MODEL, A, range(10)) == {
        C: tuple(range(10)),
        B: tuple(range(10)),
    }, "its standby, and the next rank: both may not die with it"
    assert targets(state(*TWO), MODEL, B, range(10, 30)) == {
        C: tuple(range(10, 30)),
        D: tuple(range(10, 30)),
    }
    coming = (rank(0, 0, 14, A), rank(1, 14, 30, D))
    assert targets(state(*TWO, prepared=coming), MODEL, B, range(10, 30)) == {
        A: tuple(range(10, 14)),
        C: tuple(range(10, 30)),
        D: tuple(range(10, 30)),
    }
    assert targets(state(*TWO, prepared=coming, after=3), MODEL, A, range(10)) == {
        C: tuple(range(10)),
        B: tuple(range(10)),
    }, "what was prepared for another epoch is void"
    assert targets(State(), MODEL, A, range(10)) == {}
    spare = msgspec.structs.replace(rank(0, 0, 10, A), spares=(D,))
    bare = rank(1, 10, 30, B)
    assert targets(state(spare, bare), MODEL, A, range(10)) == {
        D: tuple(range(10)),
        B: tuple(range(10)),
    }
    assert targets(state(spare, bare), MODEL, B, range(10, 30)) == {A: tuple(range(10, 30))}
    check_writer(state(spare, bare), MODEL, B, A, range(10, 30))
    assert targets(state(rank(0, 0, 30, A)), MODEL, A, range(30)) == {}, "there is nobody else"
    assert targets(state(*TWO), MODEL, D, range(10, 30)) == {}, "a standby computes nothing"


def test_only_those_who_were_given_layers_read_them_and_only_ranks_write():
    log = state(*TWO)
    check_reader(log, MODEL, C, range(30))
    check_reader(log, MODEL, D, range(12, 20))
    for peer, layers in ((D, range(9, 20)), (A, range(10, 11)), (PeerId("stranger"), range(1))):
        with pytest.raises(Refused) as caught:
            check_reader(log, MODEL, peer, layers)
        assert caught.value.code == "kv_not_yours"
    check_writer(log, MODEL, B, D, range(10, 30))
    for writer, here, layers, code in (
        (D, C, range(10, 30), "kv_not_yours"),
        (A, C, range(11), "kv_not_yours"),
        (B, A, range(10, 30), "kv_not_wanted"),
    ):
        with pytest.raises(Refused) as caught:
            check_writer(log, MODEL, writer, here, layers)
        assert caught.value.code == code
    with pytest.raises(Refused):
        check_reader(State(), MODEL, A, range(1))
    assert computed(log, MODEL, B) == frozenset(range(10, 30))
    assert given_layers(log, MODEL, C) == frozenset(range(30))
    assert likely_sources(log, MODEL, range(9, 11)) == (A, B, C, D)
    assert likely_sources(log, MODEL, range(12, 13)) == (B, C, D)


# ---- what to send --------------------------------------------------------------------------------


def block(index: int, session: str = "s", layers: range = range(10)) -> SettledBlock:
    return SettledBlock(
        SessionId(session), A, MODEL, 4, index, LINKS[index], layers.start, layers.stop, "cells"
    )


def drain(book: BlockBook, peer: PeerId) -> list[tuple[str, int]]:
    sent = []
    while (job := book.next_for(peer)) is not None:
        sent.append((str(job.part.key.session), job.number))
        book.sent(peer, job)
    return sent


def test_sessions_take_turns_and_gaps_wait():
    book = BlockBook()
    for session in "xy":
        for index in range(3):
            book.settled(block(index, session), "f16")
            if (session, index) != ("x", 1):
                assert book.ready(block(index, session))
    for part in book:
        book.retarget(part, {C: tuple(range(10))})
    assert sorted(drain(book, C)) == [("x", 0), ("y", 0), ("y", 1), ("y", 2)]
    book.ready(block(1, "x"))
    assert drain(book, C) == [("x", 1), ("x", 2)]
    assert [part.leading for part in book] == [3, 3]
    assert [part.holders(A) for part in book] == [{A: 3, C: 3}] * 2


def test_a_late_target_gets_the_older_blocks_and_one_with_other_layers_again():
    book = BlockBook()
    for index in range(3):
        book.settled(block(index), "f16")
        book.ready(block(index))
    [part] = book
    book.retarget(part, {C: (0, 1)})
    assert len(drain(book, C)) == 3
    book.retarget(part, {C: (0, 1), D: (5,)})
    assert drain(book, C) == []
    assert [number for _, number in drain(book, D)] == [0, 1, 2]
    book.retarget(part, {D: (4, 5)})
    assert book.targets() == {D}
    job = book.next_for(D)
    assert job is not None
    book.has(D, job, 2)
    assert [number for _, number in drain(book, D)] == [2]
    book.lost(D)
    assert not part.marks[D].asked
    assert len(drain(book, D)) == 3
    book.ended(SessionId("s"))
    assert len(book) == 0
    assert book.next_for(D) is None


def test_how_far_prepared_ranks_are_behind():
    book = BlockBook()
    for session in "xy":
        for index in (0, 1, 3):
            book.settled(block(index, session), "f16")
            book.ready(block(index, session))
    for part in book:
        book.retarget(part, {C: (0, 1), D: ()})
    assert book.behind(MODEL, {C, D}) == 4
    assert book.behind(MODEL, {D}) == 0
    assert book.behind(Digest("0" * 64), {C}) == 0
    drain(book, C)
    assert book.behind(MODEL, {C}) == 0


def test_a_job_that_was_overtaken_changes_nothing():
    book = BlockBook()
    book.settled(block(0), "f16")
    book.ready(block(0))
    [part] = book
    book.retarget(part, {C: (0, 1)})
    job = book.next_for(C)
    assert job is not None
    book.retarget(part, {C: (0, 1, 2)})
    book.sent(C, job)
    assert part.marks[C].held == 0
    book.retarget(part, {})
    book.sent(C, job)
    book.has(C, job, 1)
    assert part.marks == {}


def test_blocks_out_of_order_or_of_another_chain_are_not_followed():
    book = BlockBook()
    book.settled(block(1), "f16")
    assert len(book) == 0
    assert not book.ready(block(1))
    book.settled(block(0), "f16")
    book.settled(block(2), "f16")
    assert not book.ready(block(2))
    assert not book.ready(msgspec.structs.replace(block(0), chain=LINKS[7]))
    [part] = book
    assert part.chain == [LINKS[0]]


# ---- whom to ask ---------------------------------------------------------------------------------


@given(
    st.integers(0, 6),
    st.integers(1, 12),
    st.dictionaries(
        st.sampled_from([A, B, C]), st.dictionaries(st.integers(0, 17), st.integers(0, 8))
    ),
    st.dictionaries(st.integers(0, 17), st.integers(0, 8)),
    st.dictionaries(st.sampled_from([A, B, C]), st.floats(0, 1e9)),
)
def test_asks_bring_exactly_what_is_missing(first, width, remote, local, speeds):
    layers = range(first, first + width)
    count = leading(layers, [local, *remote.values()])
    asks = share_out(layers, local, remote, count, speeds)
    brought: dict[int, int] = {}
    for ask in asks:
        for layer in range(ask.first_layer, ask.last_layer):
            assert layer not in brought, "nothing is asked for twice"
            assert ask.start == min(local.get(layer, 0), count)
            assert remote[ask.peer][layer] >= ask.stop == count
            brought[layer] = ask.stop
    for layer in layers:
        assert max(local.get(layer, 0), brought.get(layer, 0)) >= count
    for layer in brought:
        assert local.get(layer, 0) < count


def test_layers_are_divided_by_speed():
    remote = {A: dict.fromkeys(range(12), 5), B: dict.fromkeys(range(12), 5)}
    asks = share_out(range(12), {}, remote, 5, {A: 2e6, B: 1e6})
    assert [(a.peer, a.first_layer, a.last_layer) for a in asks] == [(A, 0, 8), (B, 8, 12)]
    asks = share_out(range(12), {}, remote, 5, {A: 2e6, B: 1e5})
    assert [(a.peer, a.first_layer, a.last_layer) for a in asks] == [(A, 0, 12)]


def test_liars_are_not_asked_longer_each_time_and_the_slow_shortly():
    trust = Trust()
    assert trust.good(A, 0.0)
    trust.failed(A, 0.0)
    assert not trust.good(A, SHORT_SHUN - 1)
    assert trust.good(A, SHORT_SHUN)
    trust.lied(B, 0.0)
    assert not trust.good(B, FIRST_SHUN - 1)
    trust.lied(B, 100.0)
    assert not trust.good(B, 100 + 2 * FIRST_SHUN - 1)
    assert trust.distrusted(101.0) == 1
    for _ in range(100):
        trust.lied(B, 200.0)
    assert trust.good(B, 200.0 + 3600.0)
    for number in range(3000):
        trust.lied(PeerId(str(number)), 0.0)
    assert trust.distrusted(0.0) <= 1024


def test_a_budget_may_be_overdrawn_once():
    budget = ByteBudget(100, 10, 0.0)
    assert budget.take(150, 0.0)
    assert not budget.take(1, 1.0)
    assert budget.take(1, 5.0)
    assert budget.full(100.0)
    assert [budget.reserve(200, 100.0) for _ in range(3)] == [0.0, 10.0, 30.0]
