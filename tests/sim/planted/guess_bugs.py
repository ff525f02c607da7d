"""Bugs of guessing ahead: what is accepted, what is dropped, what is kept of a wrong guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from unittest import mock

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import PeerId
from pyagent_node.inference.backend import StepInput, StepOutput, TrimSequence
from pyagent_node.inference.pipeline import engine, requests, speculation
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.driver import Session
from pyagent_node.inference.pipeline.flights import Landed
from pyagent_node.inference.pipeline.frames import Result, Step
from pyagent_node.inference.pipeline.speculation import Speculation
from pyagent_node.inference.pipeline.stage_queue import Batch, StageQueue
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations import backend
from pyagent_node.simulations.fault_kinds import Crash

from .kit import Bug, both, same, swap
from .session_bugs import CALM, SLOW

HEADS_DIE = same(5, 7.0, SLOW, *(Crash(2.0 + turn, turn % 2, 0.5) for turn in range(5)))
OFTEN = 0.3


# ---- at the head --------------------------------------------------------------------------------

_on_result = Attempt.on_result


def _believe_the_guesses(
    self: Attempt, sender: PeerId, result: Result, now: float
) -> Landed | None:
    flight = self._flights[0] if self._flights else None
    if flight is not None and result.sampled and flight.guesses:
        sampled = (*map(Sampled, flight.guesses), result.sampled[-1])
        result = msgspec.structs.replace(result, sampled=sampled)
    return _on_result(self, sender, result, now)


def _stay_where_it_was(self: Attempt, sender: PeerId, result: Result, now: float) -> Landed | None:
    position = self.position
    landed = _on_result(self, sender, result, now)
    if landed is not None and landed.void:
        self.position = position
    return landed


_result = engine.PipelineEngine.on_result


def _journal_with_guesses(self: engine.PipelineEngine, sender: PeerId, message: Result) -> None:
    _result(self, sender, message)
    session: Session | None = self._wires.get(message.session)
    attempt = session.core.attempt if session is not None else None
    if session is not None and attempt is not None and attempt.ahead and self._journal is not None:
        guesses = [Sampled(token) for token in attempt.ahead]
        self._journal.append(session.core.plan.session, session.reported, guesses)
        session.reported += len(guesses)


_heard = Speculation.heard


def _hear_itself(self: Speculation, sampled: Sequence[Sampled], total: int) -> None:
    _heard(self, [Sampled(one.token ^ 1) for one in sampled], total)


async def _keep_the_drafter(spec: Speculation | None) -> None:
    pass


# ---- at the ranks -------------------------------------------------------------------------------

_take = StageQueue.take
_is_void = ServedSession.is_void


def _end_one_cell_short(self: StageQueue) -> Batch | None:
    batch = _take(self)
    if batch is None:
        return None
    ops = [
        TrimSequence(op.seq, op.start + 1) if isinstance(op, TrimSequence) else op
        for op in batch.ops
    ]
    return batch._replace(ops=tuple(ops))


def _never_void_at_the_tail(self: ServedSession, step: Step, first: int, *, tail: bool) -> bool:
    return _is_void(self, step, first, tail=False)


def _void_too_long(self: ServedSession, step: Step, first: int, *, tail: bool) -> bool:
    _, stop = self.cancelled
    late = stop > 0 and stop <= step.step < stop + 2
    return step.parent is not None and (late or _is_void(self, step, first, tail=tail))


# ---- in the runner ------------------------------------------------------------------------------


class _Grudge(list[int]):
    """A history that remembers wrong guesses."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []


_slot = backend._Slot.__init__
_step = backend.ToyRunner._step
_toy_sample = backend.toy_sample
_sample = backend.sample
_trim = backend._Slot.trim


def _slot_with_grudge(self: backend._Slot, layers: int, sampling: SamplingParams | None) -> None:
    _slot(self, layers, sampling)
    self.history = _Grudge()


def _step_with_grudge(self: backend.ToyRunner, step: StepInput) -> StepOutput:
    output = _step(self, step)
    right = len(output.sampled) - 1
    if step.sample and right < step.drafts:
        history = cast("_Grudge", self._slots[step.seq].history)
        history.kept.append(int(step.tokens[len(step.tokens) - step.drafts + right]))
    return output


def _sample_with_grudge(
    logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams
) -> Sampled:
    if not isinstance(history, _Grudge):
        return _toy_sample(logits, history, params)
    kept = len(history.kept)

    def sample(logits: Any, tokens: Any, position: int, **shape: Any) -> Any:
        return _sample(logits, tokens, position - kept, **shape)

    with mock.patch.object(backend, "sample", sample):
        return _toy_sample(logits, [*history.kept, *history], params)


def _trim_but_keep_a_cell(self: backend._Slot, start: int) -> None:
    states = self.before[start + 1] if start + 1 < len(self.before) else self.states
    if start < len(self.history):
        _trim(self, start)
        self.states = states


BUGS = (
    Bug(
        "wrong_guess_accepted",
        "a head takes all its guesses for right, whatever the last rank says",
        swap(Attempt, "on_result", _believe_the_guesses),
        CALM,
        frozenset({"tokens"}),
        asks=OFTEN,
        drafters=(),
    ),
    Bug(
        "steps_go_on_from_a_void_one",
        "a head does not go back to where the answer ends when steps in flight are void",
        swap(Attempt, "on_result", _stay_where_it_was),
        CALM,
        frozenset({"restored"}),
        asks=OFTEN,
        drafters=("quick", "slow"),
    ),
    Bug(
        "guesses_in_the_journal",
        "guesses in flight get into the journal, from which another head goes on",
        swap(engine.PipelineEngine, "on_result", _journal_with_guesses),
        HEADS_DIE,
        frozenset({"tokens"}),
        asks=OFTEN,
        drafters=("quick", "slow"),
    ),
    Bug(
        "drafter_told_something_else",
        "a drafter is told other tokens than those of the answer",
        swap(Speculation, "heard", _hear_itself),
        CALM,
        frozenset({"drafters hear the answer"}),
        asks=OFTEN,
        drafters=(),
    ),
    Bug(
        "drafter_not_closed",
        "a session that ends does not let its drafter go",
        swap(engine, "release", _keep_the_drafter),
        CALM,
        frozenset({"drafters hear the answer"}),
        asks=OFTEN,
        drafters=(),
    ),
    Bug(
        "guesses_not_looked_at",
        "guesses are sent as they come, tokens or not",
        both(  # from blocks, a session gets far enough between two bad guesses
            swap(speculation, "usable", lambda draft, **_: draft),
            swap(requests, "cache_root", lambda *_: b""),
        ),
        CALM,
        frozenset({"restored", "no error escapes"}),
        drafters=("lying",),
        asks=0.1,
    ),
    Bug(
        "trimmed_one_cell_short",
        "after a wrong guess ranks drop one cell less than they should",
        swap(StageQueue, "take", _end_one_cell_short),
        CALM,
        frozenset({"runners are asked rightly"}),
        asks=OFTEN,
        drafters=(),
    ),
    Bug(
        "void_step_computed",
        "the last rank computes a step whose parent was cut short",
        swap(ServedSession, "is_void", _never_void_at_the_tail),
        CALM,
        frozenset({"runners are asked rightly"}),
        asks=OFTEN,
        drafters=("quick", "slow"),
    ),
    Bug(
        "cancel_drops_a_live_step",
        "a cancellation also drops the steps after those that it names",
        swap(ServedSession, "is_void", _void_too_long),
        CALM,
        frozenset({"restored"}),
        asks=OFTEN,
        drafters=("quick", "slow"),
    ),
    Bug(
        "penalties_for_a_wrong_guess",
        "a runner's penalties count guesses that were wrong",
        both(
            swap(backend._Slot, "__init__", _slot_with_grudge),
            swap(backend.ToyRunner, "_step", _step_with_grudge),
            swap(backend, "toy_sample", _sample_with_grudge),
        ),
        CALM,
        frozenset({"tokens"}),
        asks=OFTEN,
        drafters=(),
    ),
    Bug(
        "cell_of_a_wrong_guess_kept",
        "a runner that is trimmed keeps the first cell that it should drop",
        swap(backend._Slot, "trim", _trim_but_keep_a_cell),
        CALM,
        frozenset({"tokens"}),
        asks=OFTEN,
        drafters=(),
    ),
)
