"""Landmarks: which cells they are, their names and bytes; nothing else is taken for them."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.types import Digest
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.chunks import moved_to
from pyagent_node.inference.kv.landmarks import (
    EACH,
    LEVEL,
    NEAR,
    cells_name,
    cells_of,
    chosen,
    packed,
    picked,
    places,
    spans_at,
    unpacked,
)
from pyagent_node.inference.kv.pruning import POOL, Positions, ranges
from pyagent_node.native import blake3
from pyagent_node.node.kv_blocks import codec_name, read_block
from pyagent_node.node.kv_messages import seal, unseal
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.kv_codec import EXACT, LEVELS, KvShape, Level, decode_rows, encode
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, LINK_BYTES, BlockKey, block_chain
from pyagent_node.sharding.kv_landmarks import (
    MAX_STRETCH,
    check,
    is_landmarks,
    landmark_chain,
    landmark_codec,
    pack,
    unpack,
)

SHAPE = KvShape(2, 8, 1e4)
CODEC = "rows/1/f16"
LINK = bytes(range(32))
PIECES = st.integers(2 * BLOCK_TOKENS, 1200)


def rows(count: int, seed: int = 1) -> tuple[bytes, bytes]:
    made = np.random.default_rng(seed).standard_normal((2, count, 16)).astype("<f2")
    return made[0].tobytes(), made[1].tobytes()


def stretch(count: int, start: int = 0, layers: int = 2) -> KvRange:
    made = tuple(LayerKv(layer, *rows(count, layer)) for layer in range(layers))
    return KvRange(CODEC, start, start + count, made)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Positions, int]:
    """Return places that rise in a stretch up to its last one, and its tokens."""
    count = draw(st.integers(1, BLOCK_TOKENS))
    tokens = draw(st.integers(count, 2000))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inner = generator.choice(tokens - 1, count - 1, replace=False) if count > 1 else []
    found = np.sort(np.array([*inner, tokens - 1], np.int32))
    return found.astype(np.int32), tokens


@given(PIECES, st.integers(1, 64), st.integers(0, 2**32 - 1), st.integers(NEAR, BLOCK_TOKENS))
def test_landmarks_are_so_many_cells_of_the_piece_with_the_last_ones(
    tokens: int, skip: int, seed: int, cells: int
) -> None:
    generator = np.random.default_rng(seed)
    behind = int(generator.integers(0, 100))
    positions = np.arange(tokens + behind, dtype=np.int32)
    mass = generator.choice([0.0, 0.1, 9.0], tokens + behind).astype(np.float32)
    seen = generator.integers(0, 40, tokens + behind).astype(np.int32)
    cells = min(cells, tokens - skip)
    found = chosen(positions, mass, seen, start=skip, stop=tokens, cells=cells)
    assert len(found) == cells
    assert (np.diff(found) > 0).all()
    assert found[0] >= skip
    assert found[-NEAR:].tolist() == list(range(tokens - NEAR, tokens))
    again = chosen(positions, mass, seen, start=skip, stop=tokens, cells=cells)
    assert again.tolist() == found.tolist()


def test_what_is_looked_at_stays_with_its_neighbours() -> None:
    positions, seen = np.arange(400, dtype=np.int32), np.full(400, 200, np.int32)
    mass = np.full(400, 0.01, np.float32)
    mass[[3, 100, 390]] = 5.0  # computed anew; of the piece; of what was read behind it
    found = chosen(positions, mass, seen, start=16, stop=256, cells=NEAR + POOL)
    assert found.tolist() == [*range(97, 104), *range(256 - NEAR, 256)]


@pytest.mark.parametrize(
    ("start", "stop", "cells"), [(0, 100, NEAR - 1), (0, 100, 101), (90, 300, 64), (300, 310, 4)]
)
def test_there_must_be_so_many_cells(start: int, stop: int, cells: int) -> None:
    positions = np.arange(200, dtype=np.int32)
    flat = np.ones(200, np.float32)
    with pytest.raises(InvalidRequest) as caught:
        chosen(positions, flat, flat.astype(np.int32), start=start, stop=stop, cells=cells)
    assert caught.value.code == "bad_parameter"


@given(st.integers(0, 4096))
def test_a_form_is_whole_blocks_and_half_of_the_cells_at_most(tokens: int) -> None:
    cells = cells_of(tokens)
    assert cells % BLOCK_TOKENS == 0
    assert 2 * cells <= tokens < 2 * cells + EACH


@given(choices(), st.integers(0, 100), st.integers(0, 5000))
def test_rows_are_picked_and_moved_with_their_places(
    choice: tuple[Positions, int], start: int, to: int
) -> None:
    at, tokens = choice
    whole = stretch(tokens, start)
    found = picked(whole, at + np.int32(start))
    assert places(found).tolist() == (at + start).tolist()
    assert found.kept == ranges(at + np.int32(start))
    moved = tuple(moved_to(found, to, SHAPE))
    spans = spans_at(found, to)
    assert [p for a, b in spans for p in range(a, b)] == (at + to).tolist()
    wanted = tuple(moved_to(whole, to, SHAPE))
    size = SHAPE.row_bytes
    for one, every in zip(moved, wanted, strict=True):
        for short, long in ((one.keys, every.keys), (one.values, every.values)):
            assert short == b"".join(long[p * size : (p + 1) * size] for p in at.tolist())


@pytest.mark.parametrize("at", [[], [5, 4, 9], [3, 3, 9], [1, 2], [-1, 9], [9, 10]])
def test_rows_that_are_not_there_are_refused(at: list[int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        picked(stretch(10), np.array(at, np.int32))
    assert caught.value.code == "kv_range"


def test_nothing_is_picked_twice_and_no_broken_rows() -> None:
    once = picked(stretch(10), np.array([2, 9], np.int32))
    with pytest.raises(InvalidRequest):
        picked(once, np.array([9], np.int32))
    broken = msgspec.structs.replace(stretch(10), layers=(LayerKv(0, b"1234567", b"12345678"),))
    with pytest.raises(CorruptData) as caught:
        picked(broken, np.array([9], np.int32))
    assert caught.value.code == "kv_malformed"
    with pytest.raises(CorruptData):
        tuple(moved_to(msgspec.structs.replace(once, kept=((9, 10),)), 4, SHAPE))


# ---- names ---------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 16), st.integers(0, 3))
def test_names_are_their_own_and_say_who_chose(
    first: int, layers: int, count: int, other: int
) -> None:
    tokens = np.arange(256, dtype=np.int32)
    whole = block_chain(LINK, tokens, 256)
    names = landmark_chain(whole[-1], first, first + layers, count)
    assert len(set(names)) == count
    assert not set(names) & set(whole)
    assert all(len(name) == LINK_BYTES for name in names)
    changed = [
        landmark_chain(whole[other], first, first + layers, count) if other < 3 else (b"",),
        landmark_chain(whole[-1], first + 1, first + 1 + layers, count),
        landmark_chain(whole[-1], first, first + layers + 1, count),
        landmark_chain(whole[-1], first, first + layers, count + 1),
    ]
    assert all(not set(names) & set(each) for each in changed)
    BlockKey(Digest("a" * 64), 0, names[0], landmark_codec("int4-0a1b2c3d")).check()


@pytest.mark.parametrize(
    ("link", "first", "last", "count"),
    [(b"", 0, 1, 1), (LINK, 1, 1, 1), (LINK, -1, 1, 1), (LINK, 0, 1 << 17, 1), (LINK, 0, 1, 0)],
)
def test_names_of_nothing_are_refused(link: bytes, first: int, last: int, count: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        landmark_chain(link, first, last, count)
    assert caught.value.code == "bad_block_key"


# ---- bytes ---------------------------------------------------------------------------------------


@given(choices())
def test_rows_and_places_come_back(choice: tuple[Positions, int]) -> None:
    at, tokens = choice
    keys, values = rows(len(at))
    block = pack(EXACT, keys, values, places=at, tokens=tokens, shape=SHAPE)
    found = unpack(EXACT, block, shape=SHAPE)
    assert found.tokens == tokens
    assert found.places.tolist() == at.tolist()
    assert found.rows == (keys, values)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_holds_them_and_none_is_another(level: Level) -> None:
    at = np.arange(0, 256, 4, dtype=np.int32)
    keys, values = rows(64)
    block = pack(level, keys, values, places=at, tokens=256, shape=SHAPE)
    found = unpack(level, block, shape=SHAPE)
    off = np.frombuffer(found.rows.values, "<f2").astype(float) - np.frombuffer(values, "<f2")
    assert np.abs(off).max() < 1.5
    for other in set(LEVELS) - {level}:
        with pytest.raises(CorruptData):
            unpack(other, block, shape=SHAPE)


def test_landmarks_are_no_block_and_blocks_no_landmarks() -> None:
    at = np.arange(192, 256, dtype=np.int32)
    keys, values = rows(64)
    block = pack(EXACT, keys, values, places=at, tokens=256, shape=SHAPE)
    with pytest.raises(CorruptData):
        decode_rows(EXACT, block, tokens=64, row_bytes=SHAPE.row_bytes)
    plain = encode(EXACT, keys, values, tokens=64, shape=SHAPE)
    with pytest.raises(CorruptData) as caught:
        unpack(EXACT, plain, shape=SHAPE)
    assert caught.value.code == "bad_landmarks"


@given(st.data())
def test_changed_bytes_are_an_error(data: st.DataObject) -> None:
    at = np.array([1, 5, 9], np.int32)
    block = bytearray(pack(EXACT, *rows(3), places=at, tokens=10, shape=SHAPE))
    place = data.draw(st.integers(0, len(block) - 1))
    block[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptData):
        unpack(EXACT, bytes(block), shape=SHAPE)
    with pytest.raises(CorruptData):
        unpack(EXACT, bytes(block[:place]), shape=SHAPE)


@given(st.binary(max_size=200))
def test_hostile_bytes_are_an_error(data: bytes) -> None:
    for each in (data, b"pLM\1" + data):
        with pytest.raises(CorruptData):
            unpack(EXACT, each, shape=SHAPE)


@pytest.mark.parametrize(
    ("at", "tokens"),
    [([], 9), ([1, 1], 9), ([2, 1], 9), ([-1, 1], 9), ([1, 9], 9), ([0, 1], 1 + MAX_STRETCH)],
)
def test_places_that_cannot_be_are_not_packed(at: list[int], tokens: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pack(EXACT, *rows(len(at)), places=np.array(at, np.int32), tokens=tokens, shape=SHAPE)
    assert caught.value.code == "kv_shape"


def test_sound_digests_over_places_that_cannot_be_are_refused() -> None:
    """Whoever forges the digest, too, gets an error, never a wrong place."""
    at = np.array([1, 5, 9], np.int32)
    block = pack(EXACT, *rows(3), places=at, tokens=10, shape=SHAPE)
    head, data = bytearray(block[:22]), block[38:]
    for changed, value in ((10, 6), (18, 200), (21, 255)):
        forged = bytearray(head)
        forged[changed] = value
        made = bytes(forged) + blake3(bytes(forged) + data)[:16] + data
        with pytest.raises(CorruptData) as caught:
            unpack(EXACT, made, shape=SHAPE)
        assert caught.value.code == "bad_landmarks"


def test_the_store_holds_them_beside_whole_blocks_under_names_of_their_own() -> None:
    model, codec = Digest("a" * 64), codec_name(CODEC)
    chain = block_chain(LINK, np.arange(256, dtype=np.int32), 256)
    names = landmark_chain(chain[-1], 0, 2, 2)
    store, made = BlockStore(memory_bytes=1 << 20), dict[BlockKey, bytes]()
    for number, link in enumerate(names):
        at = np.arange(128 * number, 128 * (number + 1), 2, dtype=np.int32)
        for layer in range(2):
            key = BlockKey(model, layer, link, landmark_codec(codec))
            block = pack(EXACT, *rows(64, layer), places=at, tokens=256, shape=SHAPE)
            made[key] = seal(key, block)
            parent = names[number - 1] if number else b""
            assert store.put(key, made[key], 1.0, parent=parent, number=number)
    assert store.leading(model, names, range(2), landmark_codec(codec)) == 2
    for held in (codec, landmark_codec(codec)):
        assert store.leading(model, chain, range(2), held) == 0
    assert store.leading(model, names, range(2), codec) == 0
    for key, data in made.items():
        found = store.get(key)
        assert found == data
        block = unseal(key, data)
        assert unpack(EXACT, block, shape=SHAPE).rows == rows(64, key.layer)
        exact = BlockKey(model, key.layer, chain[0], codec)
        for sealed in (data, seal(exact, block)):  # mislabelled by mistake, and on purpose
            with pytest.raises(CorruptData):
                read_block(exact, sealed, CODEC)


def test_ranges_touch_nowhere() -> None:
    found = picked(stretch(20), np.array([0, 1, 2, 7, 8, 19], np.int32))
    assert found.kept == ((0, 3), (7, 9), (19, 20))
    assert all(a[1] < b[0] for a, b in pairwise(found.kept))


# ---- as blocks that a shelf keeps ----------------------------------------------------------------


def landmark_blocks(tokens: int, skip: int) -> tuple[Positions, list[LayerKv]]:
    """Return places in a piece, and the blocks of a layer with their rows."""
    rng = np.random.default_rng(tokens)
    some = rng.choice(np.arange(skip, tokens - 1), cells_of(tokens) - 1, replace=False)
    at = np.append(np.sort(some), tokens - 1).astype(np.int32)
    few = picked(stretch(tokens, layers=1), at)
    count = cells_of(tokens) // BLOCK_TOKENS
    return at, [packed(few, few.layers[0], n, tokens=tokens, shape=SHAPE) for n in range(count)]


@given(st.integers(2 * BLOCK_TOKENS, 700), st.integers(0, 64))
def test_blocks_of_a_piece_come_back_with_their_places(tokens: int, skip: int) -> None:
    at, blocks = landmark_blocks(tokens, skip)
    found, kv = unpacked(blocks, tokens=tokens, skip=skip, shape=SHAPE)
    assert np.array_equal(found, at)
    assert len(kv.keys) == len(kv.values) == len(at) * SHAPE.row_bytes
    for each in blocks:
        check(each.keys + each.values)


def test_blocks_that_do_not_belong_together_are_refused() -> None:
    _, blocks = landmark_blocks(300, 16)
    _, others = landmark_blocks(301, 16)
    wrong = [
        (blocks[:1], 300, 16),
        ([*blocks, blocks[1]], 300, 16),
        (blocks[::-1], 300, 16),
        ([blocks[0], others[1]], 300, 16),
        (blocks, 301, 16),
        (others, 300, 16),
        (blocks, 300, 200),
        ([blocks[0], LayerKv(0, blocks[1].keys, blocks[1].values[:-1])], 300, 16),
        ([blocks[0], LayerKv(0, b"", b"")], 300, 16),
        (stretch(300).layers, 300, 16),
    ]
    for parts, tokens, skip in wrong:
        with pytest.raises(CorruptData) as caught:
            unpacked(parts, tokens=tokens, skip=skip, shape=SHAPE)
        assert caught.value.code == "bad_landmarks"


def test_their_format_is_that_of_no_other_blocks() -> None:
    name = cells_name(CODEC)
    assert is_landmarks(name)
    assert not is_landmarks(CODEC)
    assert not name.endswith("/f16")  # else a shelf would round the rows once more
    assert LEVEL in name
