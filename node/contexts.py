"""What the API asks of contexts: make and remove them, add and remove documents, ask questions.

Adding a document: bytes → text (``context_readers``) → chunks and windows → vectors → record and
bodies, published in one go.  So a document is there as a whole or not at all, and adding again what
is there already costs nothing: whoever was cut off begins again and only the missing is done.
Vectors of windows that the version before had too are taken from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.native import blake3
from pyagent_node.node.api.context_schema import (
    AddReply,
    ContextsReply,
    ContextView,
    CreateContextRequest,
    DocumentsReply,
    DocumentView,
    HitView,
    PlaceView,
    QueryReply,
    QueryRequest,
    RemoveReply,
)
from pyagent_node.node.api.following import Report, nobody
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.context_drafts import KEPT_FROM, Drafts
from pyagent_node.node.context_encoder import EncoderSource
from pyagent_node.node.context_forms import may_spread
from pyagent_node.node.context_readers import check_size, read_document
from pyagent_node.sharding.context import minilm
from pyagent_node.sharding.context.catalog import Known, sketch_bytes
from pyagent_node.sharding.context.defaults import axes_of, encode_centre
from pyagent_node.sharding.context.documents import About, Cut, cut, document, removal
from pyagent_node.sharding.context.embedder import Embedder, Vectors
from pyagent_node.sharding.context.lexical import names_something
from pyagent_node.sharding.context.port import Answer, ContextMesh, Found
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    DocumentRecord,
    Version,
    check_source,
)
from pyagent_node.sharding.context.rerank import COMPARED, best_windows, reordered
from pyagent_node.sharding.context.search import check_question
from pyagent_node.sharding.context.windows import windows

BATCH: Final = 64
"""Windows that go through the encoder in one go: less than a second, so that nobody waits long."""
UPLOADS: Final = 2
"""Documents that are added at the same time; others wait."""
WAITING: Final = 64
"""Documents that may wait."""


class Contexts:
    """The contexts of a node, as its API sees them.

    ``held`` returns the bodies that are kept here and their contexts; ``drafts`` keeps vectors of
    documents that are not published yet; ``clock`` tells Unix seconds.
    """

    def __init__(
        self,
        mesh: ContextMesh,
        encoder: EncoderSource,
        *,
        held: Callable[[], Mapping[ChunkId, ContextId]],
        drafts: Drafts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.mesh = mesh
        self._encoder, self._held, self._clock = encoder, held, clock
        self._drafts = drafts
        self._adding = trio.Semaphore(UPLOADS)
        self._waiting = 0
        self._encoding = trio.CapacityLimiter(1)
        self._sources: WeakValueDictionary[tuple[bytes, str], trio.Lock] = WeakValueDictionary()

    # Contexts ----------------------------------------------------------------------------------

    async def create(self, request: CreateContextRequest) -> ContextView:
        """Make a context; raises :class:`Conflict` (``context_exists``).

        An encoder whose axes were not learned is opened for it, which may take a while: its centre
        becomes part of the context.  Raises what that does.
        """
        encoder = await self._encoder.choose()
        self._encoder.check(encoder)
        centre = b""
        if encoder != minilm.IDENTITY:  # whose axes were learned: it need not be here yet
            opened = await self._encoder.open(encoder, nobody)
            centre = encode_centre(opened.centre)
        info = await self.mesh.create(request.name, request.policy, encoder=encoder, centre=centre)
        return self._view(info)

    async def drop(self, name: str) -> RemoveReply:
        """Remove a context with all its documents."""
        await self.mesh.drop(name)
        return RemoveReply(name)

    async def list(self) -> ContextsReply:
        """Return all contexts."""
        return ContextsReply(tuple(self._view(info) for info in self.mesh.contexts()))

    async def show(self, name: str) -> DocumentsReply:
        """Return a context and its documents."""
        info = self.mesh.find(name)
        catalog, now = self.mesh.catalog(info.id), self._clock()
        lost = self.mesh.lost(info)
        fresh = {record.source for record in catalog.fresh(info.policy, now)}
        soon = {record.source for record in catalog.fresh(info.policy, now + _ahead(info))}
        rows = tuple(
            _document(each, each.source in fresh, each.source in fresh & soon, _lost_of(each, lost))
            for each in catalog.documents()
        )
        return DocumentsReply(self._view(info), rows)

    def _view(self, info: ContextInfo) -> ContextView:
        catalog = self.mesh.catalog(info.id)
        fresh = catalog.fresh(info.policy, self._clock())
        held = self._held()
        return ContextView(
            name=info.name,
            id=info.id.hex(),
            policy=info.policy,
            encoder=info.encoder,
            created=info.created,
            documents=len(catalog.documents()),
            fresh=len(fresh),
            chunks=sum(len(record.chunks) for record in fresh),
            windows=sum(record.windows for record in fresh),
            tokens=sum(record.tokens for record in fresh),
            record_bytes=sum(known.size for known in catalog.everything()),
            bodies_here=sum(context == info.id for context in held.values()),
            owners=self.mesh.owners,
            lost=len(self.mesh.lost(info)),
            spread=info.spread,
            spread_why=_spread_why(info, self.mesh.index_bytes),
            sketch_bytes=sketch_bytes(catalog),
            sketch_bytes_here=self.mesh.share(info.id).size
            + sum(len(record.sketches) for record in catalog.documents()),
            removals=len(catalog.removals()),
            removals_wait_for=self.mesh.held_up(info.id),
        )

    # Documents ---------------------------------------------------------------------------------

    async def add(
        self, name: str, source: str, data: bytes, *, modified: int, report: Report
    ) -> AddReply:
        """Add a file's bytes as the document ``source``, instead of what was there.

        ``modified`` is when the file was last changed (Unix seconds).  Raises what
        :func:`read_document`, the encoder and the mesh do; :class:`LimitExceeded`
        (``too_many_uploads``); :class:`Conflict` (``context_encoder_differs``).
        """
        began = time.monotonic()
        info = self._writable(name)
        check_source(source)
        check_size(len(data), source)
        if self._waiting >= WAITING:
            raise LimitExceeded(
                f"{WAITING} documents wait to be added already.",
                code="too_many_uploads",
                remedy="Try again later.",
            )
        self._waiting += 1
        try:
            async with self._alone(info, source), self._adding:
                reply = await self._add(info, source, data, min(max(modified, 0), 1 << 40), report)
        finally:
            self._waiting -= 1
        return msgspec.structs.replace(reply, seconds=round(time.monotonic() - began, 3))

    async def _add(
        self, info: ContextInfo, source: str, data: bytes, modified: int, report: Report
    ) -> AddReply:
        digest = await trio.to_thread.run_sync(blake3, data)
        catalog = self.mesh.catalog(info.id)
        known = catalog.get(source)
        if known is not None and known.record.digest == digest and self._current(info, known):
            return _reply(known.record, "unchanged", 0, "")
        read = await read_document(data, source)
        encoder = await self._encoder.open(info.encoder, report)
        parts = await trio.to_thread.run_sync(cut, read.text, source, encoder.count_tokens)
        _check_window(info, sum(chunk.tokens for chunk in parts.chunks), source)
        vectors, embedded = await self._vectors(encoder, parts, known, source, report)
        about = About(
            context=info.id,
            source=source,
            version=self._next_version(info, source),
            digest=digest,
            size=len(data),
            modified=modified,
            added=int(self._clock()),
            encoder=encoder.identity,
        )
        axes = await trio.to_thread.run_sync(axes_of, encoder, info.centre)
        record, bodies = await trio.to_thread.run_sync(document, parts, vectors, about, axes)
        while not await self._published(info, record, bodies):
            about = msgspec.structs.replace(about, version=self._next_version(info, source))
            record, bodies = await trio.to_thread.run_sync(document, parts, vectors, about, axes)
        if self._drafts is not None and record.windows >= KEPT_FROM:
            await self._drafts.forget(encoder.identity, parts.texts())
        status: Literal["added", "changed"] = (
            "added" if known is None or known.record.removed else "changed"
        )
        return _reply(record, status, embedded, read.note)

    async def remove(self, name: str, source: str) -> RemoveReply:
        """Remove a document; raises :class:`NotFound` (``source_not_found``)."""
        info = self.mesh.find(name)
        catalog = self.mesh.catalog(info.id)
        async with self._alone(info, source):
            known = catalog.get(source)
            if known is None or known.record.removed:
                raise NotFound(
                    f"There is no document {source[:200]!r} in {name!r}.",
                    code="source_not_found",
                    remedy=f"`pyagent-node context show {name}` lists them.",
                )
            while True:
                version = self._next_version(info, source)
                gone = removal(known.record, version, int(self._clock()))
                if await self._published(info, gone, ()):
                    break
        return RemoveReply(source)

    def _next_version(self, info: ContextInfo, source: str) -> Version:
        return self.mesh.catalog(info.id).next_version(source, self.mesh.peer_id)

    async def _published(
        self, info: ContextInfo, record: DocumentRecord, bodies: Sequence[ChunkBody]
    ) -> bool:
        """Give a document to the mesh; ``False``: its version is too old by now.

        That happens only when the log has new versions count from a higher one on meanwhile.
        """
        if self.mesh.find(info.name).id != info.id:
            raise NotFound(
                f"The context {info.name!r} was removed meanwhile.", code="context_not_found"
            )
        try:
            await self.mesh.publish(record, bodies)
        except Conflict as error:
            if error.code != "context_version_old":
                raise
            return False
        return True

    def _alone(self, info: ContextInfo, source: str) -> trio.Lock:
        """Return the lock of a document: its versions on this node come one after the other."""
        return self._sources.setdefault((info.id, source), trio.Lock())

    def _writable(self, name: str) -> ContextInfo:
        info = self.mesh.find(name)
        self._encoder.check(info.encoder)
        return info

    def _current(self, info: ContextInfo, known: Known) -> bool:
        if known.record.removed or known.record.encoder != info.encoder:
            return False
        if _lost_of(known.record, self.mesh.lost(info)):
            return False
        now, catalog = self._clock(), self.mesh.catalog(info.id)
        for when in (now, now + _ahead(info)):
            if all(r.source != known.record.source for r in catalog.fresh(info.policy, when)):
                return False
        return True

    async def _vectors(
        self,
        encoder: Embedder,
        parts: Cut,
        known: Known | None,
        source: str,
        report: Report,
    ) -> tuple[Vectors, int]:
        """Return the vectors of the windows, and how many of them were computed now."""
        texts = parts.texts()
        vectors = np.zeros((len(texts), encoder.dimensions), np.float32)
        before = await self._known_vectors(known, encoder)
        todo: list[int] = []
        for row, text in enumerate(texts):
            vector = before.get(text)
            if vector is None:
                todo.append(row)
            else:
                vectors[row] = vector
        drafts = self._drafts if len(todo) >= KEPT_FROM else None
        if drafts is not None:
            kept = await drafts.known(
                encoder.identity, [texts[row] for row in todo], encoder.dimensions
            )
            for place, vector in kept.items():
                vectors[todo[place]] = vector
            todo = [row for place, row in enumerate(todo) if place not in kept]
        # Texts of about the same length are computed together.
        todo.sort(key=lambda row: len(texts[row]))
        for at in range(0, len(todo), BATCH):
            report(Progress(step="embed", text=source, done=at, total=len(todo), unit="windows"))
            rows = todo[at : at + BATCH]
            batch = [texts[row] for row in rows]
            vectors[rows] = await trio.to_thread.run_sync(
                encoder.embed, batch, limiter=self._encoding
            )
            if drafts is not None:
                await drafts.keep(encoder.identity, batch, vectors[rows])
        report(Progress(step="embed", text=source, done=len(todo), total=len(todo), unit="windows"))
        return vectors, len(todo)

    async def _known_vectors(self, known: Known | None, encoder: Embedder) -> dict[str, np.ndarray]:
        """Return the vectors of the windows of the version before, by their texts."""
        if known is None or known.record.encoder != encoder.identity:
            return {}
        record = known.record
        places = [place for place, row in enumerate(record.chunks) if row.windows]
        bodies = await self.mesh.fetch([record.id_of(place) for place in places])
        before: dict[str, np.ndarray] = {}
        for body in bodies:
            own = windows(body.text)
            spans = tuple((window.start, window.end) for window in own)
            fits = len(body.vectors) == 2 * encoder.dimensions * len(spans)
            if fits and spans == body.spans:  # else another version of this program cut it
                for window, vector in zip(own, body.matrix(), strict=True):
                    before[window.text] = vector
        return before

    @staticmethod
    async def _compared(encoder: Embedder, question: str, answer: Answer) -> Sequence[Found]:
        """Return hits in the order that comparing the question's words gives."""
        hits = answer.hits
        if not hits:
            return hits
        texts = best_windows(hits)
        words = await trio.to_thread.run_sync(encoder.compare, question, texts, answer.rarities)
        return hits if words is None else reordered(hits, words)

    # Questions ---------------------------------------------------------------------------------

    async def query(self, name: str, request: QueryRequest, report: Report = nobody) -> QueryReply:
        """Return the chunks of a context that a question needs."""
        began = time.monotonic()
        answer, embed_seconds = await self.search(name, request, report)
        return QueryReply(
            hits=tuple(_hit(hit) for hit in answer.hits),
            windows=answer.windows,
            candidates=answer.candidates,
            candidate_chunks=answer.candidate_chunks,
            chunks=answer.chunks,
            lost=answer.lost,
            nodes=answer.nodes,
            nodes_asked=answer.nodes_asked,
            probed=answer.probed,
            missing=answer.missing,
            seconds=round(time.monotonic() - began, 6),
            embed_seconds=round(embed_seconds, 6),
        )

    async def search(
        self, name: str, request: QueryRequest, report: Report = nobody
    ) -> tuple[Answer, float]:
        """Return what was found for a question, and the seconds that its own vector took.

        ``report`` gets the progress of fetching the encoder, if that has to be done first.
        """
        check_question(request.question, request.count)
        info = self._writable(name)
        encoder = await self._encoder.open(info.encoder, report)
        began = time.monotonic()
        vector = await trio.to_thread.run_sync(encoder.embed_question, request.question)
        seconds = time.monotonic() - began
        axes = await trio.to_thread.run_sync(lambda: axes_of(encoder, info.centre))
        vector = await trio.to_thread.run_sync(axes.model.aim, vector)
        # Words that name something of code weigh more than what comparing states finds.
        again = request.way != "words" and not names_something(request.question)
        count = max(request.count, COMPARED) if again else request.count
        answer = await self.mesh.search(
            info, request.question, vector, count=count, way=request.way
        )
        hits = await self._compared(encoder, request.question, answer) if again else answer.hits
        answer = msgspec.structs.replace(answer, hits=tuple(hits[: request.count]))
        sources = list(dict.fromkeys(hit.source for hit in answer.hits))
        await self.mesh.used(info.id, sources, int(self._clock()))
        return answer, seconds


def _spread_why(info: ContextInfo, limit: int) -> str:
    if not may_spread(info):
        return "it was made before contexts kept the centre of their encoder: make it anew"
    if info.spread:
        return f"a node is to hold at most {limit:,} bytes of sketches (context_index_bytes)"
    return f"they fit into the {limit:,} bytes that a node is to hold, or every node owns all"


def _ahead(info: ContextInfo) -> int:
    """Return how far ahead a document must be fresh to be left as it is."""
    limits = [s for s in (info.policy.max_age_seconds, info.policy.unused_seconds) if s]
    return min(limits) // 2 if limits else 0


def _check_window(info: ContextInfo, tokens: int, source: str) -> None:
    limit = info.policy.max_tokens
    if limit and tokens > limit:
        raise LimitExceeded(
            f"{source[:200]!r} has {tokens} tokens; the context {info.name!r} keeps {limit}.",
            code="document_too_large",
            remedy="Add it in parts, or make a context with a larger --max-tokens.",
        )


def _reply(
    record: DocumentRecord,
    status: Literal["added", "changed", "unchanged"],
    embedded: int,
    note: str,
) -> AddReply:
    return AddReply(
        source=record.source,
        status=status,
        tokens=record.tokens,
        chunks=len(record.chunks),
        joined=_joined(record),
        windows=record.windows,
        embedded=embedded,
        seconds=0.0,
        note=note,
    )


def _joined(record: DocumentRecord) -> int:
    return sum(row.same != place for place, row in enumerate(record.chunks))


def _lost_of(record: DocumentRecord, lost: frozenset[ChunkId]) -> int:
    """Return how many chunks of a document are lost; adding the same bytes brings them back."""
    if not lost:
        return 0
    return sum(record.id_of(at) in lost for at, row in enumerate(record.chunks) if row.windows)


def _document(record: DocumentRecord, fresh: bool, current: bool, lost: int) -> DocumentView:
    return DocumentView(
        source=record.source,
        digest=record.digest.hex(),
        size=record.size,
        tokens=record.tokens,
        chunks=len(record.chunks),
        windows=record.windows,
        joined=_joined(record),
        added=record.added,
        modified=record.modified,
        counter=record.version.counter,
        writer=PeerId(record.version.writer),
        fresh=fresh,
        current=current and not lost,
        lost=lost,
    )


def _hit(hit: Found) -> HitView:
    best = hit.text[hit.window[0] : hit.window[1]].strip() if hit.window else ""
    return HitView(
        source=hit.source,
        first_line=hit.first_line,
        last_line=hit.last_line,
        tokens=hit.tokens,
        score=round(hit.score, 6),
        text=hit.text,
        best=best,
        likeness=hit.likeness,
        closeness=hit.closeness,
        meaning_rank=hit.meaning_rank,
        words_rank=hit.words_rank,
        owner=hit.owner,
        also=_other_places(hit),
    )


def _other_places(hit: Found) -> tuple[PlaceView, ...]:
    """Where else the text stands, each place once: many chunks of one long line are one place."""
    own = (hit.source, hit.first_line, hit.last_line)
    places = dict.fromkeys((p.source, p.first_line, p.last_line) for p in hit.same)
    return tuple(PlaceView(*place) for place in places if place != own)
