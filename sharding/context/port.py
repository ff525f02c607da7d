"""The ``ContextMesh`` port: contexts as the nodes of a mesh hold them together.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.index import Way
from pyagent_node.sharding.context.records import ChunkBody, ChunkId, DocumentRecord, Version
from pyagent_node.sharding.context.shares import Part, Share


class Place(msgspec.Struct, frozen=True):
    """Where else the text of a hit (or nearly that text) stands; lines count from 1."""

    source: str
    first_line: int
    last_line: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that a question found, with what a citation of it needs.

    ``score`` orders the hits of one answer.  ``likeness`` is the inner product of the question's
    vector with that of the best window, which is ``window`` (characters ``[start, end)`` of
    ``text``); ``closeness`` is how well the question's single words are found there, where that
    was compared (``rerank``).  ``meaning_rank`` and ``words_rank`` (from 1) say which ranking
    brought it, and how far up it stood; ``owner`` held it.  ``same`` lists other places of the
    same text.
    """

    id: ChunkId
    source: str
    version: Version
    ordinal: int
    first_line: int
    last_line: int
    tokens: int
    score: float
    text: str
    likeness: float | None = None
    closeness: float | None = None
    window: tuple[int, int] | None = None
    meaning_rank: int | None = None
    words_rank: int | None = None
    owner: PeerId | None = None
    same: tuple[Place, ...] = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found, best first, and how.

    ``candidates`` windows in ``candidate_chunks`` chunks were picked by their sketches among
    ``windows``; ``nodes_asked`` of ``nodes`` owners were asked for them, and ``missing`` candidate
    chunks could be had from none (then the answer may lack something).  By words alone a chunk is
    found only if it is a candidate: of the ``chunks`` of fresh documents all are, up to
    ``WORDS_CHUNKS``.  ``probed`` nodes were asked
    for sketches: 0 where this node has all of them.  ``lost`` chunks of fresh documents no node has
    any more: they are no candidates.  ``rarities`` is what the question's terms weigh
    (``search.rarities``).
    """

    hits: tuple[Found, ...]
    windows: int = 0
    candidates: int = 0
    candidate_chunks: int = 0
    chunks: int = 0
    nodes: int = 1
    nodes_asked: int = 0
    missing: int = 0
    probed: int = 0
    rarities: Mapping[str, float] = {}
    lost: int = 0


class ContextStore(Protocol):
    """What this node itself keeps of contexts: records, bodies, times of last use.

    What a coroutine was given is durable when it returns, and giving it again changes nothing.
    Raises :class:`CorruptData` (``context_store_corrupt``), :class:`Unavailable` (``disk_full``,
    ``disk_failed``).
    """

    @property
    def used_bytes(self) -> int:
        """Bytes of the bodies that are kept."""
        ...

    @property
    def limit_bytes(self) -> int:
        """The most bytes of bodies that are kept."""
        ...

    def catalog(self, context: ContextId) -> Catalog:
        """Return what is known of a context; it follows what is merged."""
        ...

    def known(self) -> Collection[ContextId]:
        """Return the contexts that anything is known of."""
        ...

    async def merge(self, records: Sequence[bytes]) -> int:
        """Take encoded records in; return how many were news.

        Raises :class:`CorruptData` (``bad_context_record``) before any was taken in.
        """
        ...

    async def put_bodies(self, bodies: Sequence[ChunkBody]) -> None:
        """Keep bodies; raises :class:`LimitExceeded` (``context_store_full``)."""
        ...

    async def bodies(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """Return those of the bodies that are kept; a damaged one is not, and is forgotten."""
        ...

    def holds(self, chunk: ChunkId) -> bool:
        """Whether a body is kept here."""
        ...

    def held(self) -> Mapping[ChunkId, ContextId]:
        """Return the ids of all bodies that are kept, and their contexts; not a copy."""
        ...

    async def forget(self, ids: Sequence[ChunkId]) -> None:
        """Give bodies up."""
        ...

    def share(self, context: ContextId) -> Share:
        """Return the sketches that this node keeps of bare records; it follows what is put."""
        ...

    async def put_parts(self, context: ContextId, parts: Mapping[ChunkId, Part]) -> None:
        """Keep parts instead of those that were there of the same chunks."""
        ...

    async def forget_parts(self, context: ContextId, chunks: Collection[ChunkId]) -> None:
        """Give parts up."""
        ...

    async def strip(self, context: ContextId, sources: Sequence[str]) -> None:
        """Forget the sketches in some records: these are bare from now on."""
        ...

    async def adopt(self, context: ContextId, records: Sequence[bytes], floor: int) -> int:
        """Take a settled node's records in: of what is here up to ``floor`` they take the place.

        Returns how many were news; raises what :meth:`merge` does.
        """
        ...

    async def stand(
        self, context: ContextId, standing: Standing, gone: Mapping[str, bytes]
    ) -> None:
        """Keep how far this node is, and forget records, at once; it never gets less far.

        ``gone`` are the digests of these by source; a record that is another one by now stays.
        """
        ...

    async def use(self, context: ContextId, uses: Mapping[str, int]) -> None:
        """Keep times of last use (Unix seconds); the latest counts."""
        ...

    async def drop(self, context: ContextId) -> None:
        """Forget all of a context."""
        ...


class ContextMesh(Protocol):
    """Contexts as the nodes of a mesh hold them together.

    Every method raises errors of ``pyagent_node.base.errors`` only; waits have deadlines.
    """

    @property
    def peer_id(self) -> PeerId:
        """This node: the writer of the versions it makes."""
        ...

    def contexts(self) -> tuple[ContextInfo, ...]:
        """Return the contexts there are, by name."""
        ...

    def find(self, name: str) -> ContextInfo:
        """Return a context; raises :class:`NotFound` (``context_not_found``)."""
        ...

    async def create(
        self, name: str, policy: ContextPolicy, *, encoder: str, centre: bytes = b""
    ) -> ContextInfo:
        """Commit a new context; raises :class:`Conflict` (``context_exists``)."""
        ...

    async def drop(self, name: str) -> None:
        """Commit that a context is no more; nodes forget what they hold of it."""
        ...

    def catalog(self, context: ContextId) -> Catalog:
        """Return what this node knows of a context; not a copy, and grows by itself."""
        ...

    def share(self, context: ContextId) -> Share:
        """Return the sketches of bare records that this node keeps."""
        ...

    def lost(self, context: ContextInfo) -> frozenset[ChunkId]:
        """Return the chunks that no node has any more, as all of their owners say."""
        ...

    @property
    def owners(self) -> int:
        """How many nodes own chunks, present or not."""
        ...

    @property
    def index_bytes(self) -> int:
        """The most bytes of sketches that lie on every node; larger contexts are spread."""
        ...

    def held_up(self, context: ContextId) -> tuple[PeerId, ...]:
        """Return the members that removals wait for before they are forgotten."""
        ...

    async def publish(self, record: DocumentRecord, bodies: Sequence[ChunkBody]) -> None:
        """Give a document to the mesh: its bodies to their owners first, then the record.

        Returns when every chunk lies at one owner at least and the record is on this node's disk.
        A record that says ``removed`` has no bodies.  Raises :class:`Conflict`
        (``context_version_old``) where new versions count from a higher one on by now: make it
        anew with another version.
        """
        ...

    async def fetch(self, ids: Sequence[ChunkId]) -> list[ChunkBody]:
        """Return the bodies that can be had, from here or from their owners; others are missing."""
        ...

    async def search(
        self,
        context: ContextInfo,
        question: str,
        vector: NDArray[np.float32],
        *,
        count: int = 8,
        way: Way = "both",
    ) -> Answer:
        """Return the chunks of live documents that a question needs."""
        ...

    async def used(self, context: ContextId, sources: Sequence[str], now: int) -> None:
        """Note that chunks of some documents were part of an answer at ``now`` (Unix seconds)."""
        ...
