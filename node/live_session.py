"""One session at its head, and whoever reads it: events are kept, so a reader can come back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import Conflict, InvalidRequest, PyAgentError, Unavailable
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import Finished, GenerationEvent

READ_AHEAD: Final = 32
"""Events that may wait for a slow reader; then the generation waits too."""
RESUMED_SECONDS: Final = 30.0
"""How long a session that was taken over is waited for, at least, when its reader is lost again."""


class Successor(Protocol):
    """A session's new head; see ``session_moves``."""

    def events(self, after: int) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events from the token with index ``after`` on."""
        ...

    async def aclose(self) -> None:
        """Say that nobody reads there any more."""
        ...


class LiveSession:
    """One session and what it has answered; ``seconds`` is how long it waits for a reader."""

    def __init__(self, session: SessionId, model: str, label: str, seconds: float) -> None:
        self.session = session
        self.model = model
        self.label = label
        self.seconds = seconds
        self.events: list[GenerationEvent] = []
        self.failure: PyAgentError | None = None
        self.done = trio.Event()
        """Set when the generation is over."""
        self.scope = trio.CancelScope()
        self.reader: Reader | None = None
        self.moving = False
        self.successor: Successor | None = None
        """The node that heads it now; what it makes is passed on."""
        self.visits = 0
        self.settled = trio.Event()
        """Set when no move is under way."""
        self.settled.set()
        self._room = trio.Event()

    def put(self, event: GenerationEvent) -> None:
        """Take an event."""
        self.events.append(event)
        if self.reader is not None:
            self.reader.wake.set()

    async def room(self) -> None:
        """Wait while a reader is there and lags behind."""
        while self.reader is not None and len(self.events) - self.reader.at >= READ_AHEAD:
            self._room = trio.Event()
            await self._room.wait()

    def make_room(self) -> None:
        """Let the generation look whether it may go on."""
        self._room.set()

    def end(self) -> None:
        """The generation is over."""
        if self.failure is None and not (self.events and isinstance(self.events[-1], Finished)):
            self.failure = Unavailable(
                "The session was ended by this node.",
                code="session_ended",
                remedy="Its client was away for too long, or the node is stopping.",
            )
        self.done.set()
        if self.reader is not None:
            self.reader.wake.set()


class Reader:
    """The events of a session from the token with index ``after`` on."""

    def __init__(self, live: LiveSession, after: int) -> None:
        self.live = live
        self.after = after
        self.at = 0
        self.wake = trio.Event()
        self.replaced = False
        self.complete = False
        """Whether the end of the answer, or its error, was given out."""

    @property
    def skipped(self) -> list[GenerationEvent]:
        """The events before ``after`` that there are."""
        return self.live.events[: self.after]

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Return the next event.

        Raises the error that ended the session, :class:`Conflict` (``session_read_elsewhere``),
        and :class:`InvalidRequest` (``beyond_end``) when the answer ended before ``after``.
        """
        live = self.live
        while True:
            if self.replaced:
                raise Conflict(
                    "Another connection reads this session now.", code="session_read_elsewhere"
                )
            if self.at < len(live.events):
                event = live.events[self.at]
                if self.at < self.after and isinstance(event, Finished):
                    raise _beyond_end(self.after, self.at)
                self.at += 1
                live.make_room()
                if self.at > self.after or isinstance(event, Finished):
                    self.complete = isinstance(event, Finished)
                    return event
            elif self.complete:
                raise StopAsyncIteration
            elif live.done.is_set():
                self.complete = True
                raise live.failure or StopAsyncIteration
            else:
                self.wake = trio.Event()
                await self.wake.wait()


def _beyond_end(after: int, tokens: int) -> InvalidRequest:
    return InvalidRequest(
        f"The answer has {tokens} tokens; there is nothing from {after} on.",
        code="beyond_end",
        tokens=tokens,
        parameter="from",
    )
