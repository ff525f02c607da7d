"""The head's shell: checks requests, runs sessions over the placements, streams their events."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import numpy as np
import trio

from pyagent_node.base.errors import Conflict, LimitExceeded, PyAgentError, error_from_info
from pyagent_node.base.limits import MAX_SESSIONS_PER_PEER, STEP_SECONDS
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import PREFILL_CHUNK
from pyagent_node.inference.backend_names import MAX_CLASS, MAX_CLASSES
from pyagent_node.inference.generation import (
    ChatMessage,
    GenerationEvent,
    GenerationRequest,
    LoadedModel,
    SessionView,
)
from pyagent_node.inference.kv.port import KvShelf, NullShelf
from pyagent_node.inference.pipeline.driver import Driver, Session, can_head, embedder
from pyagent_node.inference.pipeline.frames import Joined, Restored, Result, StageError
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.joining import missing
from pyagent_node.inference.pipeline.journal import JournalSink, SessionJournal
from pyagent_node.inference.pipeline.links import PipeLinks
from pyagent_node.inference.pipeline.making import PieceMaker
from pyagent_node.inference.pipeline.offers import Offers
from pyagent_node.inference.pipeline.origins import Origin
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.proposals import release
from pyagent_node.inference.pipeline.recovery import READY_SECONDS
from pyagent_node.inference.pipeline.requests import (
    check_request,
    new_journal,
    not_ready,
    plan_journal,
    plan_request,
    prompt_tokens,
)
from pyagent_node.inference.pipeline.restoring import worth_asking
from pyagent_node.inference.pipeline.session_views import session_views
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.pipeline.stage_service import StageService
from pyagent_node.inference.pipeline.stage_types import Outgoing, peer_lost

PREFILL_SHARE: Final = 0.5
"""What the last prompt counts in what is known of how long prompts take."""


def new_session_id() -> SessionId:
    """Return a fresh session id that no peer can guess."""
    return SessionId(secrets.token_hex(16))


class PipelineEngine:
    """Implements ``generation.Engine`` over the pipelines whose head this node can be.

    The owner calls :meth:`expect` for every placed model, :meth:`offer` when its head assets are
    there, :meth:`withdraw` when they are gone, and :meth:`forget` when it is placed no more.
    Requests for an expected model wait a while until it is offered.  Running sessions survive the
    loss of ranks, and move to a newer placement as soon as it is offered (see ``recovery``).
    """

    def __init__(
        self,
        peer_id: PeerId,
        links: PipeLinks,
        stages: StageService,
        *,
        session_ids: Callable[[], SessionId] = new_session_id,
        step_seconds: float = STEP_SECONDS,
        journal: JournalSink | None = None,
        wall: Callable[[], float] = time.time,
        speculators: Speculators | None = None,
        shelf: KvShelf | None = None,
    ) -> None:
        """``journal`` is told of every session; ``wall`` gives Unix seconds.

        ``shelf`` says which KV blocks can likely be had.
        """
        self._peer_id = peer_id
        self._links = links
        self._stages = stages
        self._session_ids = session_ids
        self._step_seconds = step_seconds
        self._journal = journal
        self._wall = wall
        self._speculators = speculators or Speculators()
        self._shelf = shelf or NullShelf()
        self.refused: Counter[str] = Counter()
        """Messages for sessions of this node that are not by one of their ranks."""
        self._prefill: dict[Digest, float] = {}
        """What a token of a prompt takes all ranks of a model together, in seconds."""
        self._served: dict[Digest, tuple[tuple[str, ...], tuple[Origin, ...]]] = {}
        """The exactness classes, and the ranks, of the last answer of each model."""
        self._offers = Offers()
        self._sessions: dict[SessionId, Session] = {}
        self._wires: dict[SessionId, Session] = {}
        """The sessions with an attempt, by its id on the wire."""
        self.pieces = PieceMaker(peer_id, self.send, session_ids)

    # ---- models ----------------------------------------------------------------------------

    def expect(self, digest: Digest, name: str) -> None:
        """Note that a model is placed, so that requests for it wait instead of failing."""
        self._offers.expect(digest, name)

    def forget(self, digest: Digest) -> None:
        """Note that a model is placed no more; its sessions end."""
        for session in self._of_model(digest):
            name = session.model.name
            self._fail(
                session,
                Conflict(f"{name} was unloaded while it answered.", code="model_unloaded"),
            )
        self._offers.forget(digest)

    def offer(self, model: HeadModel) -> None:
        """Make a placed model available; its running sessions go on over this placement."""
        placement = model.placement
        for session in self._of_model(placement.model):
            if session.core.epoch < placement.epoch:
                self.interrupt(session, _moved(session.core.epoch, placement.epoch))
        self._offers.offer(model)

    def withdraw(self, digest: Digest, epoch: int) -> None:
        """Take the model away if it is still offered under ``epoch``; its sessions wait."""
        self._offers.withdraw(digest, epoch)
        for session in self._of_model(digest):
            if session.core.epoch == epoch:
                self.interrupt(session, not_ready(session.model.name))

    def offered(self, digest: Digest) -> HeadModel | None:
        """Return what is offered of a model now."""
        return self._offers.get(digest)

    def models(self) -> list[LoadedModel]:
        """Return the models with a live placement that this node can be head for."""
        return [
            LoadedModel(m.name, m.placement.model, m.placement.n_ctx, m.created, m.placement)
            for m in self._offers
        ]

    def _of_model(self, digest: Digest) -> list[Session]:
        return [s for s in self._sessions.values() if s.core.plan.model == digest]

    # ---- sessions --------------------------------------------------------------------------

    def sessions(self) -> list[SessionView]:
        """Return the sessions this node heads, and those that its stages serve for others."""
        return session_views(
            self._sessions,
            [served for served in self._stages.sessions() if served.session not in self._wires],
            self._offers,
            head=self._peer_id,
            now=trio.current_time(),
        )

    def heads(self, wire: SessionId) -> bool:
        """Whether this node is the head of what is ``wire`` on the wire."""
        return wire in self._wires or self.pieces.makes(wire)

    def fail(self, session: SessionId, error: PyAgentError) -> bool:
        """End a session with ``error``, if this node heads it; its reader gets the error."""
        entry = self._sessions.get(session)
        if entry is None:
            return False
        self._fail(entry, error)
        return True

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Return the tokens of ``text`` without any added ones."""
        return await self._offers.find(model).tokenizer.tokenize(
            text, add_special=False, parse_special=False
        )

    async def chat(self, model: str, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the tokens of a conversation in the model's template."""
        return await self._offers.find(model).tokenizer.chat(messages)

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        """Run one generation; see ``generation.Engine``."""
        started = trio.current_time()
        model = await self._offers.wait_for(request.model, started + READY_SECONDS)
        check_request(request, len(model.vocabulary.pieces))
        self._speculators.resolve(request, model)
        prompt = await prompt_tokens(model.tokenizer, request)
        # Placed anew while the prompt was tokenised: use what holds now.
        model = await self._offers.wait_for(request.model, started + READY_SECONDS)
        session = request.session or self._session_ids()
        request = self._speculators.resolve(request, model)
        plan = plan_request(request, prompt, model, session=session, head=self._peer_id)
        if plan.join is not None and can_head(model):
            made = missing(plan.join_root, plan.join, prompt, model.placement, self._shelf)
            await self.pieces.make(model, plan.join_root, made, plan.join.skip)
            model = await self._offers.wait_for(request.model, trio.current_time() + READY_SECONDS)
        journal = new_journal(plan, prompt, request, created=self._wall())
        speculation = self._speculators.open(request, model)
        core = HeadCore(plan, prompt, model.vocabulary, started, speculation)
        async with self._run(core, model, journal) as events:
            yield events

    @asynccontextmanager
    async def resume(
        self, journal: SessionJournal, after: int
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        """Go on with a generation that another head began, as its head from now on.

        The events are those of the first time from the token with index ``after`` on: the tokens
        of the journal are shown again at once, with the same texts, and the rest is generated.
        ``after`` may lie beyond the journal, for a reader that had seen more than was saved.

        Raises what :meth:`generate` raises, :class:`CorruptData` (``bad_journal``),
        :class:`Conflict` (``session_exists``) and, for an ``after`` beyond the whole answer,
        :class:`LimitExceeded` (``beyond_end``).
        """
        started = trio.current_time()
        model = await self._offers.wait_for(journal.model, started + READY_SECONDS)
        plan = plan_journal(
            journal, model.vocabulary, after, head=self._peer_id, trained=model.n_ctx_train
        )
        prompt = np.array(journal.prompt, dtype=np.int32)
        core = HeadCore(plan, prompt, model.vocabulary, started)
        core.recall(journal.tokens, after, started)
        core.speculation = self._speculators.reopen(journal, model)
        async with self._run(core, model, journal) as events:
            yield events

    @asynccontextmanager
    async def _run(
        self, core: HeadCore, model: HeadModel, journal: SessionJournal
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        """Run a session while the context lasts, beginning over ``model``; releases its drafter."""
        try:
            async with self._running(core, model, journal) as events:
                yield events
        finally:
            await release(core.speculation)

    @asynccontextmanager
    async def _running(
        self, core: HeadCore, model: HeadModel, journal: SessionJournal
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        stable = core.plan.session
        if stable in self._sessions:
            raise Conflict(f"This node heads session {stable} already.", code="session_exists")
        if len(self._sessions) >= MAX_SESSIONS_PER_PEER:
            raise LimitExceeded(
                f"This node heads {len(self._sessions)} requests already.",
                code="too_many_sessions",
                remedy="Wait until another request has ended.",
                limit=MAX_SESSIONS_PER_PEER,
            )
        if not can_head(model):
            raise not_ready(model.name)
        session = self._sessions[stable] = Session(core, model)
        if self._journal is not None:
            self._journal.begin(journal)
        failure: BaseException | None = None
        try:
            self.begin(session, model)
            driver = Driver(self, session, self._offers, step_seconds=self._step_seconds)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.run)
                if core.speculation is not None:
                    nursery.start_soon(driver.prepare, core.speculation)
                try:
                    yield _Events(self, session)
                except BaseException as error:  # raised again below, not in a group
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            self._end(session)
        if failure is not None:
            raise failure

    # ---- what comes in ---------------------------------------------------------------------

    def on_result(self, sender: PeerId, message: Result) -> None:
        """Take a result; the next step leaves before this returns."""
        session = self._wires.get(message.session)
        if session is None or self._strange(session, sender):
            return
        core = session.core
        tail = core.attempt.tail if core.attempt is not None else None
        steps = core.on_result(sender, message, trio.current_time())
        if message.classes and sender == tail:
            classes = tuple(each[:MAX_CLASS] for each in message.classes[:MAX_CLASSES])
            self._served[core.plan.model] = classes, core.trail
        if core.fed is not None:
            self._learn(core.plan.model, *core.fed)
            core.fed = None
        for step in steps:
            self._links.send(step.peer, step.message, step.tail)
        if not steps or core.speculation is not None:
            session.work.set()
        if self._journal is not None and len(core.answer) > session.reported:
            self._journal.append(
                core.plan.session, session.reported, core.answer[session.reported :]
            )
            session.reported = len(core.answer)
        session.wake.set()

    def _learn(self, model: Digest, tokens: int, seconds: float) -> None:
        """Take note of how long a prompt took, if it was long enough to tell."""
        if tokens >= PREFILL_CHUNK // 2:
            each = seconds / tokens
            before = self._prefill.get(model, each)
            self._prefill[model] = before + PREFILL_SHARE * (each - before)

    def on_restored(self, sender: PeerId, message: Restored | Joined) -> None:
        """Take a rank's word on what it has of blocks."""
        if isinstance(message, Restored) and self.pieces.makes(message.session):
            self.pieces.on_restored(sender, message)
            return
        session = self._wires.get(message.session)
        if session is None or self._strange(session, sender):
            return
        if session.core.on_restored(sender, message):
            session.work.set()
            session.wake.set()

    def on_error(self, sender: PeerId, message: StageError) -> None:
        """Take a rank's error."""
        self.pieces.on_error(sender, message.session, error_from_info(message.error))
        session = self._wires.get(message.session)
        if session is not None and not self._strange(session, sender):
            self._settle(session, session.core.on_error(sender, message, trio.current_time()))

    def _strange(self, session: Session, sender: PeerId) -> bool:
        """Count a message of somebody who has no part in the session."""
        attempt = session.core.attempt
        strange = attempt is not None and sender not in attempt.peers
        if strange:
            self.refused["wrong_sender"] += 1
        return strange

    def peer_down(self, peer: PeerId) -> None:
        """Interrupt the sessions with a rank on ``peer``."""
        self.pieces.peer_down(peer, peer_lost(0, peer))
        for session in list(self._wires.values()):
            self._settle(session, session.core.peer_down(peer, trio.current_time()))

    def peer_up(self) -> None:
        """Let suspended sessions try again: a peer is there that was not."""
        self._offers.touch()

    def link_lost(self, peer: PeerId, *, control: bool) -> None:
        """Interrupt the sessions whose steps to rank 0 on ``peer`` may be lost."""
        if control:
            return
        self.pieces.peer_down(peer, peer_lost(0, peer))
        for session in list(self._wires.values()):
            attempt = session.core.attempt
            if attempt is not None and attempt.route.placement.ranks[0].peer_id == peer:
                self.interrupt(session, peer_lost(0, peer))

    # ---- for the driver and the readers ----------------------------------------------------

    def send(self, out: Outgoing) -> None:
        """Send a message."""
        self._links.send(out.peer, out.message, out.tail)

    def begin(self, session: Session, model: HeadModel) -> None:
        """Begin an attempt of a session that has none, under a new id on the wire.

        The first half of the id is that of the session, so that people can tell whose it is.
        """
        core = session.core
        wire = SessionId(core.plan.session[:16] + self._session_ids()[16:])
        blocks = worth_asking(
            core.plan.root,
            core.prompt,
            len(core.prompt) + len(core.answer),
            model.placement,
            self._shelf,
            known=core.known,
            last=self._served.get(model.placement.model, ((), ())),
        )
        now, seconds = trio.current_time(), self._prefill.get(core.plan.model, 0.0)
        embed = embedder(model)
        opening = core.begin(wire, model.placement, embed, now, blocks, seconds=seconds)
        session.wake.set()
        if opening:
            session.model, session.wire = model, wire
            self._wires[wire] = session
        for out in opening:
            self.send(out)

    def interrupt(self, session: Session, error: PyAgentError) -> None:
        """Take an error of the session's attempt."""
        self._settle(session, session.core.interrupt(error, trio.current_time()))

    def _settle(self, session: Session, closing: list[Outgoing]) -> None:
        """Send what closes an attempt, if that is due, and let the session's tasks look.

        Sending only queues, so this cannot be cancelled.
        """
        if closing and session.wire is not None:
            del self._wires[session.wire]
            self._links.forget(closing[0].peer, session.wire)
            session.wire = None
            for out in closing:
                self.send(out)
        session.work.set()
        session.wake.set()

    def _fail(self, session: Session, error: PyAgentError) -> None:
        session.core.fail(error)
        self._settle(session, [])
        self._offers.touch()  # it may be waiting there for ranks

    def _end(self, session: Session) -> None:
        """Forget a session, and close it on every rank."""
        core = session.core
        self._settle(session, core.close())
        del self._sessions[core.plan.session]
        if self._journal is not None:
            self._journal.end(core.plan.session, core.outcome)

    async def next_event(self, session: Session) -> GenerationEvent | None:
        """Return the next event of ``session``, or ``None`` when it is over."""
        core = session.core
        while True:
            event, room = core.take(trio.current_time())
            if room:
                session.work.set()
            if event is not None:
                return event
            if core.over:
                return None
            session.wake = trio.Event()
            await session.wake.wait()


class _Events:
    """The events of one session; one reader."""

    def __init__(self, engine: PipelineEngine, session: Session) -> None:
        self._engine = engine
        self._session = session

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> GenerationEvent:
        event = await self._engine.next_event(self._session)
        if event is None:
            raise StopAsyncIteration
        return event


def _moved(before: int, now: int) -> PyAgentError:
    return Conflict(
        f"The placement of epoch {before} has ended.",
        code="stale_epoch",
        remedy="The model was placed anew; ask again.",
        epoch=now,
        frame_epoch=before,
    )
