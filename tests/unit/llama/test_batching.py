"""The plan of calls: complete, in order, and the same for a session whoever else is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK
from pyagent_node.inference.llama.batching import Call, StepShape, plan_calls

WIDTH_SETS = st.sets(st.integers(2, MAX_DECODE_ROWS)).map(lambda s: (1, *sorted(s)))


@st.composite
def steps(draw: st.DrawFn) -> list[StepShape]:
    seqs = draw(st.lists(st.integers(0, 20), unique=True, max_size=12))
    lengths = st.one_of(st.just(1), st.integers(1, 9), st.integers(1, 1400))
    return [StepShape(seq, draw(st.integers(0, 2000)), draw(lengths)) for seq in seqs]


def rows_of(calls: list[Call], step: int) -> list[tuple[int, int]]:
    return [(p.offset, p.n) for call in calls for p in call if p.step == step]


@given(steps(), WIDTH_SETS)
def test_every_row_is_computed_once_and_in_order(
    shapes: list[StepShape], widths: tuple[int, ...]
) -> None:
    calls = plan_calls(shapes, widths)
    for index, shape in enumerate(shapes):
        at = 0
        for offset, n in rows_of(calls, index):
            assert offset == at
            at += n
        assert at == shape.n


@given(steps(), WIDTH_SETS)
def test_small_calls_have_safe_widths_and_neighbours(
    shapes: list[StepShape], widths: tuple[int, ...]
) -> None:
    for call in plan_calls(shapes, widths):
        width = sum(part.n for part in call)
        first = call[0]
        begins = shapes[first.step].position + first.offset == 0
        assert width in widths or (len(call) == 1 and (width > MAX_DECODE_ROWS or begins))
        seqs = [shapes[part.step].seq for part in call]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        if len(call) > 1:
            assert all(part.n == 1 for part in call)


@given(steps(), WIDTH_SETS)
def test_no_call_crosses_a_boundary_and_others_change_nothing_for_long_steps(
    shapes: list[StepShape], widths: tuple[int, ...]
) -> None:
    calls = plan_calls(shapes, widths)
    for call in calls:
        for part in call:
            first = shapes[part.step].position + part.offset
            last = first + part.n - 1
            assert first // PREFILL_CHUNK == last // PREFILL_CHUNK
    for index, shape in enumerate(shapes):
        if shape.n > 1:
            alone = plan_calls([shape], widths)
            assert rows_of(alone, 0) == rows_of(calls, index)


def test_single_rows_go_together_in_the_widest_safe_calls() -> None:
    shapes = [StepShape(seq, 7, 1) for seq in (5, 0, 1, 2, 9)]
    calls = plan_calls(shapes, (1, 2))
    assert [[shapes[p.step].seq for p in call] for call in calls] == [[0, 1], [2], [5], [9]]
    assert plan_calls([], (1,)) == []


def test_guesses_are_decode_rows_however_many() -> None:
    step = StepShape(0, 300, 25, drafts=24)
    assert [part for (part,) in plan_calls([step], (1, 2, 4, 8))] == [
        (0, 0, 8),
        (0, 8, 8),
        (0, 16, 8),
        (0, 24, 1),
    ]
