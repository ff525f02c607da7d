"""Registers in the log who holds which journal: in the background, and many at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.commands import Checkpoint, Command, DropCheckpoints, PutCheckpoints
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.journal_holding import keep_seconds
from pyagent_node.node.journal_session import HeadedSession

log = logging.getLogger("pyagent_node.journals")

BATCH: Final = 64
"""Sessions in one command."""
GATHER_SECONDS: Final = 0.02
"""What comes within this time goes with the same command."""
RETRY_SECONDS: Final = (1.0, 2.0, 4.0, 8.0)
"""Longest pauses after attempts that the log did not take; whatever comes anew ends them."""
MAX_DROPS: Final = 4096
"""Ended sessions to tell of; the manifests of more expire by themselves."""


class Manifests:
    """The manifests of the sessions that ``head`` serves; ``wall`` gives Unix seconds."""

    def __init__(self, consensus: Consensus, head: PeerId, wall: Callable[[], float]) -> None:
        self.committed: Callable[[HeadedSession], None] = lambda _session: None
        """Called for each session after its manifest was decided upon."""
        self._consensus = consensus
        self._head = head
        self._wall = wall
        self._puts: dict[SessionId, HeadedSession] = {}
        self._drops: dict[SessionId, None] = {}
        self._known: set[SessionId] = set()
        self._wake = trio.Event()

    def put(self, session: HeadedSession) -> None:
        """Register or renew a session, with the holders that it has when its turn comes."""
        session.registered = frozenset(session.holders)
        session.kv.registered(trio.current_time())
        self._puts[session.public] = session
        self._wake.set()

    def drop(self, session: HeadedSession) -> None:
        """A session is over: forget it, in the log too if it got there."""
        self.leave(session)
        if session.public in self._known or session.claim > 1:
            self._known.discard(session.public)
            if len(self._drops) < MAX_DROPS:
                self._drops[session.public] = None
                self._wake.set()

    def leave(self, session: HeadedSession) -> None:
        """Renew a session no more, and leave its manifest to others."""
        if self._puts.get(session.public) is session:
            del self._puts[session.public]

    async def run(self) -> None:
        """Propose what is due, for ever."""
        failures = 0
        while True:
            if not self._puts and not self._drops:
                self._wake = trio.Event()
                await self._wake.wait()
            await trio.sleep(GATHER_SECONDS)
            good = await self._propose_puts() and await self._propose_drops()
            failures = 0 if good else failures + 1
            if failures:
                self._wake = trio.Event()
                with trio.move_on_after(RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1]):
                    await self._wake.wait()

    async def _propose_puts(self) -> bool:
        batch = dict(list(self._puts.items())[:BATCH])
        if not batch:
            return True
        for public in batch:
            del self._puts[public]
        now = self._wall()
        expires = int(now + keep_seconds(self._consensus)) + 1
        checkpoints = tuple(self._checkpoint(session, expires) for session in batch.values())
        self._known.update(batch)
        again = await self._propose(PutCheckpoints(checkpoints, int(now)))
        for public, session in batch.items():
            if again and session.outcome is None and public not in self._drops:
                self._puts.setdefault(public, session)
            elif not again:
                self.committed(session)
        return not again

    async def _propose_drops(self) -> bool:
        batch = tuple(self._drops)[:BATCH]
        if not batch:
            return True
        again = await self._propose(DropCheckpoints(batch, self._head))
        if not again:
            for public in batch:
                self._drops.pop(public, None)
        return not again

    async def _propose(self, command: Command) -> bool:
        """Return whether to try again later."""
        try:
            await self._consensus.propose(command)
        except Unavailable as error:
            log.debug("%s waits: %s", type(command).__name__, error)
            return True
        except PyAgentError as error:
            log.warning("the log did not take %s: %s", type(command).__name__, error)
        return False

    def _checkpoint(self, session: HeadedSession, expires: int) -> Checkpoint:
        return Checkpoint(
            session=session.public,
            model=session.model,
            head=self._head,
            tokens=min(session.holders.values(), default=0),
            holders=tuple(sorted(session.holders)),
            expires=expires,
            claim=session.claim,
            signer=self._head,
            kv=session.kv.parts() or msgspec.UNSET,
        )
