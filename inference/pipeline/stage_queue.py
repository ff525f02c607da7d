"""Who gets a slot and what is computed next: the scheduling half of a stage's pure core.

Sessions wait for a slot in order of arrival.  Single tokens of different sessions are computed
together; a prefill chunk is computed alone, for it takes many times as long.  The two kinds take
turns, and within a kind the session that has waited longest goes first.  (What a session gets does
not depend on its company: see the ``Backend`` port, which is also why the lowest slot goes first.)
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

from pyagent_node.inference.backend import (
    Activations,
    FreeSequence,
    OpenSequence,
    SequenceOp,
    StepInput,
    Tokens,
)
from pyagent_node.inference.pipeline.frames import OpenSession, Step
from pyagent_node.inference.sampling import SamplingParams


class QueuedStep(NamedTuple):
    """A step that waits; ``size`` counts the bytes of its tail."""

    message: Step
    tokens: Tokens
    activations: Activations | None
    size: int


class ServedSession:
    """One session on this stage; ``seq`` is its slot, ``None`` while it waits for one."""

    __slots__ = (
        "closed",
        "epoch",
        "first_sample",
        "generated",
        "head",
        "id",
        "in_flight",
        "last_seen",
        "next_position",
        "next_step",
        "positions",
        "prompt_tokens",
        "queue",
        "sampling",
        "seq",
    )

    def __init__(self, message: OpenSession, now: float) -> None:
        self.id = message.session
        self.epoch = message.epoch
        self.head = message.head
        self.positions = message.positions
        self.prompt_tokens = message.prompt_tokens
        self.sampling: SamplingParams = message.sampling
        self.seq: int | None = None
        self.queue: deque[QueuedStep] = deque()
        self.in_flight = False
        self.closed = False
        self.next_position = 0
        self.next_step = 0
        self.generated = 0
        self.first_sample: float | None = None
        self.last_seen = now


class Batch(NamedTuple):
    """Work for the runner: sequence operations first, then one decode of ``inputs``."""

    ops: tuple[SequenceOp, ...]
    inputs: tuple[StepInput, ...]
    work: tuple[tuple[ServedSession, QueuedStep], ...]


class StageQueue:
    """Slots, waiting steps and turns of one stage.

    ``sampling`` says whether the runner has the output head: only then it is told sampling
    parameters and asked for tokens.
    """

    def __init__(self, *, slots: int, width: int, sampling: bool) -> None:
        self.steps = 0
        self.bytes = 0
        self._width = width
        self._sampling = sampling
        self._slots: list[int] = list(range(slots))
        self._waiting: deque[ServedSession] = deque()
        self._ops: list[SequenceOp] = []
        self._tokens: deque[ServedSession] = deque()
        self._chunks: deque[ServedSession] = deque()
        self._chunk_turn = False

    @property
    def waiting(self) -> int:
        """Sessions without a slot."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`take` would return something."""
        return bool(self._ops or self._tokens or self._chunks)

    def admit(self, session: ServedSession) -> None:
        """Give ``session`` a slot, now or when its turn comes."""
        self._waiting.append(session)
        self._grant()

    def push(self, session: ServedSession, step: QueuedStep) -> None:
        """Add the next step of ``session``."""
        session.queue.append(step)
        self.steps += 1
        self.bytes += step.size
        if len(session.queue) == 1:
            self._make_ready(session)

    def finished(self, session: ServedSession) -> None:
        """Note that the step of ``session`` in the last batch was computed."""
        session.in_flight = False
        if session.queue:
            self._make_ready(session)

    def remove(self, session: ServedSession) -> None:
        """Drop a session's queued steps and free its slot.

        Even a slot that is being computed on is given away at once: the runner takes operations
        between decodes, so it is freed and opened again before its next use.
        """
        session.closed = True
        self.steps -= len(session.queue)
        self.bytes -= sum(step.size for step in session.queue)
        session.queue.clear()
        if session.seq is None:
            self._waiting.remove(session)
            return
        for ready in (self._tokens, self._chunks):
            if session in ready:
                ready.remove(session)
        self._ops.append(FreeSequence(session.seq))
        heapq.heappush(self._slots, session.seq)
        self._grant()

    def clear_ops(self) -> None:
        """Forget the pending sequence operations: there is no runner to carry them out."""
        self._ops.clear()

    def take(self) -> Batch | None:
        """Take the work that is due now."""
        work: list[tuple[ServedSession, QueuedStep]] = []
        for chunks in (self._chunk_turn, not self._chunk_turn):
            ready = self._chunks if chunks else self._tokens
            width = 1 if chunks else self._width
            while ready and len(work) < width:
                session = ready.popleft()
                session.in_flight = True
                step = session.queue.popleft()
                self.steps -= 1
                self.bytes -= step.size
                work.append((session, step))
            if work:
                self._chunk_turn = not chunks
                break
        if not work and not self._ops:
            return None
        ops = tuple(self._ops)
        self._ops.clear()
        inputs = tuple(
            StepInput(
                _slot(s),
                q.message.position,
                q.tokens,
                q.activations,
                q.message.sample and self._sampling,
            )
            for s, q in work
        )
        return Batch(ops, inputs, tuple(work))

    def _make_ready(self, session: ServedSession) -> None:
        if session.seq is None or session.in_flight:
            return
        chunk = session.queue[0].message.n > 1
        (self._chunks if chunk else self._tokens).append(session)

    def _grant(self) -> None:
        while self._slots and self._waiting:
            session = self._waiting.popleft()
            session.seq = heapq.heappop(self._slots)
            self._ops.append(
                OpenSequence(session.seq, session.sampling if self._sampling else None)
            )
            if session.queue:
                self._make_ready(session)


def _slot(session: ServedSession) -> int:
    assert session.seq is not None, "only sessions with a slot become ready"
    return session.seq
