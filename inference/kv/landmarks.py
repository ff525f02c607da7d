"""The landmarks of a piece: the few of its cells that carry most of the attention on it.  Pure.

A piece of a prompt (``chunks``) of some 256 tokens has as many cells in every layer.  Its landmark
form has half as many, in whole blocks (with fewer, facts are lost): those that get most attention
from a question read behind the piece, :data:`PROBE`, which asks what any question may want.  (Rows
at the end of the piece choose much worse, and the piece read once more behind itself somewhat:
``docs/context.md``.)  The policy is that of ``pruning``, without sinks: the first tokens of a piece
are computed anew by whoever joins it.  The last cell is always among them, because a sequence goes
on from there.

The form is lossy, whatever the level of its rows: a sequence that gets it has gaps
(``KvRange.kept``), counts as pruned, and nothing of it gets the name of an exact block.  It has a
name of its own, see ``sharding.kv_landmarks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.pruning import Positions, kept, ranges
from pyagent_node.sharding.kv_codec import EXPECTED_SIZE, KvShape, Level
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS
from pyagent_node.sharding.kv_landmarks import landmark_codec, pack, split, unpack

EACH: Final = 2 * BLOCK_TOKENS
"""Tokens of a piece for which its form has a block of cells."""
PROBE: Final = "\n\nQuestion: what do the lines above tell, and of whom?\nAnswer: they tell that"
"""What is read behind a piece, and its padding, when its landmarks are chosen."""
LEVEL: Final[Level] = "int4"
"""How the rows are kept: at finer levels the whole piece, rounded, is better for as many bytes."""
NEAR: Final = 4
"""The last cells of a piece, which stay: the last one has to, and the text goes on from there."""


def cells_of(tokens: int) -> int:
    """Return how many cells the form of a piece of ``tokens`` has; 0: it is too short for one."""
    return tokens // EACH * BLOCK_TOKENS


def chosen(
    positions: Positions,
    mass: NDArray[np.float32],
    seen: NDArray[np.int32],
    *,
    start: int,
    stop: int,
    cells: int,
) -> Positions:
    """Return the landmarks among the cells at ``[start, stop)``: ``cells`` of them, in order.

    The columns are those of ``CellAttention``; ``mass`` is summed over the layers.  Cells outside
    (those computed anew, padding, a probe behind) do not count.  Raises :class:`InvalidRequest`
    (``bad_parameter``) where there are not so many cells, or fewer than :data:`NEAR` are wanted.
    """
    inside = (positions >= start) & (positions < stop)
    found = int(inside.sum())
    if not NEAR <= cells <= found or not inside.any() or positions[inside][-1] != stop - 1:
        raise InvalidRequest(
            f"{cells} landmarks cannot be chosen of the {found} cells at {start} to {stop}.",
            code="bad_parameter",
            parameter="cells",
        )
    return kept(positions[inside], mass[inside], seen[inside], most=cells, sinks=0, window=NEAR)


def picked(kv: KvRange, positions: Positions) -> KvRange:
    """Return ``kv``, which has no gaps, with the rows at ``positions`` alone.

    Raises :class:`CorruptData` (``kv_malformed``) for rows of unequal lengths, and
    :class:`InvalidRequest` (``kv_range``) unless the positions rise from within the range up to
    its last one.
    """
    count = kv.stop - kv.start
    rising = len(positions) > 0 and bool((np.diff(positions) > 0).all())
    if kv.kept or not rising or positions[0] < kv.start or positions[-1] != kv.stop - 1:
        raise InvalidRequest(
            f"Landmarks of cells {kv.start} to {kv.stop} rise up to the last of them.",
            code="kv_range",
        )
    rows = positions - kv.start

    def pick(data: bytes) -> bytes:
        if len(data) % count:
            raise CorruptData(
                f"KV of {count} tokens has a row of broken length.", code="kv_malformed"
            )
        return np.frombuffer(data, np.uint8).reshape(count, -1)[rows].tobytes()

    layers = tuple(LayerKv(x.layer, pick(x.keys), pick(x.values)) for x in kv.layers)
    return KvRange(kv.codec, kv.start, kv.stop, layers, ranges(positions))


def places(kv: KvRange) -> Positions:
    """Return the positions of the rows of a range with gaps."""
    spans = kv.kept or ((kv.start, kv.stop),)
    found = [np.arange(start, stop, dtype=np.int32) for start, stop in spans]
    return cast("Positions", np.concatenate(found))


def spans_at(kv: KvRange, start: int) -> tuple[tuple[int, int], ...]:
    """Return the ``kept`` of a range as it is when the range begins at ``start``."""
    by = start - kv.start
    return tuple((first + by, last + by) for first, last in kv.kept)


def cells_name(cells: str) -> str:
    """Return the format of landmark blocks of rows in the format ``cells``."""
    return landmark_codec(f"{cells}/{LEVEL}")


def block_bytes(shape: KvShape) -> float:
    """Return what a landmark block of a layer has in the mean."""
    return 2 * BLOCK_TOKENS * shape.row_bytes * EXPECTED_SIZE[LEVEL]


def packed(kv: KvRange, layer: LayerKv, number: int, *, tokens: int, shape: KvShape) -> LayerKv:
    """Return block ``number`` of a layer of ``kv``, the landmarks of a piece of ``tokens``.

    Raises what ``kv_landmarks.pack`` raises.
    """
    at = places(kv)[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
    first = number * BLOCK_TOKENS * shape.row_bytes
    span = slice(first, first + len(at) * shape.row_bytes)
    block = pack(LEVEL, layer.keys[span], layer.values[span], places=at, tokens=tokens, shape=shape)
    return LayerKv(layer.layer, *split(block))


def unpacked(
    blocks: Sequence[LayerKv], *, tokens: int, skip: int, shape: KvShape
) -> tuple[Positions, LayerKv]:
    """Return the landmarks of one layer, and where they are from, out of all blocks of the layer.

    They must be of a piece of ``tokens``, rise from behind its first ``skip`` up to its last, and
    be as many as its form has.  Raises :class:`CorruptData` (``bad_landmarks``, or the codec's).
    """
    parts = [unpack(LEVEL, each.keys + each.values, shape=shape) for each in blocks]
    at = cast("Positions", np.concatenate([part.places for part in parts]))
    rising = bool((np.diff(at) > 0).all()) and at[0] >= skip and at[-1] == tokens - 1
    if not rising or len(at) != cells_of(tokens) or any(p.tokens != tokens for p in parts):
        raise CorruptData(
            "Landmark blocks do not belong together, or to this piece.",
            code="bad_landmarks",
            remedy="The whole piece is fetched or computed.",
        )
    keys = b"".join([part.rows.keys for part in parts])
    values = b"".join([part.rows.values for part in parts])
    return at, LayerKv(blocks[0].layer, keys, values)
