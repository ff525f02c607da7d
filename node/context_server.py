"""Answers peers about contexts: members only, within limits, and nothing that is out of date.

Everybody who belongs to the mesh may ask.  What is to be held here comes from nodes that may change
what the mesh does (no clients), and only for contexts that the log knows.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, NotFound, Refused
from pyagent_node.base.limits import MAX_PEERS, MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.native import blake3
from pyagent_node.node.context_messages import (
    AskBodies,
    AskHeld,
    AskRecords,
    AskScores,
    AskSlots,
    AskSummary,
    Bodies,
    ContextSummary,
    Done,
    Held,
    PutBodies,
    Records,
    Scores,
    Slots,
    Summary,
    TellRecords,
    TellUses,
    context_of,
    first_parts,
    pack,
    pack_scores,
    unpack,
    unpack_digests,
    unpack_ids,
    unpack_question,
    unpack_uses,
)
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.kv_server import ByteBudget
from pyagent_node.node.kv_vault import Offload
from pyagent_node.node.rpc import RpcServer
from pyagent_node.sharding.context.catalog import SLOTS, Catalog
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    decode_body,
    decode_record,
    encode_body,
    encode_record,
)
from pyagent_node.sharding.context.search import Scored, score_all

log = logging.getLogger("pyagent_node.context")

PUT_BURST: Final = 512 * MIB
"""Bytes of bodies that a peer may send here to be held at once ..."""
PUT_RATE: Final = 64 * MIB
"""... and how many more each second."""
BATCH: Final = 64
"""Bodies that are read at a time for a reply."""


class ContextServer:
    """The serving side; ``leaving`` are chunks that are being given up here."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        rpc: RpcServer,
        store: ContextStore,
        reach: Reach,
        *,
        clock: Callable[[], float],
        offload: Offload,
    ) -> None:
        self.leaving: set[ChunkId] = set()
        self.kept_bytes = 0
        """Bytes of bodies that peers had held here."""
        self.on_records: Callable[[Sequence[bytes]], Awaitable[int]] = store.merge
        """Takes records that a peer brought; returns how many were news."""
        self._mesh = mesh
        self._consensus = consensus
        self._store = store
        self._reach = reach
        self._clock = clock
        self._offload = offload
        self._budgets: dict[PeerId, ByteBudget] = {}
        self._digests: dict[ContextId, tuple[int, bytes]] = {}
        rpc.register(AskSummary, self._summary)
        rpc.register(AskSlots, self._slots)
        rpc.register(AskRecords, self._records)
        rpc.register(TellRecords, self._take_records)
        rpc.register(PutBodies, self._keep)
        rpc.register(AskHeld, self._held)
        rpc.register(AskBodies, self._bodies)
        rpc.register(AskScores, self._scores)
        rpc.register(TellUses, self._uses)

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

    def _known(self, data: bytes) -> Catalog:
        """Return a context's catalog; raises :class:`NotFound` (``context_not_found``)."""
        context = context_of(data)
        if all(info.id != context for info in self._consensus.state.contexts.values()):
            raise NotFound("The log of this node knows no such context.", code="context_not_found")
        return self._store.catalog(context)

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
        known = sorted(info.id for info in self._consensus.state.contexts.values())
        contexts = tuple(ContextSummary(each, self.digest(each)) for each in known)
        return Summary(contexts, self._store.limit_bytes), b""

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
        if not self._budget(peer).take(len(tail), self._clock()):
            raise LimitExceeded(
                "This node takes no more chunks of you for now.",
                code="context_budget",
                remedy="Wait some seconds.",
            )
        bodies = await self._offload(lambda: [decode_body(data) for data in unpack(tail)])
        for context in {body.context for body in bodies}:
            self._known(context)
        await self._store.put_bodies(bodies)
        self.kept_bytes += len(tail)
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
        """Whether a newer version of the chunk's document is known here."""
        known = self._store.catalog(body.context).get(body.source)
        return known is not None and known.record.version > body.version

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

    def _budget(self, peer: PeerId) -> ByteBudget:
        now = self._clock()
        if peer not in self._budgets and len(self._budgets) >= MAX_PEERS:
            self._budgets = {p: b for p, b in self._budgets.items() if not b.full(now)}
        return self._budgets.setdefault(peer, ByteBudget(PUT_BURST, PUT_RATE, now))


def _encode_all(bodies: Sequence[ChunkBody]) -> list[bytes]:
    return [encode_body(body) for body in bodies]


def _encoded(catalog: Catalog, slots: Iterable[int], known: set[bytes]) -> Iterable[bytes]:
    for slot in slots:
        for source, digest in sorted(catalog.slot(slot).items()):
            if digest not in known:
                held = catalog.get(source)
                if held is not None:
                    yield encode_record(held.record)
