"""Journals as bytes: chains, signatures, the book of copies, the choice of holders."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import Conflict, CorruptData, LimitExceeded, NotFound
from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.consensus.port import MemberRecord
from pyagent_node.consensus.state import State
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.identity import NodeKey, verify
from pyagent_node.node.journal_book import BookLimits, JournalBook, Writer
from pyagent_node.node.journal_choice import choose_holders, usable_peers
from pyagent_node.node.journal_messages import (
    MAX_TOKEN_BYTES,
    Append,
    Begin,
    encode_header,
    encode_token,
    pack,
    public_id,
    read_copy,
    unpack,
)
from pyagent_node.node.journal_session import HeadedSession

KEY = NodeKey(bytes(31) + b"\1")
OTHER = NodeKey(bytes(31) + b"\2")
HEAD = KEY.peer_id


def journal(number: int = 1, n: int = 0) -> SessionJournal:
    return SessionJournal(
        session=SessionId(f"{number:032x}"),
        model=Digest("ab" * 32),
        sampling=SamplingParams(seed=5, logit_bias={3: 1.0, 1: 2.0}),
        stop=("x",),
        budget=100,
        ignore_eos=False,
        prompt=(1, 2, 3),
        created=17.5,
        label="shown like this",
        tokens=tuple(Sampled(i, -1.0, ((i, -1.0),)) for i in range(n)),
    )


def headed(number: int = 1, n: int = 0, claim: int = 1) -> HeadedSession:
    return HeadedSession(journal(number, n), HEAD, claim, KEY.sign)


def read(session: HeadedSession, tail: bytes | None = None, **changes: object) -> SessionJournal:
    copy, whole = session.export()
    copy = msgspec.structs.replace(copy, **changes)
    return read_copy(
        session.session, copy, whole if tail is None else tail, frozenset({HEAD}), verify
    )


def test_a_journal_survives_its_copy():
    session = headed(n=3)
    session.append(3, [Sampled(9), Sampled(8)])
    want = msgspec.structs.replace(
        journal(n=3), tokens=(*journal(n=3).tokens, Sampled(9), Sampled(8))
    )
    assert read(session) == want


def test_tokens_told_twice_count_once():
    session = headed(n=3)
    session.append(1, journal(n=5).tokens[1:])
    session.append(5, [])
    assert read(session) == journal(n=5)


def test_the_log_does_not_learn_the_session():
    assert public_id(SessionId("0" * 32)) != "0" * 32
    assert len(public_id(SessionId("0" * 32))) == 32


@given(st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject):
    session = headed(n=4)
    copy, tail = session.export()
    at = data.draw(st.integers(0, len(tail) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    changed = tail[:at] + bytes([tail[at] ^ bit]) + tail[at + 1 :]
    with pytest.raises(CorruptData):
        read_copy(session.session, copy, changed, frozenset({HEAD}), verify)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(tail: bytes):
    with pytest.raises(CorruptData):
        read(headed(n=1), tail)


def test_copies_of_others_are_refused():
    session = headed(n=2)
    with pytest.raises(CorruptData):
        read(session, signer=OTHER.peer_id)
    with pytest.raises(CorruptData):
        read(session, signer=PeerId("nobody"))
    with pytest.raises(CorruptData):
        read(session, claim=2)
    with pytest.raises(CorruptData):
        read(session, claim=-1)
    copy, tail = headed(number=2, n=2).export()
    with pytest.raises(CorruptData):
        read_copy(session.session, copy, tail, frozenset({HEAD}), verify)
    with pytest.raises(CorruptData):
        read(session, tail=pack(unpack(session.export()[1])[:-1]))


# ---- the book ---------------------------------------------------------------------------------


def begin(
    book: JournalBook, writer: Writer, number: int = 1, n: int = 0, claim: int = 1, now: float = 0.0
) -> SessionId:
    session = headed(number, n, claim)
    message = Begin(session.public, claim, session.signature())
    book.begin(writer, message, list(session.pieces), now)
    return session.public


def test_a_copy_grows_in_order_only():
    book, writer = JournalBook(), Writer(HEAD)
    public = begin(book, writer, n=2)
    token = encode_token(Sampled(1))
    assert book.append(writer, Append(public, 2, b"s"), [token]).tokens == 3
    for start in (2, 4, -1, 10**9):
        with pytest.raises(NotFound):
            book.append(writer, Append(public, start, b"s"), [token])
    with pytest.raises(NotFound):
        book.append(Writer(HEAD), Append(public, 3, b"s"), [token])
    with pytest.raises(CorruptData):
        book.append(writer, Append(public, 3, b"s"), [b""])
    with pytest.raises(CorruptData):
        book.append(writer, Append(public, 3, b"s"), [b"x" * (MAX_TOKEN_BYTES + 1)])
    copy = book.get(public, 0.0)
    assert copy is not None
    assert copy.tokens == 3


def test_a_later_head_replaces_an_earlier_one_not_the_reverse():
    book, first, second = JournalBook(), Writer(HEAD), Writer(OTHER.peer_id)
    public = begin(book, first, n=2)
    with pytest.raises(Conflict):
        begin(book, second, n=2)
    begin(book, second, n=1, claim=2)
    with pytest.raises(Conflict):
        begin(book, first, n=9)
    book.end(first, public)
    assert len(book) == 1
    book.end(second, public)
    assert len(book) == book.size == 0


def test_copies_expire_after_their_stream_is_gone():
    book, writer, again = JournalBook(), Writer(HEAD), Writer(HEAD)
    public = begin(book, writer)
    assert book.get(public, 1e9) is not None
    begin(book, again)
    book.leave(writer, at=10.0)
    assert book.get(public, 1e9) is not None, "another stream of the head writes it now"
    book.leave(again, at=10.0)
    assert book.get(public, 9.0) is not None
    assert book.get(public, 10.0) is None
    book.expire(10.0)
    assert len(book) == book.size == 0


@pytest.mark.parametrize(
    "limits",
    [
        BookLimits(sessions=3),
        BookLimits(sessions_per_head=3),
        BookLimits(bytes=1000),
        BookLimits(bytes_per_head=1000),
        BookLimits(bytes_per_session=400),
    ],
)
def test_the_book_is_bounded(limits: BookLimits):
    book, writer = JournalBook(limits), Writer(HEAD)
    public = begin(book, writer)

    def fill() -> None:
        for number in range(2, 9):
            begin(book, writer, number)
            copy = book.get(public, 0.0)
            assert copy is not None
            book.append(writer, Append(public, copy.tokens, b""), [encode_token(Sampled(1))])

    with pytest.raises(LimitExceeded) as caught:
        fill()
    assert caught.value.code == "journals_full"
    assert 1 <= len(book) <= 4
    begin(book, writer)  # in place of the one that is there
    for number in range(1, 9):
        book.drop(headed(number).public)
    assert len(book) == book.size == 0


def test_expired_copies_make_room():
    book, writer = JournalBook(BookLimits(sessions=1)), Writer(HEAD)
    begin(book, writer, 1)
    book.leave(writer, at=5.0)
    with pytest.raises(LimitExceeded):
        begin(book, Writer(HEAD), 2, now=4.0)
    begin(book, Writer(HEAD), 2, now=5.0)


def test_what_is_no_journal_is_not_kept():
    book, writer = JournalBook(), Writer(HEAD)
    header = encode_header(journal())
    for pieces in ([], [b""], [b"\xc1"], [header[:-1]], [encode_header(journal(2))]):
        with pytest.raises(CorruptData):
            book.begin(writer, Begin(public_id(journal().session), 1, b""), list(pieces), 0.0)
    assert len(book) == 0


# ---- who holds what ------------------------------------------------------------------------------


def peer(name: str, rtt: float | None = 5.0, role: str = "voter") -> PeerInfo:
    return PeerInfo(PeerId(name), name, role, (), rtt, True)


def choose(peers: list[PeerInfo], copies: int = 2, **given: object) -> tuple[PeerId, ...]:
    wanted = {"current": (), "shunned": (), **given}
    return choose_holders(SessionId("s"), copies, peers, **wanted)


def test_near_peers_hold_and_those_who_do_go_on():
    peers = [peer("far", 200.0), peer("near", 4.0), peer("asks", 1.0, "client"), peer("new", None)]
    assert choose(peers) == ("near", "new")
    assert choose(peers, current=("far",)) == ("far", "near")
    assert choose(peers, shunned=("near",)) == ("new", "far")
    assert choose(peers, copies=0) == ()
    assert set(choose(peers, copies=9)) == {"far", "near", "asks", "new"}
    assert choose([]) == ()


def test_sessions_spread_over_equally_near_peers():
    peers = [peer(f"p{i}", 4.0 + i / 100) for i in range(6)]
    chosen = {
        choose_holders(SessionId(str(i)), 1, peers, current=(), shunned=()) for i in range(60)
    }
    assert len(chosen) == 6


def test_who_leaves_or_is_out_holds_nothing():
    def member(name: str, **changes: object) -> MemberRecord:
        record = MemberRecord(PeerId(name), name, "voter", b"c")
        return msgspec.structs.replace(record, **changes)

    members = [
        member("good"),
        member("drains", draining=True),
        member("revoked", revoked="stolen"),
        member("gone", removed_at=5),
    ]
    state = State(members={m.peer_id: m for m in members})
    peers = [peer(name) for name in ("good", "drains", "revoked", "gone", "stranger")]
    assert [p.peer_id for p in usable_peers(peers, state)] == ["good", "stranger"]


def test_a_session_is_over_when_nobody_needs_it():
    session = headed()
    assert not session.over
    session.retained = True
    session.outcome = "finished"
    assert not session.over
    session.retained = False
    assert session.over
    session = headed()
    session.retained = True
    session.outcome = "left"
    assert session.over
    assert math.isfinite(session.size)
