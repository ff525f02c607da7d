"""Reading and writing cells straight in the memory of llama.cpp's KV cache.

llama.cpp gives out and takes in the cells of a sequence only as a whole; a block of 64 tokens of a
long context would cost a copy of all of it.  The tensor tap sees the cache's own tensors when the
first graph runs.  Each is, for one layer::

    n_streams x n_cells rows of f16, one stream a sequence

A row lies where its cell does, so this only works for sequences whose cells lie in the order of
their positions from 0 on (``SequenceLog.straight``).  Cells that are written must be there already
(``LlamaContext.claim``).  The self-test compares what is read and what was written here with
llama.cpp's own export, before either is used at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.llama.kv_state import CellLayout, Cells, RowKind
from pyagent_node.native import HeldTensor

logger = logging.getLogger("pyagent_node.llama")

PREFIX: Final = "cache_"
"""How the names of the cache's tensors begin: ``cache_k_l<layer>`` and ``cache_v_l<layer>``."""


class _Plane(NamedTuple):
    """Keys or values of one layer."""

    tensor: HeldTensor
    row_bytes: int


class CacheView:
    """The cells of ``n_seq`` sequences of ``n_cells`` each."""

    def __init__(self, keys: Sequence[_Plane], values: Sequence[_Plane], n_cells: int) -> None:
        self._keys = keys
        self._values = values
        self._n_cells = n_cells

    def read(self, seq: int, start: int, stop: int) -> list[tuple[bytes, bytes]]:
        """Return the rows of keys and of values of cells ``[start, stop)``, layer by layer."""
        assert 0 <= start <= stop <= self._n_cells, "cells of one sequence"
        first, count = seq * self._n_cells + start, stop - start

        def rows(plane: _Plane) -> bytes:
            return plane.tensor.read(first * plane.row_bytes, count * plane.row_bytes)

        return [(rows(k), rows(v)) for k, v in zip(self._keys, self._values, strict=True)]

    def write(self, seq: int, start: int, cells: Cells) -> None:
        """Put rows into the cells from ``start`` on."""
        count = len(cells.positions)
        assert 0 <= start <= start + count <= self._n_cells, "cells of one sequence"
        first = seq * self._n_cells + start
        for planes, layers in ((self._keys, cells.keys), (self._values, cells.values)):
            for plane, rows in zip(planes, layers, strict=True):
                assert rows.shape == (count, plane.row_bytes), "a row a cell"
                plane.tensor.write(first * plane.row_bytes, np.ascontiguousarray(rows).data)

    @property
    def keys(self) -> list[HeldTensor]:
        """The keys of every layer."""
        return [plane.tensor for plane in self._keys]

    def first_cell(self, seq: int) -> int:
        """Return the row at which the cells of a sequence begin."""
        return seq * self._n_cells

    def pick(self, seq: int, cells: NDArray[np.intp], positions: NDArray[np.int32]) -> Cells:
        """Return a copy of some cells, which are at these positions."""
        first, count = seq * self._n_cells, int(cells[-1]) + 1

        def rows(plane: _Plane) -> NDArray[np.uint8]:
            data = plane.tensor.read(first * plane.row_bytes, count * plane.row_bytes)
            # one plane at a time: all of them at once would be all of the cells a second time
            return np.frombuffer(data, np.uint8).reshape(count, plane.row_bytes)[cells]

        keys, values = (tuple(map(rows, planes)) for planes in (self._keys, self._values))
        return Cells(positions, keys, values)

    def release(self, seq: int, start: int) -> None:
        """Give back the memory of a sequence's cells from ``start`` on, where that is possible.

        They are read as zeros afterwards, as they were before they were first used.
        """
        for plane, first, size in self._spans(seq, start):
            try:
                plane.tensor.release(first, size)
            except OSError as error:  # as of memory that is locked
                logger.debug("the memory of cells was not given back: %s", error)
                return

    def resident(self, seq: int) -> int | None:
        """Return how many bytes of what is set aside for a sequence are in memory."""
        found = [plane.tensor.resident(first, size) for plane, first, size in self._spans(seq, 0)]
        known = [size for size in found if size is not None]
        return sum(known) if len(known) == len(found) else None

    def _spans(self, seq: int, start: int) -> list[tuple[_Plane, int, int]]:
        """Return where the cells of a sequence from ``start`` on lie in each plane, in bytes."""
        first, count = seq * self._n_cells + start, self._n_cells - start
        return [
            (plane, first * plane.row_bytes, count * plane.row_bytes)
            for plane in (*self._keys, *self._values)
        ]


def find_cache(
    found: Iterable[HeldTensor], layout: CellLayout, *, n_cells: int, n_seq: int
) -> CacheView | None:
    """Return a view of the cache among the tensors that were seen; ``None`` if one is missing.

    Tensors of another size than the cells of every sequence take are not what they look like.
    """
    tensors = {tensor.name: tensor for tensor in found}

    def planes(letter: str, kinds: Sequence[RowKind]) -> list[_Plane]:
        got = [(tensors.get(f"{PREFIX}{letter}_l{i}"), kind) for i, kind in enumerate(kinds)]
        return [
            _Plane(tensor, kind.nbytes)
            for tensor, kind in got
            if tensor is not None and tensor.nbytes == kind.nbytes * n_cells * n_seq
        ]

    keys, values = planes("k", layout.keys), planes("v", layout.values)
    if len(keys) != len(layout.keys) or len(values) != len(layout.values):
        return None
    return CacheView(keys, values, n_cells)
