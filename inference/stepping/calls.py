"""Computing the calls of a plan: rows in, cells noted, activations and sampled tokens out.

A call in a shape that was not tried yet is a trial, see ``shapes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.backend import Activations, StepInput, StepOutput
from pyagent_node.inference.sampling import Sampled
from pyagent_node.inference.stepping.batching import (
    Call,
    CallPlanner,
    Part,
    Shape,
    StepShape,
    is_prefill,
)
from pyagent_node.inference.stepping.rows import Rows, call_rows, with_companion
from pyagent_node.inference.stepping.sequences import SequenceLog
from pyagent_node.inference.stepping.shapes import LONG, ShapeBook
from pyagent_node.native import sample

_NO_LOGPROB: Final = -1


class LonePolicy(NamedTuple):
    """How a call of a single row is computed.

    ``long_threads`` counts beyond :data:`LONG` cells; with ``companion`` the row is computed there
    next to a copy of itself that is dropped afterwards, which keeps llama.cpp from splitting.
    """

    short_threads: int
    long_threads: int
    companion: bool


class Computer(Protocol):
    """Computes rows of a slice over the cells of its sequences, and keeps those cells."""

    @property
    def n_embd(self) -> int:
        """Length of a row of activations."""
        ...

    def decode(self, rows: Rows, out: Activations | None, *, lone_threads: int) -> None:
        """Compute one call; ``out`` of shape (n, n_embd) gets what leaves a slice without head.

        ``lone_threads`` is for a single row.  Raises :class:`LimitExceeded` (``kv_full``) and
        :class:`Unavailable` (``decode_failed``); the cells of the call are then not there.
        """
        ...

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return the logits of a wanted row of the last call, shape (n_vocab,)."""
        ...

    def drop(self, seq: int, start: int) -> None:
        """Remove the cells of ``seq`` at positions ``[start, ...)``."""
        ...


class CallRunner:
    """Computes steps on a context; ``head`` when logits come out of it instead of activations."""

    def __init__(
        self, context: Computer, shapes: ShapeBook, lone: LonePolicy, *, head: bool
    ) -> None:
        self._context = context
        self._shapes = shapes
        self._lone = lone
        self._head = head

    def decode(self, steps: Sequence[StepInput], logs: Sequence[SequenceLog]) -> list[StepOutput]:
        """Compute checked steps without trees, of distinct sequences; errors as for the port."""
        work = _Work(steps, logs, self._context, head=self._head)
        planner = CallPlanner(
            [StepShape(step.seq, step.position, len(step.tokens), step.drafts) for step in steps],
            self._shapes.order,
        )
        while (call := planner.next()) is not None:
            cells = max(work.cells(part) for part in call)
            shape = Shape(len(call), call[0].n)
            if work.is_prefill(call) or self._shapes.is_safe(shape, cells):
                self._compute(call, work)
            elif self._shapes.is_due(shape, cells):
                self._try(call, shape, work, cells)
                planner.use(self._shapes.order)
            else:
                self._cut(call[0], work)
            for part in call:
                if work.is_refuted(part):
                    planner.drop(part.step)
        return work.outputs()

    def _compute(self, call: Call, work: _Work) -> None:
        rows = call_rows(call, work.steps)
        out = work.place(call)
        self._run(rows, out, work.logs[call[0].step])
        work.note(call, out if len(call) > 1 else None)

    def _cut(self, part: Part, work: _Work) -> None:
        """Compute rows of one sequence in safe widths, up to the first guess that is wrong."""
        log, at, stop = work.logs[part.step], part.offset, part.offset + part.n
        while at < stop:
            piece = Part(part.step, at, self._shapes.safe_width(stop - at, log.count))
            self._compute((piece,), work)
            at += piece.n
            if work.is_refuted(piece):
                return

    def _try(self, call: Call, shape: Shape, work: _Work, cells: int) -> None:
        """Compute a call in its shape and in safe ones; the latter counts, and both are compared.

        Without a verdict when a guess is wrong before the last row was compared.
        """
        context, log = self._context, work.logs[call[0].step]
        together = self._rows(call, work, log)
        for part in call:
            context.drop(work.steps[part.step].seq, work.start(part))
        at, same = 0, True
        for part in call if shape.sequences > 1 else _single_rows(call[0]):
            alone = self._rows((part,), work, work.logs[part.step])
            same = same and _bits_equal(alone, together[at : at + part.n])
            at += part.n
            work.note((part,), None if self._head else alone)
            if shape.sequences == 1 and at < shape.rows and work.is_refuted(part):
                return
        self._shapes.note(shape, cells, passed=same)

    def _rows(self, call: Call, work: _Work, log: SequenceLog) -> NDArray[np.float32]:
        """Compute a call and return what comes out for each of its rows, wanted or not."""
        rows = call_rows(call, work.steps)
        n = len(rows.seqs)
        out = None if self._head else np.empty((n, self._context.n_embd), np.float32)
        self._run(rows._replace(wanted=np.ones(n, np.int8)), out, log)
        return out if out is not None else np.stack([self._context.logits(i) for i in range(n)])

    def _run(self, rows: Rows, out: Activations | None, log: SequenceLog) -> None:
        lone = self._lone
        if len(rows.seqs) > 1 or log.count < LONG:
            self._context.decode(rows, out, lone_threads=lone.short_threads)
        elif not lone.companion:
            self._context.decode(rows, out, lone_threads=lone.long_threads)
        else:
            pair = np.empty((2, self._context.n_embd), np.float32) if out is not None else None
            self._context.decode(with_companion(rows), pair, lone_threads=1)
            self._context.drop(log.seq, int(rows.positions[0]) + 1)
            if out is not None and pair is not None:
                out[0] = pair[0]


class _Work:
    """Steps on their way: what of them was computed and what came out."""

    def __init__(
        self,
        steps: Sequence[StepInput],
        logs: Sequence[SequenceLog],
        context: Computer,
        *,
        head: bool,
    ) -> None:
        self.steps = steps
        self.logs = logs
        self._context = context
        self._outs: list[Activations | None] = [
            None if head else np.empty((len(step.tokens), context.n_embd), np.float32)
            for step in steps
        ]
        self._sampled: list[tuple[Sampled, ...]] = [()] * len(steps)

    def start(self, part: Part) -> int:
        """Return the position of a part's first row."""
        return self.steps[part.step].position + part.offset

    def cells(self, part: Part) -> int:
        """Return how many cells a part's sequence has with the part."""
        return self.logs[part.step].count + part.n

    def is_prefill(self, call: Call) -> bool:
        """Whether the rows of a call go together because they are a piece of a prompt."""
        first = call[0]
        return is_prefill(self.steps[first.step].drafts, self.start(first), first.n)

    def place(self, call: Call) -> Activations | None:
        """Return where the activations of a call are to go; ``None`` when there are none."""
        whole = self._outs[call[0].step]
        if whole is None or len(call) == 1:
            return None if whole is None else whole[call[0].offset : call[0].offset + call[0].n]
        return np.empty((sum(part.n for part in call), self._context.n_embd), np.float32)

    def note(self, call: Call, out: Activations | None) -> None:
        """Note the cells and results of the call that was computed last.

        ``out`` are its activations where they are not in :meth:`place` already.
        """
        at = 0
        for part in call:
            step, log, row = self.steps[part.step], self.logs[part.step], at
            at += part.n
            if step.drafts and step.sample:
                self._sampled[part.step] += self._verify(step, log, part, row)
                continue
            stop = part.offset + part.n
            log.append(step.position + part.offset, step.tokens[part.offset : stop])
            target = self._outs[part.step]
            if target is not None and out is not None:
                target[part.offset : stop] = out[row:at]
            if step.sample and stop == len(step.tokens):
                self._sampled[part.step] = (_sample(log, self._context.logits(at - 1)),)

    def _verify(
        self, step: StepInput, log: SequenceLog, part: Part, row: int
    ) -> tuple[Sampled, ...]:
        """Note a part's rows, from ``row`` of the call on, up to the first guess that is wrong."""
        got: list[Sampled] = []
        stop = part.offset + part.n
        for index in range(part.offset, stop):
            log.append(step.position + index, step.tokens[index : index + 1])
            if index < len(step.tokens) - step.drafts - 1:
                continue
            got.append(_sample(log, self._context.logits(row + index - part.offset)))
            if index + 1 < len(step.tokens) and got[-1].token != step.tokens[index + 1]:
                if index + 1 < stop:
                    self._context.drop(log.seq, log.end)
                break
        return tuple(got)

    def is_refuted(self, part: Part) -> bool:
        """Whether a guess up to the end of a part that was computed, or the next, is wrong."""
        step, sampled, stop = self.steps[part.step], self._sampled[part.step], part.offset + part.n
        if not step.drafts or not sampled or stop == len(step.tokens):
            return False
        known = len(step.tokens) - step.drafts + len(sampled) - 1
        return known < stop or sampled[-1].token != int(step.tokens[stop])

    def outputs(self) -> list[StepOutput]:
        """Return what came out of each step."""
        return [StepOutput(*result) for result in zip(self._outs, self._sampled, strict=True)]


def _sample(log: SequenceLog, logits: NDArray[np.float32]) -> Sampled:
    params = log.sampling
    assert params is not None, "checked with the step"
    try:
        token, logprob, top = sample(
            logits,
            log.history,
            log.end,
            seed=params.seed,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            bias_tokens=log.bias.tokens,
            bias_values=log.bias.values,
            top_logprobs=params.top_logprobs if params.logprobs else _NO_LOGPROB,
            **({"noisy": True} if params.noisy_top else {}),
        )
    except ValueError as error:
        raise CorruptData(f"No token can be sampled: {error}.", code="not_finite") from None
    return Sampled(token, logprob if params.logprobs else None, tuple(top))


def _single_rows(part: Part) -> Call:
    return tuple(Part(part.step, part.offset + i, 1) for i in range(part.n))


def _bits_equal(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Compare bits: the NaN of hostile activations must not look like a failure of the shape."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))
