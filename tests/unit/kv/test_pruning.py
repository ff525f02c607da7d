"""The policy of pruning: what is always kept, what goes first, how the budget grows."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK
from pyagent_node.inference.kv.budgets import (
    GUESSES,
    MAX_CELLS,
    MIN_CELLS,
    SINKS,
    SLACK,
    SPARE,
    WINDOW,
    Pruning,
    budget,
    check,
    due,
    positions,
    read_budget,
)
from pyagent_node.inference.kv.pruning import POOL, Positions, kept, ranges

ALWAYS = SINKS + WINDOW
budgets = st.one_of(st.just(0), st.integers(MIN_CELLS, MAX_CELLS)).map(Pruning)


class Cells(NamedTuple):
    """Cells of a session, some of them dropped before."""

    positions: Positions
    mass: np.ndarray[tuple[int], np.dtype[np.float32]]
    seen: np.ndarray[tuple[int], np.dtype[np.int32]]


@st.composite
def cells(draw: st.DrawFn) -> Cells:
    count = draw(st.integers(1, 900))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.integers(1, 4))
    positions = np.sort(generator.choice(spread * count, count, replace=False)).astype(np.int32)
    mass = generator.choice([0.0, 0.001, 0.5, 30.0], count).astype(np.float32)
    seen = generator.integers(0, 40, count).astype(np.int32)
    return Cells(positions, mass, seen)


@given(cells(), st.integers(0, 1000))
def test_sinks_and_window_stay_and_no_more_than_the_budget_besides(held: Cells, most: int) -> None:
    found = kept(*held, most=most)
    count = len(held.positions)
    assert len(found) == min(count, max(most, ALWAYS))
    assert set(found.tolist()) <= set(held.positions.tolist())
    assert (np.diff(found) > 0).all()
    assert set(held.positions[:SINKS].tolist()) <= set(found.tolist())
    assert found[-WINDOW:].tolist() == held.positions[-WINDOW:].tolist()[-len(found) :]


@given(cells(), st.integers(ALWAYS, 1000))
def test_what_nobody_has_seen_stays_before_what_was_measured(held: Cells, most: int) -> None:
    found = set(kept(*held, most=most).tolist())
    inner = slice(SINKS, max(SINKS, len(held.positions) - WINDOW))
    unseen = held.positions[inner][held.seen[inner] == 0].tolist()
    dropped = [position for position in unseen if position not in found]
    measured = set(held.positions[inner][held.seen[inner] > 0].tolist())
    assert not dropped or not (found & measured)
    assert not dropped or max(dropped) < min(
        (position for position in unseen if position in found), default=MAX_CELLS
    )


@given(cells(), st.integers(0, 1000))
def test_the_same_cells_are_kept_each_time_and_pruning_again_changes_nothing(
    held: Cells, most: int
) -> None:
    found = kept(*held, most=most)
    again = np.isin(held.positions, found)
    assert kept(*held, most=most).tolist() == found.tolist()
    assert kept(found, held.mass[again], held.seen[again], most=most).tolist() == found.tolist()


@given(budgets, st.integers(0, 1 << 22), st.integers(0, 1 << 12))
def test_budgets_never_fall_and_grow_slower_than_the_context(
    pruning: Pruning, seen: int, more: int
) -> None:
    assert budget(pruning, seen) <= budget(pruning, seen + more)
    assert budget(pruning, 4 * seen) <= 2 * budget(pruning, seen) + 32
    assert budget(pruning, seen) >= ALWAYS


@given(
    budgets,
    st.booleans(),
    st.integers(1, 1 << 14),
    st.integers(1, 1 << 14),
    st.integers(0, 1 << 17),
)
def test_positions_beyond_a_slot_are_those_whose_cells_fit(
    pruning: Pruning, rolling: bool, prompt: int, n_ctx: int, trained: int
) -> None:
    pruning = Pruning(pruning.cells, rolling=rolling)
    found = positions(pruning, prompt, n_ctx=n_ctx, trained=trained)
    assert n_ctx <= found <= max(n_ctx, trained)
    assert positions(None, prompt, n_ctx=n_ctx, trained=trained) == n_ctx
    if found == n_ctx:
        return
    assert rolling or prompt + SPARE <= n_ctx
    # what is held just before a pruning, and what may come until then
    held = budget(pruning, found)
    while not due(pruning, held, found):
        held += 1
    assert held + SPARE <= n_ctx + 1
    if found < trained:
        most = budget(pruning, found + 1)
        assert most + max(SLACK, most // 4) + SPARE > n_ctx


def test_what_may_come_before_a_pruning_is_counted() -> None:
    assert SPARE >= PREFILL_CHUNK
    assert GUESSES + MAX_DECODE_ROWS <= WINDOW


@given(budgets, st.integers(0, 1 << 20))
def test_it_is_not_due_again_soon_after_it_was_done(pruning: Pruning, seen: int) -> None:
    most = budget(pruning, seen)
    assert not any(due(pruning, most + new, seen + new) for new in (0, 1, SLACK))
    assert due(pruning, most + max(SLACK, most // 4) + 1, seen)


@given(cells())
def test_ranges_hold_the_positions_and_do_not_touch(held: Cells) -> None:
    found = ranges(held.positions)
    assert [p for start, stop in found for p in range(start, stop)] == held.positions.tolist()
    assert all(before[1] < after[0] for before, after in pairwise(found))
    assert ranges(held.positions[:0]) == ()


def test_a_fact_is_kept_with_its_neighbours() -> None:
    count = 1000
    mass = np.full(count, 0.001, np.float32)
    mass[400] = 5.0
    positions, seen = np.arange(count, dtype=np.int32), np.full(count, 8, np.int32)
    found = kept(positions, mass, seen, most=ALWAYS + POOL)
    side = POOL // 2
    assert found[SINKS:-WINDOW].tolist() == list(range(400 - side, 401 + side))


def test_old_cells_do_not_win_by_their_age() -> None:
    count = 1000
    positions = np.arange(count, dtype=np.int32)
    seen = np.linspace(100, 1, count).astype(np.int32)
    mass = seen.astype(np.float32)
    mass[600:607] *= 2  # half as old as the first, and worth twice as much
    found = kept(positions, mass, seen, most=ALWAYS + 7 + POOL - 1)
    assert set(range(600, 607)) <= set(found.tolist())


def test_a_mass_that_is_no_number_is_worth_nothing() -> None:
    count = 600
    mass = np.ones(count, np.float32)
    mass[100:110] = np.nan
    mass[110:120] = np.inf
    positions, seen = np.arange(count, dtype=np.int32), np.ones(count, np.int32)
    found = kept(positions, mass, seen, most=count - 10)
    side = POOL // 2  # the others are all alike, and share what they have with their neighbours
    gone = set(positions.tolist()) - set(found.tolist())
    assert gone == set(range(100 + side, 110 + side))


@pytest.mark.parametrize(
    ("text", "cells"), [("auto", 0), ("256", 256), ("04096", 4096), (str(MAX_CELLS), MAX_CELLS)]
)
def test_budgets_that_can_be_asked_for(text: str, cells: int) -> None:
    found = read_budget(text)
    assert found is not None
    assert found == Pruning(cells)
    assert read_budget(str(found)) == found


def test_off_asks_for_none() -> None:
    assert read_budget("off") is None


@pytest.mark.parametrize(
    "text", ["", "0", "255", "-1", "1e3", "Auto", " 512", "٥١٢", "9" * 5000, str(MAX_CELLS + 1)]
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_budget(text)
    assert caught.value.code == "bad_parameter"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("count", [-1, 1, 255, MAX_CELLS + 1])
def test_other_numbers_of_cells_are_refused(count: int) -> None:
    with pytest.raises(InvalidRequest):
        check(Pruning(count))
