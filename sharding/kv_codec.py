"""KV blocks as bytes: the keys and values of one layer for up to 64 tokens.  Pure; native.

A block says what it holds, in a versioned header with a checksum over everything (``native/src/kv/
header.rs``), so that bytes from a disk or a peer are either the rows that somebody encoded, or an
error.  Levels:

``f16``
    exact: every bit comes back.
``int8``, ``int4``, ``int3``
    lossy, within :data:`ERROR_BOUNDS`; on text about 2.2, 4.4 and 6 times smaller, see
    ``docs/kv.md`` for what that costs.  Keys are turned back to where they were before their
    rotation by position and told as differences from the mean of their channel, values in parts of
    their token's size; everything is rounded to uniform steps and entropy coded
    (``native/src/kv/quantised.rs`` has the sources).
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, get_args

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.native import kv_decode, kv_encode, kv_moved

Level = Literal["f16", "int8", "int4", "int3"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
"""Every level, the exact one first, then by size."""
EXACT: Final[Level] = "f16"

MAX_TOKENS: Final = 64
"""The most tokens in a block."""
MAX_ROW: Final = 1 << 16
"""The most numbers in a row of keys or of values."""
_F16: Final = 2
_SINKS: Final = 4
"""The tokens that attention rests on: four, by Xiao et al. (arXiv:2309.17453)."""

_NUMBERS: Final[dict[Level, int]] = {"f16": 0, "int8": 1, "int4": 2, "int3": 3}
_NAMES: Final = {number: level for level, number in _NUMBERS.items()}


class KvShape(msgspec.Struct, frozen=True, gc=False):
    """The rows of a model's KV: ``heads`` heads (of keys) of ``width`` numbers.

    ``rope_base`` is the base of the rotation by position that keys have been through, and
    ``rope_halves`` says that it turns number i of a head with number i + width / 2 (as in Qwen),
    not 2i with 2i + 1 (as in Llama).  With a base of 0 (not known) lossy levels need more bytes.
    """

    heads: int
    width: int
    rope_base: float = 0.0
    rope_halves: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of keys, and of a row of values."""
        return self.heads * self.width * _F16


class Bounds(NamedTuple):
    """The most that a number can be off, but for its rounding to f16.

    ``keys`` in parts of the root mean square of the head's keys in the block, ``values`` in parts
    of that of the token's values in the head.
    """

    keys: float
    values: float


def _bounds(keys: float, values: float) -> Bounds:
    """Bounds for steps in parts of root mean squares that are told in quarter octaves.

    A number is off by half a step; a key is one side of a rotated pair, which may both be.
    """
    rounded = 2 ** (1 / 8)
    return Bounds(keys / 2 * rounded * 2**0.5, values / 2 * rounded)


ERROR_BOUNDS: Final[dict[Level, Bounds]] = {
    "f16": Bounds(0.0, 0.0),
    "int8": _bounds(0.03, 0.03),
    "int4": _bounds(0.35, 0.35),
    "int3": _bounds(0.7, 0.7),
}

EXPECTED_SIZE: Final[dict[Level, float]] = {"f16": 1.0, "int8": 0.45, "int4": 0.23, "int3": 0.17}
"""About what part of its bytes in f16 a block of text has (``bench kv``); for plans, no promise."""


class Rows(NamedTuple):
    """Rows of one layer, in f16 as the backend keeps them: ``tokens * row_bytes`` bytes each."""

    keys: bytes
    values: bytes


def level_named(name: str) -> Level:
    """Return the level of a name; raises :class:`InvalidRequest` (``kv_shape``) for none."""
    for level in LEVELS:
        if level == name:
            return level
    raise _unfit(f"there is no level {name[:80]!r}")


def encode(
    level: Level,
    keys: bytes,
    values: bytes,
    *,
    tokens: int,
    shape: KvShape,
    begins_text: bool = False,
) -> bytes:
    """Return a block of the rows of ``tokens`` tokens.  The interpreter lock is released meanwhile.

    ``begins_text`` says that the first token has position 0: attention rests on the first tokens of
    a text, so lossy levels keep them finer.

    Raises :class:`InvalidRequest` (``kv_shape``) when the rows do not have the shape, when that is
    out of bounds, for an unknown level, and for NaN or infinity at a level that is not exact.
    """
    number = _NUMBERS.get(level)
    if number is None:
        raise _unfit(f"there is no level {level!r}")
    try:
        return kv_encode(
            number,
            keys,
            values,
            tokens=tokens,
            heads=shape.heads,
            width=shape.width,
            rope_base=shape.rope_base,
            rope_halves=shape.rope_halves,
            first=_SINKS if begins_text else 0,
        )
    except (ValueError, OverflowError) as error:
        raise _unfit(str(error)) from None


def decode(level: Level, block: bytes, *, tokens: int, shape: KvShape) -> Rows:
    """Return the rows of a block.  The interpreter lock is released meanwhile.

    Raises :class:`CorruptData`: ``kv_damaged`` for bytes that are truncated, changed or no block,
    ``kv_mislabelled`` for a whole block that is not of this level, number of tokens and shape.
    """
    heads, width, rows = _open(level, block, tokens)
    if (heads, width) != (shape.heads, shape.width):
        raise _mislabelled(f"{heads} heads of {width}, not {shape.heads} of {shape.width}")
    return rows


def decode_rows(level: Level, block: bytes, *, tokens: int, row_bytes: int) -> Rows:
    """Return the rows of a block of which only the length of a row is known; as :func:`decode`."""
    heads, width, rows = _open(level, block, tokens)
    if heads * width * _F16 != row_bytes:
        raise _mislabelled(f"rows of {heads * width * _F16} bytes, not {row_bytes}")
    return rows


def moved(keys: bytes, delta: int, *, shape: KvShape) -> bytes:
    """Return rows of keys as they are ``delta`` positions further on; any number of rows.

    The interpreter lock is released meanwhile.  Raises :class:`InvalidRequest` (``kv_shape``) when
    it is not known how keys are rotated, or for rows of another shape.
    """
    try:
        return kv_moved(
            keys,
            delta,
            width=shape.width,
            rope_base=shape.rope_base,
            rope_halves=shape.rope_halves,
        )
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"Keys cannot be moved: {error}.", code="kv_shape") from None


def _open(level: Level, block: bytes, tokens: int) -> tuple[int, int, Rows]:
    """Return the heads of a block of this level and number of tokens, their width, and its rows."""
    try:
        number, found, heads, width, keys, values = kv_decode(block)
    except ValueError as error:
        raise CorruptData(f"A KV block was refused: {error}.", code="kv_damaged") from None
    if (_NAMES.get(number), found) != (level, tokens):
        raise _mislabelled(f"{found} tokens at level number {number}, not {tokens} at {level!r}")
    return heads, width, Rows(keys, values)


def _mislabelled(what: str) -> CorruptData:
    return CorruptData(f"A KV block was refused: it has {what}.", code="kv_mislabelled")


def _unfit(what: str) -> InvalidRequest:
    return InvalidRequest(f"No KV block can be made: {what}.", code="kv_shape")
