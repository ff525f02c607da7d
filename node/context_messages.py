"""The messages of ``/pyagent/context/1``: what nodes ask each other about contexts.  Pure.

They travel as requests and replies of ``node.rpc``, on streams of a protocol of its own.  Records
and bodies go in the tail as they are stored: each carries a checksum, and a body's id follows from
what it says, so that no node need believe another one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.contexts import CONTEXT_ID_BYTES
from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import ContextId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.catalog import MARK_BYTES, SLOT_DIGEST_BYTES, SLOTS
from pyagent_node.sharding.context.index import RERANKED
from pyagent_node.sharding.context.probing import Likely
from pyagent_node.sharding.context.records import CHUNK_ID_BYTES, ChunkId
from pyagent_node.sharding.context.search import MAX_TERMS, Scored
from pyagent_node.sharding.context.shares import ALL_GROUPS, Part, decode_part
from pyagent_node.sharding.context.sketches import MAX_DIMENSIONS, in_range

PROTOCOL: Final = "/pyagent/context/1"

MAX_IDS: Final = 4096
"""Chunks that one request may name."""
MAX_CONTEXTS: Final = 1024
REPLY_BYTES: Final = 2 * MIB
"""A reply of several parts ends when it has so many bytes; the rest is asked for again."""
MAX_PARTS_BYTES: Final = 40 * MIB
"""Bytes of the parts in one tail: a record may be large."""
MAX_PARTS: Final = 1 << 16
MAX_LIST_BYTES: Final = 2 * MIB
"""Bytes of a list of small things: its items are counted only after they were decoded."""
MAX_TIME: Final = 1 << 40
"""Seconds since 1970."""
MAX_USES: Final = 10_000
"""Times of last use in one message."""

_COUNT: Final = struct.Struct("<I")


class AskSummary(msgspec.Struct, frozen=True, tag="ask_summary"):
    """Ask what a node knows of each context, and how much it can hold."""


class ContextSummary(msgspec.Struct, frozen=True, array_like=True):
    """``digest`` covers all records of a context: equal ones hold the same records.

    ``groups`` are those of spread sketches that the node holds in full, of the chunks that
    ``marks`` is the digest of, as the owner that it is at ``epoch``.  ``covered`` and ``settled``
    say how far the node is with forgetting removals (``sharding.context.collecting``).
    """

    context: bytes
    digest: bytes
    groups: int = 0
    marks: bytes = b""
    epoch: int = 0
    covered: int = 0
    settled: int = 0


class Summary(msgspec.Struct, frozen=True, tag="summary"):
    """``capacity`` is the bytes that the node offers for bodies; 0: it holds none.

    All that the node took in up to the index ``applied`` of the log shows; -1: an earlier version
    of this program does not say.
    The tail has the ids of chunks that the node, as the owner that it is at ``epoch``, could get
    from nobody for long: see ``context_lost``.
    """

    contexts: tuple[ContextSummary, ...]
    capacity: int
    applied: int = -1
    epoch: int = 0


class AskSlots(msgspec.Struct, frozen=True, tag="ask_slots"):
    """Ask for the digest of each slot of a context."""

    context: bytes


class Slots(msgspec.Struct, frozen=True, tag="slots"):
    """The tail holds the digests, one after the other."""


class AskRecords(msgspec.Struct, frozen=True, tag="ask_records"):
    """Ask for the records in some slots; the tail holds the digests of those that are known."""

    context: bytes
    slots: tuple[int, ...]


class Records(msgspec.Struct, frozen=True, tag="records"):
    """The tail holds records (see :func:`pack`); ``more``: there are others."""

    more: bool = False


class TellRecords(msgspec.Struct, frozen=True, tag="tell_records"):
    """Here are records, in the tail."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """It was done; ``count`` of what was sent was news."""

    count: int = 0


class PutBodies(msgspec.Struct, frozen=True, tag="put_bodies"):
    """Hold these bodies, in the tail; answered when they are on the disk."""


class AskHeld(msgspec.Struct, frozen=True, tag="ask_held"):
    """Ask which chunks (ids in the tail) a node holds *as their owner*, at this epoch or a later.

    Whoever asks forgets what is held, so the answer is a promise: see ``context_mover``.
    ``buckets`` has the bucket of each chunk.
    """

    epoch: int
    buckets: tuple[int, ...]


class Held(msgspec.Struct, frozen=True, tag="held"):
    """``flags`` has a byte for each chunk: 1 if it is held."""

    flags: bytes


class AskBodies(msgspec.Struct, frozen=True, tag="ask_bodies"):
    """Ask for bodies; the tail holds ids of chunks."""


class Bodies(msgspec.Struct, frozen=True, tag="bodies"):
    """The tail holds those there are of the first ``looked`` chunks that were asked for."""

    looked: int


class AskScores(msgspec.Struct, frozen=True, tag="ask_scores"):
    """Ask how well chunks fit a question.

    The tail holds the question's vector (``dimensions`` numbers), then :class:`Wanted` in
    MessagePack.  ``terms`` are the hashes of the question's words: its text does not travel.
    """

    context: bytes
    dimensions: int
    terms: tuple[int, ...]


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """A chunk, and which windows of it."""

    id: bytes
    windows: tuple[int, ...]


class Scores(msgspec.Struct, frozen=True, tag="scores"):
    """The tail holds ``Scored`` in MessagePack; ``stale`` chunks are of old versions by now."""

    stale: tuple[bytes, ...] = ()


class AskParts(msgspec.Struct, frozen=True, tag="ask_parts"):
    """Ask for the sketches in some groups of windows of chunks whose ids are in the tail."""

    context: bytes
    groups: int


class Parts(msgspec.Struct, frozen=True, tag="parts"):
    """The tail holds ids and parts in turn, those there are of the first ``looked`` chunks."""

    looked: int


class AskLikely(msgspec.Struct, frozen=True, tag="ask_likely"):
    """Ask for the likeliest windows by the sketches that a node holds; the tail is the vector.

    Only windows in ``groups`` (bit ``g`` stands for group ``g``) count.
    """

    context: bytes
    dimensions: int
    groups: int


class LikelyWindows(msgspec.Struct, frozen=True, tag="likely_windows"):
    """The tail holds the marks of the slots of a catalog, then ``Likely`` in MessagePack.

    ``groups`` are those that the node has looked through, of the chunks that the marks cover: some
    or all of those that it was asked for.
    """

    groups: int


class TellUses(msgspec.Struct, frozen=True, tag="tell_uses"):
    """When documents were last part of an answer; the tail is a map in MessagePack."""

    context: bytes


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_wanted: Final = msgspec.msgpack.Decoder(list[Wanted])
_decode_likely: Final = msgspec.msgpack.Decoder(list[Likely])
_decode_scores: Final = msgspec.msgpack.Decoder(list[Scored])
_decode_uses: Final = msgspec.msgpack.Decoder(dict[str, int])


def pack(parts: Sequence[bytes]) -> bytes:
    """Return parts as one tail: their number, their lengths, themselves."""
    sizes = np.array([len(part) for part in parts], "<u4").tobytes()
    return b"".join((_COUNT.pack(len(parts)), sizes, *parts))


def unpack(tail: bytes) -> list[bytes]:
    """Return the parts of a tail; raises :class:`CorruptData` (``bad_context_message``)."""
    if not _COUNT.size <= len(tail) <= MAX_PARTS_BYTES:
        raise _corrupt("has no parts, or too many bytes")
    (count,) = _COUNT.unpack_from(tail)
    start = _COUNT.size + 4 * count
    if count > MAX_PARTS or start > len(tail):
        raise _corrupt("does not have the parts that it says")
    sizes = np.frombuffer(tail, "<u4", count, _COUNT.size).astype(np.int64)
    if int(sizes.sum()) != len(tail) - start:
        raise _corrupt("does not have the length that it says")
    ends = np.cumsum(sizes) + start
    return [tail[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]


def first_parts(parts: Iterable[bytes], limit: int = REPLY_BYTES) -> tuple[list[bytes], bool]:
    """Return the first parts, of about ``limit`` bytes, and whether there are more."""
    taken: list[bytes] = []
    size = 0
    for part in parts:
        if taken and size + len(part) > limit:
            return taken, True
        taken.append(part)
        size += len(part)
    return taken, False


def pack_ids(ids: Sequence[ChunkId]) -> bytes:
    """Return ids as a tail."""
    return b"".join(ids)


def unpack_ids(tail: bytes) -> list[ChunkId]:
    """Return the ids in a tail; raises :class:`CorruptData` (``bad_context_message``)."""
    if len(tail) % CHUNK_ID_BYTES or len(tail) > MAX_IDS * CHUNK_ID_BYTES:
        raise _corrupt("does not hold ids of chunks, or too many")
    return [ChunkId(tail[at : at + CHUNK_ID_BYTES]) for at in range(0, len(tail), CHUNK_ID_BYTES)]


def unpack_digests(tail: bytes, *, whole: bool) -> list[bytes]:
    """Return digests of records, or (``whole``) those of all slots.

    Raises :class:`CorruptData` (``bad_context_message``).
    """
    size = SLOT_DIGEST_BYTES
    if len(tail) % size or (whole and len(tail) != SLOTS * size) or len(tail) > MAX_PARTS_BYTES:
        raise _corrupt("does not hold digests")
    return [tail[at : at + size] for at in range(0, len(tail), size)]


def _check_list(tail: bytes) -> None:
    if len(tail) > MAX_LIST_BYTES:
        raise _corrupt("is too large")


def pack_question(vector: NDArray[np.float32], wanted: Sequence[Wanted]) -> bytes:
    """Return the tail of :class:`AskScores`."""
    return vector.astype("<f4").tobytes() + _encode(list(wanted))


def unpack_question(ask: AskScores, tail: bytes) -> tuple[NDArray[np.float32], list[Wanted]]:
    """Return the vector and the chunks; raises :class:`CorruptData` (``bad_context_message``)."""
    size = 4 * ask.dimensions
    if not 0 < ask.dimensions <= MAX_DIMENSIONS or len(tail) < size or len(ask.terms) > MAX_TERMS:
        raise _corrupt("holds no question")
    vector = np.frombuffer(tail, "<f4", ask.dimensions).astype(np.float32)
    _check_list(tail)
    try:
        wanted = _decode_wanted.decode(tail[size:])
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("holds no list of chunks") from None
    if not np.isfinite(vector).all() or len(wanted) > MAX_IDS:
        raise _corrupt("holds no vector, or too many chunks")
    if any(len(each.id) != CHUNK_ID_BYTES for each in wanted):
        raise _corrupt("holds no ids of chunks")
    return vector, wanted


def pack_scores(scored: Sequence[Scored]) -> bytes:
    """Return the tail of :class:`Scores`."""
    return _encode(list(scored))


def unpack_scores(tail: bytes, terms: int) -> list[Scored]:
    """Return the scores of a reply to a question of so many terms.

    Raises :class:`CorruptData` (``bad_context_message``).
    """
    _check_list(tail)
    try:
        scored = _decode_scores.decode(tail)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("holds no scores") from None
    for each in scored:
        sane = np.isfinite(each.likeness) and each.window >= 0 and each.length >= 0
        if not sane or len(each.counts) != terms or min(each.counts, default=0) < 0:
            raise _corrupt("holds scores that make no sense")
    return scored


def marks_digest(marks: Sequence[int]) -> bytes:
    """Return the digest of the marks of a catalog."""
    return blake3(_pack_marks(marks))[:MARK_BYTES]


def _pack_marks(marks: Sequence[int]) -> bytes:
    return np.array(marks, "<u8").tobytes()


def pack_vector(vector: NDArray[np.float32]) -> bytes:
    """Return the tail of :class:`AskLikely`."""
    return vector.astype("<f4").tobytes()


def unpack_vector(ask: AskLikely, tail: bytes) -> NDArray[np.float32]:
    """Return the vector; raises :class:`CorruptData` (``bad_context_message``)."""
    if not 0 < ask.dimensions <= MAX_DIMENSIONS or len(tail) != 4 * ask.dimensions:
        raise _corrupt("holds no question")
    if not 0 < ask.groups <= ALL_GROUPS:
        raise _corrupt("asks for no groups that there are")
    vector = np.frombuffer(tail, "<f4").astype(np.float32)
    if not in_range(vector):
        raise _corrupt("holds no vector")
    return vector


def pack_likely(marks: Sequence[int], found: Sequence[Likely]) -> bytes:
    """Return the tail of :class:`LikelyWindows`."""
    return _pack_marks(marks) + _encode(list(found))


def unpack_likely(
    reply: LikelyWindows, tail: bytes, asked: int
) -> tuple[tuple[int, ...], list[Likely]]:
    """Return marks and windows of a reply to a question for the groups ``asked``.

    Raises :class:`CorruptData` (``bad_context_message``).
    """
    size = SLOTS * MARK_BYTES
    _check_list(tail)
    if len(tail) < size or not 0 <= reply.groups <= ALL_GROUPS:
        raise _corrupt("holds no marks")
    if reply.groups & ~asked:
        raise _corrupt("is of groups that were not asked for")
    try:
        found = _decode_likely.decode(tail[size:])
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("holds no windows") from None
    if sum(len(each.places) for each in found) > RERANKED:
        raise _corrupt("holds too many windows")
    for each in found:
        sane = len(each.id) == CHUNK_ID_BYTES and len(each.places) == len(each.estimates)
        if not sane or not np.isfinite(each.estimates).all() or min(each.places, default=0) < 0:
            raise _corrupt("holds windows that make no sense")
    return tuple(np.frombuffer(tail[:size], "<u8").tolist()), found


def unpack_parts(tail: bytes, groups: int) -> dict[ChunkId, Part]:
    """Return the parts of a reply to :class:`AskParts`.

    Raises :class:`CorruptData` (``bad_context_message``, ``bad_context_part``).
    """
    flat = unpack(tail)
    if len(flat) % 2 or any(len(chunk) != CHUNK_ID_BYTES for chunk in flat[::2]):
        raise _corrupt("does not hold parts")
    found = {
        ChunkId(chunk): decode_part(data) for chunk, data in zip(flat[::2], flat[1::2], strict=True)
    }
    if any(part.groups != groups for part in found.values()):
        raise _corrupt("holds parts that were not asked for")
    return found


def pack_uses(uses: dict[str, int]) -> bytes:
    """Return the tail of :class:`TellUses`."""
    return _encode(uses)


def unpack_uses(tail: bytes) -> dict[str, int]:
    """Return times of last use; raises :class:`CorruptData` (``bad_context_message``)."""
    _check_list(tail)
    try:
        uses = _decode_uses.decode(tail)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt("holds no times of use") from None
    if len(uses) > MAX_USES or not all(0 <= at < MAX_TIME for at in uses.values()):
        raise _corrupt("holds too many times of use, or such as cannot be")
    return uses


def context_of(data: bytes) -> ContextId:
    """Return the id of a context; raises :class:`InvalidRequest` (``bad_context_id``)."""
    if len(data) != CONTEXT_ID_BYTES:
        raise InvalidRequest("This is no id of a context.", code="bad_context_id")
    return ContextId(data)


def _corrupt(what: str) -> CorruptData:
    return CorruptData(f"A message about contexts {what}.", code="bad_context_message")
