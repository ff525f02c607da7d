"""Shapes are tried on the rows that want them, and what is not exact never shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.inference.backend import MAX_DECODE_ROWS, StepInput, StepOutput
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.stepping.batching import JOINT_SHAPES, Shape
from pyagent_node.inference.stepping.calls import CallRunner, LonePolicy
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog
from pyagent_node.inference.stepping.shapes import LONG, PATIENCE, ShapeBook

N_SEQ = 8
N_CTX = 4 * LONG
VOCAB = 50
LOADED = (1, 2, 4, 8)


def test_a_book_plans_with_what_passed_and_with_what_is_to_be_tried() -> None:
    book = ShapeBook(LOADED, failed=(), slow=(2,), n_seq=N_SEQ)
    assert {shape for shape in book.joint if shape.rows > 1} == {
        shape for shape in JOINT_SHAPES if shape.sequences <= N_SEQ
    }
    assert Shape(1, 7) in book.order
    assert Shape(1, 2) not in book.order
    assert Shape(2, 1) not in book.order
    assert all(book.is_safe(Shape(1, width), cells) for width in LOADED for cells in (9, 999))
    assert not book.is_safe(Shape(1, 7), 9)


def test_a_shape_passes_once_for_short_sequences_and_once_for_long_ones() -> None:
    book = ShapeBook(LOADED, failed=(), slow=(), n_seq=N_SEQ)
    shape = Shape(4, 4)
    book.note(shape, LONG, passed=True)
    assert book.is_safe(shape, 1)
    assert not book.is_safe(shape, LONG + 1)
    book.note(shape, LONG + 1, passed=False)
    assert not book.is_safe(shape, 1)
    assert shape not in book.order


def test_as_many_rows_as_failed_once_are_not_tried_however_they_are_spread() -> None:
    book = ShapeBook((1, 2, 4), failed=(8,), slow=(), n_seq=16)
    assert book.joint == (Shape(2, 2),)
    assert {Shape(1, 7), Shape(4, 1)} < set(book.order)
    assert not {Shape(8, 1), Shape(1, 8)} & set(book.order)
    assert ShapeBook((1, 2, 3), failed=(4, 8), slow=(), n_seq=16).joint == ()
    assert ShapeBook((1,), failed=(2, 3, 4, 8), slow=(), n_seq=1).order[-1] == Shape(1, 1)


class ToyContext:
    """A model whose logits are those of token and position, except in the shapes that are wrong."""

    n_embd = 1

    def __init__(self, wrong: Collection[Shape]) -> None:
        self.wrong = wrong
        self.cells: dict[int, int] = dict.fromkeys(range(N_SEQ), 0)
        self.calls: list[Shape] = []
        self._logits: list[NDArray[np.float32]] = []

    def decode(self, rows: Rows, out: NDArray[np.float32] | None, *, lone_threads: int) -> None:
        assert rows.tokens is not None
        assert lone_threads == 1
        seqs = np.unique(rows.seqs)
        shape = Shape(len(seqs), len(rows.seqs) // len(seqs))
        self.calls.append(shape)
        self._logits = []
        for seq, position, token in zip(rows.seqs, rows.positions, rows.tokens, strict=True):
            assert self.cells[int(seq)] == position, "cells are made in order"
            self.cells[int(seq)] += 1
            logits = np.zeros(VOCAB, np.float32)
            logits[answer(int(token), int(position))] = 1.0
            if shape in self.wrong:
                logits[0] = 2.0
            self._logits.append(logits)
        if out is not None:
            out[:, 0] = [row.argmax() for row in self._logits]

    def logits(self, row: int) -> NDArray[np.float32]:
        return self._logits[row]

    def drop(self, seq: int, start: int) -> None:
        self.cells[seq] = min(self.cells[seq], start)


def answer(token: int, position: int) -> int:
    return 1 + (7 * token + 3 * position) % (VOCAB - 1)


def chain(token: int, position: int, n: int) -> list[int]:
    """Return ``token`` and the ``n`` answers after it."""
    tokens = [token]
    for at in range(position, position + n):
        tokens.append(answer(tokens[-1], at))
    return tokens


class World:
    def __init__(self, wrong: Collection[Shape] = (), *, head: bool = True) -> None:
        self.context = ToyContext(wrong)
        self.head = head
        self.book = ShapeBook(LOADED, failed=(), slow=(), n_seq=N_SEQ)
        lone = LonePolicy(1, 1, companion=False)
        context = cast("LlamaContext", self.context)
        self.runner = CallRunner(context, self.book, lone, head=head)
        sampling = SamplingParams(seed=0, temperature=0)
        self.logs = [SequenceLog(seq, N_CTX, sampling) for seq in range(N_SEQ)]

    def decode(
        self, seqs: Sequence[int], rows: Sequence[Sequence[int]], *, drafts: int = 0
    ) -> list[StepOutput]:
        logs = [self.logs[seq] for seq in seqs]
        steps = [
            StepInput(log.seq, log.end, np.array(tokens, np.int32), None, self.head, drafts)
            for log, tokens in zip(logs, rows, strict=True)
        ]
        self.context.calls.clear()
        return self.runner.decode(steps, logs)

    def wish(self, *widths: int) -> None:
        """Have so many rows of one sequence come up as often as is needed for a trial."""
        for width in widths:
            for _ in range(PATIENCE):
                assert not self.book.is_due(Shape(1, width), 20)

    def begin(self, cells: int = 20) -> None:
        for seq in range(N_SEQ):
            self.decode([seq], [[seq] * cells])


def tokens_of(outputs: Sequence[StepOutput]) -> list[list[int]]:
    return [[sampled.token for sampled in output.sampled] for output in outputs]


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("shape", [Shape(8, 4), Shape(8, 1), Shape(3, 4), Shape(1, 7)])
def test_a_trial_gives_what_single_rows_give_whatever_comes_of_it(
    shape: Shape, wrong: bool
) -> None:
    world = World([shape] if wrong else [])
    world.wish(7)
    world.begin()
    for turn in range(3):
        seqs = range(shape.sequences)
        ends = [world.logs[seq].end for seq in seqs]
        rows = [chain(seq + turn, end, shape.rows - 1) for seq, end in zip(seqs, ends, strict=True)]
        outputs = world.decode(seqs, rows, drafts=shape.rows - 1)
        for seq, end, output in zip(seqs, ends, tokens_of(outputs), strict=True):
            assert output == chain(seq + turn, end, shape.rows)[1:]
            assert world.context.cells[seq] == world.logs[seq].end == end + shape.rows
        if turn == 0:
            assert world.context.calls[0] == shape
            assert len(world.context.calls) == 1 + max(shape.sequences, 7 * (shape.sequences == 1))
        else:
            assert (shape in world.context.calls) is not wrong
            assert wrong or len(world.context.calls) == 1


@pytest.mark.parametrize("good", range(5))
def test_a_wrong_guess_ends_a_trial_as_it_ends_any_call(good: int) -> None:
    world = World()
    world.wish(5)
    world.begin()
    for seqs in ([0], range(4)):
        rows = [(chain(5, world.logs[seq].end, good) + [0] * 4)[:5] for seq in seqs]
        ends = [world.logs[seq].end for seq in seqs]
        outputs = world.decode(seqs, rows, drafts=4)
        for seq, end, output in zip(seqs, ends, tokens_of(outputs), strict=True):
            assert output == chain(5, end, good + 1)[1:]
            assert world.context.cells[seq] == world.logs[seq].end == end + good + 1


def test_a_trial_that_is_cut_short_has_no_verdict() -> None:
    world = World([Shape(1, 5)])
    world.wish(5)
    world.begin()
    world.decode([0], [[9, 0, 0, 0, 0]], drafts=4)
    assert Shape(1, 5) in world.book.order
    world.decode([0], [chain(9, world.logs[0].end, 4)], drafts=4)
    assert Shape(1, 5) not in world.book.order


@pytest.mark.parametrize("good", range(8))
def test_rows_of_one_sequence_are_cut_into_safe_widths_until_a_trial_pays(good: int) -> None:
    world = World([Shape(1, 7)])
    world.begin()
    for turn in range(PATIENCE + 2):
        end = world.logs[0].end
        rows = (chain(9, end, good) + [0] * 7)[:7]
        (output,) = tokens_of(world.decode([0], [rows], drafts=6))
        right = min(good, 6)
        assert output == chain(9, end, right + 1)[1:]
        assert world.context.cells[0] == world.logs[0].end == end + right + 1
        cut = [Shape(1, 4), Shape(1, 2), Shape(1, 1)]
        if turn < PATIENCE:
            assert world.context.calls == cut[: 1 + (right > 3) + (right > 5)]
        elif turn == PATIENCE:
            assert world.context.calls[0] == Shape(1, 7)
    assert (Shape(1, 7) in world.book.order) is (good < 6)


def test_a_width_that_passed_for_short_sequences_is_not_used_for_long_ones() -> None:
    book = ShapeBook(LOADED, failed=(), slow=(), n_seq=N_SEQ)
    book.note(Shape(1, 7), LONG, passed=True)
    assert [book.safe_width(7, cells) for cells in (0, LONG - 7, LONG - 6)] == [7, 7, 4]
    assert [book.safe_width(rows, 999) for rows in (1, 2, 3, 7, 8)] == [1, 2, 2, 4, 8]


def test_prompts_are_no_trials() -> None:
    world = World([Shape(1, 9), Shape(1, 5)])
    world.decode([0], [[1] * 5])
    world.decode([0], [[1] * (MAX_DECODE_ROWS + 1)])
    assert world.context.calls == [Shape(1, 9)]


def test_activations_come_out_of_trials_as_well() -> None:
    world = World([Shape(4, 4)], head=False)
    world.begin()
    rows = [[seq, 1, 2, 3] for seq in range(4)]
    for _ in range(2):
        at = world.logs[0].end
        for tokens, output in zip(rows, world.decode(range(4), rows), strict=True):
            assert output.activations is not None
            expected = [answer(token, at + i) for i, token in enumerate(tokens)]
            assert output.activations[:, 0].tolist() == expected
            assert output.sampled == ()


def test_not_a_number_is_no_reason_to_give_a_shape_up() -> None:
    world = World(head=False)
    world.begin()
    plain = world.context.decode

    def hostile(rows: Rows, out: NDArray[np.float32] | None, *, lone_threads: int) -> None:
        plain(rows, out, lone_threads=lone_threads)
        assert out is not None
        out[:] = np.nan

    world.context.decode = hostile  # type: ignore[method-assign]
    world.decode(range(4), [[1, 2, 3, 4]] * 4)
    assert world.book.is_safe(Shape(4, 4), 24)
