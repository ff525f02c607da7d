"""Answers peers about contexts: members only, within limits, and nothing that is out of date.

Everybody who belongs to the mesh may ask.  What is to be held here comes from nodes that may change
what the mesh does (no clients), and only for contexts that the log knows.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import InvalidRequest, LimitExceeded, NotFound, Refused
from pyagent_node.base.limits import MAX_PEERS, MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.native import blake3
from pyagent_node.node.context_lost import Losses
from pyagent_node.node.context_messages import (
    MAX_IDS,
    AskBodies,
    AskHeld,
    AskLikely,
    AskParts,
    AskRecords,
    AskScores,
    AskSlots,
    AskSummary,
    Bodies,
    ContextSummary,
    Done,
    Held,
    LikelyWindows,
    Parts,
    PutBodies,
    Records,
    Scores,
    Slots,
    Summary,
    TellRecords,
    TellUses,
    context_of,
    first_parts,
    marks_digest,
    pack,
    pack_ids,
    pack_likely,
    pack_scores,
    unpack,
    unpack_digests,
    unpack_ids,
    unpack_question,
    unpack_uses,
    unpack_vector,
)
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.kv_server import ByteBudget
from pyagent_node.node.kv_vault import Offload
from pyagent_node.node.rpc import RpcServer
from pyagent_node.sharding.context import minilm
from pyagent_node.sharding.context.catalog import SLOTS, Catalog
from pyagent_node.sharding.context.defaults import Axes
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.probing import MAX_UNSURE, Likely, likely
from pyagent_node.sharding.context.record_codec import (
    check_body,
    decode_body,
    decode_record,
    encode_body,
    encode_record,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
)
from pyagent_node.sharding.context.search import Scored, score_all
from pyagent_node.sharding.context.shares import (
    ALL_GROUPS,
    GROUPS,
    Part,
    encode_part,
    part_of,
)

log = logging.getLogger("pyagent_node.context")

PUT_BURST: Final = 512 * MIB
"""Bytes of bodies that a peer may send here to be held at once ..."""
PUT_RATE: Final = 64 * MIB
"""... and how many more each second."""
FEW: Final = 16
"""A group counts as held here if the sketches of less than one chunk in so many may be lacking."""
RECORD_BURST: Final = 256 * MIB
"""Bytes of records that a peer may tell at once ..."""
RECORD_RATE: Final = 16 * MIB
"""... and how many more each second."""
SAMPLE: Final = 16
"""Bodies that tell how long the vectors of a context are."""
BATCH: Final = 64
"""Bodies that are read at a time for a reply."""

Models = Callable[[str, int, bytes], Axes]
"""Returns the axes of an encoder (its identity, its dimensions, its centre in a context)."""


class ContextServer:
    """The serving side; ``leaving`` are chunks that are being given up here.

    ``models`` gives the axes of an encoder; ``now`` tells Unix seconds.
    """

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        rpc: RpcServer,
        store: ContextStore,
        reach: Reach,
        *,
        losses: Losses,
        models: Models,
        clock: Callable[[], float],
        now: Callable[[], float],
        offload: Offload,
    ) -> None:
        self.leaving: set[ChunkId] = set()
        self.on_records: Callable[[Sequence[bytes]], Awaitable[int]] = store.merge
        """Takes records that a peer brought; returns how many were news."""
        self.applied: Callable[[], int] = lambda: consensus.state.index
        """Returns the index of the log up to which all that was taken in shows."""
        self.losses = losses
        self._mesh = mesh
        self._consensus = consensus
        self._store = store
        self._reach = reach
        self.models = models
        self._clock = clock
        self._now = now
        self._offload = offload
        self._budgets: dict[PeerId, ByteBudget] = {}
        self._told: dict[PeerId, ByteBudget] = {}
        self._digests: dict[ContextId, tuple[int, bytes]] = {}
        self._lengths: dict[ContextId, frozenset[int]] = {}
        rpc.register(AskSummary, self._summary)
        rpc.register(AskSlots, self._slots)
        rpc.register(AskRecords, self._records)
        rpc.register(TellRecords, self._take_records)
        rpc.register(PutBodies, self._keep)
        rpc.register(AskHeld, self._held)
        rpc.register(AskBodies, self._bodies)
        rpc.register(AskScores, self._scores)
        rpc.register(TellUses, self._uses)
        rpc.register(AskParts, self._parts)
        rpc.register(AskLikely, self._likely)

    # ---- who ---------------------------------------------------------------------------------

    def _check_member(self, peer: PeerId, *, writes: bool = False) -> None:
        """Raise :class:`Refused` (``not_member``, ``role_not_allowed``)."""
        record = self._consensus.state.members.get(peer)
        if record is not None and not is_member(record):
            raise Refused(f"{peer} is no member of this mesh.", code="not_member")
        role = record.role if record is not None else self._role(peer)
        if role is None:
            raise Refused(f"{peer} is no member of this mesh.", code="not_member")
        if writes and role == "client":
            raise Refused("A client only asks about contexts.", code="role_not_allowed")

    def _role(self, peer: PeerId) -> str | None:
        if peer == self._mesh.peer_id:
            return "voter"
        return next((info.role for info in self._mesh.peers() if info.peer_id == peer), None)

    def _info(self, data: bytes) -> ContextInfo:
        """Return a context; raises :class:`NotFound` (``context_not_found``)."""
        context = context_of(data)
        for info in self._consensus.state.contexts.values():
            if info.id == context:
                return info
        raise NotFound("The log of this node knows no such context.", code="context_not_found")

    def _known(self, data: bytes) -> Catalog:
        """Return a context's catalog; raises :class:`NotFound` (``context_not_found``)."""
        return self._store.catalog(self._info(data).id)

    # ---- records -----------------------------------------------------------------------------

    def digest(self, context: ContextId) -> bytes:
        """Return the digest of all records of a context."""
        catalog = self._store.catalog(context)
        kept = self._digests.get(context)
        if kept is None or kept[0] != catalog.generation:
            kept = self._digests[context] = (
                catalog.generation,
                blake3(b"".join(catalog.slots()))[:16],
            )
        return kept[1]

    async def _summary(self, peer: PeerId, ask: AskSummary, tail: bytes) -> tuple[Summary, bytes]:
        self._check_member(peer)
        known = sorted(self._consensus.state.contexts.values(), key=lambda info: info.id)
        contexts = tuple(
            ContextSummary(
                each.id,
                self.digest(each.id),
                *self._sketched(each),
                self._reach.epoch,
                *self._store.catalog(each.id).standing,
            )
            for each in known
        )
        lost = sorted(self.losses.own())
        summary = Summary(contexts, self._store.limit_bytes, self.applied(), self._reach.epoch)
        return summary, pack_ids(lost)

    def _sketched(self, info: ContextInfo) -> tuple[int, bytes]:
        """Return the groups of spread sketches that are here in full, and what marks those."""
        if not info.spread:
            return 0, b""
        own = sum(1 << group for group in range(GROUPS) if self._reach.owns(group))
        if self.lacking(info, own, bare_only=False):
            return 0, b""
        return own, marks_digest(self._store.catalog(info.id).marks())

    def lost(self, info: ContextInfo) -> frozenset[ChunkId]:
        """Return the chunks of a context that no node has any more, as all owners say."""
        return self.losses.among(self._store.catalog(info.id))

    def lacking(self, info: ContextInfo, groups: int, *, bare_only: bool = True) -> list[ChunkId]:
        """Return the chunks whose sketches in ``groups`` are not here though they could be."""
        catalog, share = self._store.catalog(info.id), self._store.share(info.id)
        found, lost = catalog.lacking(share, groups, bare_only=bare_only), self.lost(info)
        return [chunk for chunk in found if chunk not in lost] if lost else found

    async def _slots(self, peer: PeerId, ask: AskSlots, tail: bytes) -> tuple[Slots, bytes]:
        self._check_member(peer)
        return Slots(), b"".join(self._known(ask.context).slots())

    async def _records(self, peer: PeerId, ask: AskRecords, tail: bytes) -> tuple[Records, bytes]:
        self._check_member(peer)
        catalog = self._known(ask.context)
        if len(ask.slots) > SLOTS or not all(0 <= slot < SLOTS for slot in ask.slots):
            raise InvalidRequest("There are no such slots.", code="bad_context_message")
        known = set(unpack_digests(tail, whole=False))
        parts, more = first_parts(_encoded(catalog, ask.slots, known))
        return Records(more), pack(parts)

    async def _take_records(
        self, peer: PeerId, tell: TellRecords, tail: bytes
    ) -> tuple[Done, bytes]:
        self._check_member(peer, writes=True)
        now = self._clock()
        if not self._budget(self._told, peer, RECORD_BURST, RECORD_RATE).take(len(tail), now):
            raise LimitExceeded(
                "This node takes no more records of you for now.",
                code="context_record_budget",
                remedy="Wait some seconds: it also looks for what it lacks by itself.",
            )
        parts = unpack(tail)
        for data in parts:
            self._known(decode_record(data).context)
        return Done(await self.on_records(parts)), b""

    async def _uses(self, peer: PeerId, tell: TellUses, tail: bytes) -> tuple[Done, bytes]:
        self._check_member(peer, writes=True)
        catalog = self._known(tell.context)
        await self._store.use(catalog.context, unpack_uses(tail))
        return Done(), b""

    # ---- bodies ------------------------------------------------------------------------------

    async def _keep(self, peer: PeerId, put: PutBodies, tail: bytes) -> tuple[Done, bytes]:
        self._check_member(peer, writes=True)
        budget = self._budget(self._budgets, peer, PUT_BURST, PUT_RATE)
        if not budget.take(len(tail), self._clock()):
            raise LimitExceeded(
                "This node takes no more chunks of you for now.",
                code="context_budget",
                remedy="Wait some seconds.",
            )
        bodies = await self._offload(lambda: [check_body(decode_body(d)) for d in unpack(tail)])
        for context in {body.context for body in bodies}:
            self._known(context)
        await self._store.put_bodies(bodies)
        return Done(len(bodies)), b""

    async def _held(self, peer: PeerId, ask: AskHeld, tail: bytes) -> tuple[Held, bytes]:
        """Say what is held here for good: the one who asks gives it up.

        Two nodes that each take the other for the owner must not both be told yes.  Who is behind
        the asker's epoch says no, and so does who is no owner by what it knows itself.
        """
        self._check_member(peer)
        chunks = unpack_ids(tail)
        if len(ask.buckets) != len(chunks):
            raise InvalidRequest("Each chunk has a bucket.", code="bad_context_message")
        if self._reach.epoch < ask.epoch:
            return Held(bytes(len(chunks))), b""
        flags = bytes(
            self._reach.owns(bucket) and self._has(chunk)
            for chunk, bucket in zip(chunks, ask.buckets, strict=True)
        )
        return Held(flags), b""

    def _has(self, chunk: ChunkId) -> bool:
        return self._store.holds(chunk) and chunk not in self.leaving

    async def _bodies(self, peer: PeerId, ask: AskBodies, tail: bytes) -> tuple[Bodies, bytes]:
        self._check_member(peer)
        chunks = unpack_ids(tail)
        if not chunks:
            raise InvalidRequest("No chunk was asked for.", code="bad_context_message")
        parts: list[bytes] = []
        looked = 0
        for at in range(0, len(chunks), BATCH):
            some = await self._store.bodies(chunks[at : at + BATCH])
            fresh = [body for body in some if not self.stale(body)]
            parts += await self._offload(partial(_encode_all, fresh))
            looked += len(chunks[at : at + BATCH])
            if sum(map(len, parts)) > MIB:
                break
        return Bodies(looked), pack(parts)

    def stale(self, body: ChunkBody) -> bool:
        """Whether a newer version of the chunk's document is known here, or that it was removed."""
        catalog = self._store.catalog(body.context)
        known = catalog.get(body.source)
        if known is None:
            return not catalog.behind and catalog.collected(body.version)
        return known.record.version > body.version

    async def _scores(self, peer: PeerId, ask: AskScores, tail: bytes) -> tuple[Scores, bytes]:
        self._check_member(peer)
        context = self._known(ask.context).context
        vector, wanted = unpack_question(ask, tail)
        places = {ChunkId(each.id): each.windows for each in wanted}
        bodies = await self._store.bodies(list(places))
        mine = [body for body in bodies if body.context == context]
        stale = tuple(body.id for body in mine if self.stale(body))
        fresh = [body for body in mine if not self.stale(body)]

        def work() -> list[Scored]:
            return score_all(fresh, places, vector, ask.terms)

        return Scores(stale), pack_scores(await self._offload(work))

    # ---- spread sketches ---------------------------------------------------------------------

    async def parts(
        self, info: ContextInfo, chunks: Sequence[ChunkId], groups: int
    ) -> dict[ChunkId, Part]:
        """Return the sketches in some groups of those of the chunks whose bodies are here.

        A body whose vectors cannot be sketched has none: it counts as looked at.  Windows that its
        record knows nothing of are left out: who asks could not take them.
        """
        bodies = [body for body in await self._store.bodies(chunks) if body.context == info.id]
        catalog = self._store.catalog(info.id)
        places = {body.id: catalog.locate(body.id) for body in bodies}
        known = {chunk: at[0].chunks[at[1]].windows for chunk, at in places.items() if at}

        def work() -> dict[ChunkId, Part]:
            found: dict[ChunkId, Part] = {}
            for body in bodies:
                try:
                    axes = self.models(info.encoder, body.dimensions, info.centre)
                    part = part_of(body, axes, groups)
                    found[body.id] = part.first(known.get(body.id, len(body.spans)))
                except InvalidRequest as error:
                    log.warning("a chunk of %r has no sketches: %s", body.source, error)
                    found[body.id] = Part(groups, b"", b"", b"", b"")
            return found

        return await self._offload(work)

    async def _parts(self, peer: PeerId, ask: AskParts, tail: bytes) -> tuple[Parts, bytes]:
        self._check_member(peer)
        info, chunks = self._info(ask.context), unpack_ids(tail)
        if not chunks or not 0 <= ask.groups <= ALL_GROUPS:
            raise InvalidRequest("No chunk was asked for.", code="bad_context_message")
        flat: list[bytes] = []
        looked = 0
        for at in range(0, len(chunks), BATCH):
            some = await self.parts(info, chunks[at : at + BATCH], ask.groups)
            for chunk, part in some.items():
                flat += (chunk, encode_part(part))
            looked += len(chunks[at : at + BATCH])
            if sum(map(len, flat)) > MIB:
                break
        return Parts(looked), pack(flat)

    async def axes(self, info: ContextInfo, dimensions: int) -> Axes:
        """Return the axes of a context's encoder; random ones take a while to make.

        Raises :class:`InvalidRequest` (``bad_vectors``) for another length than that of its centre.
        """
        return await self._offload(lambda: self.models(info.encoder, dimensions, info.centre))

    async def _check_length(self, info: ContextInfo, length: int) -> None:
        """Refuse a vector that is none of a context's encoder, before axes are made for it.

        Where no body of the context is here, any length may be right.  Raises
        :class:`InvalidRequest` (``bad_vectors``).
        """
        known = self._lengths.get(info.id, frozenset())
        if info.encoder == minilm.IDENTITY:
            known = frozenset((minilm.DIMENSIONS,))
        elif info.centre:
            known = frozenset((len(info.centre) // 2,))
        elif not known:
            some = islice(self._store.catalog(info.id).chunk_ids(), MAX_IDS)
            bodies = await self._store.bodies([c for c in some if self._store.holds(c)][:SAMPLE])
            known = frozenset(body.dimensions for body in bodies)
            if known:
                self._lengths[info.id] = known
        if known and length not in known:
            raise InvalidRequest(
                f"The encoder of {info.name!r} makes no vectors of {length} numbers.",
                code="bad_vectors",
            )

    async def likely(
        self, info: ContextInfo, vector: NDArray[np.float32], asked: int
    ) -> tuple[int, tuple[int, ...], list[Likely]]:
        """Return which of the groups are here, marks of their chunks, and the likeliest windows.

        Only windows in the groups ``asked`` count.  A group of which a few sketches are not here
        yet counts as here: the marks tell.
        """
        catalog, share = self._store.catalog(info.id), self._store.share(info.id)
        axes, now = await self.axes(info, len(vector)), self._now()
        groups, lost = self.ready(info), self.lost(info)
        without = [(place[0].source, place[1]) for c in lost if (place := catalog.locate(c))]
        marks = catalog.covered(share, groups)
        table = await self._offload(lambda: catalog.table(axes.model, info.policy, now, share))
        found = await self._offload(lambda: likely(table, vector, asked, without=without))
        return groups & asked, marks, found

    def ready(self, info: ContextInfo) -> int:
        """Return the groups of which all sketches are here, but for those of a few chunks."""
        catalog, share = self._store.catalog(info.id), self._store.share(info.id)
        few = min(MAX_UNSURE, catalog.chunks // FEW) + len(self.lost(info))
        return catalog.ready(share, few)

    async def _likely(
        self, peer: PeerId, ask: AskLikely, tail: bytes
    ) -> tuple[LikelyWindows, bytes]:
        self._check_member(peer)
        info, vector = self._info(ask.context), unpack_vector(ask, tail)
        await self._check_length(info, len(vector))
        groups, marks, found = await self.likely(info, vector, ask.groups)
        return LikelyWindows(groups), pack_likely(marks, found)

    def _budget(
        self, budgets: dict[PeerId, ByteBudget], peer: PeerId, burst: float, rate: float
    ) -> ByteBudget:
        now = self._clock()
        if peer not in budgets and len(budgets) >= MAX_PEERS:
            for idle in [p for p, budget in budgets.items() if budget.full(now)]:
                del budgets[idle]
        return budgets.setdefault(peer, ByteBudget(burst, rate, now))


def _encode_all(bodies: Sequence[ChunkBody]) -> list[bytes]:
    return [encode_body(body) for body in bodies]


def _encoded(catalog: Catalog, slots: Iterable[int], known: set[bytes]) -> Iterable[bytes]:
    for slot in slots:
        for source, digest in sorted(catalog.slot(slot).items()):
            if digest not in known:
                held = catalog.get(source)
                if held is not None:
                    yield encode_record(held.record)
