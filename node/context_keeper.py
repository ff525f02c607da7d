"""Keeps this node's share of the sketches of contexts whose sketches lie spread over the nodes.

Every node looks for itself, as the mover does for bodies: it has whoever holds a chunk's body make
the sketches of those windows that belong to its groups, in the background.  Sketches that it does
not keep any more it gives up only when all owners have said that they hold theirs, so a question
finds everything meanwhile.  Back on the way to every node having all of them, it gets the rest.

``ContextInfo.spread``, which the log says, is what a node is to keep.  What a question does follows
from what there is: so two nodes may be at different points of the way.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.context_client import ContextClient
from pyagent_node.node.context_messages import marks_digest
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_server import ContextServer
from pyagent_node.node.context_sync import RecordSync
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.records import ChunkId
from pyagent_node.sharding.context.shares import ALL_GROUPS, GROUPS, Part

log = logging.getLogger("pyagent_node.context")

BATCH: Final = 512
"""Chunks whose sketches are got at a time."""
STRIPPED: Final = 64
"""Records that are made bare at a time."""
PENDING_SECONDS: Final = 2.0
"""How soon it looks again while something is on its way."""


class SketchKeeper:
    """:meth:`wake` says that something changed; ``seconds`` lie between two looks otherwise."""

    def __init__(
        self,
        consensus: Consensus,
        client: ContextClient,
        store: ContextStore,
        reach: Reach,
        *,
        sync: RecordSync,
        server: ContextServer,
        seconds: float,
    ) -> None:
        self.made = 0
        """Chunks whose sketches came here."""
        self.lacking = 0
        """Chunks whose sketches could not be had when it last looked."""
        self._consensus = consensus
        self._client = client
        self._store = store
        self._reach = reach
        self._sync = sync
        self._server = server
        self._seconds = seconds
        self._wake = trio.Event()

    def wake(self) -> None:
        """Look soon."""
        self._wake.set()

    async def run(self) -> None:
        """Look for ever; what failed is tried again."""
        while True:
            self._wake = trio.Event()
            pending = True
            try:
                pending = await self.once()
            except PyAgentError as error:
                log.warning("sketches of contexts could not be kept: %s", error)
            pause = min(PENDING_SECONDS, self._seconds) if pending else self._seconds
            with trio.move_on_after(pause):
                await self._wake.wait()

    async def once(self) -> bool:
        """Look at every context once; says whether something is still on its way."""
        self.lacking = 0
        pending = False
        for info in list(self._consensus.state.contexts.values()):
            wanted = self.own_groups() if info.spread else ALL_GROUPS
            await self._prune(info)
            lacking = await self._get(info, wanted)
            self.lacking += lacking
            pending = pending or bool(lacking)
            if info.spread and not lacking and self._beyond(info, wanted):
                if self.settled(info):
                    await self._give_up(info, wanted)
                else:
                    pending = True
        return pending

    def own_groups(self) -> int:
        """Return the groups that this node owns."""
        return sum(1 << group for group in range(GROUPS) if self._reach.owns(group))

    def settled(self, info: ContextInfo) -> bool:
        """Whether every owner has all sketches of its groups, by what it said last."""
        catalog = self._store.catalog(info.id)
        digest = marks_digest(catalog.marks())
        if not self._reach.epoch:
            return False
        for group in range(GROUPS):
            for peer in self._reach.owners(group):
                if peer == self._reach.here:
                    if self._server.lacking(info, self.own_groups(), bare_only=False):
                        return False
                    continue
                said = self._sync.sketched.get((peer, info.id))
                if said is None or said.epoch < self._reach.epoch:
                    return False  # it may have been asked to give them up since
                if said.marks != digest or not said.groups >> group & 1:
                    return False
        return True

    async def _prune(self, info: ContextInfo) -> None:
        """Give up parts of chunks that are in no document any more."""
        catalog, share = self._store.catalog(info.id), self._store.share(info.id)
        gone = [chunk for chunk in share if catalog.locate(chunk) is None]
        if gone:
            await self._store.forget_parts(info.id, gone)

    async def _get(self, info: ContextInfo, wanted: int) -> int:
        """Get what is wanted and not here; returns how many chunks that could not be had for."""
        catalog, share = self._store.catalog(info.id), self._store.share(info.id)
        lacking = list(self._server.lacking(info, wanted, bare_only=not info.spread))
        failed = 0
        for at in range(0, len(lacking), BATCH):
            buckets: dict[ChunkId, int] = {}
            windows: dict[ChunkId, int] = {}
            for chunk in lacking[at : at + BATCH]:
                place = catalog.locate(chunk)
                if place is not None:
                    row = place[0].chunks[place[1]]
                    buckets[chunk], windows[chunk] = row.bucket, row.windows
            found: dict[ChunkId, Part] = {}

            async def ask(
                peer: PeerId,
                chunks: list[ChunkId],
                found: dict[ChunkId, Part] = found,
                windows: dict[ChunkId, int] = windows,
            ) -> Collection[ChunkId]:
                if peer == self._reach.here:
                    some = await self._server.parts(info, chunks, wanted)
                else:
                    some = await self._client.parts(peer, info.id, chunks, wanted)
                some = {chunk: part for chunk, part in some.items() if part.fits(windows[chunk])}
                found.update(some)
                return some.keys()

            failed += len(await self._reach.gather(buckets, ask))
            for chunk, part in found.items():
                held = share.get(chunk)
                if held is not None and held.fits(windows[chunk]):
                    found[chunk] = held.joined(part)
            if found:
                await self._store.put_parts(info.id, found)
            self.made += len(found)
        return failed

    def _beyond(self, info: ContextInfo, wanted: int) -> bool:
        """Whether there are sketches here that are not to be kept."""
        whole = any(
            record.windows and not record.whole
            for record in self._store.catalog(info.id).documents()
        )
        return whole or bool(self._store.share(info.id).beyond(wanted))

    async def _give_up(self, info: ContextInfo, wanted: int) -> None:
        cut = self._store.share(info.id).beyond(wanted)
        if cut:
            await self._store.put_parts(info.id, cut)
        catalog = self._store.catalog(info.id)
        sources = [r.source for r in catalog.documents() if r.windows and not r.whole]
        for at in range(0, len(sources), STRIPPED):
            some = [s for s in sources[at : at + STRIPPED] if self._has_own(info, s, wanted)]
            await self._store.strip(info.id, some)
        log.info("the sketches of context %s lie spread over the nodes", info.name)

    def _has_own(self, info: ContextInfo, source: str, wanted: int) -> bool:
        """Whether this node's part of a document is here: a newer version may have come."""
        share, known = self._store.share(info.id), self._store.catalog(info.id).get(source)
        lost = self._server.lost(info)
        return known is not None and all(
            share.covers(known.record.id_of(place), wanted) or known.record.id_of(place) in lost
            for place, row in enumerate(known.record.chunks)
            if row.windows
        )
