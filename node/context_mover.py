"""Brings bodies to the nodes that own them, and gives them up where they are not owned any more.

Every node looks for itself: what it owns and lacks it copies from whoever has it, in the
background and within a rate; what it holds and does not own it gives up *only* when all owners have
said, at this epoch or a later, that they hold it.  So whatever happens to the table of owners, a
body that was at one node is never at none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.context_client import ContextClient
from pyagent_node.node.context_lost import Losses
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_server import ContextServer
from pyagent_node.node.context_sync import RecordSync
from pyagent_node.node.kv_server import ByteBudget
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.records import ChunkBody, ChunkId

log = logging.getLogger("pyagent_node.context")

COPY_BATCH: Final = 128
"""Chunks that are copied at a time."""
PENDING_SECONDS: Final = 2.0
"""How soon it looks again while something waits for other nodes."""
ASK_BATCH: Final = 1024
"""Chunks that an owner is asked about at a time."""
BREATH: Final = 2048
"""Chunks that are looked at between two turns of other tasks."""
BARRIER_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 1.0
"""How soon the log is followed again when it could not be."""


class Mover:
    """Moves what must move; :meth:`wake` says that something changed."""

    def __init__(
        self,
        consensus: Consensus,
        client: ContextClient,
        store: ContextStore,
        reach: Reach,
        *,
        sync: RecordSync,
        server: ContextServer,
        losses: Losses,
        seconds: float,
        bytes_per_second: float,
        collect_seconds: float,
        orphan_seconds: float,
    ) -> None:
        self.copied = 0
        """Bodies that came here because this node owns them now."""
        self.released = 0
        """Bodies given up because others own them."""
        self.collected = 0
        """Bodies given up because no document has them any more."""
        self.lacking = 0
        """Bodies that this node owned and could not get, when it last looked."""
        self.on_change: Callable[[], None] = lambda: None
        """Told when the owners, or the contexts that there are, have changed."""
        self._consensus = consensus
        self._client = client
        self._store = store
        self._reach = reach
        self._sync = sync
        self._server = server
        self._losses = losses
        self._seconds = seconds
        self._rate = bytes_per_second
        self._collect_seconds = collect_seconds
        self._orphan_seconds = orphan_seconds
        self._orphans: dict[ChunkId, float] = {}
        self._due = math.inf
        """When the next body of a replaced document is to be given up."""
        self._pending = False
        """Whether something could not be moved yet: others are looking for it, or at it, too."""
        self._wake = trio.Event()
        self._seen: tuple[int, frozenset[tuple[str, bool]]] = (0, frozenset())

    def wake(self) -> None:
        """Look soon."""
        self._wake.set()

    async def run(self) -> None:
        """Look for ever; errors of the disk are told and what failed is tried again."""
        budget = ByteBudget(self._rate, self._rate, trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            while True:
                self._wake = trio.Event()
                try:
                    await self.once(budget)
                except PyAgentError as error:
                    log.warning("chunks of contexts could not be moved: %s", error)
                    await trio.sleep(self._seconds)
                pause = min(PENDING_SECONDS, self._seconds) if self._pending else self._seconds
                pause = min(pause, max(0.0, self._due - trio.current_time()))
                with trio.move_on_after(pause):
                    await self._wake.wait()

    async def _follow(self) -> None:
        """Wake up when other owners are committed, or a context is dropped; for ever."""
        while True:
            self._note()
            try:
                async with self._consensus.applied(self._consensus.state.index) as entries:
                    self._note()
                    async for _ in entries:
                        self._note()
            except (LimitExceeded, Unavailable) as error:
                log.debug("following the log anew: %s", error)
            await trio.sleep(AGAIN_SECONDS)

    def _note(self) -> None:
        contexts = self._consensus.state.contexts.values()
        seen = (self._reach.epoch, frozenset((info.name, info.spread) for info in contexts))
        if seen != self._seen:
            self._seen = seen
            self._reach.table()  # so that it remembers the one before
            self.wake()
            self.on_change()

    async def once(self, budget: ByteBudget) -> None:
        """Look at everything once."""
        self._due = math.inf
        await self._drop_contexts()
        epoch = self._reach.epoch
        if not epoch:
            return  # nobody owns anything yet
        lacking, surplus = await self._look()
        # first what makes room: a full store must get empty again
        await self._collect()
        if surplus:
            await self._release(surplus, epoch)
        try:
            await self._copy(lacking, epoch, budget)
        finally:
            hopeful = self.lacking > len(self._losses.own())
            self._pending = hopeful or any(map(self._store.holds, surplus))

    async def _look(self) -> tuple[dict[ChunkId, int], dict[ChunkId, int]]:
        """Return what is owned and lacking here, and what is held and not owned, with buckets."""
        lacking: dict[ChunkId, int] = {}
        surplus: dict[ChunkId, int] = {}
        count = 0
        for info in list(self._consensus.state.contexts.values()):
            catalog = self._store.catalog(info.id)
            for chunk in list(catalog.chunk_ids()):
                count += 1
                if not count % BREATH:
                    await trio.lowlevel.checkpoint()
                place = catalog.locate(chunk)
                if place is None:
                    continue
                bucket = place[0].chunks[place[1]].bucket
                mine, held = self._reach.owns(bucket), self._store.holds(chunk)
                if mine and not held and self._store.limit_bytes:
                    lacking[chunk] = bucket
                elif held and not mine:
                    surplus[chunk] = bucket
        return lacking, surplus

    # ---- copying -----------------------------------------------------------------------------

    async def _copy(self, lacking: dict[ChunkId, int], epoch: int, budget: ByteBudget) -> None:
        chunks = list(lacking)
        self.lacking = 0
        failed: set[ChunkId] = set()
        for at in range(0, len(chunks), COPY_BATCH):
            if self._reach.epoch != epoch:
                self.wake()
                return
            some = {
                chunk: lacking[chunk]
                for chunk in chunks[at : at + COPY_BATCH]
                if not self._store.holds(chunk)
            }
            found: list[ChunkBody] = []

            async def ask(
                peer: PeerId, wanted: list[ChunkId], found: list[ChunkBody] = found
            ) -> Collection[ChunkId]:
                bodies = await self._client.bodies(peer, wanted)
                found += bodies
                return [body.id for body in bodies]

            failed |= await self._reach.gather(some, ask, here=False)
            self.lacking = len(failed)
            try:
                await self._store.put_bodies(found)
            except LimitExceeded as error:
                self.lacking = len(lacking) - at
                log.warning("chunks that this node owns are not taken: %s", error)
                return
            size = sum(map(_size, found))
            self.copied += len(found)
            await trio.sleep(budget.reserve(size, trio.current_time()))
        self._losses.note(failed)
        if self.lacking:
            log.info("%d chunks that this node owns are at no node that it reaches", self.lacking)

    # ---- giving up ---------------------------------------------------------------------------

    async def _release(self, surplus: dict[ChunkId, int], epoch: int) -> None:
        """Give up what all owners hold."""
        asked: dict[PeerId, list[ChunkId]] = {}
        needed: dict[ChunkId, set[PeerId]] = {}
        for chunk, bucket in surplus.items():
            needed[chunk] = set(self._reach.owners(bucket))
            for peer in needed[chunk]:
                asked.setdefault(peer, []).append(chunk)
        present = self._reach.present()
        for peer, chunks in sorted(asked.items()):
            if peer not in present:
                continue
            for at in range(0, len(chunks), ASK_BATCH):
                some = chunks[at : at + ASK_BATCH]
                try:
                    held = await self._client.held(peer, some, [surplus[c] for c in some], epoch)
                except PyAgentError as error:
                    log.debug("%s does not say what it holds: %s", peer, error)
                    break
                for chunk in held:
                    needed[chunk].discard(peer)
        # a bucket that nobody owns is no reason to give anything up
        sure = [
            chunk
            for chunk, missing in needed.items()
            if not missing and self._reach.owners(surplus[chunk])
        ]
        self.released += await self._forget(sure, lambda: self._reach.epoch == epoch)

    async def _collect(self) -> None:
        """Give up what belongs to no document that there is."""
        now = trio.current_time()
        orphans: dict[ChunkId, float] = {}
        for chunk, context in list(self._store.held().items()):
            if self._store.catalog(context).locate(chunk) is None:
                orphans[chunk] = self._orphans.get(chunk, now)
        self._orphans = orphans
        replaced = self._sync.superseded
        old = [
            chunk
            for chunk, since in orphans.items()
            if now - since >= self._orphan_seconds
            or now - replaced.get(chunk, math.inf) >= self._collect_seconds
        ]
        self.collected += await self._forget(old, lambda: True)
        due = (replaced[chunk] + self._collect_seconds for chunk in orphans if chunk in replaced)
        self._due = min((at for at in due if at > now), default=math.inf)
        for chunk in [c for c in replaced if c not in orphans]:
            if now - replaced[chunk] >= self._collect_seconds:
                del replaced[chunk]

    async def _forget(self, chunks: list[ChunkId], still: Callable[[], bool]) -> int:
        """Give chunks up if that is ``still`` right; nobody is told any more that they are here."""
        if not chunks or not still():
            return 0
        leaving = self._server.leaving
        leaving.update(chunks)
        try:
            await self._store.forget(chunks)
        finally:
            leaving.difference_update(chunks)
        return len(chunks)

    async def _drop_contexts(self) -> None:
        """Give up contexts that the mesh has dropped.

        A log that lags behind does not know contexts either, so it is asked first what is true.
        """
        gone = self._unknown()
        if not gone:
            return
        try:
            with trio.fail_after(BARRIER_SECONDS):
                await self._consensus.read_barrier()
        except (PyAgentError, trio.TooSlowError) as error:
            log.debug("whether contexts are gone is not known: %s", error)
            return
        for context in self._unknown():
            await self._store.drop(context)
            log.info("the context %s was dropped", context.hex())

    def _unknown(self) -> list[ContextId]:
        known = {info.id for info in self._consensus.state.contexts.values()}
        return sorted(set(self._store.known()) - known)


def _size(body: ChunkBody) -> int:
    return len(body.text) + len(body.vectors)
