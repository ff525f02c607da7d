"""What the API says of contexts.  Only ``msgspec`` structs of plain values."""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.types import ContextPolicy, PeerId


class CreateContextRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Make a context."""

    name: str
    policy: ContextPolicy = ContextPolicy()


class ContextView(msgspec.Struct, frozen=True, kw_only=True):
    """A context as this node knows it.

    ``documents`` of which ``fresh`` may be answered from, in ``chunks`` of ``windows`` and
    ``tokens`` (those of fresh documents); ``record_bytes`` of all records lie on every node,
    ``bodies_here`` are the chunks whose text lies on this one; ``owners`` nodes own chunks of
    contexts, and ``lost`` chunks no node has any more (add their documents again).  ``spread``: the
    sketches, of ``sketch_bytes`` together, lie spread over the nodes, ``sketch_bytes_here`` of them
    on this one; ``spread_why`` says why so, or why not.  ``removals`` are records of removed
    documents, which are forgotten once every member has them: ``removals_wait_for`` names those
    that do not yet.
    """

    name: str
    id: str
    policy: ContextPolicy
    encoder: str
    created: int
    documents: int
    fresh: int
    chunks: int
    windows: int
    tokens: int
    record_bytes: int
    bodies_here: int
    owners: int = 0
    lost: int = 0
    spread: bool = False
    spread_why: str = ""
    sketch_bytes: int = 0
    sketch_bytes_here: int = 0
    removals: int = 0
    removals_wait_for: tuple[PeerId, ...] = ()


class ContextsReply(msgspec.Struct, frozen=True):
    """All contexts."""

    contexts: tuple[ContextView, ...]


class DocumentView(msgspec.Struct, frozen=True, kw_only=True):
    """A document: ``digest`` is BLAKE3 of its bytes, times are Unix seconds.

    ``joined`` of its chunks say what others of it say.  ``current``: adding the same bytes again
    would change nothing; not so for a document that is no longer fresh, or soon will not be, or of
    which ``lost`` chunks are at no node any more.
    """

    source: str
    digest: str
    size: int
    tokens: int
    chunks: int
    windows: int
    joined: int
    added: int
    modified: int
    counter: int
    writer: PeerId
    fresh: bool
    current: bool
    lost: int = 0


class DocumentsReply(msgspec.Struct, frozen=True):
    """A context and its documents."""

    context: ContextView
    documents: tuple[DocumentView, ...]


class AddReply(msgspec.Struct, frozen=True, kw_only=True):
    """What adding a document came to.

    ``embedded`` of its ``windows`` went through the encoder; the vectors of others were known from
    its version before.  ``note`` says how its text was got, where that is not plain.
    """

    source: str
    status: Literal["added", "changed", "unchanged"]
    tokens: int
    chunks: int
    joined: int
    windows: int
    embedded: int
    seconds: float
    note: str = ""


class RemoveReply(msgspec.Struct, frozen=True):
    """A document or a context is removed."""

    removed: str


class QueryRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question; ``way`` is what ranks the chunks."""

    question: str
    count: int = 8
    way: Literal["meaning", "words", "both"] = "both"


class PlaceView(msgspec.Struct, frozen=True):
    """Where a text stands as well."""

    source: str
    first_line: int
    last_line: int


class HitView(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that a question found; see ``sharding.context.port.Found``.

    ``best`` is the text of the window that is most like the question, ``closeness`` how well the
    question's single words are found there.
    """

    source: str
    first_line: int
    last_line: int
    tokens: int
    score: float
    text: str
    best: str = ""
    likeness: float | None = None
    closeness: float | None = None
    meaning_rank: int | None = None
    words_rank: int | None = None
    owner: PeerId | None = None
    also: tuple[PlaceView, ...] = ()


class QueryReply(msgspec.Struct, frozen=True, kw_only=True):
    """The chunks that matter, best first, and how they were found (see ``Answer``).

    ``candidate_chunks`` of ``chunks`` were compared.
    ``embed_seconds`` went into the question's own vector.
    """

    hits: tuple[HitView, ...]
    windows: int
    candidates: int
    candidate_chunks: int
    nodes: int
    nodes_asked: int
    missing: int
    seconds: float
    embed_seconds: float
    probed: int = 0
    chunks: int = 0
    lost: int = 0
