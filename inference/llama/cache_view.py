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

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from pyagent_node.inference.llama.kv_state import CellLayout, Cells, RowKind
from pyagent_node.native import HeldTensor

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
