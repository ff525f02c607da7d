"""llama.cpp's sequence state: built, parsed back, and refused when it is anything else."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node.base.errors import Unsupported
from pyagent_node.inference.llama.kv_state import (
    CellLayout,
    Cells,
    RowKind,
    build_state,
    parse_state,
)

LAYOUT = CellLayout(keys=(RowKind(1, 6), RowKind(1, 4)), values=(RowKind(1, 2), RowKind(0, 8)))


def cells(count: int, seed: int) -> Cells:
    rng = np.random.default_rng(seed)

    def rows(kinds: tuple[RowKind, ...]) -> tuple[NDArray[np.uint8], ...]:
        return tuple(rng.integers(0, 256, (count, k.nbytes)).astype(np.uint8) for k in kinds)

    return Cells(np.arange(count, dtype=np.int32) + seed, rows(LAYOUT.keys), rows(LAYOUT.values))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(sum),
    st.integers(1, 9),
    st.integers(0, 8),
)
def test_what_is_built_is_parsed_back(counts: list[int], n_streams: int, seq: int) -> None:
    pieces = [cells(count, 7 * i) for i, count in enumerate(counts)]
    state = parse_state(build_state(LAYOUT, pieces, seq=seq, n_streams=n_streams), n_streams)
    assert state is not None
    assert state.layout == LAYOUT
    assert np.array_equal(state.cells.positions, np.concatenate([p.positions for p in pieces]))
    for layer in range(2):
        joined = np.concatenate([p.keys[layer] for p in pieces])
        assert np.array_equal(state.cells.keys[layer], joined)
        joined = np.concatenate([p.values[layer] for p in pieces])
        assert np.array_equal(state.cells.values[layer], joined)


def test_every_truncation_and_anything_longer_is_refused() -> None:
    data = build_state(LAYOUT, [cells(3, 1)], seq=0, n_streams=2)
    for size in range(len(data)):
        with pytest.raises(Unsupported) as caught:
            parse_state(data[:size], 2)
        assert caught.value.code == "kv_not_portable"
    with pytest.raises(Unsupported, match="too many"):
        parse_state(np.append(data, np.uint8(0)), 2)


@given(st.data())
def test_damaged_bytes_are_parsed_or_refused_but_never_read_beyond_the_end(
    data: st.DataObject,
) -> None:
    state = build_state(LAYOUT, [cells(2, 1)], seq=0, n_streams=3)
    at = data.draw(st.integers(0, len(state) - 1))
    state[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Unsupported):
        parse_state(state, 3)


def test_an_empty_sequence_and_a_foreign_number_of_streams() -> None:
    empty = np.frombuffer(np.array([0xAF143CD8, 0, 2, 0, 0], "<u4").tobytes(), np.uint8).copy()
    assert parse_state(empty, 2) is None
    with pytest.raises(Unsupported, match="2 streams"):
        parse_state(empty, 3)


def test_picking_cells_copies_them_in_the_order_asked_for() -> None:
    some = cells(4, 0)
    picked = some.pick(np.array([3, 1]))
    assert picked.positions.tolist() == [3, 1]
    assert np.array_equal(picked.keys[1], some.keys[1][[3, 1]])
