"""Removes documents that are no longer fresh, so that their chunks are given up everywhere.

Nobody answers from such a document anyway; this only frees the room.  The node that added a
document removes it a while after it is over; if that node is gone, others do, a day later.  A
removal is a record like any other: all nodes get it, and it stays until all have it
(``context_settling``), because one that was away for long may still hold what was removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import Conflict, PyAgentError
from pyagent_node.sharding.context.documents import removal
from pyagent_node.sharding.context.port import ContextMesh
from pyagent_node.sharding.context.records import DocumentRecord

log = logging.getLogger("pyagent_node.context")

LOOK_SECONDS: Final = 60.0
"""Time between two looks."""
OWN_SECONDS: Final = 300
"""How long the node that added a document waits after it was last fresh."""
OTHERS_SECONDS: Final = 86_400
"""How long others wait."""
MAX_AT_ONCE: Final = 256
"""Documents that are removed in one look."""


class Collector:
    """Looks after the documents of ``mesh``; ``clock`` tells Unix seconds."""

    def __init__(self, mesh: ContextMesh, *, clock: Callable[[], float]) -> None:
        self._mesh, self._clock = mesh, clock
        self.removed = 0
        """Documents that were removed here because they were no longer fresh."""

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except PyAgentError as error:
                log.warning("old documents could not be removed: %s", error)

    async def look(self) -> int:
        """Remove what is over; return how many documents that were."""
        now, count = self._clock(), 0
        for info in self._mesh.contexts():
            for record in self.over(info, now)[: MAX_AT_ONCE - count]:
                catalog = self._mesh.catalog(info.id)
                known = catalog.get(record.source)
                if known is None or known.record.version != record.version:
                    continue  # it was added anew while others were removed
                version = catalog.next_version(record.source, self._mesh.peer_id)
                try:
                    await self._mesh.publish(removal(record, version, int(now)), ())
                except Conflict as error:  # versions count from a higher one on: next time
                    log.debug("%r was not removed yet: %s", record.source, error)
                    continue
                count += 1
        self.removed += count
        return count

    def over(self, info: ContextInfo, now: float) -> list[DocumentRecord]:
        """Return the documents of a context that this node removes at ``now``."""
        catalog = self._mesh.catalog(info.id)
        fresh = {record.source for record in catalog.fresh(info.policy, now)}
        own = {record.source for record in catalog.fresh(info.policy, now - OWN_SECONDS)}
        late = {record.source for record in catalog.fresh(info.policy, now - OTHERS_SECONDS)}
        return [
            record
            for record in catalog.documents()
            if record.source not in fresh
            and record.added <= now - OWN_SECONDS
            and (
                record.source not in own
                if record.version.writer == self._mesh.peer_id
                else record.source not in late and record.added <= now - OTHERS_SECONDS
            )
        ]
