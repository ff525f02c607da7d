"""Blocks of KV as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.native import kv_decode, kv_encode
from pyagent_node.sharding.kv_codec import EXACT, KvShape, Rows, decode, encode

SHAPE = KvShape(heads=3, width=8, rope_base=1e5)


def some_rows(seed: int, tokens: int = 64, shape: KvShape = SHAPE) -> Rows:
    noise = np.random.default_rng(seed)
    size = (tokens, shape.heads * shape.width)
    return Rows(*(noise.normal(0, 3, size).astype("<f2").tobytes() for _ in range(2)))


@given(st.integers(1, 64), st.integers(1, 5), st.integers(1, 40), st.data())
def test_the_exact_level_keeps_every_bit(
    tokens: int, heads: int, width: int, data: st.DataObject
) -> None:
    shape = KvShape(heads, width)
    size = tokens * shape.row_bytes
    seed = data.draw(st.integers(0, 2**32))
    keys, values = (np.random.default_rng(seed + i).bytes(size) for i in range(2))
    block = encode(EXACT, keys, values, tokens=tokens, shape=shape)
    assert decode(EXACT, block, tokens=tokens, shape=shape) == (keys, values)


def test_a_block_cut_anywhere_is_refused() -> None:
    rows = some_rows(1, tokens=2)
    block = encode(EXACT, *rows, tokens=2, shape=SHAPE)
    for stop in range(len(block)):
        with pytest.raises(CorruptData) as caught:
            decode(EXACT, block[:stop], tokens=2, shape=SHAPE)
        assert caught.value.code == "kv_damaged"


def test_a_block_with_any_byte_changed_is_refused() -> None:
    block = encode(EXACT, *some_rows(1, tokens=2), tokens=2, shape=SHAPE)
    for at in range(len(block)):
        changed = bytearray(block)
        changed[at] ^= 0x10
        with pytest.raises(CorruptData) as caught:
            decode(EXACT, bytes(changed), tokens=2, shape=SHAPE)
        assert caught.value.code == "kv_damaged"
    with pytest.raises(CorruptData, match="something follows"):
        decode(EXACT, block + b"\0", tokens=2, shape=SHAPE)


@given(st.binary(max_size=300))
def test_bytes_of_any_other_sort_are_refused(data: bytes) -> None:
    for block in (data, b"PKV1" + data):
        with pytest.raises(ValueError, match="no block of KV"):
            kv_decode(block)


def test_a_block_of_something_else_is_refused() -> None:
    block = encode(EXACT, *some_rows(1, tokens=4), tokens=4, shape=SHAPE)
    for tokens, shape in ((3, SHAPE), (4, KvShape(8, 3)), (4, KvShape(3, 9))):
        with pytest.raises(CorruptData) as caught:
            decode(EXACT, block, tokens=tokens, shape=shape)
        assert caught.value.code == "kv_mislabelled"


@pytest.mark.parametrize(
    ("tokens", "shape", "words"),
    [
        (0, SHAPE, "1 to 64 tokens"),
        (65, SHAPE, "1 to 64 tokens"),
        (-1, SHAPE, "tokens must lie between"),
        (2**40, SHAPE, "tokens must lie between"),
        (4, KvShape(0, 8), "1 to 65536 numbers"),
        (4, KvShape(2**16, 2), "1 to 65536 numbers"),
        (4, KvShape(2**31, 2**31), "1 to 65536 numbers"),
        (4, KvShape(3, 9, 1e4), "odd width"),
        (4, KvShape(3, 8, -1.0), "finite and positive"),
        (4, KvShape(3, 8, float("nan")), "finite and positive"),
        (4, KvShape(3, 8, 1e39), "finite and positive"),
        (5, SHAPE, "keys has 192 bytes; the shape needs 240"),
    ],
)
def test_rows_that_do_not_fit_are_named(tokens: int, shape: KvShape, words: str) -> None:
    keys, values = some_rows(1, tokens=4)
    with pytest.raises(InvalidRequest, match=words) as caught:
        encode(EXACT, keys, values, tokens=tokens, shape=shape)
    assert caught.value.code == "kv_shape"


def test_levels_that_are_none_are_refused() -> None:
    keys, values = some_rows(1)
    with pytest.raises(InvalidRequest, match="no level 'zip'"):
        encode("zip", keys, values, tokens=64, shape=SHAPE)  # type: ignore[arg-type]
    for level in (200, 2**20):
        with pytest.raises(ValueError, match="no level number"):
            kv_encode(level, keys, values, tokens=64, heads=3, width=8)


def test_what_is_no_buffer_is_named() -> None:
    with pytest.raises(TypeError, match="keys must be bytes or another buffer, not str"):
        kv_encode(0, "text", b"", tokens=1, heads=1, width=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="block must be bytes"):
        kv_decode(None)  # type: ignore[arg-type]
