"""What the reader of an answer gets: tokens become events; a slow reader holds the answer.  Pure.

A token is part of the answer at once, and an event waits for the reader.  When :data:`RUN_AHEAD`
of them wait the answer is *held*: nothing more is asked for until half of them were read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from pyagent_node.base.types import PeerId, Placement
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationEvent,
    TopLogprob,
    Usage,
)
from pyagent_node.inference.pipeline.detokenizer import TextAssembler
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.restoring import bad_result
from pyagent_node.inference.sampling import Sampled

RUN_AHEAD: Final = 64
"""Events that may wait for the reader before the session stops asking for more tokens."""


class ShownAnswer:
    """The tokens of one answer, and the events that tell a reader of them."""

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]) -> None:
        self.tokens: list[Sampled] = []
        """The tokens so far."""
        self.held = False
        """Whether the reader lags too far behind."""
        self.skip = 0
        """So many tokens more are no events: the reader has them."""
        self._vocabulary = vocabulary
        self._text = TextAssembler(tuple(stop))
        self._events: deque[GenerationEvent] = deque()

    @property
    def waiting(self) -> int:
        """Events that nobody has taken yet."""
        return len(self._events)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._text.stopped

    def ends(self, token: int) -> bool:
        """Whether ``token`` is one that ends answers."""
        return token in self._vocabulary.end_tokens

    def check(self, sampled: Sampled, sender: PeerId) -> None:
        """Raise the error of a rank that names tokens which the vocabulary does not have."""
        n, top = len(self._vocabulary.pieces), sampled.top
        if not 0 <= sampled.token < n or (top and not all(0 <= t < n for t, _ in top)):
            raise bad_result(sender, "it holds no valid token")

    def add(self, sampled: Sampled, step_seconds: float, compute_seconds: float) -> None:
        """Add a token, which was checked."""
        pieces = self._vocabulary.pieces
        piece = pieces[sampled.token]
        text = self._text.push(piece)
        self.tokens.append(sampled)
        if self.skip:
            self.skip -= 1
            return
        self._events.append(
            Generated(
                token=sampled.token,
                text=text,
                piece=piece,
                logprob=sampled.logprob,
                top=tuple([TopLogprob(t, pieces[t], lp) for t, lp in sampled.top]),
                step_seconds=step_seconds,
                compute_seconds=compute_seconds,
            )
        )

    def look(self) -> None:
        """Hold the answer if the reader lags too far behind."""
        self.held = len(self._events) >= RUN_AHEAD

    def finish(self, reason: str, usage: Usage, placement: Placement) -> None:
        """Add the last event."""
        text = self._text.finish()
        self._events.append(
            Finished(
                reason="stop" if reason == "stop" or self._text.stopped else "length",
                text=text,
                usage=usage,
                placement=placement,
            )
        )

    def take(self) -> tuple[GenerationEvent | None, bool]:
        """Return the next event, and whether the answer need not be held any more."""
        if not self._events:
            return None, False
        event = self._events.popleft()
        room = self.held and len(self._events) < RUN_AHEAD // 2
        if room:
            self.held = False
        return event, room
