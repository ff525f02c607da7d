"""Contexts as the nodes of a mesh hold them together; implements ``ContextMesh``.

Records of documents go to every node (``context_sync``), bodies of chunks to the owners of their
buckets (``context_mover``), which the log knows and the leader decides (``context_steward``);
questions go to the owners of candidates (``context_search``).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.contexts import (
    CONTEXT_ID_BYTES,
    ContextInfo,
    check_context_name,
    check_policy,
)
from pyagent_node.base.errors import Conflict, NotFound, PyAgentError, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.consensus.commands import CreateContext, DropContext
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.node.context_client import MOVE_SECONDS, ContextClient
from pyagent_node.node.context_keeper import SketchKeeper
from pyagent_node.node.context_lost import Losses
from pyagent_node.node.context_messages import PROTOCOL
from pyagent_node.node.context_mover import Mover
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_search import ContextSearch
from pyagent_node.node.context_server import ContextServer, Models
from pyagent_node.node.context_settling import Settler
from pyagent_node.node.context_steward import BucketSteward
from pyagent_node.node.context_sync import RecordSync
from pyagent_node.node.kv_vault import Offload, in_thread
from pyagent_node.node.nurseries import background
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.index import Way
from pyagent_node.sharding.context.port import Answer, ContextStore
from pyagent_node.sharding.context.record_codec import (
    bare,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
)
from pyagent_node.sharding.context.shares import Share

log = logging.getLogger("pyagent_node.context")

PUT_SECONDS: Final = 30.0
"""Longest time for a node to take the bodies of a document; then another one is tried."""


class Pace(msgspec.Struct, frozen=True):
    """How often things are looked at, and how fast they move; seconds, and bytes a second.

    ``settle`` is for how long a node must be there to get buckets.  Bodies of replaced documents
    are given up after ``collect``, those of which no record ever came after ``orphan``: it may be
    that it is on the far side of a cut.  A body that its owners looked for in vain for ``lost``
    counts as lost.
    """

    sync: float = 10.0
    move: float = 15.0
    steward: float = 1.0
    settle: float = 3.0
    collect: float = 60.0
    lost: float = 600.0
    orphan: float = 86_400.0
    bytes_per_second: float = 32 * MIB


class ContextService:
    """Get one from :func:`open_contexts`."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        rpc: Rpc,
        store: ContextStore,
        *,
        models: Models,
        clock: Callable[[], float],
        offload: Offload,
        random_bytes: Callable[[int], bytes],
        pace: Pace,
    ) -> None:
        self.store = store
        self.rpc = rpc
        self.client = ContextClient(rpc.client)
        self.reach = Reach(mesh, consensus)
        losses = Losses(self.reach, trio.current_time, seconds=pace.lost)
        self.server = ContextServer(
            mesh,
            consensus,
            rpc.server,
            store,
            self.reach,
            losses=losses,
            models=models,
            clock=trio.current_time,
            now=clock,
            offload=offload,
        )
        self.sync = RecordSync(
            mesh,
            consensus,
            self.client,
            store,
            server=self.server,
            reach=self.reach,
            seconds=pace.sync,
        )
        self.mover = Mover(
            consensus,
            self.client,
            store,
            self.reach,
            sync=self.sync,
            server=self.server,
            losses=losses,
            seconds=pace.move,
            bytes_per_second=pace.bytes_per_second,
            collect_seconds=pace.collect,
            orphan_seconds=pace.orphan,
        )
        self.keeper = SketchKeeper(
            consensus,
            self.client,
            store,
            self.reach,
            sync=self.sync,
            server=self.server,
            seconds=pace.move,
        )
        self.searcher = ContextSearch(
            self.client,
            store,
            self.reach,
            server=self.server,
            clock=clock,
            offload=offload,
        )
        self.steward = BucketSteward(
            mesh,
            consensus,
            store,
            self.reach,
            lambda: {peer: float(size) for peer, size in self.sync.capacities.items()},
            seconds=pace.steward,
            settle=pace.settle,
        )
        self.settler = Settler(
            consensus,
            self.client,
            store,
            self.reach,
            sync=self.sync,
            clock=clock,
            seconds=pace.steward,
        )
        self.published = 0
        """Documents that were added or removed at this node."""
        self._consensus = consensus
        self._clock = clock
        self._random_bytes = random_bytes
        self._stale: set[PeerId] = set()
        self._stale_seen = trio.Event()
        self.server.on_records = self.sync.merge
        self.server.applied = self.sync.applied
        self.sync.settler = self.settler
        self.sync.on_news = self._news
        self.mover.on_change = self.keeper.wake
        self.searcher.on_stale = self._is_stale

    async def run(self) -> None:
        """Serve, compare, move and decide, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sync.run)
            nursery.start_soon(self.mover.run)
            nursery.start_soon(self.keeper.run)
            nursery.start_soon(self.steward.run)
            nursery.start_soon(self.settler.run)
            nursery.start_soon(self._catch_up)

    # ---- the port ----------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        """See ``ContextMesh``."""
        return self.reach.here

    def contexts(self) -> tuple[ContextInfo, ...]:
        """See ``ContextMesh``."""
        return tuple(sorted(self._consensus.state.contexts.values(), key=lambda each: each.name))

    def find(self, name: str) -> ContextInfo:
        """See ``ContextMesh``."""
        found = self._consensus.state.contexts.get(name)
        if found is None:
            raise NotFound(
                f"There is no context {name[:80]!r}.",
                code="context_not_found",
                remedy="'pyagent-node context list' shows those that there are.",
            )
        return found

    async def create(
        self, name: str, policy: ContextPolicy, *, encoder: str, centre: bytes = b""
    ) -> ContextInfo:
        """See ``ContextMesh``."""
        check_context_name(name)
        check_policy(policy)
        new = ContextId(self._random_bytes(CONTEXT_ID_BYTES))
        info = ContextInfo(name, new, policy, encoder, int(self._clock()), centre=centre)
        await self._consensus.propose(CreateContext(info))
        return info

    async def drop(self, name: str) -> None:
        """See ``ContextMesh``."""
        await self._consensus.propose(DropContext(name, self.find(name).id))
        self.mover.wake()

    def catalog(self, context: ContextId) -> Catalog:
        """See ``ContextMesh``."""
        info = self._info(context)
        return self.settler.catalog(info) if info is not None else self.store.catalog(context)

    def held_up(self, context: ContextId) -> tuple[PeerId, ...]:
        """See ``ContextMesh``."""
        return self.settler.held_up(context)

    def share(self, context: ContextId) -> Share:
        """See ``ContextMesh``."""
        return self.store.share(context)

    def lost(self, context: ContextInfo) -> frozenset[ChunkId]:
        """See ``ContextMesh``."""
        return self.server.lost(context)

    @property
    def owners(self) -> int:
        """See ``ContextMesh``."""
        return len({peer for row in self._consensus.state.buckets for peer in row})

    @property
    def index_bytes(self) -> int:
        """See ``ContextMesh``."""
        return self._consensus.state.settings["context_index_bytes"]

    async def publish(self, record: DocumentRecord, bodies: Sequence[ChunkBody]) -> None:
        """See ``ContextMesh``; raises :class:`Unavailable` (``no_owner``)."""
        encoded = encode_record(record)
        self._check_version(record)
        if bodies:
            await self._place(record, bodies)
        if self._spread(record.context):
            encoded = encode_record(bare(record, record_digest(encoded)))
        self._check_version(record)  # and merging begins before the log can move on
        await self.sync.merge([encoded])
        self.published += 1
        await self.sync.tell(encoded)

    async def fetch(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """See ``ContextMesh``."""
        found = {body.id: body for body in await self.store.bodies(ids)}
        wanted: dict[ChunkId, int] = {}
        for chunk in ids:
            place = self._locate(chunk)
            if chunk not in found and place is not None:
                wanted[chunk] = place[0].chunks[place[1]].bucket

        async def ask(peer: PeerId, some: list[ChunkId]) -> Collection[ChunkId]:
            bodies = await self.client.bodies(peer, some)
            found.update((body.id, body) for body in bodies)
            return [body.id for body in bodies]

        if wanted:
            with trio.move_on_after(MOVE_SECONDS):
                await self.reach.gather(wanted, ask, here=False)
        return [found[chunk] for chunk in dict.fromkeys(ids) if chunk in found]

    async def search(
        self,
        context: ContextInfo,
        question: str,
        vector: NDArray[np.float32],
        *,
        count: int = 8,
        way: Way = "both",
    ) -> Answer:
        """See ``ContextMesh``."""
        return await self.searcher.search(context, question, vector, count=count, way=way)

    async def used(self, context: ContextId, sources: Sequence[str], now: int) -> None:
        """See ``ContextMesh``."""
        uses = dict.fromkeys(sources, now)
        if self.store.catalog(context).use(uses):
            await self.store.use(context, uses)
            self.sync.used(context, uses)

    def _news(self) -> None:
        self.mover.wake()
        self.keeper.wake()

    # ---- parts -------------------------------------------------------------------------------

    def _info(self, context: ContextId) -> ContextInfo | None:
        infos = self._consensus.state.contexts.values()
        return next((info for info in infos if info.id == context), None)

    def _spread(self, context: ContextId) -> bool:
        info = self._info(context)
        return info is not None and info.spread

    def _check_version(self, record: DocumentRecord) -> None:
        """Raise :class:`Conflict` (``context_version_old``) for what nobody would take any more.

        And :class:`Unavailable` (``context_not_member``) as long as this node's copy of the log
        does not say that it is a member: it may not know yet what new versions count from.
        """
        members = self._consensus.state.members
        own = members.get(self.peer_id)
        if members and (own is None or not is_member(own)):
            raise Unavailable(
                "This node is no member of the mesh, as far as it knows.",
                code="context_not_member",
                remedy="If it has just joined, try again in a moment.",
            )
        lowest = self.catalog(record.context).lowest
        if record.version.counter <= lowest:
            raise Conflict(
                f"New versions count from above {lowest} by now.",
                code="context_version_old",
                remedy="Make it anew with another version.",
            )

    def _locate(self, chunk: ChunkId) -> tuple[DocumentRecord, int] | None:
        for info in self._consensus.state.contexts.values():
            place = self.store.catalog(info.id).locate(chunk)
            if place is not None:
                return place
        return None

    async def _place(self, record: DocumentRecord, bodies: Sequence[ChunkBody]) -> None:
        """Give each body to as many of its owners as there are copies, or to who stands in."""
        copies = self._consensus.state.settings["context_copies"]
        left: dict[ChunkId, list[PeerId]] = {}
        have: dict[ChunkId, int] = {}
        by_id = {body.id: body for body in bodies}
        for chunk, body in by_id.items():
            left[chunk] = self.reach.sources(record.chunks[body.ordinal].bucket)
            have[chunk] = 0
        while True:
            jobs: dict[PeerId, list[ChunkId]] = {}
            for chunk, rest in left.items():
                for peer in rest[: copies - have[chunk]]:
                    jobs.setdefault(peer, []).append(chunk)
                left[chunk] = rest[copies - have[chunk] :] if have[chunk] < copies else []
            if not jobs:
                break
            async with trio.open_nursery() as nursery:
                for peer, chunks in sorted(jobs.items()):
                    some = [by_id[chunk] for chunk in chunks]
                    nursery.start_soon(self._put, peer, some, chunks, have)
        if not all(have.values()):
            raise Unavailable(
                "No node took the chunks of the document.",
                code="no_owner",
                remedy="Nodes may be away, or have no room: see 'pyagent-node status'.",
            )

    async def _put(
        self,
        peer: PeerId,
        bodies: list[ChunkBody],
        chunks: list[ChunkId],
        have: dict[ChunkId, int],
    ) -> None:
        try:
            with trio.fail_after(PUT_SECONDS):
                if peer == self.peer_id:
                    await self.store.put_bodies(bodies)
                else:
                    await self.client.put_bodies(peer, bodies)
        except (PyAgentError, trio.TooSlowError) as error:
            log.info("%s did not take %d chunks: %s", peer, len(bodies), error)
            return
        for chunk in chunks:
            have[chunk] += 1

    def _is_stale(self, peer: PeerId) -> None:
        self._stale.add(peer)
        self._stale_seen.set()

    async def _catch_up(self) -> None:
        """Look at peers that know newer versions of something."""
        while True:
            await self._stale_seen.wait()
            self._stale_seen = trio.Event()
            stale, self._stale = self._stale, set()
            for peer in sorted(stale):
                await self.sync.look(peer)


@asynccontextmanager
async def open_contexts(
    mesh: Mesh,
    consensus: Consensus,
    store: ContextStore,
    *,
    models: Models,
    clock: Callable[[], float] = time.time,
    offload: Offload = in_thread,
    random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    pace: Pace | None = None,
) -> AsyncIterator[ContextService]:
    """Hold contexts together with the other nodes while the block lasts.

    ``models`` gives the axes of an encoder; ``clock`` gives Unix seconds.
    """
    async with open_rpc(mesh, PROTOCOL) as rpc, background() as nursery:
        service = ContextService(
            mesh,
            consensus,
            rpc,
            store,
            models=models,
            clock=clock,
            offload=offload,
            random_bytes=random_bytes,
            pace=pace or Pace(),
        )
        nursery.start_soon(service.run)
        yield service
