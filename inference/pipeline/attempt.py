"""The steps of a session over one placement: what to send next, and which result is due.

A session that loses a rank goes on with a new attempt, under a wire session of its own, that feeds
the journal again: the prompt in the very chunks of the first time, then the generated tokens in
steps of up to ``MAX_DECODE_ROWS``, which a runner computes in shapes that its self-test found
bit-identical to single tokens.  Hence every cell of the new ranks is that of the old ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import PeerId, Placement, SessionId
from pyagent_node.inference.backend import MAX_DECODE_ROWS, Activations, Tokens
from pyagent_node.inference.pipeline.frames import (
    CloseSession,
    OpenSession,
    Result,
    Step,
    chunk_end,
    pack_tail,
)
from pyagent_node.inference.pipeline.stage_types import MAX_STEPS_PER_SESSION, Outgoing
from pyagent_node.inference.sampling import Sampled, SamplingParams

Embed = Callable[[Tokens], Activations]


class Route(msgspec.Struct, frozen=True):
    """Where an attempt goes: ``session`` is its id on the wire, used for no other attempt."""

    session: SessionId
    head: PeerId
    placement: Placement
    sampling: SamplingParams


class Chunk(NamedTuple):
    """The tokens at positions ``[start, stop)`` that are due to be sent."""

    start: int
    stop: int


class Attempt:
    """One wire session: ``prompt``, then the ``answer`` so far, then token after token.

    ``answer`` is the session's own list, which grows while the attempt lasts.  ``embed`` is
    ``None`` when one rank holds the whole model.
    """

    def __init__(  # noqa: PLR0917 - private to the head
        self,
        route: Route,
        prompt: Tokens,
        answer: Sequence[Sampled],
        positions: int,
        embed: Embed | None,
        now: float,
    ) -> None:
        self.route = route
        self.last_progress = now
        self._prompt = prompt
        self._answer = answer
        self._positions = positions
        self.embed = embed
        ranks = route.placement.ranks
        self._entry = ranks[0].peer_id
        self._tail = ranks[-1].peer_id
        self.peers = frozenset(rank.peer_id for rank in ranks)
        self._window = min(len(ranks) + 1, MAX_STEPS_PER_SESSION)
        self._total = len(prompt) + len(answer)
        self._position = 0
        self._sent = 0
        self._done = 0
        self._sent_at = now
        self._ends: deque[int] = deque()
        self._fed = 0

    # ---- what goes out ---------------------------------------------------------------------

    def open(self) -> Outgoing:
        """Return the message that admits the session."""
        route, n = self.route, len(self._prompt)
        placement = route.placement
        return Outgoing(
            self._entry,
            OpenSession(
                session=route.session,
                model=placement.model,
                epoch=placement.epoch,
                rank=0,
                head=route.head,
                positions=self._positions,
                prompt_tokens=n,
                sampling=route.sampling,
            ),
        )

    def close(self) -> list[Outgoing]:
        """Return what frees the session on every rank."""
        placement = self.route.placement
        model, epoch, session = placement.model, placement.epoch, self.route.session
        return [
            Outgoing(rank.peer_id, CloseSession(session, model, epoch, rank.rank))
            for rank in placement.ranks
        ]

    def next_chunk(self, *, hold: bool = False) -> Chunk | None:
        """Return the chunk to send now, or ``None`` when the window is full or all is sent.

        The window lets every rank work on another chunk of the prompt at the same time; the short
        steps after it may fill every queue on the way.  With ``hold`` the last token stays here.
        """
        start, n = self._position, len(self._prompt)
        flying = self._sent - self._done
        if start < n:
            return None if flying >= self._window else Chunk(start, chunk_end(start, n))
        stop = self._total - hold
        if start >= stop or flying >= MAX_STEPS_PER_SESSION:
            return None
        return Chunk(start, min(start + MAX_DECODE_ROWS, stop))

    def tokens(self, chunk: Chunk) -> Tokens:
        """Return the tokens of ``chunk``."""
        n = len(self._prompt)
        if chunk.start < n:
            return self._prompt[chunk.start : chunk.stop]
        answer = self._answer[chunk.start - n : chunk.stop - n]
        return np.array([sampled.token for sampled in answer], dtype=np.int32)

    def send_chunk(self, chunk: Chunk, rows: Activations | None, now: float) -> Outgoing:
        """Return the step for the chunk that :meth:`next_chunk` gave, with its embeddings."""
        assert chunk.start == self._position, "chunks are sent in order"
        self._ends.append(chunk.stop)
        return self._step(self.tokens(chunk), rows, chunk.stop == self._total, now)

    def send_token(self, token: int, now: float) -> Outgoing:
        """Return the step for the last token of the answer."""
        tokens = cast("Tokens", np.array((token,), dtype=np.int32))
        rows = None if self.embed is None else self.embed(tokens)
        return self._step(tokens, rows, True, now)

    def _step(self, tokens: Tokens, rows: Activations | None, sample: bool, now: float) -> Outgoing:
        route = self.route
        placement = route.placement
        step = Step(
            route.session,
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

    # ---- what comes back -------------------------------------------------------------------

    def on_result(self, sender: PeerId, result: Result, now: float) -> Sampled | None:
        """Take a result of the tail; returns the next token of the answer when it is that.

        The caller adds the token to the answer.  Raises :class:`CorruptData` (``bad_result``).
        """
        if sender != self._tail:
            return None
        if result.step != self._done or self._done >= self._sent:
            raise bad_result(sender, f"step {result.step} was not due")
        self._done += 1
        self.last_progress = now
        if self._ends:
            self._fed = self._ends.popleft()
        if self._done < self._sent or self._position < self._total:
            return None
        if len(result.sampled) != 1:
            raise bad_result(sender, f"it holds {len(result.sampled)} tokens")
        self._total += 1
        return result.sampled[0]

    def step_seconds(self, now: float) -> float:
        """Return how long ago the last step was sent."""
        return now - self._sent_at

    @property
    def waiting(self) -> bool:
        """Whether a result is due."""
        return self._done < self._sent

    @property
    def computed(self) -> int:
        """The tokens whose steps every rank has computed."""
        if self._ends:
            return self._fed
        return self._position - (self._sent - self._done)


def bad_result(sender: PeerId, what: str) -> CorruptData:
    """Return the error for a result that breaks the protocol."""
    return CorruptData(
        f"Node {sender} sent a result that does not belong here: {what}.",
        code="bad_result",
        peer_id=sender,
    )
