"""Asks peers about contexts; see ``context_messages``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, PyAgentError
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.node.context_messages import (
    MAX_IDS,
    MAX_USES,
    AskBodies,
    AskHeld,
    AskLikely,
    AskParts,
    AskRecords,
    AskScores,
    AskSlots,
    AskSummary,
    Bodies,
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
    Wanted,
    first_parts,
    pack,
    pack_ids,
    pack_question,
    pack_uses,
    pack_vector,
    unpack,
    unpack_digests,
    unpack_ids,
    unpack_likely,
    unpack_parts,
    unpack_scores,
)
from pyagent_node.node.rpc import RpcClient
from pyagent_node.sharding.context.probing import Likely
from pyagent_node.sharding.context.record_codec import (
    decode_body,
    decode_record,
    encode_body,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
)
from pyagent_node.sharding.context.search import Scored
from pyagent_node.sharding.context.shares import Part

R = TypeVar("R", bound=msgspec.Struct)

ASK_SECONDS: Final = 5.0
"""Longest wait for a short answer."""
MOVE_SECONDS: Final = 30.0
"""Longest wait for one that carries records or bodies."""
SCORE_SECONDS: Final = 4.0
"""Longest wait for scores and texts of an answer; then another owner is asked."""


class ContextClient:
    """Asks one peer at a time.

    Every method raises what the peer answered, or why it did not: :class:`Unavailable`,
    :class:`DeadlineExceeded`, :class:`CorruptData` for what breaks the protocol.
    """

    def __init__(self, rpc: RpcClient) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self._rpc = rpc

    async def summary(self, peer: PeerId) -> tuple[Summary, list[ChunkId]]:
        """Return what a peer knows of each context, and the chunks that it says are lost."""
        reply, tail = await self._ask(peer, AskSummary(), Summary)
        return reply, unpack_ids(tail)

    async def slots(self, peer: PeerId, context: ContextId) -> list[bytes]:
        """Return the digest of each slot of a context."""
        _, tail = await self._ask(peer, AskSlots(context), Slots)
        return unpack_digests(tail, whole=True)

    async def records(
        self, peer: PeerId, context: ContextId, slots: Sequence[int], known: Sequence[bytes]
    ) -> tuple[list[bytes], bool]:
        """Return records in some slots that are not among the ``known``, and if there are more.

        Each is a record of that context; no more than that is known of them.
        """
        reply, tail = await self._ask(
            peer, AskRecords(context, tuple(slots)), Records, b"".join(known), MOVE_SECONDS
        )
        return [data for data in unpack(tail) if _is_of(data, context)], reply.more

    async def tell_records(self, peer: PeerId, records: Sequence[bytes]) -> int:
        """Hand records over; returns how many were news to the peer."""
        told = 0
        left = list(records)
        while left:
            some, _ = first_parts(left)
            left = left[len(some) :]
            reply, _ = await self._ask(peer, TellRecords(), Done, pack(some), MOVE_SECONDS)
            told += reply.count
        return told

    async def put_bodies(self, peer: PeerId, bodies: Sequence[ChunkBody]) -> None:
        """Have bodies held; they are on the peer's disk when this returns."""
        left = [encode_body(body) for body in bodies]
        while left:
            some, _ = first_parts(left)
            left = left[len(some) :]
            await self._ask(peer, PutBodies(), Done, pack(some), MOVE_SECONDS)

    async def held(
        self, peer: PeerId, chunks: Sequence[ChunkId], buckets: Sequence[int], epoch: int
    ) -> set[ChunkId]:
        """Return the chunks that a peer holds as their owner, at ``epoch`` or later."""
        ask = AskHeld(epoch, tuple(buckets))
        reply, _ = await self._ask(peer, ask, Held, pack_ids(chunks))
        if len(reply.flags) != len(chunks):
            raise CorruptData("A peer did not say what it holds.", code="bad_context_message")
        return {chunk for chunk, flag in zip(chunks, reply.flags, strict=True) if flag == 1}

    async def bodies(
        self, peer: PeerId, chunks: Sequence[ChunkId], seconds: float = MOVE_SECONDS
    ) -> list[ChunkBody]:
        """Return those of the bodies that a peer has; each is one that was asked for."""
        found: dict[ChunkId, ChunkBody] = {}
        left = list(chunks)
        while left:
            asked = left[:MAX_IDS]
            reply, tail = await self._ask(peer, AskBodies(), Bodies, pack_ids(asked), seconds)
            if not 0 < reply.looked <= len(asked):
                raise CorruptData("A peer looked for nothing.", code="bad_context_message")
            looked = set(asked[: reply.looked])
            for data in unpack(tail):
                body = decode_body(data)
                chunk = body.id
                if chunk not in looked:
                    raise CorruptData(
                        "A peer sent a chunk that it was not asked for, or changed one.",
                        code="bad_context_body",
                    )
                found[chunk] = body
            left = left[reply.looked :]
        return list(found.values())

    async def scores(
        self,
        peer: PeerId,
        context: ContextId,
        vector: NDArray[np.float32],
        terms: tuple[int, ...],
        wanted: Sequence[Wanted],
    ) -> tuple[list[Scored], set[ChunkId]]:
        """Return scores of those of the chunks that a peer holds, and which are of old versions."""
        ask = AskScores(context, len(vector), terms)
        reply, tail = await self._ask(
            peer, ask, Scores, pack_question(vector, wanted), SCORE_SECONDS
        )
        places = {each.id: set(each.windows) for each in wanted}
        scored = unpack_scores(tail, len(terms))
        asked: Collection[bytes] = places.keys()
        sane = all(each.window in places.get(each.id, ()) for each in scored)
        if not sane or any(each not in asked for each in reply.stale):
            raise CorruptData(
                "A peer scored what it was not asked for.", code="bad_context_message"
            )
        return scored, {ChunkId(each) for each in reply.stale}

    async def parts(
        self, peer: PeerId, context: ContextId, chunks: Sequence[ChunkId], groups: int
    ) -> dict[ChunkId, Part]:
        """Return the sketches in some groups of those of the chunks whose bodies a peer has."""
        found: dict[ChunkId, Part] = {}
        left = list(chunks)
        while left:
            asked = left[:MAX_IDS]
            reply, tail = await self._ask(
                peer, AskParts(context, groups), Parts, pack_ids(asked), MOVE_SECONDS
            )
            if not 0 < reply.looked <= len(asked):
                raise CorruptData("A peer looked for nothing.", code="bad_context_message")
            some = unpack_parts(tail, groups)
            if not some.keys() <= set(asked[: reply.looked]):
                raise CorruptData("A peer sent another part.", code="bad_context_message")
            found |= some
            left = left[reply.looked :]
        return found

    async def likely(
        self, peer: PeerId, context: ContextId, vector: NDArray[np.float32], groups: int
    ) -> tuple[int, tuple[int, ...], list[Likely]]:
        """Return which of ``groups`` a peer has looked through, marks, and the likeliest windows.

        Raises :class:`CorruptData` (``bad_context_message``) for an answer to something else.
        """
        ask = AskLikely(context, len(vector), groups)
        reply, tail = await self._ask(peer, ask, LikelyWindows, pack_vector(vector), SCORE_SECONDS)
        return reply.groups, *unpack_likely(reply, tail, groups)

    async def tell_uses(self, peer: PeerId, context: ContextId, uses: dict[str, int]) -> None:
        """Say when documents were last used."""
        items = list(uses.items())
        for at in range(0, len(items), MAX_USES):
            some = dict(items[at : at + MAX_USES])
            await self._ask(peer, TellUses(context), Done, pack_uses(some))

    async def _ask(
        self,
        peer: PeerId,
        message: msgspec.Struct,
        reply: type[R],
        tail: bytes = b"",
        seconds: float = ASK_SECONDS,
    ) -> tuple[R, bytes]:
        answer, data = await self._rpc.call(peer, message, reply, tail=tail, seconds=seconds)
        self.bytes_out += len(tail)
        self.bytes_in += len(data)
        return answer, data


def _is_of(data: bytes, context: ContextId) -> bool:
    """Whether these are bytes of a record of a context; a bad one must not stop the good ones."""
    try:
        return decode_record(data).context == context
    except PyAgentError:
        return False
