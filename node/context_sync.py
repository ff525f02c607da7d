"""Keeps every node's records alike: what is new is told at once, and the rest is found out.

Anti-entropy: now and then, and whenever a peer comes, a node asks what the peer knows, and fetches
the records in those slots of a context whose digests differ.  What it lacked it has then; what the
peer lacks the peer finds out in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import trio

from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.context_client import ContextClient
from pyagent_node.node.context_messages import ContextSummary
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_server import ContextServer
from pyagent_node.sharding.context.catalog import MAX_CATALOG, MAX_DOCUMENTS, Catalog
from pyagent_node.sharding.context.collecting import Told
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.record_codec import (
    decode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkId,
    DocumentRecord,
    Version,
)

log = logging.getLogger("pyagent_node.context")

TELL_SECONDS: Final = 5.0
"""Longest time for a peer to take a new record; it finds out by itself if it did not."""
AT_ONCE: Final = 8
"""Peers that are looked at each time; the others come next."""
IDLE_SECONDS: Final = 1.0
"""How often a node looks whether there are contexts at all."""
MAX_CAPACITY: Final = 1 << 50
"""Bytes: nobody is believed to have room for more."""
MAX_ROUNDS: Final = 10_000
"""Replies with records that one look at a peer may take."""


class _Taken(NamedTuple):
    """How many records were news, and which were refused why.

    ``collected`` of them were of versions that were removed.  ``put_off``: some would be news, and
    were not taken for now, since another node's records are being taken over.
    """

    news: int
    refused: list[bytes]
    problem: LimitExceeded | None
    collected: int = 0
    put_off: bool = False


class Settling(Protocol):
    """Is told what peers say of how far they are with forgetting removals."""

    async def told(self, peer: PeerId, context: ContextId, told: Told) -> bool:
        """Note what a peer says; returns whether all was done that its records are good for."""
        ...

    async def looked(self, peer: PeerId, context: ContextId, told: Told) -> None:
        """Note that all was taken in that a peer had when it said this."""
        ...


class _NoSettling:
    async def told(self, peer: PeerId, context: ContextId, told: Told) -> bool:
        return False

    async def looked(self, peer: PeerId, context: ContextId, told: Told) -> None:
        return None


class _Room:
    """What a context has in records: bytes and documents."""

    def __init__(self, used: int, documents: int) -> None:
        self._used, self._documents = used, documents

    def take(self, size: int, instead: int | None, removed: bool) -> None:
        """Count a record, ``instead`` of one of that size; :class:`LimitExceeded` if too much."""
        used = self._used + size - (instead or 0)
        if used > MAX_CATALOG and not removed:
            raise LimitExceeded(
                f"A context has at most {MAX_CATALOG} bytes of records.",
                code="context_full",
                remedy="Remove documents, or take another context.",
                limit=MAX_CATALOG,
                used=self._used,
            )
        if instead is None and self._documents >= MAX_DOCUMENTS:
            raise LimitExceeded(
                f"A context has at most {MAX_DOCUMENTS} documents.", code="context_full"
            )
        self._used = used
        self._documents += instead is None


class RecordSync:
    """Merges records of peers, and tells them of this node's."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        client: ContextClient,
        store: ContextStore,
        *,
        server: ContextServer,
        reach: Reach,
        seconds: float,
    ) -> None:
        self.capacities: dict[PeerId, int] = {}
        """Bytes that each peer offers for bodies, as it says."""
        self.superseded: dict[ChunkId, float] = {}
        """When a chunk's document was replaced or removed, as far as this node saw it."""
        self.sketched: dict[tuple[PeerId, ContextId], ContextSummary] = {}
        """What each peer said last of a context: the groups of spread sketches it has in full."""
        self.merged = 0
        """Records that came from peers and were news."""
        self.on_news: Callable[[], None] = lambda: None
        """Told of every change of the catalogs."""
        self._mesh = mesh
        self._consensus = consensus
        self._client = client
        self._store = store
        self._server = server
        self._reach = reach
        self._seconds = seconds
        self._looking: set[PeerId] = set()
        self._merging: dict[object, int] = {}
        """For each merge that is under way the index of the log at which it began."""
        self.settler: Settling = _NoSettling()
        """Follows what peers say of how far they are."""
        self._idle = True
        self._uses: dict[ContextId, dict[str, int]] = {}

    async def run(self) -> None:
        """Look at peers when they come, and all of them again and again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, nursery)
            nursery.start_soon(self._share_uses)
            after = self._reach.here
            while True:
                if not self._consensus.state.contexts:
                    self._idle = True
                    await trio.sleep(IDLE_SECONDS)
                    continue
                others = sorted(self._reach.present() - {self._reach.here})
                if not self._idle:  # those whose turn it is
                    others = [p for p in others if p > after] + [p for p in others if p <= after]
                    others = others[:AT_ONCE]
                self._idle = False
                for peer in others:
                    nursery.start_soon(self.look, peer)
                after = others[-1] if others else self._reach.here
                await trio.sleep(self._seconds)

    async def _follow(self, nursery: trio.Nursery) -> None:
        async with self._mesh.events() as events:
            async for event in events:
                if event.change == "up" and self._consensus.state.contexts:
                    nursery.start_soon(self.look, event.peer_id)
                    nursery.start_soon(self._tell_all_uses, event.peer_id)

    # ---- finding out -------------------------------------------------------------------------

    async def look(self, peer: PeerId) -> None:
        """Find out what a peer knows and this node does not; never raises."""
        if peer in self._looking:
            return
        self._looking.add(peer)
        try:
            summary, lost = await self._client.summary(peer)
            self._server.losses.heard(peer, summary.epoch, lost)
            self.capacities[peer] = min(max(summary.capacity, 0), MAX_CAPACITY)
            for each in summary.contexts:
                self.sketched[peer, ContextId(each.context)] = each
            known = {info.id for info in self._consensus.state.contexts.values()}
            for each in sorted(summary.contexts, key=lambda each: each.context):
                if each.context in known:
                    told = Told(summary.applied, each.covered, each.settled)
                    await self._look_through(peer, ContextId(each.context), each.digest, told)
        except PyAgentError as error:
            log.debug("what %s knows of contexts was not found out: %s", peer, error)
        finally:
            self._looking.discard(peer)

    async def _look_through(
        self, peer: PeerId, context: ContextId, digest: bytes, told: Told
    ) -> None:
        if await self.settler.told(peer, context, told):
            return
        if digest == self._server.digest(context) or await self._fetch(peer, context):
            await self.settler.looked(peer, context, told)

    async def _fetch(self, peer: PeerId, context: ContextId) -> bool:
        """Take in what a peer has; say whether that was all of it."""
        theirs = await self._client.slots(peer, context)
        refused: list[bytes] = []
        problem: LimitExceeded | None = None
        more, put_off = True, False
        for _ in range(MAX_ROUNDS):
            catalog = self._store.catalog(context)
            slots = [at for at, digest in enumerate(catalog.slots()) if digest != theirs[at]]
            known = [digest for slot in slots for digest in catalog.slot(slot).values()]
            records, more = await self._client.records(peer, context, slots, known + refused)
            if peer not in self._reach.present():
                return False  # what it has may be out of date, now that it is no member
            found = await self._take(records)
            self.merged += found.news
            refused += map(record_digest, found.refused)
            problem, put_off = found.problem or problem, found.put_off or put_off
            if not more or not (found.news or found.refused):
                break
        if problem is not None:
            raise problem
        return not more and not put_off

    def applied(self) -> int:
        """Return the index of the log up to which all that was taken in shows in the catalogs."""
        return min([self._consensus.state.index, *self._merging.values()])

    async def merge(self, records: Sequence[bytes]) -> int:
        """Take records in; those of contexts that the log does not know are left out.

        Raises :class:`LimitExceeded` (``context_full``) where a context has no room for some of
        them, and :class:`Conflict` (``context_record_collected``) for versions that were removed,
        when all others are in.
        """
        found = await self._take(records)
        if found.problem is not None:
            raise found.problem
        if found.collected:
            raise Conflict(
                f"{found.collected} records are of versions that were removed.",
                code="context_record_collected",
                remedy="A node that was away catches up by itself; to have a document that was"
                " removed, add it again.",
            )
        return found.news

    async def _take(self, records: Sequence[bytes]) -> _Taken:
        this = object()
        self._merging[this] = self._consensus.state.index
        try:
            return await self._take_now(records)
        finally:
            del self._merging[this]

    async def _take_now(self, records: Sequence[bytes]) -> _Taken:
        newest = self._newest(records)
        taken: list[tuple[DocumentRecord, bytes]] = []
        before: list[tuple[Catalog, list[ChunkId]]] = []
        refused: list[bytes] = []
        problem: LimitExceeded | None = None
        collected, put_off = 0, False
        rooms: dict[ContextId, _Room] = {}
        for record, data in newest:
            catalog = self._store.catalog(record.context)
            if catalog.refused(record.version):
                refused.append(data)
                collected += 1
                put_off = put_off or catalog.put_off(record.version)
                continue
            held = catalog.get(record.source)
            room = rooms.setdefault(record.context, _Room(catalog.size, len(catalog)))
            try:
                room.take(len(data), held.size if held is not None else None, record.removed)
            except LimitExceeded as error:
                refused.append(data)
                problem = error
                continue
            taken.append((record, data))
            if held is not None:
                rows = enumerate(held.record.chunks)
                before.append((catalog, [held.record.id_of(at) for at, row in rows if row.windows]))
        news = await self._store.merge([data for _, data in taken]) if taken else 0
        put_off = put_off or not all(self._holds(record, data) for record, data in taken)
        now = trio.current_time()
        for catalog, chunks in before:
            for chunk in chunks:
                if catalog.locate(chunk) is None:
                    self.superseded.setdefault(chunk, now)
        if news:
            self.on_news()
        return _Taken(news, refused, problem, collected, put_off)

    def _holds(self, record: DocumentRecord, data: bytes) -> bool:
        """Whether a record or a newer one of its source is here."""
        held = self._store.catalog(record.context).get(record.source)
        rank = (record.version, record_digest(data))
        return held is not None and (held.record.version, held.digest) >= rank

    def _newest(self, records: Sequence[bytes]) -> list[tuple[DocumentRecord, bytes]]:
        """Return the newest record of each source that is news here, removals first."""
        known = {info.id for info in self._consensus.state.contexts.values()}
        newest: dict[tuple[ContextId, str], tuple[Version, bytes, DocumentRecord, bytes]] = {}
        for data in records:
            record = decode_record(data)
            if record.context not in known:
                continue
            key, rank = (record.context, record.source), (record.version, record_digest(data))
            held, best = self._store.catalog(record.context).get(record.source), newest.get(key)
            if held is not None and rank < (held.record.version, held.digest):
                self._lost(record)
            elif (held is None or (held.record.version, held.digest) < rank) and (
                best is None or best[:2] < rank
            ):
                newest[key] = (*rank, record, data)
        found = [(record, data) for _, _, record, data in newest.values()]
        return sorted(found, key=lambda each: not each[0].removed)

    def _lost(self, record: DocumentRecord) -> None:
        """Note a version that came when a newer one was known: its bodies may lie here already."""
        catalog, now = self._store.catalog(record.context), trio.current_time()
        for place, row in enumerate(record.chunks):
            chunk = record.id_of(place)
            if row.windows and self._store.holds(chunk) and catalog.locate(chunk) is None:
                self.superseded.setdefault(chunk, now)

    # ---- telling -----------------------------------------------------------------------------

    async def tell(self, record: bytes) -> int:
        """Tell every peer of a record; returns how many took it.  Never raises."""
        told = 0

        async def one(peer: PeerId) -> None:
            nonlocal told
            try:
                with trio.move_on_after(TELL_SECONDS):
                    await self._client.tell_records(peer, [record])
                    told += 1
            except PyAgentError as error:
                log.debug("%s was not told of a record: %s", peer, error)

        async with trio.open_nursery() as nursery:
            for peer in sorted(self._reach.present() - {self._reach.here}):
                nursery.start_soon(one, peer)
        return told

    def used(self, context: ContextId, uses: dict[str, int]) -> None:
        """Note times of last use; peers are told before long."""
        self._uses.setdefault(context, {}).update(uses)

    async def _share_uses(self) -> None:
        while True:
            await trio.sleep(self._seconds)
            uses, self._uses = self._uses, {}
            for context, some in uses.items():
                try:
                    await self._store.use(context, some)
                except PyAgentError as error:
                    log.warning("the times of last use were not kept: %s", error)
                for peer in sorted(self._reach.present() - {self._reach.here}):
                    await self._tell_uses(peer, context, some)

    async def _tell_all_uses(self, peer: PeerId) -> None:
        for info in list(self._consensus.state.contexts.values()):
            uses = dict(self._store.catalog(info.id).uses)
            if uses:
                await self._tell_uses(peer, info.id, uses)

    async def _tell_uses(self, peer: PeerId, context: ContextId, uses: dict[str, int]) -> None:
        try:
            await self._client.tell_uses(peer, context, uses)
        except (LimitExceeded, NotFound) as error:
            log.debug("%s took no times of use: %s", peer, error)
        except PyAgentError as error:
            log.debug("%s was not told what was used: %s", peer, error)
