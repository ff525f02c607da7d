"""Whom to dial and when, as a pure function of what happened."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh.book import (
    MAX_ADDRESSES,
    MAX_ENTRIES,
    MAX_FAILURES,
    POLITE_SECONDS,
    Book,
    Source,
)

ME = PeerId("M")
SMALLER, LARGER = PeerId("A"), PeerId("Z")
HERE = ["/ip4/10.0.0.1/tcp/1"]


@pytest.fixture
def book() -> Book:
    return Book(ME, random.Random(1), first=0.5, most=60.0)


def test_configured_peers_are_due_at_once_and_for_ever(book: Book) -> None:
    assert book.next_at() == math.inf
    assert book.learn(LARGER, HERE, Source.CONFIGURED, 10.0)
    assert book.due(10.0) == [LARGER]
    now = 10.0
    for _ in range(5 * MAX_FAILURES):
        book.failed(LARGER, now)
        assert book.due(now) == []
        now = book.next_at()
        assert book.due(now) == [LARGER]


def test_waits_double_within_their_jitter_and_their_bound(book: Book) -> None:
    book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)
    for failures in range(1, 20):
        book.failed(LARGER, 0.0)
        expected = min(60.0, 0.5 * 2**failures)
        assert 0.5 * expected <= book.next_at() <= 1.5 * expected


def test_a_refusal_is_asked_again_rarely(book: Book) -> None:
    book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)
    book.failed(LARGER, 0.0, refused=True)
    assert book.next_at() >= 30.0


def test_the_smaller_of_two_strangers_dials_first(book: Book) -> None:
    book.learn(LARGER, HERE, Source.HEARD, 0.0)
    assert book.next_at() <= 0.5
    book.connected(LARGER)
    book.learn(SMALLER, HERE, Source.HEARD, 0.0)
    assert POLITE_SECONDS <= book.next_at() <= POLITE_SECONDS + 0.5


def test_peers_we_only_heard_of_are_forgotten_in_time(book: Book) -> None:
    book.learn(LARGER, HERE, Source.HEARD, 0.0)
    for _ in range(MAX_FAILURES):
        book.failed(LARGER, 0.0)
    assert book.addresses(LARGER) == []
    assert book.next_at() == math.inf


def test_connected_peers_are_left_alone_until_they_are_lost(book: Book) -> None:
    book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)
    book.connected(LARGER)
    assert book.due(1e9) == []
    assert book.next_at() == math.inf
    book.lost(LARGER, 100.0)
    assert 100.25 <= book.next_at() <= 100.75


def test_the_address_that_worked_comes_first_and_new_ones_before_old(book: Book) -> None:
    book.learn(LARGER, ["/a", "/b", "/c"], Source.CONFIGURED, 0.0)
    book.connected(LARGER, "/c")
    assert book.addresses(LARGER) == ["/c", "/a", "/b"]
    assert not book.learn(LARGER, ["/a"], Source.HEARD, 0.0)
    assert book.learn(LARGER, ["/d"], Source.HEARD, 0.0)
    assert book.addresses(LARGER)[0] == "/d"
    book.learn(LARGER, [f"/{n}" for n in range(50)], Source.HEARD, 0.0)
    assert len(book.addresses(LARGER)) == MAX_ADDRESSES


def test_a_new_address_of_a_lost_peer_is_tried_soon(book: Book) -> None:
    book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)
    for _ in range(10):
        book.failed(LARGER, 0.0)
    assert book.next_at() > 20.0
    book.learn(LARGER, ["/ip4/10.0.0.2/tcp/1"], Source.HEARD, 1.0)
    assert book.next_at() <= 1.75


def test_the_book_is_bounded_and_never_names_its_owner(book: Book) -> None:
    assert not book.learn(ME, HERE, Source.CONFIGURED, 0.0)
    assert not book.learn(LARGER, [], Source.CONFIGURED, 0.0)
    for number in range(MAX_ENTRIES + 10):
        book.learn(PeerId(f"p{number}"), HERE, Source.HEARD, 0.0)
    assert len(book.due(1e9)) == MAX_ENTRIES
    assert book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)


def test_postponed_and_forgotten(book: Book) -> None:
    book.learn(LARGER, HERE, Source.CONFIGURED, 0.0)
    book.postpone(LARGER, math.inf)
    assert book.due(1e9) == []
    book.failed(LARGER, 0.0)
    assert book.next_at() < 2.0
    book.forget(LARGER)
    for change in (book.lost, book.failed):
        change(LARGER, 0.0)
    book.connected(LARGER)
    book.postpone(LARGER, 1.0)
    assert book.next_at() == math.inf


@given(st.lists(st.tuples(st.sampled_from("clfnx"), st.sampled_from("AZ")), max_size=60))
def test_a_peer_is_due_exactly_when_it_is_not_connected(steps: list[tuple[str, str]]) -> None:
    book = Book(ME, random.Random(1), first=0.5, most=60.0)
    connected: dict[str, bool] = {}
    for now, (step, name) in enumerate(steps):
        peer = PeerId(name)
        if step == "n":
            book.learn(peer, HERE, Source.CONFIGURED, now)
            connected.setdefault(name, False)
        elif step == "x":
            book.forget(peer)
            connected.pop(name, None)
        elif name in connected:
            if step == "c":
                book.connected(peer)
                connected[name] = True
            elif step == "l":
                book.lost(peer, now)
                connected[name] = False
            else:
                book.failed(peer, now)
    assert set(book.due(1e9)) == {name for name, up in connected.items() if not up}
