"""Blocks of KV at the levels that lose something: how much, and nothing else."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.native import blake3, kv_decode
from pyagent_node.sharding.kv_codec import (
    ERROR_BOUNDS,
    EXACT,
    EXPECTED_SIZE,
    LEVELS,
    KvShape,
    Level,
    decode,
    decode_rows,
    encode,
    level_named,
)

from . import kv_reference

LOSSY = [level for level in LEVELS if level != EXACT]
F16_MAX = 65504.0

shapes = st.builds(
    KvShape,
    heads=st.integers(1, 3),
    width=st.integers(1, 20).map(lambda half: 2 * half),
    rope_base=st.sampled_from([0.0, 1e4, 1e5, 1e6]),
    rope_halves=st.booleans(),
)


@st.composite
def rows(draw: st.DrawFn, shape: KvShape, tokens: int) -> NDArray[np.float16]:
    """Rows as models make them (channels of many sizes), or with anything at all in them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row = shape.heads * shape.width
    numbers = rng.normal(0, 1, (tokens, row)) * rng.lognormal(0, 1.5, row) + rng.normal(0, 3, row)
    match draw(st.sampled_from(["plain", "plain", "far", "zeros", "any", "tiny", "huge"])):
        case "far":
            numbers[draw(st.integers(0, tokens - 1))] *= draw(st.sampled_from([1e-3, 30.0, 1e3]))
        case "zeros":
            numbers[rng.random(tokens) < draw(st.sampled_from([0.3, 1.0]))] = 0
        case "any":
            bits = rng.integers(0, 2**16, numbers.shape).astype("<u2")
            numbers = np.nan_to_num(bits.view("<f2").astype(np.float64), posinf=1, neginf=-1)
        case "tiny":
            numbers *= 1e-7
        case "huge":
            numbers *= 1e5
    return np.clip(numbers, -F16_MAX, F16_MAX).astype("<f2")


def numbers(raw: bytes, tokens: int) -> NDArray[np.float64]:
    return np.frombuffer(raw, "<f2").reshape(tokens, -1).astype(np.float64)


@settings(max_examples=60)
@given(st.sampled_from(LOSSY), shapes, st.integers(1, 64), st.booleans(), st.data())
def test_no_number_is_further_off_than_is_promised(
    level: Level, shape: KvShape, tokens: int, begins: bool, data: st.DataObject
) -> None:
    keys, values = (data.draw(rows(shape, tokens)) for _ in range(2))
    block = encode(
        level, keys.tobytes(), values.tobytes(), tokens=tokens, shape=shape, begins_text=begins
    )
    found = decode(level, block, tokens=tokens, shape=shape)
    bounds = ERROR_BOUNDS[level]
    for raw, given_rows, part, whole_head in (
        (found.keys, keys, bounds.keys, True),
        (found.values, values, bounds.values, False),
    ):
        wanted = given_rows.astype(np.float64)
        off = np.abs(numbers(raw, tokens) - wanted).reshape(tokens, shape.heads, shape.width)
        squares = (wanted**2).reshape(tokens, shape.heads, shape.width)
        axes = (0, 2) if whole_head else (2,)
        size = np.sqrt(squares.mean(axes, keepdims=True))
        rounding = np.abs(wanted).reshape(off.shape) / 1000 + 1e-7
        assert (off <= part * size + rounding).all()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(LOSSY), shapes, st.integers(1, 20), st.booleans(), st.data())
def test_a_block_means_what_the_reference_reads_in_it(
    level: Level, shape: KvShape, tokens: int, begins: bool, data: st.DataObject
) -> None:
    raw = [data.draw(rows(shape, tokens)).tobytes() for _ in range(2)]
    block = encode(level, raw[0], raw[1], tokens=tokens, shape=shape, begins_text=begins)
    found = decode(level, block, tokens=tokens, shape=shape)
    for mine, wanted in zip(found, kv_reference.decode(block), strict=True):
        clipped = np.clip(wanted, -F16_MAX, F16_MAX)
        size = np.abs(clipped).max()
        np.testing.assert_allclose(
            numbers(mine, tokens), clipped, rtol=2e-3, atol=float(size) * 1e-4 + 1e-7
        )


def test_values_equal_the_reference_to_the_bit() -> None:
    shape = KvShape(2, 16, 1e4)
    rng = np.random.default_rng(5)
    raw = [rng.normal(0, 2, (9, 32)).astype("<f2").tobytes() for _ in range(2)]
    for level in LOSSY:
        block = encode(level, raw[0], raw[1], tokens=9, shape=shape)
        found = decode(level, block, tokens=9, shape=shape)
        wanted = kv_reference.decode(block)[1].astype("<f2")
        assert (numbers(found.values, 9) == wanted.astype(np.float64)).all()


def test_fewer_bytes_at_each_level() -> None:
    shape = KvShape(3, 64, 1e5)
    rng = np.random.default_rng(3)
    keys, values = (rng.normal(0, 1, (64, 192)).astype("<f2").tobytes() for _ in range(2))
    sizes = [len(encode(level, keys, values, tokens=64, shape=shape)) for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    for level, size in zip(LEVELS, sizes, strict=True):
        assert abs(size / sizes[0] - EXPECTED_SIZE[level]) < 0.05
    assert len(set(sizes)) == len(LEVELS)


def test_what_the_rotation_hides_is_found_and_costs_nothing_to_keep() -> None:
    rng = np.random.default_rng(4)
    numbers_before = rng.normal(0, 4, (1, 1, 64)) + rng.normal(0, 1, (64, 1, 64))
    keys = kv_reference.rotated(numbers_before.astype(np.float32), 1e4, halves=False)
    raw = keys.astype("<f2").tobytes()

    def error(shape: KvShape) -> float:
        block = encode("int4", raw, raw, tokens=64, shape=shape)
        found = numbers(decode("int4", block, tokens=64, shape=shape).keys, 64)
        return float(np.square(found - keys[:, 0]).mean())

    # a step is a part of what is left after the means, and that is less
    right = error(KvShape(1, 64, 1e4))
    for other in (KvShape(1, 64), KvShape(1, 64, 1e4, rope_halves=True), KvShape(1, 64, 1e6)):
        assert right < error(other) / 2


@pytest.mark.parametrize("level", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(level: Level, bad: float) -> None:
    shape = KvShape(1, 8)
    good = np.ones((4, 8), "<f2")
    wild = good.copy()
    wild[3, 7] = bad
    for keys, values, name in ((wild, good, "keys"), (good, wild, "values")):
        with pytest.raises(InvalidRequest, match=f"{name} is not all finite"):
            encode(level, keys.tobytes(), values.tobytes(), tokens=4, shape=shape)


def resealed(block: bytes) -> bytes:
    """Give a forged block the right length and checksum."""
    head = block[:16] + struct.pack("<I", len(block) - 36)
    return head + blake3(head + block[36:])[:16] + block[36:]


@settings(max_examples=300)
@given(st.sampled_from(LOSSY), st.integers(0, 2**32), st.data())
def test_a_forged_block_is_refused_or_gives_finite_rows(
    level: Level, seed: int, data: st.DataObject
) -> None:
    shape = KvShape(2, 8, 1e4)
    rng = np.random.default_rng(seed)
    raw = [rng.normal(0, 1, (8, 16)).astype("<f2").tobytes() for _ in range(2)]
    block = bytearray(encode(level, raw[0], raw[1], tokens=8, shape=shape))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(block) - 1))
        block[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    if data.draw(st.booleans()):
        del block[data.draw(st.integers(36, len(block))) :]
    try:
        *_, keys, values = kv_decode(resealed(bytes(block)))
    except ValueError:
        return
    for found in (keys, values):
        assert np.isfinite(np.frombuffer(found, "<f2")).all()


def test_a_level_that_another_was_expected_at_is_refused() -> None:
    shape = KvShape(1, 8)
    raw = np.ones((4, 8), "<f2").tobytes()
    block = encode("int4", raw, raw, tokens=4, shape=shape)
    with pytest.raises(CorruptData) as caught:
        decode("int8", block, tokens=4, shape=shape)
    assert caught.value.code == "kv_mislabelled"


def test_rows_come_back_where_only_their_length_is_known() -> None:
    shape = KvShape(2, 8, 1e4)
    raw = np.ones((4, 16), "<f2").tobytes()
    block = encode("int4", raw, raw, tokens=4, shape=shape)
    found = decode_rows("int4", block, tokens=4, row_bytes=32)
    assert found == decode("int4", block, tokens=4, shape=shape)
    with pytest.raises(CorruptData) as caught:
        decode_rows("int4", block, tokens=4, row_bytes=34)
    assert caught.value.code == "kv_mislabelled"


def test_levels_are_known_by_name() -> None:
    assert tuple(map(level_named, LEVELS)) == LEVELS
    with pytest.raises(InvalidRequest, match="no level 'f32'"):
        level_named("f32")
