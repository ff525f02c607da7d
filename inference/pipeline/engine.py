"""The head's shell: checks requests, runs sessions over the placements, streams their events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, cast

import numpy as np
import trio

from pyagent_node.base.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.limits import MAX_SESSIONS_PER_PEER, STEP_SECONDS
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import Activations, Tokens
from pyagent_node.inference.generation import (
    GenerationEvent,
    GenerationRequest,
    LoadedModel,
    SessionView,
)
from pyagent_node.inference.pipeline.frames import Result, StageError
from pyagent_node.inference.pipeline.head import Chunk, HeadCore, HeadPlan
from pyagent_node.inference.pipeline.links import PipeLinks
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.requests import check_request, prompt_tokens
from pyagent_node.inference.pipeline.stage_service import StageService
from pyagent_node.inference.pipeline.stage_types import Outgoing, peer_lost

LOOKUP_ROWS: Final = 64
"""Embedding rows looked up before other tasks get a turn."""
RETRY_SECONDS: Final = 0.25
"""Pause before a request that found a rank restarting is sent again."""
READY_SECONDS: Final = 30.0
"""How long a request waits for a rank to come back before its error is shown."""
_PASSING: Final = frozenset({"stage_not_ready", "stale_epoch"})
"""Errors that a restart or a new placement causes, and that pass."""


def new_session_id() -> SessionId:
    """Return a fresh session id that no peer can guess."""
    return SessionId(secrets.token_hex(16))


class _Session:
    __slots__ = ("core", "model", "request", "wake")

    def __init__(self, core: HeadCore, model: HeadModel, request: GenerationRequest) -> None:
        self.core = core
        self.model = model
        self.request = request
        self.wake = trio.Event()


class PipelineEngine:
    """Implements ``generation.Engine`` over the pipelines whose head this node can be.

    The owner calls :meth:`expect` for every placed model, :meth:`offer` when its head assets are
    there, :meth:`withdraw` when they are gone, and :meth:`forget` when it is placed no more.
    Requests for an expected model wait a while until it is offered.
    """

    def __init__(
        self,
        peer_id: PeerId,
        links: PipeLinks,
        stages: StageService,
        *,
        session_ids: Callable[[], SessionId] = new_session_id,
        step_seconds: float = STEP_SECONDS,
    ) -> None:
        self._peer_id = peer_id
        self._links = links
        self._stages = stages
        self._session_ids = session_ids
        self._step_seconds = step_seconds
        self._models: dict[Digest, HeadModel] = {}
        self._expected: dict[Digest, str] = {}
        self._changed = trio.Event()
        self._sessions: dict[SessionId, _Session] = {}
        self._running = 0

    # ---- models ----------------------------------------------------------------------------

    def expect(self, digest: Digest, name: str) -> None:
        """Note that a model is placed, so that requests for it wait instead of failing."""
        self._expected[digest] = name

    def forget(self, digest: Digest) -> None:
        """Note that a model is placed no more."""
        self._expected.pop(digest, None)
        self._touch()

    def offer(self, model: HeadModel) -> None:
        """Make a placed model available; replaces an earlier placement of it."""
        self._models[model.placement.model] = model
        self._touch()

    def withdraw(self, digest: Digest, epoch: int) -> None:
        """Take the model away if it is still offered under ``epoch``."""
        model = self._models.get(digest)
        if model is not None and model.placement.epoch == epoch:
            del self._models[digest]

    def models(self) -> list[LoadedModel]:
        """Return the models with a live placement that this node can be head for."""
        return [
            LoadedModel(m.name, m.placement.model, m.placement.n_ctx, m.created, m.placement)
            for m in self._models.values()
        ]

    def _touch(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait_for(self, name: str, until: float) -> HeadModel:
        """Return a model, waiting until a time for one that is expected."""
        with trio.move_on_at(until):
            while True:
                try:
                    return self._find(name)
                except Unavailable:
                    await self._changed.wait()
        return self._find(name)

    def _find(self, name: str) -> HeadModel:
        for model in self._models.values():
            if name in (model.name, model.placement.model):
                return model
        for digest, expected in self._expected.items():
            if name in (expected, digest):
                raise Unavailable(
                    f"{expected} is placed, but this node cannot be its head yet.",
                    code="head_not_ready",
                    remedy="Ask again in a moment; see 'pyagent-node status'.",
                )
        known = ", ".join(sorted(m.name for m in self._models.values())) or "none"
        raise NotFound(
            f"Model {name[:200]!r} is not loaded; loaded are: {known}.",
            code="model_not_found",
            remedy="Load it with 'pyagent-node model load'.",
        )

    # ---- sessions --------------------------------------------------------------------------

    def sessions(self) -> list[SessionView]:
        """Return the sessions this node heads, and those that its stages serve for others."""
        now = trio.current_time()
        views = {
            session: SessionView(
                session,
                entry.model.name,
                entry.core.plan.placement.epoch,
                self._peer_id,
                len(entry.core.prompt),
                entry.core.generated,
                _rate(entry.core.generated, entry.core.first_token, now),
            )
            for session, entry in self._sessions.items()
        }
        for served in self._stages.sessions():
            if served.session not in views:
                model = self._models.get(served.model)
                views[served.session] = SessionView(
                    served.session,
                    model.name if model else served.model,
                    served.epoch,
                    served.head,
                    served.prompt_tokens,
                    served.generated,
                    _rate(served.generated, served.first_sample, served.last_seen),
                )
        return list(views.values())

    def heads(self, session: SessionId) -> bool:
        """Whether this node is the head of ``session``."""
        return session in self._sessions

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Return the tokens of ``text`` without any added ones."""
        return await self._find(model).tokenizer.tokenize(
            text, add_special=False, parse_special=False
        )

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        """Run one generation; see ``generation.Engine``."""
        started = trio.current_time()
        model = await self._wait_for(request.model, started + READY_SECONDS)
        check_request(request, len(model.vocabulary.pieces))
        prompt = await prompt_tokens(model.tokenizer, request)
        # Placed anew while the prompt was tokenised: use what holds now.
        model = await self._wait_for(request.model, started + READY_SECONDS)
        core = self._plan(model, request, prompt, started)
        if self._running >= MAX_SESSIONS_PER_PEER:
            raise LimitExceeded(
                f"This node heads {self._running} requests already.",
                code="too_many_sessions",
                remedy="Wait until another request has ended.",
                limit=MAX_SESSIONS_PER_PEER,
            )
        session = _Session(core, model, request)
        self._running += 1
        try:
            await self._begin(session)
            yield _Events(self, session)
        finally:
            self._running -= 1
            self._end(session.core)

    def _plan(
        self, model: HeadModel, request: GenerationRequest, prompt: Tokens, started: float
    ) -> HeadCore:
        n, n_ctx = len(prompt), model.placement.n_ctx
        if n >= n_ctx:
            raise InvalidRequest(
                f"The prompt has {n} tokens; the context of {n_ctx} leaves room for {n_ctx - 1}.",
                code="prompt_too_long",
                remedy="Shorten it, or load the model with a longer context (--n-ctx).",
                prompt_tokens=n,
                n_ctx=n_ctx,
            )
        plan = HeadPlan(
            session=self._session_ids(),
            head=self._peer_id,
            placement=model.placement,
            budget=min(request.max_tokens or n_ctx, n_ctx - n),
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            sampling=request.sampling,
        )
        whole = len(model.placement.ranks) == 1
        embed = None if whole or model.embeddings is None else model.embeddings.rows
        if embed is None and not whole:
            raise Unavailable(
                f"The embedding table of {model.name} is not on this node yet.",
                code="head_not_ready",
                remedy="Ask again in a moment.",
            )
        return HeadCore(plan, prompt, model.vocabulary, embed, started)

    # ---- what comes in ---------------------------------------------------------------------

    def on_result(self, sender: PeerId, message: Result) -> None:
        """Take a result; the next step leaves before this returns."""
        session = self._sessions.get(message.session)
        if session is None:
            return
        step = session.core.on_result(sender, message, trio.current_time())
        if step is not None:
            self._send(step)
        session.wake.set()

    def on_error(self, sender: PeerId, message: StageError) -> None:
        """Take a rank's error."""
        session = self._sessions.get(message.session)
        if session is not None:
            session.core.on_error(sender, message)
            session.wake.set()

    def peer_down(self, peer: PeerId) -> None:
        """Fail the sessions with a rank on ``peer``."""
        for session in self._sessions.values():
            session.core.peer_down(peer)
            session.wake.set()

    def link_lost(self, peer: PeerId, *, control: bool) -> None:
        """Fail the sessions whose steps to rank 0 on ``peer`` may be lost."""
        if control:
            return
        for session in self._sessions.values():
            if session.core.plan.placement.ranks[0].peer_id == peer:
                session.core.fail(peer_lost(0, peer))
                session.wake.set()

    # ---- inside ----------------------------------------------------------------------------

    def _send(self, out: Outgoing) -> None:
        self._links.send(out.peer, out.message, out.tail)

    async def _begin(self, session: _Session) -> None:
        self._sessions[session.core.plan.session] = session
        self._send(session.core.open())
        await self._prefill(session)

    def _end(self, core: HeadCore) -> None:
        """Close a session on every rank; sending only queues, so this cannot be cancelled."""
        plan = core.plan
        self._sessions.pop(plan.session, None)
        self._links.forget(plan.placement.ranks[0].peer_id, plan.session)
        for out in core.close():
            self._send(out)

    async def _begin_again(self, session: _Session) -> None:
        """Start a session anew that was refused before its first token."""
        old = session.core
        self._end(old)
        await trio.sleep(RETRY_SECONDS)
        session.model = await self._wait_for(session.request.model, old.started + READY_SECONDS)
        session.core = self._plan(session.model, session.request, old.prompt, old.started)
        await self._begin(session)

    async def _prefill(self, session: _Session) -> None:
        core = session.core
        while (chunk := core.next_chunk()) is not None:
            rows = await self._lookup(session.model, core, chunk)
            if core.over:
                return
            self._send(core.send_chunk(chunk, rows, trio.current_time()))

    async def _lookup(self, model: HeadModel, core: HeadCore, chunk: Chunk) -> Activations | None:
        if len(core.plan.placement.ranks) == 1 or model.embeddings is None:
            return None
        tokens = core.tokens(chunk)
        parts: list[Activations] = []
        for at in range(0, len(tokens), LOOKUP_ROWS):
            parts.append(model.embeddings.rows(tokens[at : at + LOOKUP_ROWS]))
            await trio.lowlevel.checkpoint()
        return parts[0] if len(parts) == 1 else cast("Activations", np.concatenate(parts))

    async def next_event(self, session: _Session) -> GenerationEvent | None:
        """Return the next event of ``session``, or ``None`` when it is over."""
        while True:
            core, now = session.core, trio.current_time()
            try:
                event, step = core.take(now)
            except PyAgentError as error:
                early = core.first_token is None and now < core.started + READY_SECONDS
                if not early or error.code not in _PASSING:
                    raise
                await self._begin_again(session)
                continue
            if step is not None:
                self._send(step)
            if event is not None:
                return event
            if core.over:
                return None
            await self._prefill(session)
            session.wake = trio.Event()
            if core.ready:
                continue
            with trio.move_on_at(core.last_progress + self._step_seconds) as scope:
                await session.wake.wait()
            if scope.cancelled_caught:
                core.fail(
                    DeadlineExceeded(
                        f"No rank answered for {self._step_seconds:.0f} s.",
                        code="step_deadline",
                        remedy="See 'pyagent-node status' for the load of the ranks.",
                    )
                )


class _Events:
    """The events of one session; one reader."""

    def __init__(self, engine: PipelineEngine, session: _Session) -> None:
        self._engine = engine
        self._session = session

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> GenerationEvent:
        event = await self._engine.next_event(self._session)
        if event is None:
            raise StopAsyncIteration
        return event


def _rate(generated: int, since: float | None, now: float) -> float:
    seconds = 0.0 if since is None else now - since
    return (generated - 1) / seconds if generated > 1 and seconds > 0 else 0.0
