"""Bugs of sessions: what is computed, replayed, copied, shown and said."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus import session_changes
from pyagent_node.consensus.commands import Checkpoint, ClaimSession
from pyagent_node.consensus.state import State
from pyagent_node.inference.pipeline import engine, stage
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.frames import PipeMessage, Result, Tail
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_queue import StageQueue
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.pipeline.stage_types import Outgoing, StageLimits
from pyagent_node.node import journals, session_recovery
from pyagent_node.node.journal_book import JournalBook, Writer
from pyagent_node.node.journal_manifests import Manifests
from pyagent_node.node.journal_session import HeadedSession
from pyagent_node.node.journals import JournalKeeper
from pyagent_node.simulations.fault_kinds import Crash, Evil, KillRunner, Pause, SlowRunner

from .kit import Bug, both, same, swap

CALM = same(3, 4.0)
KILLS = same(4, 6.0, *(KillRunner(1.0 + 0.7 * turn, 1 + turn % 3) for turn in range(7)))
SLOW = SlowRunner(0.5, 12.0, 2, 3.0)
"""Answers take long enough for something to happen meanwhile."""
HEADS_DIE = same(5, 7.0, SLOW, *(Crash(3.0 + turn, turn % 2, 0.5) for turn in range(4)))
HEADS_PAUSE = same(5, 7.0, SLOW, Pause(2.5, 2.5, 0), Pause(2.6, 2.5, 1))


# ---- going on elsewhere -------------------------------------------------------------------------

_init = Attempt.__init__


def _one_token_short(self: Attempt, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self._total -= self._total > len(self._prompt)


_read_copy = session_recovery.read_copy


def _without_seed(*args: Any) -> SessionJournal:
    journal = _read_copy(*args)
    return msgspec.structs.replace(
        journal, sampling=msgspec.structs.replace(journal.sampling, seed=0)
    )


def _ignore_the_claim(self: JournalKeeper, session: HeadedSession) -> None:
    pass


_claim = session_changes.claim


def _claim_and_forget(state: State, command: ClaimSession) -> State:
    after = _claim(state, command)
    rest = {k: each for k, each in after.checkpoints.items() if k != command.session}
    return msgspec.structs.replace(after, checkpoints=rest)


_leave = JournalBook.leave


def _forget_with_the_stream(self: JournalBook, writer: Writer, at: float) -> None:
    _leave(self, writer, at)
    for session, copy in list(self._copies.items()):
        if copy.writer is writer:
            self.drop(session)


_choose_holders = journals.choose_holders


def _one_holder_fewer(session: SessionId, copies: int, *args: Any, **kwargs: Any) -> Any:
    return _choose_holders(session, copies - 1, *args, **kwargs)


# ---- what comes in ------------------------------------------------------------------------------

_on_result = Attempt.on_result


def _nobody_is_strange(self: engine.PipelineEngine, session: Any, sender: PeerId) -> bool:
    return False


def _from_anybody(self: Attempt, sender: PeerId, result: Result, now: float) -> Any:
    try:
        return _on_result(self, self.tail, result, now)
    except CorruptData:  # not due: somebody else's step was
        return None


_receive = StageCore.receive


def _of_any_epoch(
    self: StageCore, sender: PeerId, message: PipeMessage, tail: Tail, now: float
) -> list[Outgoing]:
    spec = self.spec
    self.spec = msgspec.structs.replace(spec, epoch=message.epoch)
    try:
        return _receive(self, sender, message, tail, now)
    finally:
        self.spec = spec


_check_step = stage.check_step


def _queue_any_number(*args: Any, limits: StageLimits, **kwargs: Any) -> Any:
    endless = StageLimits(steps_per_session=1 << 30, queued_steps=1 << 30)
    return _check_step(*args, limits=endless, **kwargs)


# ---- what is left -------------------------------------------------------------------------------


def _remove_but_keep_the_slot(self: StageQueue, session: ServedSession) -> None:
    session.closed = True
    self.steps -= len(session.queue)
    self.bytes -= sum(step.size for step in session.queue)
    session.queue.clear()
    for ready in (self._waiting, self._tokens, self._chunks):
        if session in ready:
            ready.remove(session)


_close = Attempt.close


def _close_first_rank(self: Attempt) -> list[Outgoing]:
    return _close(self)[:1]


# ---- what is said -------------------------------------------------------------------------------

_new_journal = engine.new_journal


def _new_journal_logged(*args: Any, **kwargs: Any) -> SessionJournal:
    journal = _new_journal(*args, **kwargs)
    logging.getLogger("pyagent_node.pipeline").debug("a session begins: %s", journal)
    return journal


_checkpoint = Manifests._checkpoint


def _checkpoint_with_text(self: Manifests, session: HeadedSession, expires: int) -> Checkpoint:
    at = session.pieces[0].find(b"TOP")
    return msgspec.structs.replace(
        _checkpoint(self, session, expires), blocks=(session.pieces[0][at : at + 32],)
    )


BUGS = (
    Bug(
        "replay_one_token_short",
        "after a failover the last token of the answer is not computed again",
        swap(Attempt, "__init__", _one_token_short),
        KILLS,
        frozenset({"tokens"}),
    ),
    Bug(
        "seed_not_carried_over",
        "whoever takes a session over samples with another seed",
        swap(session_recovery, "read_copy", _without_seed),
        HEADS_DIE,
        frozenset({"tokens"}),
        asks=0.4,
        within=5,
    ),
    Bug(
        "results_from_anybody",
        "a head takes results from nodes that do not hold the last rank",
        both(
            swap(engine.PipelineEngine, "_strange", _nobody_is_strange),
            swap(Attempt, "on_result", _from_anybody),
        ),
        same(5, 5.0, Evil(0.5, 4.0, 0, "false_result")),
        frozenset({"tokens"}),
        asks=0.3,
    ),
    Bug(
        "slot_not_freed",
        "a session that ends keeps its slot in the runner",
        swap(StageQueue, "remove", _remove_but_keep_the_slot),
        CALM,
        frozenset({"bounded"}),
    ),
    Bug(
        "later_ranks_not_closed",
        "only the first rank hears that a session is over",
        swap(Attempt, "close", _close_first_rank),
        CALM,
        frozenset({"bounded"}),
    ),
    Bug(
        "prompt_in_a_log_line",
        "a line of the program's log shows what was asked",
        swap(engine, "new_journal", _new_journal_logged),
        CALM,
        frozenset({"no secrets"}),
    ),
    Bug(
        "prompt_in_the_replicated_log",
        "a checkpoint carries the beginning of the prompt to every node's disk",
        swap(Manifests, "_checkpoint", _checkpoint_with_text),
        CALM,
        frozenset({"no secrets"}),
    ),
    Bug(
        "claim_ignored",
        "a head goes on with a session that another node took over",
        swap(JournalKeeper, "_check", _ignore_the_claim),
        HEADS_PAUSE,
        frozenset({"one head a session"}),
        asks=0.4,
        within=5,
    ),
    Bug(
        "session_forgotten_on_failover",
        "whoever takes a session over loses it from the log",
        swap(session_changes, "claim", _claim_and_forget),
        HEADS_DIE,
        frozenset({"sessions stay known"}),
        asks=0.4,
    ),
    Bug(
        "copies_die_with_the_stream",
        "a holder drops a head's journals when its connection to the head breaks",
        swap(JournalBook, "leave", _forget_with_the_stream),
        HEADS_DIE,
        frozenset({"sessions stay known"}),
        asks=0.4,
    ),
    Bug(
        "one_journal_copy_fewer",
        "a session's journal goes to one node less than the mesh wants",
        swap(journals, "choose_holders", _one_holder_fewer),
        same(4, 1.0),
        frozenset({"restored"}),
    ),
    Bug(
        "stale_epoch_accepted",
        "a stage takes frames of another epoch than its own",
        swap(StageCore, "receive", _of_any_epoch),
        same(5, 4.0, Evil(1.0, 2.0, 0, "stale_epoch")),
        frozenset({"sessions of their epoch"}),
    ),
    Bug(
        "queue_without_bound",
        "a stage lets any number of steps wait",
        swap(stage, "check_step", _queue_any_number),
        same(5, 3.0, Evil(1.0, 1.0, 0, "flood")),
        frozenset({"bounded"}),
    ),
)
