"""Which cells a prune keeps, and what is gathered of attention, against plain dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import Conflict, InvalidRequest, Unsupported
from pyagent_node.inference.backend import KvRange
from pyagent_node.inference.llama.cache_view import CacheView, _Plane
from pyagent_node.inference.stepping.attention import AttentionBook, RowMass
from pyagent_node.inference.stepping.pruning import check_watch, kept_cells, kept_positions
from pyagent_node.inference.stepping.sequences import SequenceLog

N_CTX = 24


def filled(n: int) -> SequenceLog:
    log = SequenceLog(3, N_CTX, None)
    log.append(0, np.arange(100, 100 + n, dtype=np.int32))
    return log


def ranges(positions: list[int]) -> tuple[tuple[int, int], ...]:
    """The fewest ranges that hold these positions, which ascend."""
    made: list[tuple[int, int]] = []
    for at in positions:
        if made and made[-1][1] == at:
            made[-1] = (made[-1][0], at + 1)
        else:
            made.append((at, at + 1))
    return tuple(made)


@given(st.data())
def test_pruning_growing_and_trimming_agree_with_a_dictionary(data: st.DataObject) -> None:
    log = SequenceLog(0, N_CTX, None)
    model: dict[int, int] = {}
    gone: dict[int, int] = {}
    for number in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(["append", "trim", "prune"]))
        end = max(model, default=-1) + 1
        if kind == "append":
            n = data.draw(st.integers(0, N_CTX - end))
            log.append(end, np.full(n, number, np.int32)) if n else None
            model |= {end + i: number for i in range(n)}
        elif kind == "trim":
            start = data.draw(st.integers(0, N_CTX))
            if start < end and start - 1 in gone:
                with pytest.raises(Conflict) as caught:
                    log.check_trim(start)
                assert caught.value.code == "kv_pruned"
                continue
            log.check_trim(start)
            log.trim(start)
            model = {p: t for p, t in model.items() if p < start}
            gone = {p: t for p, t in gone.items() if p < start and model}
        elif model:
            stay = sorted({*data.draw(st.sets(st.sampled_from(sorted(model)))), end - 1})
            log.prune(kept_cells(log, ranges(stay)))
            gone |= {p: t for p, t in model.items() if p not in stay}
            model = {p: model[p] for p in stay}
        assert log.positions.tolist() == sorted(model)
        assert log.tokens.tolist() == [model[p] for p in sorted(model)]
        assert sorted(log.history.tolist()) == sorted([*model.values(), *gone.values()])
        assert log.end == max(model, default=-1) + 1
        assert log.pruned is bool(gone)
        assert log.straight is (sorted(model) == list(range(len(model))) and not gone)


@pytest.mark.parametrize(
    "keep",
    [
        (),
        ((0, 0), (9, 10)),
        ((-1, 10),),
        ((5, 2), (9, 10)),
        ((0, 4), (3, 10)),
        ((6, 10), (0, 2)),
        ((0, 11),),
        ((0, 9),),
        ((0, 2**60),),
        ((0, 3), (9, 2**31 + 9)),
    ],
)
def test_ranges_that_are_none_are_refused(keep: tuple[tuple[int, int], ...]) -> None:
    log = filled(10)
    with pytest.raises(InvalidRequest) as caught:
        kept_cells(log, keep)
    assert caught.value.code == "kv_range"
    if keep:
        with pytest.raises(InvalidRequest):
            kept_positions(KvRange("rows", 0, 10, (), keep))


def test_what_is_gone_cannot_be_kept_a_second_time() -> None:
    log = filled(10)
    log.prune(kept_cells(log, ((0, 2), (8, 10))))
    with pytest.raises(InvalidRequest, match="no cell at position 2"):
        kept_cells(log, ((0, 3), (8, 10)))
    assert kept_cells(log, ((0, 2), (8, 10))).tolist() == [0, 1, 2, 3]
    assert kept_cells(log, ((9, 10),)).tolist() == [3]
    with pytest.raises(Conflict):
        log.check_whole()
    log.trim(0)
    log.check_whole()


def test_cells_whose_positions_were_shifted_stay() -> None:
    log = filled(10)
    log.shift(0, 10, 3)
    with pytest.raises(Unsupported) as caught:
        kept_cells(log, ((3, 13),))
    assert caught.value.code == "no_pruning"


def test_keeping_everything_changes_nothing() -> None:
    log = filled(10)
    log.prune(kept_cells(log, ((0, 4), (4, 10))))
    assert (log.pruned, log.straight, log.count) == (False, True, 10)


@pytest.mark.parametrize(("every", "window"), [(-1, 3), (1, -1), (2**31, 0), (1, 2**40)])
def test_numbers_of_a_watch_are_checked(every: int, window: int) -> None:
    with pytest.raises(InvalidRequest):
        check_watch(0, every, window)


def test_which_rows_are_measured() -> None:
    log = filled(0)
    book = AttentionBook(log, 1, every=3, window=4)

    def fed(n: int) -> list[int]:
        rows = book.picked(log.end, n)
        if rows:
            limits = np.arange(log.count + rows.start, log.count + rows.stop, dtype=np.int32) + 1
            book.add(log.end + rows.stop - 1, evenly(limits))
        log.append(log.end, np.zeros(n, np.int32))
        return list(rows)

    assert fed(10) == [6, 7, 8, 9]  # a piece of a prompt: the last ones
    assert [fed(1) for _ in range(7)] == [[], [], [0], [], [], [0], []]
    assert fed(3) == []
    assert fed(2) == [0]  # guesses behind the first row are not measured
    log.trim(18)
    book.trimmed()
    assert fed(1) == []
    assert fed(1) == []
    assert fed(1) == [0]


def evenly(limits: np.ndarray[tuple[int], np.dtype[np.int32]]) -> RowMass:
    """Rows that look at all that they see alike."""
    n = int(limits.max())
    mass = np.zeros((1, n), np.float32)
    for limit in limits.tolist():
        mass[:, :limit] += 1 / limit
    return RowMass(mass, mass[0].copy(), np.log(limits).sum(keepdims=True), limits)


@given(st.data())
def test_columns_go_with_their_cells(data: st.DataObject) -> None:
    log = SequenceLog(0, N_CTX, None)
    book = AttentionBook(log, 1, every=1, window=N_CTX)
    mass: dict[int, float] = {}
    seen: dict[int, int] = {}
    rows = 0
    for _ in range(data.draw(st.integers(1, 10))):
        kind = data.draw(st.sampled_from(["step", "dropped", "trim", "prune"]))
        if kind in {"step", "dropped"} and log.end < N_CTX:
            if not book.picked(log.end, 1):
                continue
            book.settle()
            book.add(log.end, evenly(np.array([log.count + 1], np.int32)))
            rows += 1
            for p in log.positions.tolist():
                mass[p] += 1 / (log.count + 1)
                seen[p] += 1
            if kind == "dropped":
                log.append(log.end, np.zeros(1, np.int32))
                log.trim(log.end - 1)
                book.trimmed()
                continue
            mass[log.end], seen[log.end] = 1 / (log.count + 1), 1
            log.append(log.end, np.zeros(1, np.int32))
        elif kind == "trim":
            start = data.draw(st.integers(0, N_CTX))
            log.trim(start)
            book.trimmed()
            mass = {p: m for p, m in mass.items() if p < start}
            seen = {p: n for p, n in seen.items() if p < start}
        elif kind == "prune" and log.count:
            held = log.positions.tolist()
            stay = sorted({*data.draw(st.sets(st.sampled_from(held))), held[-1]})
            kept = kept_cells(log, ranges(stay))
            log.prune(kept)
            book.pruned(kept)
            mass, seen = {p: mass[p] for p in stay}, {p: seen[p] for p in stay}
        found = book.result()
        assert found.rows == rows
        assert found.positions.tolist() == sorted(mass)
        assert found.seen.tolist() == [seen[p] for p in sorted(seen)]
        assert np.allclose(found.mass[0], [mass[p] for p in sorted(mass)], atol=1e-5)
        assert np.array_equal(found.mass[0], found.peak)


class _Locked:
    """Memory that cannot be given back."""

    asked = 0

    def release(self, offset: int, size: int) -> int | None:
        """Say why not."""
        self.asked += 1
        raise OSError(22, "Invalid argument")


def test_memory_that_is_locked_is_kept() -> None:
    tensor = _Locked()
    planes = [_Plane(tensor, 8)]  # type: ignore[arg-type]
    CacheView(planes, planes, 16).release(0, 4)
    assert tensor.asked == 1
