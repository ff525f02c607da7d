"""Byte ranges, bitmaps and the chunk scheduler."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import PeerId
from pyagent_node.inference.models.chunk_scheduler import MAX_COPIES, ChunkScheduler
from pyagent_node.inference.models.chunks import (
    ChunkSet,
    chunk_count,
    chunk_range,
    chunks_of,
    merge_ranges,
)
from pyagent_node.inference.models.gguf_header import ByteRange

ranges = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 40)).map(lambda t: ByteRange(t[0], t[0] + t[1]))
)
A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


@given(ranges)
def test_merge_ranges(parts: list[ByteRange]) -> None:
    merged = merge_ranges(parts)
    assert {i for a, b in parts for i in range(a, b)} == {i for a, b in merged for i in range(a, b)}
    assert all(a < b for a, b in merged)
    assert all(x.stop < y.start for x, y in itertools.pairwise(merged))


@given(ranges, st.integers(1, 50))
def test_chunks_of(parts: list[ByteRange], size: int) -> None:
    found = chunks_of(parts, size)
    assert found == sorted({i // size for a, b in parts for i in range(a, b)})


@given(st.integers(1, 5000), st.integers(1, 700))
def test_chunk_ranges_tile_the_file(size: int, chunk: int) -> None:
    places = [chunk_range(i, size, chunk) for i in range(chunk_count(size, chunk))]
    assert merge_ranges(places) == (ByteRange(0, size),)
    assert sum(b - a for a, b in places) == size


@given(st.integers(1, 70), st.sets(st.integers(0, 69)))
def test_chunk_set(count: int, members: set[int]) -> None:
    members = {m for m in members if m < count}
    chunks = ChunkSet(count)
    for member in members:
        chunks.add(member)
    assert set(chunks) == members
    assert len(chunks) == len(members)
    assert chunks.complete == (len(members) == count)
    assert chunks.missing(range(count)) == [i for i in range(count) if i not in members]
    again = ChunkSet(count, chunks.to_bytes())
    assert again == chunks
    for member in members:
        again.discard(member)
    assert len(again) == 0
    assert set(chunks.copy()) == members
    assert -1 not in chunks
    assert count not in chunks


def test_chunk_set_full_and_malformed() -> None:
    assert ChunkSet.full(11).complete
    for count, bits in ((11, b"\0"), (11, b"\0\0\0"), (11, b"\0\x08"), (0, b"\0")):
        with pytest.raises(CorruptData) as caught:
            ChunkSet(count, bits)
        assert caught.value.code == "bitmap_malformed"
    for index in (-1, 11):
        with pytest.raises(IndexError):
            ChunkSet(11).add(index)
        with pytest.raises(IndexError):
            ChunkSet(11).discard(index)


def some(count: int, *members: int) -> ChunkSet:
    chunks = ChunkSet(count)
    for member in members:
        chunks.add(member)
    return chunks


def test_rare_chunks_come_first() -> None:
    plan = ChunkScheduler(range(4))
    assert plan.peer_has(A, some(4, 0, 1, 2))
    assert plan.peer_has(B, some(4, 0, 1, 2, 3))
    assert plan.next(B) == 3
    assert plan.next(B) == 0
    assert plan.next(A) == 1
    assert plan.next(C) is None


def test_nothing_is_asked_twice_before_the_end() -> None:
    plan = ChunkScheduler(range(6))
    for peer in (A, B):
        plan.peer_has(peer, ChunkSet.full(6))
    asked = [plan.next(peer) for peer in (A, B, A, B, A, B)]
    assert sorted(i for i in asked if i is not None) == list(range(6))
    stolen = plan.next(A)
    assert stolen == asked[1]
    assert plan.arrived(stolen)
    assert not plan.arrived(stolen)
    assert plan.missing == 5


def test_what_a_lost_peer_was_asked_for_goes_to_others() -> None:
    plan = ChunkScheduler(range(2))
    plan.peer_has(A, ChunkSet.full(2))
    assert [plan.next(A), plan.next(A), plan.next(A)] == [0, 1, None]
    plan.peer_has(B, some(2, 1))
    plan.drop(A)
    assert plan.next(B) == 1
    assert plan.next(B) is None
    assert plan.missing == 2


def test_a_refused_chunk_is_not_asked_of_that_peer_again() -> None:
    plan = ChunkScheduler([5])
    plan.peer_has(A, some(6, 5))
    plan.peer_has(B, some(6, 5))
    assert plan.next(A) == 5
    plan.refused(A, 5)
    assert plan.next(A) is None
    assert plan.next(B) == 5


@given(st.data())
def test_every_chunk_arrives_whatever_the_peers_do(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 20))
    plan = ChunkScheduler(range(count))
    peers = [A, B, C]
    for peer in peers:
        plan.peer_has(peer, ChunkSet.full(count))
    under_way: dict[PeerId, list[int]] = {peer: [] for peer in peers}
    honest = A
    for _ in range(400):
        if not plan.missing:
            break
        peer = data.draw(st.sampled_from(peers))
        index = plan.next(peer)
        if index is not None:
            under_way[peer].append(index)
            assert sum(index in asked for asked in under_way.values()) <= MAX_COPIES
        elif under_way[peer]:
            done = under_way[peer].pop(0)
            if peer == honest or data.draw(st.booleans()):
                plan.arrived(done)
            else:
                plan.refused(peer, done)
        elif peer != honest:
            plan.drop(peer)
            plan.peer_has(peer, ChunkSet.full(count))
    while plan.missing:
        index = plan.next(honest)
        if index is not None:
            under_way[honest].append(index)
            continue
        if under_way[honest]:
            plan.arrived(under_way[honest].pop(0))
            continue
        for peer in (B, C):
            plan.drop(peer)
