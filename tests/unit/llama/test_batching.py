"""The plan of calls: complete, in order, and the same for a session whoever else is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.inference.backend import MAX_DECODE_ROWS, MAX_DRAFTS, PREFILL_CHUNK
from pyagent_node.inference.stepping.batching import (
    JOINT_SHAPES,
    Call,
    CallPlanner,
    Shape,
    StepShape,
    preference,
)
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

WIDTH_SETS = st.sets(st.integers(2, MAX_DECODE_ROWS)).map(lambda s: (1, *sorted(s)))
SHAPE_SETS = st.sets(st.sampled_from(JOINT_SHAPES)).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> list[StepShape]:
    seqs = draw(st.lists(st.integers(0, 20), unique=True, max_size=12))
    lengths = st.one_of(st.just(1), st.integers(1, 9), st.integers(1, 1400))
    got = []
    for seq in seqs:
        position, n = draw(st.integers(0, 2000)), draw(lengths)
        guesses = position > 0 and 1 < n <= MAX_DRAFTS + 1 and draw(st.booleans())
        got.append(StepShape(seq, position, n, n - 1 if guesses else 0))
    return got


def plan_calls(
    shapes: list[StepShape], widths: tuple[int, ...], joint: tuple[Shape, ...] = ()
) -> list[Call]:
    """Return the calls if all of every step is computed."""
    return list(iter(CallPlanner(shapes, preference(widths, joint)).next, None))


def rows_of(calls: list[Call], step: int) -> list[tuple[int, int]]:
    return [(p.offset, p.n) for call in calls for p in call if p.step == step]


@given(steps(), WIDTH_SETS, SHAPE_SETS)
def test_every_row_is_computed_once_and_in_order(
    shapes: list[StepShape], widths: tuple[int, ...], joint: tuple[Shape, ...]
) -> None:
    calls = plan_calls(shapes, widths, joint)
    for index, shape in enumerate(shapes):
        at = 0
        for offset, n in rows_of(calls, index):
            assert offset == at
            at += n
        assert at == shape.n


@given(steps(), WIDTH_SETS, SHAPE_SETS)
def test_small_calls_have_safe_shapes_and_neighbours(
    shapes: list[StepShape], widths: tuple[int, ...], joint: tuple[Shape, ...]
) -> None:
    for call in plan_calls(shapes, widths, joint):
        first = call[0]
        step = shapes[first.step]
        if len(call) == 1:
            prefill = first.n > MAX_DECODE_ROWS and not step.drafts
            assert prefill or step.position + first.offset == 0 or first.n in widths
            continue
        assert len({part.n for part in call}) == 1
        assert (len(call), first.n) in joint or (first.n == 1 and len(call) in widths)
        assert all(shapes[p.step].position + p.offset > 0 for p in call)
        seqs = [shapes[part.step].seq for part in call]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


@given(steps(), WIDTH_SETS, SHAPE_SETS)
def test_no_call_crosses_a_boundary_and_others_change_nothing_for_prefill(
    shapes: list[StepShape], widths: tuple[int, ...], joint: tuple[Shape, ...]
) -> None:
    calls = plan_calls(shapes, widths, joint)
    for call in calls:
        for part in call:
            first = shapes[part.step].position + part.offset
            last = first + part.n - 1
            assert first // PREFILL_CHUNK == last // PREFILL_CHUNK
    for index, shape in enumerate(shapes):
        long = [p for p in rows_of(calls, index) if p[1] > MAX_DECODE_ROWS]
        assert long == [p for p in rows_of(plan_calls([shape], (1,)), 0) if p[1] > MAX_DECODE_ROWS]


@given(steps(), WIDTH_SETS, SHAPE_SETS, st.data())
def test_what_was_dropped_is_not_computed_and_the_rest_is(
    shapes: list[StepShape], widths: tuple[int, ...], joint: tuple[Shape, ...], data: st.DataObject
) -> None:
    planner = CallPlanner(shapes, preference(widths, joint))
    done, dropped = [0] * len(shapes), set[int]()
    while (call := planner.next()) is not None:
        for part in call:
            assert part.step not in dropped
            assert part.offset == done[part.step]
            done[part.step] += part.n
        if data.draw(st.integers(0, 3)) == 0:
            dropped.add(call[0].step)
            planner.drop(call[0].step)
    left = [i for i, shape in enumerate(shapes) if done[i] < shape.n]
    assert set(left) <= dropped


def test_guesses_of_neighbours_go_together_in_safe_shapes() -> None:
    shapes = [StepShape(seq, 9, n, n - 1) for seq, n in ((3, 6), (4, 5), (6, 4), (5, 8))]
    calls = plan_calls(shapes, (1, 2, 4, 8), (Shape(4, 4), Shape(2, 2)))
    assert [[shapes[p.step].seq for p in call] for call in calls] == [
        [3, 4, 5, 6],
        [5],
        [3, 4],
        [3],
    ]
    assert [call[0].n for call in calls] == [4, 4, 1, 1]


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


@given(st.integers(0, 40), st.integers(9, 2000))
def test_a_prompt_that_begins_at_a_block_is_computed_up_to_the_next_boundary(
    block: int, n: int
) -> None:
    position = BLOCK_TOKENS * block
    calls = plan_calls([StepShape(0, position, n)], (1, 2, 4, 8))
    first = next(part for part in calls[0])
    assert first.n == min(n, PREFILL_CHUNK - position % PREFILL_CHUNK)
    whole = [part for (part,) in calls if part.n > MAX_DECODE_ROWS]
    assert all((position + part.offset) % PREFILL_CHUNK == 0 for part in whole[1:])
    assert sum(part.n for part in whole) > n - MAX_DECODE_ROWS - 1
