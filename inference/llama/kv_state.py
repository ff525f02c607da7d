"""The format in which llama.cpp hands over the KV cells of one sequence, parsed and built strictly.

``llama_state_seq_get_data`` of llama-cpp-python 0.3.36 (little-endian, nothing padded)::

    u32 magic 0xaf143cd8 | i32 sequence | u32 n_streams
    n_streams times:
        u32 n_cells                          (nothing more for a stream without cells)
        n_cells times:  i32 position | u32 1 | i32 sequence
        u32 v_transposed | u32 n_layers
        n_layers times: i32 type of K | u64 bytes of a K row | n_cells rows
        n_layers times: i32 type of V | u64 bytes of a V row | n_cells rows

Rows are whole (V is not transposed) when flash attention is on, so cells can be cut by token and by
layer and joined again for other slice boundaries.  llama.cpp checks little of what it is given and
aborts on some of the rest; only bytes built here, from rows of checked lengths, are given to it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import Unsupported

MAGIC: Final = 0xAF143CD8

_HEAD: Final = struct.Struct("<IiI")
_COUNT: Final = struct.Struct("<I")
_SHAPE: Final = struct.Struct("<II")
_ROWS: Final = struct.Struct("<iQ")
_CELL: Final = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])

MAX_LAYERS: Final = 1024
MAX_ROW_BYTES: Final = 1 << 24

Rows = NDArray[np.uint8]
"""Cells of one layer, shape (n_cells, bytes of a row)."""


class RowKind(NamedTuple):
    """Element type (a ``ggml_type``) and length of a row of K or V."""

    type: int
    nbytes: int


class CellLayout(NamedTuple):
    """The rows of one cell: one entry a layer."""

    keys: tuple[RowKind, ...]
    values: tuple[RowKind, ...]

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell in all layers."""
        return sum(kind.nbytes for kind in (*self.keys, *self.values))


class Cells(NamedTuple):
    """Some cells of one sequence: ``keys`` and ``values`` have one entry a layer."""

    positions: NDArray[np.int32]
    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]

    def pick(self, indices: NDArray[np.intp]) -> Cells:
        """Return a copy of the cells at ``indices``, in that order."""
        return Cells(
            self.positions[indices],
            tuple(rows[indices] for rows in self.keys),
            tuple(rows[indices] for rows in self.values),
        )


class SequenceState(NamedTuple):
    """The cells of one sequence, in cell order; rows are views of the parsed buffer."""

    cells: Cells
    layout: CellLayout


class _Reader:
    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.at = 0

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > len(self.data) - self.at:
            raise _foreign("it is too short")
        start, self.at = self.at, self.at + nbytes
        return self.data[start : self.at]

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size).tobytes())


def _foreign(what: str) -> Unsupported:
    return Unsupported(
        f"The KV cache of this model is kept in a form that cannot be moved: {what}.",
        code="kv_not_portable",
    )


def parse_state(data: NDArray[np.uint8], n_streams: int) -> SequenceState | None:
    """Parse what llama.cpp wrote for one sequence; ``None`` when it has no cells.

    ``data`` has shape (size,).  Raises :class:`Unsupported` (``kv_not_portable``) for anything but
    the layout above: other caches (sliding window, recurrent, transposed V) differ there.
    """
    reader = _Reader(data)
    magic, _, streams = reader.unpack(_HEAD)
    if magic != MAGIC or streams != n_streams:
        raise _foreign(f"magic {magic:#x}, {streams} streams")
    state: SequenceState | None = None
    for _ in range(streams):
        (count,) = reader.unpack(_COUNT)
        if count == 0:
            continue
        if state is not None:
            raise _foreign("one sequence in two streams")
        state = _parse_stream(reader, count)
    if reader.at != len(data):
        raise _foreign(f"{len(data) - reader.at} bytes too many")
    return state


def _parse_stream(reader: _Reader, count: int) -> SequenceState:
    cells = reader.take(count * _CELL.itemsize).view(_CELL)
    if not (cells["sequences"] == 1).all():
        raise _foreign("cells that belong to several sequences")
    transposed, n_layers = reader.unpack(_SHAPE)
    if transposed or not 1 <= n_layers <= MAX_LAYERS:
        raise _foreign(f"transposed values: {transposed}, layers: {n_layers}")
    kinds: list[RowKind] = []
    rows: list[Rows] = []
    for _ in range(2 * n_layers):
        kind = RowKind(*reader.unpack(_ROWS))
        if not 0 < kind.nbytes <= MAX_ROW_BYTES:
            raise _foreign(f"rows of {kind.nbytes} bytes")
        kinds.append(kind)
        rows.append(reader.take(count * kind.nbytes).reshape(count, kind.nbytes))
    return SequenceState(
        Cells(cells["position"].astype(np.int32), tuple(rows[:n_layers]), tuple(rows[n_layers:])),
        CellLayout(tuple(kinds[:n_layers]), tuple(kinds[n_layers:])),
    )


def build_state(
    layout: CellLayout, pieces: Sequence[Cells], *, seq: int, n_streams: int, rows: bool = True
) -> NDArray[np.uint8]:
    """Build the bytes that make llama.cpp hold exactly these cells in sequence ``seq``.

    ``pieces`` are laid one after the other; their rows were checked against ``layout``.  Without
    ``rows`` zeros stand for them, which take no memory until they are written to.
    """
    count = sum(len(cells.positions) for cells in pieces)
    assert count > 0, "a sequence without cells is not written"
    n_layers = len(layout.keys)
    size = _HEAD.size + n_streams * _COUNT.size + count * _CELL.itemsize + _SHAPE.size
    size += 2 * n_layers * _ROWS.size + count * layout.cell_bytes
    data = np.zeros(size, np.uint8)
    at = 0

    def put(raw: bytes | NDArray[np.uint8]) -> None:
        nonlocal at
        piece = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else raw
        data[at : at + len(piece)] = piece
        at += len(piece)

    put(_HEAD.pack(MAGIC, seq, n_streams))
    put(_COUNT.pack(count))
    meta = np.zeros(count, _CELL)
    meta["position"] = np.concatenate([cells.positions for cells in pieces])
    meta["sequences"] = 1
    meta["sequence"] = seq
    put(meta.view(np.uint8))
    put(_SHAPE.pack(0, n_layers))
    layers = [(kind, [cells.keys[i] for cells in pieces]) for i, kind in enumerate(layout.keys)]
    layers += [
        (kind, [cells.values[i] for cells in pieces]) for i, kind in enumerate(layout.values)
    ]
    for kind, stacks in layers:
        put(_ROWS.pack(*kind))
        assert sum(len(stack) for stack in stacks) == count, "one row a cell"
        for stack in stacks:
            assert stack.shape[1] == kind.nbytes, "rows of the layout's length"
            if rows:
                put(np.ascontiguousarray(stack).reshape(-1))
        if not rows:
            at += count * kind.nbytes
    # the other streams follow with a cell count of zero each, as the buffer already holds
    assert at + (n_streams - 1) * _COUNT.size == size, "the size was computed right"
    return data
