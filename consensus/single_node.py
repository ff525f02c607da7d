"""What the writer and the followers of the engine ``"single"`` have in common."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.journal import Journal
from pyagent_node.consensus.port import AppliedStream
from pyagent_node.consensus.state import State


class EngineCounters(msgspec.Struct):
    """What the engine counts, for ``/metrics``."""

    entries: int = 0
    refused_proposals: int = 0
    refused_messages: int = 0
    sessions: int = 0


class SingleNode:
    """A node's copy of the log, and what this engine does not do."""

    def __init__(self, journal: Journal) -> None:
        self.counted = EngineCounters()
        self._journal = journal

    @property
    def state(self) -> State:
        """The state as applied here; it may lag behind the writer's."""
        return self._journal.state

    def applied(self, after: int) -> AbstractAsyncContextManager[AppliedStream]:
        """See ``Consensus.applied``."""
        return self._journal.applied(after)

    async def compact(self) -> int:
        """See ``Consensus.compact``."""
        return await self._journal.compact()

    def counters(self) -> dict[str, int]:
        """See ``Consensus.counters``."""
        return msgspec.structs.asdict(self.counted)

    def chain_at(self, index: int) -> bytes | None:
        """See ``Consensus.chain_at``."""
        return self._journal.chain_at(index)

    async def reconfigure(self, voters: frozenset[PeerId], learners: frozenset[PeerId]) -> None:
        """Raise :class:`Unsupported` (``one_writer``)."""
        await trio.lowlevel.checkpoint()
        raise _one_writer()

    async def transfer(self, to: PeerId) -> None:
        """Raise :class:`Unsupported` (``one_writer``)."""
        await trio.lowlevel.checkpoint()
        raise _one_writer()


def _one_writer() -> Unsupported:
    return Unsupported(
        "The engine of this mesh has one writer for ever; nobody votes.",
        code="one_writer",
        remedy="Create a mesh with the engine raft-rs to let several nodes decide.",
    )
