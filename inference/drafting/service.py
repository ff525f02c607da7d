"""Drafts for the heads of a mesh: the rank's end of ``remote_messages``.

The mesh has authorised a peer before a stream of it comes here.  Each stream is one session, served
one question after the other, so that a head cannot have more waiting than its stream's window.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.limits import MAX_SESSIONS_PER_PEER, RPC_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.drafting.port import (
    Drafter,
    DrafterFactory,
    PreparedDrafter,
    TreeDrafter,
    usable,
)
from pyagent_node.inference.drafting.remote_messages import (
    DRAFT_PROTOCOL,
    FROM_DRAFTER,
    Ask,
    DeskCore,
    Drafted,
    DraftRefused,
    DraftView,
    FromDrafter,
    NotNow,
    OpenDraft,
    Question,
    ToDrafter,
    read_frame,
)
from pyagent_node.inference.drafting.tree import usable_tree

logger = logging.getLogger("pyagent_node.drafter")

IDLE_SECONDS: Final = 300.0
"""A session that asks nothing for so long is ended; its head goes on without guesses."""
CLOSE_SECONDS: Final = 1.0


class DraftOffer(msgspec.Struct, frozen=True):
    """What this node drafts with, for the placed ``model`` under ``epoch``.

    ``drafter`` is the model that guesses, ``pieces`` the bytes of the target's tokens, ``n_ctx``
    what the drafter holds of a session.
    """

    model: Digest
    epoch: int
    drafter: Digest
    factory: DrafterFactory
    pieces: Sequence[bytes]
    n_ctx: int


class DraftService:
    """Answers the heads of the mesh; one a node.

    ``refused`` counts by code what was refused.
    """

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self._offers: dict[Digest, DraftOffer] = {}
        self._sessions: Counter[tuple[Digest, PeerId]] = Counter()
        self._questions: Counter[Digest] = Counter()
        self._guesses: Counter[Digest] = Counter()

    def start(self, mesh: Mesh) -> None:
        """Serve the streams that come in from now on."""
        mesh.handle(DRAFT_PROTOCOL, self._serve)

    def offer(self, offer: DraftOffer) -> None:
        """Draft for a model from now on; a session of the same drafter goes on under its epoch."""
        self._offers[offer.model] = offer

    def withdraw(self, model: Digest) -> None:
        """Draft for a model no more."""
        self._offers.pop(model, None)

    def view(self, model: Digest) -> DraftView:
        """Return the load of what drafts for a model."""
        sessions = sum(count for (key, _), count in self._sessions.items() if key == model)
        return DraftView(sessions, self._questions[model], self._guesses[model])

    async def _serve(self, stream: FrameStream) -> None:
        try:
            await self._session(stream)
        except PyAgentError as error:
            if error.code == "stream_closed":  # the head is gone, which is its right
                return
            self.refused[error.code] += 1
            logger.info("refused %s a draft: %s", stream.peer, error)
            with trio.move_on_after(CLOSE_SECONDS):
                await _send(stream, DraftRefused(error.to_info()))

    async def _session(self, stream: FrameStream) -> None:
        first = await _receive(stream, RPC_SECONDS)
        if first is None:
            return
        opening, _ = first
        if not isinstance(opening, OpenDraft):
            raise InvalidRequest(
                "A session with a drafter begins by opening it.", code="bad_draft_request"
            )
        offer = self._find(opening)
        opening.sampling.check(len(offer.pieces))
        key = offer.model, stream.peer
        if self._sessions[key] >= MAX_SESSIONS_PER_PEER:
            raise LimitExceeded(
                f"This node drafts for {self._sessions[key]} sessions of {stream.peer} already.",
                code="too_many_sessions",
                limit=MAX_SESSIONS_PER_PEER,
            )
        drafter = offer.factory.for_model(offer.pieces, opening.sampling, tenant=stream.peer)
        if opening.trees and isinstance(drafter, TreeDrafter):
            drafter.expect_trees()
        self._sessions[key] += 1
        try:
            await self._answer_all(stream, offer, drafter)
        finally:
            self._sessions[key] -= 1
            if not self._sessions[key]:
                del self._sessions[key]
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await _release(drafter)

    async def _answer_all(self, stream: FrameStream, offer: DraftOffer, drafter: Drafter) -> None:
        core = DeskCore(offer.n_ctx)
        while True:
            asked = await _receive(stream, IDLE_SECONDS)
            if asked is None:
                return
            ask, tail = asked
            if not isinstance(ask, Ask):
                raise InvalidRequest(
                    "A session with a drafter is opened once.", code="bad_draft_request"
                )
            now = self._offers.get(offer.model)
            if now is None or now.factory is not offer.factory:
                raise _not_here(offer.model)
            taken = core.take(ask, tail, now.epoch)
            if isinstance(taken, NotNow):
                if taken.epoch != ask.epoch:
                    self.refused["stale_epoch"] += 1
                await _send(stream, taken)
                continue
            answer = await self._guess(drafter, taken, core.held, len(offer.pieces))
            self._questions[offer.model] += 1
            self._guesses[offer.model] += len(answer.tokens)
            await _send(stream, answer)

    async def _guess(
        self, drafter: Drafter, question: Question, held: int, n_vocab: int
    ) -> Drafted:
        drafter.extend(question.new)
        if not question.limit:
            if isinstance(drafter, PreparedDrafter):
                await drafter.prepare()
            return Drafted(question.request, held)
        ahead, limit, floor = question.ahead, question.limit, question.floor
        if not question.tree:
            made = await drafter.propose(ahead, limit, floor=floor)
            draft = usable(made, n_vocab=n_vocab, limit=limit)
        elif isinstance(drafter, TreeDrafter):
            made = await drafter.propose_tree(ahead, limit, floor=floor)
            draft = usable_tree(made, n_vocab=n_vocab, limit=limit)
        else:
            raise Unsupported("The drafter here makes no trees.", code="no_trees")
        return Drafted(question.request, held, draft.tokens, draft.confidence, draft.parents)

    def _find(self, opening: OpenDraft) -> DraftOffer:
        offer = self._offers.get(opening.model)
        if offer is None or offer.drafter != opening.drafter:
            raise _not_here(opening.model)
        if offer.epoch != opening.epoch:
            raise Conflict(
                f"This node drafts under epoch {offer.epoch}, not {opening.epoch}.",
                code="stale_epoch",
                epoch=offer.epoch,
                frame_epoch=opening.epoch,
            )
        return offer


def _not_here(model: Digest) -> Unavailable:
    return Unavailable(
        f"This node does not draft for model {model[:12]} now.",
        code="drafter_not_ready",
        remedy="It may be starting; see 'pyagent-node placement show'.",
    )


async def _receive(
    stream: FrameStream, seconds: float
) -> tuple[ToDrafter, bytes | bytearray | memoryview] | None:
    with trio.move_on_after(seconds):
        frame = await stream.receive()
        return None if frame is None else (read_frame(frame), frame.tail)
    raise DeadlineExceeded(f"Nothing was asked for {seconds:.0f} s.", code="draft_idle")


async def _send(stream: FrameStream, message: FromDrafter) -> None:
    await stream.send(Frame(FROM_DRAFTER.encode(message)))


async def _release(drafter: Drafter) -> None:
    try:
        await drafter.aclose()
    except PyAgentError as error:  # its runner has died: there is nothing left to free
        logger.debug("a drafter did not close: %s", error)
