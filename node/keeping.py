"""Keeps a resource that may fail: opened, and opened again after growing pauses, until let go."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Final, Generic, Protocol, TypeVar

import trio

from pyagent_node.base.errors import ErrorInfo, PyAgentError, RunnerFailed
from pyagent_node.node.placement_messages import HostState

logger = logging.getLogger("pyagent_node.placements")

FIRST_PAUSE: Final = 0.25
"""Pause before the first new attempt, in seconds; each one after is twice as long."""
LONGEST_PAUSE: Final = 60.0
STEADY_SECONDS: Final = 60.0
"""What ran so long has proved itself: its next failure starts with the first pause again."""


class HostProgress(Protocol):
    """Takes the progress of an attempt."""

    def __call__(self, state: HostState, done: int = 0, total: int | None = None) -> None:
        """Note the state, and the bytes fetched so far of those needed."""
        ...


class Mortal(Protocol):
    """Something that can die while it is held."""

    @property
    def failed(self) -> trio.Event:
        """Set when it can no longer be used."""
        ...

    @property
    def failure(self) -> RunnerFailed | None:
        """Why."""
        ...


T = TypeVar("T", bound=Mortal)


class Kept(Generic[T]):
    """One resource; ``value`` is there while it works.

    ``failures`` counts the attempts that ended in ``error``.  ``on_ready`` and ``on_lost`` are
    called as it comes and goes.
    """

    def __init__(
        self,
        what: str,
        opener: Callable[[HostProgress], AbstractAsyncContextManager[T]],
        rng: random.Random,
        *,
        on_ready: Callable[[T], None] | None = None,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.what = what
        self.value: T | None = None
        self.state: HostState = "fetching"
        self.error: PyAgentError | None = None
        self.failures = 0
        self.done = 0
        self.total: int | None = None
        self.ended = trio.Event()
        """Set when nothing of it is left, after :meth:`release`."""
        self._opener = opener
        self._rng = rng
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self._spoilt: RunnerFailed | None = None
        self._spoil = trio.Event()
        self._streak = 0
        self._started = 0.0
        self._pause = FIRST_PAUSE

    @property
    def streak(self) -> int:
        """Failures since it last worked for :data:`STEADY_SECONDS`."""
        return 0 if self._steady() else self._streak

    @property
    def failure(self) -> ErrorInfo | None:
        """Why it does not work now."""
        return self.error.to_info() if self.error is not None and self.state == "failed" else None

    def release(self) -> None:
        """Let go of it; ``ended`` is set when it is gone."""
        self._scope.cancel()

    def spoil(self, value: T, error: RunnerFailed) -> None:
        """Say that ``value`` does not work though it seems to live: it is opened anew."""
        if value is self.value:
            self._spoilt = error
            self._spoil.set()

    async def ready(self) -> T:
        """Wait until it works, and return it."""
        while self.value is None:
            await self._changed.wait()
        return self.value

    async def gone(self, value: T) -> None:
        """Wait until ``value`` is not what is there any more."""
        while self.value is value:
            await self._changed.wait()

    async def run(self, after: Iterable[trio.Event] = ()) -> None:
        """Keep it until it is released; begins when all of ``after`` have happened."""
        try:
            with self._scope:
                for event in after:
                    await event.wait()
                await self._keep()
        finally:
            self.ended.set()

    async def _keep(self) -> None:
        while True:
            self._progress("fetching")
            self._started = trio.current_time()
            try:
                await self._once()
            except PyAgentError as error:
                self._note(error)
            except Exception:
                logger.exception("%s failed in an unforeseen way", self.what)
                self._note(PyAgentError("An internal error; see this node's log.", code="internal"))
            logger.warning(
                "%s failed, next attempt in %.1f s: %s", self.what, self._pause, self.error
            )
            await trio.sleep(self._pause * self._rng.uniform(0.8, 1.2))
            self._pause = min(self._pause * 2, LONGEST_PAUSE)

    async def _once(self) -> None:
        """Open it and wait for its death."""
        async with self._opener(self._progress) as value:
            self._spoilt, self._spoil = None, trio.Event()
            self._set(value)
            self._progress("ready")
            try:
                if self._on_ready is not None:
                    self._on_ready(value)
                async with trio.open_nursery() as nursery:
                    for event in (value.failed, self._spoil):
                        nursery.start_soon(_cancel_after, event, nursery.cancel_scope)
                died = value.failure or RunnerFailed("It has died.", reason="unknown")
                self._note(self._spoilt or died)
            finally:
                self._set(None)
                if self._on_lost is not None:
                    self._on_lost()

    def _note(self, error: PyAgentError) -> None:
        """Note a failure."""
        if self._steady():
            self._pause, self._streak = FIRST_PAUSE, 0
        self.error = error
        if error.code == "stale_epoch":  # that is the mesh's progress, not a fault of ours
            self._pause = FIRST_PAUSE
        else:
            self.failures += 1
            self._streak += 1
        self._progress("failed")

    def _steady(self) -> bool:
        return self.state == "ready" and trio.current_time() - self._started > STEADY_SECONDS

    def _set(self, value: T | None) -> None:
        self.value = value
        self._changed.set()
        self._changed = trio.Event()

    def _progress(self, state: HostState, done: int = 0, total: int | None = None) -> None:
        self.state, self.done, self.total = state, done, total


async def _cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
