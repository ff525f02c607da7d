"""Drives one session at its head: feeds its attempts, watches them, and begins new ones.

One task a session.  The tokens of a running answer do not pass through it: a result is answered
with the next step where it comes in (see ``engine``).
"""

from __future__ import annotations

import math
from typing import Final, Protocol, cast

import numpy as np
import trio

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend import Activations
from pyagent_node.inference.pipeline.attempt import Attempt, Embed
from pyagent_node.inference.pipeline.flights import Chunk
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.offers import Offers
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.proposals import catch_up, prepare, propose
from pyagent_node.inference.pipeline.speculation import Ask, Move, Speculation
from pyagent_node.inference.pipeline.stage_types import Outgoing

LOOKUP_ROWS: Final = 64
"""Embedding rows looked up before other tasks get a turn."""


class Session:
    """A session and who waits for what of it.

    ``wire`` is the id of its attempt, ``reported`` the number of tokens that the journal knows.
    ``wake`` is for the reader of its events, ``work`` for its driver.
    """

    __slots__ = ("core", "model", "reported", "wake", "wire", "work")

    def __init__(self, core: HeadCore, model: HeadModel) -> None:
        self.core = core
        self.model = model
        self.wire: SessionId | None = None
        self.reported = len(core.answer)
        self.wake = trio.Event()
        self.work = trio.Event()


class Shell(Protocol):
    """What the driver asks of the engine."""

    def send(self, out: Outgoing) -> None:
        """Send a message."""
        ...

    def begin(self, session: Session, model: HeadModel) -> None:
        """Begin an attempt of a session that has none."""
        ...

    def interrupt(self, session: Session, error: PyAgentError) -> None:
        """Take an error of the session's attempt."""
        ...


class Driver:
    """The task of one session; run :meth:`run`."""

    def __init__(
        self, shell: Shell, session: Session, offers: Offers, *, step_seconds: float
    ) -> None:
        self._shell = shell
        self._session = session
        self._core = session.core
        self._offers = offers
        self._step_seconds = step_seconds

    async def prepare(self, spec: Speculation) -> None:
        """Let the drafter read the prompt, next to :meth:`run`."""
        await prepare(spec, self._core.prompt, self._core.answer)
        self._session.work.set()

    async def run(self) -> None:
        """Keep the session going until it is over."""
        core, session = self._core, self._session
        while not core.over:
            attempt = core.attempt
            if attempt is None:
                await self._recover()
                continue
            await self._feed(attempt)
            if core.speculation is not None:
                await self._speculate(core.speculation, attempt)
            if core.attempt is attempt and not core.over:
                await self._watch(attempt)
        session.wake.set()

    async def _feed(self, attempt: Attempt) -> None:
        """Send what may be sent of the journal now."""
        core = self._core
        while core.attempt is attempt and (chunk := core.next_chunk()) is not None:
            rows = await self._lookup(attempt, chunk)
            if core.attempt is not attempt or core.over:
                return
            self._shell.send(attempt.send_chunk(chunk, rows, trio.current_time()))

    async def _speculate(self, spec: Speculation, attempt: Attempt) -> None:
        """Send what may be guessed now, asking the drafter where that takes time."""
        core = self._core
        if spec.asked:
            await catch_up(spec, core.prompt, core.answer)
        while core.attempt is attempt and not core.over:
            move: Move = spec.ask
            spec.ask = None
            if move is None:
                move = core.next_move(trio.current_time())
            if isinstance(move, Ask):
                start = trio.current_time()
                draft = await propose(spec, move)
                now = trio.current_time()
                if core.attempt is not attempt:
                    return
                move = core.take_draft(move, draft, now - start, now)
                if move is None:
                    continue
            if move is None:
                return
            self._shell.send(move)

    async def _lookup(self, attempt: Attempt, chunk: Chunk) -> Activations | None:
        embed = attempt.embed
        if embed is None:
            return None
        tokens = attempt.tokens(chunk)
        parts: list[Activations] = []
        for at in range(0, len(tokens), LOOKUP_ROWS):
            parts.append(embed(tokens[at : at + LOOKUP_ROWS]))
            await trio.lowlevel.checkpoint()
            if self._core.attempt is not attempt:
                break  # its table may be closed by now
        return parts[0] if len(parts) == 1 else cast("Activations", np.concatenate(parts))

    async def _watch(self, attempt: Attempt) -> None:
        """Wait until there is something to do, and interrupt an attempt that hangs."""
        session = self._session
        session.work = trio.Event()
        if attempt.restoring is not None:
            with trio.move_on_at(attempt.restoring.until) as scope:
                await session.work.wait()
            if scope.cancelled_caught and attempt.restoring is not None:
                attempt.start(0)
            return
        deadline = attempt.last_progress if attempt.waiting else trio.current_time()
        with trio.move_on_at(deadline + self._step_seconds) as scope:
            await session.work.wait()
        late = trio.current_time() >= attempt.last_progress + self._step_seconds
        if scope.cancelled_caught and attempt.waiting and late:
            self._shell.interrupt(
                session,
                DeadlineExceeded(
                    f"No rank answered for {self._step_seconds:.0f} s.",
                    code="step_deadline",
                    remedy="See 'pyagent-node status' for the load of the ranks.",
                ),
            )

    async def _recover(self) -> None:
        """Wait for ranks to go on with, and begin an attempt on them."""
        core, session, patience = self._core, self._session, self._core.patience
        while not core.over:
            model = self._offers.get(core.plan.model)
            ready = model is not None and can_head(model)
            newer = ready and model is not None and model.placement.epoch > core.epoch
            now = trio.current_time()
            if now >= patience.until:
                core.give_up()
                return
            if model is not None and ready and (newer or now >= patience.retry_at):
                self._shell.begin(session, model)
                return
            with trio.move_on_at(min(patience.until, patience.retry_at if ready else math.inf)):
                await self._offers.changed()
                patience.retry_at = min(patience.retry_at, trio.current_time())


def can_head(model: HeadModel) -> bool:
    """Whether this node has all that the head of ``model`` needs."""
    return len(model.placement.ranks) == 1 or model.embeddings is not None


def embedder(model: HeadModel) -> Embed | None:
    """Return the embedding lookup for a placement; ``None`` where rank 0 does it itself."""
    if len(model.placement.ranks) == 1 or model.embeddings is None:
        return None
    return model.embeddings.rows
