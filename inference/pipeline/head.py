"""The pure core of a session at its head: journal, steps to send, events to show.

The shell (``engine``) sends what the core answers and hands it every result.  A result is turned
into the next step at once, before the reader of the answer has seen the token, so that a slow
reader costs nothing until it lags :data:`RUN_AHEAD` events behind; then the session waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, cast

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData, PyAgentError, RunnerFailed, error_from_info
from pyagent_node.base.types import PeerId, Placement, SessionId
from pyagent_node.inference.backend import Activations, Tokens
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationEvent,
    TopLogprob,
    Usage,
)
from pyagent_node.inference.pipeline.detokenizer import TextAssembler
from pyagent_node.inference.pipeline.frames import (
    CloseSession,
    OpenSession,
    Result,
    StageError,
    Step,
    chunk_end,
    pack_tail,
)
from pyagent_node.inference.pipeline.stage_types import MAX_STEPS_PER_SESSION, Outgoing, peer_lost
from pyagent_node.inference.sampling import Sampled, SamplingParams

RUN_AHEAD: Final = 64
"""Events that may wait for the reader before the session stops asking for more tokens."""

Embed = Callable[[Tokens], Activations]


class Vocabulary(msgspec.Struct, frozen=True):
    """What a head needs to know of every token: its bytes, and which tokens end an answer."""

    pieces: tuple[bytes, ...]
    end_tokens: frozenset[int]


class HeadPlan(msgspec.Struct, frozen=True):
    """A checked request: what to generate and where.

    ``budget`` is the greatest number of tokens to generate; the prompt and the budget fit the
    placement's context together.
    """

    session: SessionId
    head: PeerId
    placement: Placement
    budget: int
    stop: tuple[str, ...]
    ignore_eos: bool
    sampling: SamplingParams


class Chunk(NamedTuple):
    """The prompt tokens ``[start, stop)`` that are due to be sent."""

    start: int
    stop: int


class HeadCore:
    """State of one session at its head."""

    def __init__(
        self,
        plan: HeadPlan,
        prompt: Tokens,
        vocabulary: Vocabulary,
        embed: Embed | None,
        now: float,
    ) -> None:
        self.plan = plan
        self.last_progress = now
        self.generated = 0
        self.first_token: float | None = None
        self.started = now
        self.prompt = prompt
        self._vocabulary = vocabulary
        self._embed = embed
        self._text = TextAssembler(plan.stop)
        self._events: deque[GenerationEvent] = deque()
        self._error: PyAgentError | None = None
        self._finished = False
        self._position = 0
        self._sent = 0
        self._done = 0
        self._sent_at = now
        self._stalled: int | None = None
        ranks = plan.placement.ranks
        self._window = min(len(ranks) + 1, MAX_STEPS_PER_SESSION)
        self._entry = ranks[0].peer_id
        self._tail = ranks[-1].peer_id
        self._peers = frozenset(rank.peer_id for rank in ranks)

    # ---- steps -----------------------------------------------------------------------------

    def open(self) -> Outgoing:
        """Return the message that admits the session."""
        plan = self.plan
        n = len(self.prompt)
        return Outgoing(
            self._entry,
            OpenSession(
                session=plan.session,
                model=plan.placement.model,
                epoch=plan.placement.epoch,
                rank=0,
                head=plan.head,
                positions=min(n + plan.budget, plan.placement.n_ctx),
                prompt_tokens=n,
                sampling=plan.sampling,
            ),
        )

    def close(self) -> list[Outgoing]:
        """Return what frees the session on every rank; it is over here too."""
        self._finished = True
        self._stalled = None
        plan = self.plan
        model, epoch = plan.placement.model, plan.placement.epoch
        return [
            Outgoing(rank.peer_id, CloseSession(plan.session, model, epoch, rank.rank))
            for rank in plan.placement.ranks
        ]

    def next_chunk(self) -> Chunk | None:
        """Return the prompt chunk to send now, or ``None`` when the window is full or all is sent.

        The window lets every rank work on another chunk of the prompt at the same time.
        """
        n = len(self.prompt)
        if self._position >= n or self._sent - self._done >= self._window or self.over:
            return None
        return Chunk(self._position, chunk_end(self._position, n))

    def tokens(self, chunk: Chunk) -> Tokens:
        """Return the prompt tokens of ``chunk``."""
        return self.prompt[chunk.start : chunk.stop]

    def send_chunk(self, chunk: Chunk, rows: Activations | None, now: float) -> Outgoing:
        """Return the step for the chunk that :meth:`next_chunk` gave, with its embeddings."""
        assert chunk.start == self._position, "chunks are sent in order"
        last = chunk.stop == len(self.prompt)
        return self._step(self.tokens(chunk), rows, last, now)

    def _step(self, tokens: Tokens, rows: Activations | None, sample: bool, now: float) -> Outgoing:
        placement = self.plan.placement
        step = Step(
            self.plan.session,
            placement.model,
            placement.epoch,
            0,
            self._sent,
            self._position,
            len(tokens),
            sample,
        )
        self._sent += 1
        self._position += len(tokens)
        self._sent_at = now
        return Outgoing(self._entry, step, pack_tail(tokens, rows))

    def _continue(self, token: int, now: float) -> Outgoing:
        tokens = cast("Tokens", np.array((token,), dtype=np.int32))
        rows = None if self._embed is None else self._embed(tokens)
        return self._step(tokens, rows, True, now)

    # ---- what comes back -------------------------------------------------------------------

    def on_result(self, sender: PeerId, result: Result, now: float) -> Outgoing | None:
        """Take a result of the tail; returns the next step to send, if one is due."""
        if self.over or sender != self._tail:
            return None
        if result.step != self._done or self._done >= self._sent:
            self._break(sender, f"step {result.step} was not due")
            return None
        self._done += 1
        self.last_progress = now
        if self._done < self._sent or self._position < len(self.prompt):
            return None
        if result.sampled is None or not self._known(result.sampled):
            self._break(sender, "it holds no valid token")
            return None
        return self._on_token(result.sampled, result.spent, now)

    def _on_token(self, sampled: Sampled, spent: float, now: float) -> Outgoing | None:
        plan = self.plan
        decoding = self.first_token is not None
        if self.first_token is None:
            self.first_token = now
        token = sampled.token
        if token in self._vocabulary.end_tokens and not plan.ignore_eos:
            self._finish("stop", now)
            return None
        self.generated += 1
        piece = self._vocabulary.pieces[token]
        pieces = self._vocabulary.pieces
        self._events.append(
            Generated(
                token=token,
                text=self._text.push(piece),
                piece=piece,
                logprob=sampled.logprob,
                top=tuple(TopLogprob(t, pieces[t], lp) for t, lp in sampled.top),
                step_seconds=now - self._sent_at if decoding else 0.0,
                compute_seconds=spent if decoding else 0.0,
            )
        )
        if self._text.stopped:
            self._finish("stop", now)
        elif self.generated >= plan.budget:
            self._finish("length", now)
        elif len(self._events) >= RUN_AHEAD:
            self._stalled = token
        else:
            return self._continue(token, now)
        return None

    def on_error(self, sender: PeerId, message: StageError) -> None:
        """Take a rank's word that it gave the session up."""
        if sender not in self._peers:
            return
        error = error_from_info(message.error)
        error.facts.setdefault("rank", message.rank)
        error.facts.setdefault("peer_id", message.peer_id)
        if isinstance(error, RunnerFailed):
            error.message = (
                f"The runner of rank {message.rank} on node {message.peer_id} failed:"
                f" {error.message}"
            )
            error.remedy = error.remedy or "It is being started again; ask again in a moment."
        self.fail(error)

    def peer_down(self, peer: PeerId) -> None:
        """Fail the session if one of its ranks was on ``peer``."""
        for rank in self.plan.placement.ranks:
            if rank.peer_id == peer:
                self.fail(peer_lost(rank.rank, peer))

    def fail(self, error: PyAgentError) -> None:
        """End the session with ``error``, after the events that came before it."""
        if not self.over:
            self._error = error

    # ---- what is shown ---------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether no more events will be made."""
        return self._finished or self._error is not None

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` would not return in vain."""
        return bool(self._events) or self.over

    def take(self, now: float) -> tuple[GenerationEvent | None, Outgoing | None]:
        """Return the next event to show, and the step to send because there is room again.

        Raises the error that ended the session, after its last event.
        """
        if not self._events:
            if self._error is not None:
                raise self._error
            return None, None
        event = self._events.popleft()
        step = None
        if self._stalled is not None and not self.over and len(self._events) < RUN_AHEAD // 2:
            step = self._continue(self._stalled, now)
            self._stalled = None
            self.last_progress = now
        return event, step

    def _finish(self, reason: str, now: float) -> None:
        self._finished = True
        first = now if self.first_token is None else self.first_token
        text = self._text.finish()
        self._events.append(
            Finished(
                reason="stop" if reason == "stop" or self._text.stopped else "length",
                text=text,
                usage=Usage(
                    prompt_tokens=len(self.prompt),
                    completion_tokens=self.generated,
                    ttft_seconds=first - self.started,
                    seconds=now - self.started,
                ),
                placement=self.plan.placement,
            )
        )

    def _known(self, sampled: Sampled) -> bool:
        n = len(self._vocabulary.pieces)
        return 0 <= sampled.token < n and all(0 <= t < n for t, _ in sampled.top)

    def _break(self, sender: PeerId, what: str) -> None:
        self.fail(
            CorruptData(
                f"Node {sender} sent a result that does not belong here: {what}.",
                code="bad_result",
                peer_id=sender,
            )
        )
