"""What a node knows of one context: the newest record of every document.  Pure.

A catalog is a replicated data type without conflicts: it is the union of all records seen, of each
source the one that is newest.  Merging is therefore commutative, associative and idempotent, and
nodes that have seen the same records hold the same catalog, in whatever order they came.  Of two
records of one version that differ (a writer that lost its disk may count anew) the higher digest
wins, everywhere.

For finding out what two catalogs lack, sources fall into :data:`SLOTS` slots by their digest; a
slot's digest covers the records in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from pyagent_node.base.errors import InvalidRequest, LimitExceeded
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.freshness import fresh
from pyagent_node.sharding.context.record_codec import (
    bare,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    MAX_NUMBER,
    ChunkId,
    DocumentRecord,
    Version,
)
from pyagent_node.sharding.context.shares import ALL_GROUPS, GROUPS, Share
from pyagent_node.sharding.context.sketches import BITS, SketchModel
from pyagent_node.sharding.context.tables import Table, table_of

SLOTS: Final = 256
SLOT_DIGEST_BYTES: Final = 16
MARK_BYTES: Final = 8
SKETCH_BYTES: Final = BITS // 8 + 2
"""Bytes of a window's sketch and its weight."""
MAX_DOCUMENTS: Final = 1 << 20
"""The most sources of a context, removed ones that are remembered included."""
MAX_CATALOG: Final = 4 << 30
"""The most bytes of the records of a context, as they are encoded."""
_NOTHING: Final = bytes(SLOT_DIGEST_BYTES)


class Known(NamedTuple):
    """A record, its digest, and how many bytes it is when encoded."""

    record: DocumentRecord
    digest: bytes
    size: int


LISTS: Final = 8
"""Lists of what is lacking that are kept: a question needs three."""


def slot_of(source: str) -> int:
    """Return the slot of a source."""
    return blake3(source.encode())[0]


class Catalog:
    """The newest records of one context."""

    def __init__(self, context: ContextId) -> None:
        self.context = context
        self._known: dict[str, Known] = {}
        self._slots: list[dict[str, bytes]] = [{} for _ in range(SLOTS)]
        self._digests: list[bytes | None] = [_NOTHING] * SLOTS
        self._chunks: dict[ChunkId, tuple[str, int]] = {}
        self._marks = [0] * SLOTS
        self._ready: tuple[tuple[int, int, int], int] = ((-1, 0, 0), 0)
        self._lacking: dict[tuple[int, bool], list[ChunkId]] = {}
        self._lacking_at = (-1, -1)
        self._windows = 0
        self._size = 0
        self._bare = 0
        self._uses: dict[str, int] = {}
        self._generation = 0
        self.standing = Standing()
        """How far this node is with forgetting removals; kept with the records."""
        self._horizon = 0
        self._floor = 0
        self._kept_out = 0
        self._table: tuple[tuple[int, int, SketchModel, frozenset[str]], Table] | None = None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def size(self) -> int:
        """Bytes of all records as they are encoded, removals too."""
        return self._size

    @property
    def generation(self) -> int:
        """Grows with every change."""
        return self._generation

    def newer(self, record: DocumentRecord, digest: bytes) -> bool:
        """Whether a record is newer than what is known of its source, and not :meth:`refused`.

        Raises :class:`InvalidRequest` (``other_context``) and :class:`LimitExceeded`
        (``context_full``).
        """
        self._check(record)
        held = self._known.get(record.source)
        if held is None and len(self._known) >= MAX_DOCUMENTS:
            raise LimitExceeded(
                f"A context has at most {MAX_DOCUMENTS} documents.", code="context_full"
            )
        if held is not None and (held.record.version, held.digest) >= (record.version, digest):
            return False
        return not self.refused(record.version)

    def merge(self, record: DocumentRecord, encoded: bytes | None = None) -> bool:
        """Take a record in; say whether it is newer than what was known.

        ``encoded`` are its bytes, where the caller has them.  Raises :class:`InvalidRequest`
        (``bad_context_record``) and what :meth:`newer` does.
        """
        if encoded is None:
            encoded = encode_record(record)
        if not self.newer(record, record_digest(encoded)):
            return False
        self.adopt(record, encoded)
        return True

    def adopts(self, record: DocumentRecord, digest: bytes, floor: int) -> bool:
        """Whether a settled node's record is to be had: what is here up to ``floor`` is nothing.

        Raises :class:`InvalidRequest` (``other_context``).
        """
        self._check(record)
        held = self._known.get(record.source)
        if held is None or held.digest == digest:
            return held is None
        version = held.record.version
        return version.counter <= floor or (version, held.digest) < (record.version, digest)

    def adopt(self, record: DocumentRecord, encoded: bytes) -> None:
        """Hold a settled node's record instead of what is known of its source."""
        held = self._known.get(record.source)
        if held is not None:
            self._drop_chunks(held.record)
            self._size -= held.size
        self._put(Known(record, record_digest(encoded), len(encoded)))

    def make_bare(self, source: str) -> DocumentRecord | None:
        """Forget the sketches of a record; returns it as it is now if it had any."""
        held = self._known.get(source)
        if held is None or held.record.whole or not held.record.windows:
            return None
        record = bare(held.record, held.digest)
        self._known[source] = Known(record, held.digest, len(encode_record(record)))
        self._size += self._known[source].size - held.size
        self._bare += 1
        self._generation += 1
        return record

    def forget(self, source: str) -> None:
        """Forget a source altogether, as when its removal is collected."""
        held = self._known.pop(source, None)
        if held is not None:
            self._drop_chunks(held.record)
            self._size -= held.size
            slot = slot_of(source)
            del self._slots[slot][source]
            self._digests[slot] = None
            self._uses.pop(source, None)
            self._generation += 1

    def get(self, source: str) -> Known | None:
        """Return the newest record of a source, a removed one too."""
        return self._known.get(source)

    def next_version(self, source: str, writer: PeerId) -> Version:
        """Return the version of what ``writer`` adds next: above all that is known."""
        held = self._known.get(source)
        known = held.record.version.counter if held is not None else 0
        return Version(max(known, self.lowest) + 1, writer)

    def everything(self) -> list[Known]:
        """Return all records, removed ones too, by source."""
        return [self._known[source] for source in sorted(self._known)]

    def documents(self) -> list[DocumentRecord]:
        """Return the documents that there are, fresh or not, by source."""
        return [known.record for known in self.everything() if not known.record.removed]

    def fresh(self, policy: ContextPolicy, now: float) -> list[DocumentRecord]:
        """Return the documents that may be answered from at ``now``, by source."""
        records = (known.record for known in self._known.values())
        return fresh(records, policy, now=now, uses=self._uses)

    def locate(self, chunk: ChunkId) -> tuple[DocumentRecord, int] | None:
        """Return the record and place of a chunk of a newest version, ``None`` for any other."""
        found = self._chunks.get(chunk)
        return (self._known[found[0]].record, found[1]) if found is not None else None

    def chunk_ids(self) -> Iterable[ChunkId]:
        """Return the ids of all chunks that have bodies, of newest versions."""
        return self._chunks.keys()

    @property
    def chunks(self) -> int:
        """Chunks of all documents that have bodies, fresh or not."""
        return len(self._chunks)

    @property
    def windows(self) -> int:
        """Windows of all documents, fresh or not."""
        return self._windows

    @property
    def spread(self) -> bool:
        """Whether there are bare records: sketches of those lie with the owners of their groups."""
        return bool(self._bare)

    def marks(self) -> tuple[int, ...]:
        """Return for each slot the sum (exclusive or) of the ids of its chunks that have bodies.

        Nodes whose slots have the same mark know the same chunks in it.
        """
        return tuple(self._marks)

    def lacking(self, share: Share, groups: int, *, bare_only: bool = True) -> list[ChunkId]:
        """Return the chunks that have windows in ``groups`` of which no sketch may be here.

        Such are neither in ``share`` nor, with ``bare_only``, in a record that is not bare.  The
        lists of the last few calls are kept, and serve until something changes.
        """
        if bare_only and not self._bare:
            return []
        now, key = (self._generation, share.generation), (groups, bare_only)
        full = len(self._lacking) >= LISTS and key not in self._lacking
        if self._lacking_at != now or full:
            self._lacking, self._lacking_at = {}, now
        found = self._lacking.get(key)
        if found is None:
            found = self._lacking[key] = [
                chunk
                for chunk, (source, _) in self._chunks.items()
                if not share.covers(chunk, groups)
                and not (bare_only and not self._known[source].record.whole)
            ]
        return found

    def ready(self, share: Share, tolerance: int = 0) -> int:
        """Return the groups of which all sketches are here, but for those of a few chunks."""
        if not self._bare:
            return ALL_GROUPS
        key = (self._generation, share.generation, tolerance)
        if self._ready[0] != key:
            held: Counter[int] = Counter()
            for chunk, (source, _) in self._chunks.items():
                part = share.get(chunk)
                whole = not self._known[source].record.whole
                held[ALL_GROUPS if whole else part.groups if part is not None else 0] += 1
            lack = [
                sum(count for groups, count in held.items() if not groups >> group & 1)
                for group in range(GROUPS)
            ]
            found = sum(1 << group for group in range(GROUPS) if lack[group] <= tolerance)
            self._ready = (key, found)
        return self._ready[1]

    def covered(self, share: Share, groups: int) -> tuple[int, ...]:
        """Return :meth:`marks` of the chunks that are not :meth:`lacking`."""
        marks = list(self._marks)
        for chunk in self.lacking(share, groups):
            marks[slot_of(self._chunks[chunk][0])] ^= mark_of(chunk)
        return tuple(marks)

    def in_slot(self, slot: int) -> list[ChunkId]:
        """Return the chunks of a slot, those of documents that were added last first."""
        records = [self._known[source].record for source in self._slots[slot]]
        records.sort(key=lambda record: (-record.added, record.source))
        return [
            record.id_of(place)
            for record in records
            for place, row in enumerate(record.chunks)
            if row.windows
        ]

    # What was removed (see ``collecting``) ----------------------------------------------------

    def obey(self, horizon: int, floor: int) -> None:
        """Take over what the log says of this context."""
        self._horizon, self._floor = max(self._horizon, horizon), max(self._floor, floor)

    def keep_out(self, counter: int) -> None:
        """Take no versions up to a counter but by :meth:`adopt`: they are being taken over.

        0 ends that, be it done or not.
        """
        self._kept_out = counter

    @property
    def lowest(self) -> int:
        """New versions have counters above this."""
        return max(self._horizon, self._floor, self._kept_out, self.standing.refused)

    @property
    def behind(self) -> bool:
        """Whether records up to the floor count for nothing here, until they are taken over."""
        return self.standing.settled < self._floor

    def refused(self, version: Version) -> bool:
        """Whether a version that is not held here is kept out: :meth:`collected`, or put off."""
        return self.collected(version) or self.put_off(version)

    def put_off(self, version: Version) -> bool:
        """Whether a version is only kept out for now, while others are taken over."""
        return version.counter <= self._kept_out and not self.collected(version)

    def collected(self, version: Version) -> bool:
        """Whether a version that is not held here was removed, as all know."""
        return version.counter <= max(self._floor, self.standing.refused)

    def removals(self, floor: int = MAX_NUMBER) -> dict[str, Known]:
        """Return the records of removals with counters up to ``floor``, by source."""
        return {
            source: known
            for source, known in self._known.items()
            if known.record.removed and known.record.version.counter <= floor
        }

    def strays(self, slots: Collection[int], theirs: Mapping[str, bytes], floor: int) -> list[str]:
        """Return the sources in ``slots`` whose records up to ``floor`` are not among ``theirs``.

        ``theirs`` are digests by source, all that a settled node has in these slots.
        """
        return [
            source
            for slot in slots
            for source, digest in self._slots[slot].items()
            if theirs.get(source) != digest and self._known[source].record.version.counter <= floor
        ]

    # Last use ----------------------------------------------------------------------------------

    @property
    def uses(self) -> Mapping[str, int]:
        """When each source was last part of an answer (Unix seconds), where it ever was."""
        return self._uses

    def use(self, uses: Mapping[str, int]) -> bool:
        """Take times of last use in (the later one counts); say whether any was news."""
        news = False
        for source, when in uses.items():
            if source in self._known and when >= 0 and when > self._uses.get(source, -1):
                self._uses[source] = when
                news = True
        return news

    # What others may lack ----------------------------------------------------------------------

    def slots(self) -> tuple[bytes, ...]:
        """Return the digest of each slot: equal ones hold the same records."""
        for slot, digest in enumerate(self._digests):
            if digest is None:
                self._digests[slot] = self._slot_digest(slot)
        return tuple(digest or _NOTHING for digest in self._digests)

    def slot(self, slot: int) -> Mapping[str, bytes]:
        """Return the sources of a slot and the digests of their newest records."""
        return self._slots[slot]

    def _slot_digest(self, slot: int) -> bytes:
        held = self._slots[slot]
        if not held:
            return _NOTHING
        return blake3(b"".join(held[source] for source in sorted(held)))[:SLOT_DIGEST_BYTES]

    # Searching ---------------------------------------------------------------------------------

    def table(
        self, model: SketchModel, policy: ContextPolicy, now: float, share: Share | None = None
    ) -> Table:
        """Return the sketches of all windows that may be answered from at ``now``.

        Of bare records it has those that are in ``share``.  Documents whose sketches do not have
        the size of ``model`` are left out.  The table of the
        last call is kept, and serves until something changes.  Another thread may call it: what is
        known is copied first, and the generation read before it, so that a table is never taken
        for newer than it is.
        """
        generation, known, uses = self._generation, list(self._known.values()), dict(self._uses)
        parts = share.generation if share is not None else 0
        records = fresh((each.record for each in known), policy, now=now, uses=uses)
        key = (generation, parts, model, frozenset(record.source for record in records))
        kept = self._table
        if kept is None or kept[0] != key:
            kept = self._table = (key, table_of(records, model, share.copy() if share else {}))
        return kept[1]

    def _put(self, known: Known) -> None:
        record = known.record
        self._known[record.source] = known
        self._size += known.size
        self._bare += bool(record.whole)
        slot = slot_of(record.source)
        for place, row in enumerate(record.chunks):
            if row.windows:
                chunk = record.id_of(place)
                self._chunks[chunk] = (record.source, place)
                self._marks[slot] ^= mark_of(chunk)
                self._windows += row.windows
        self._slots[slot][record.source] = known.digest
        self._digests[slot] = None
        self._generation += 1

    def _check(self, record: DocumentRecord) -> None:
        if record.context != self.context:
            raise InvalidRequest("The record belongs to another context.", code="other_context")

    def _drop_chunks(self, record: DocumentRecord) -> None:
        self._bare -= bool(record.whole)
        slot = slot_of(record.source)
        for place, row in enumerate(record.chunks):
            if row.windows:
                chunk = record.id_of(place)
                self._chunks.pop(chunk, None)
                self._marks[slot] ^= mark_of(chunk)
                self._windows -= row.windows


def sketch_bytes(catalog: Catalog) -> int:
    """Return how many bytes all sketches of a context have, wherever they lie."""
    return catalog.windows * SKETCH_BYTES


def mark_of(chunk: ChunkId) -> int:
    """Return what a chunk adds to the mark of its slot."""
    return int.from_bytes(chunk[:MARK_BYTES], "little")
