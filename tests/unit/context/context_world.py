"""What tests of contexts share: a small encoder, and contexts of one node with it."""

import hashlib
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import Conflict
from pyagent_node.base.types import ContextPolicy, PeerId
from pyagent_node.node.api.context_schema import AddReply, CreateContextRequest, QueryRequest
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.context_drafts import Drafts
from pyagent_node.node.context_encoder import Report
from pyagent_node.node.context_local import LocalContexts
from pyagent_node.node.context_store import SqliteContextStore, open_context_store
from pyagent_node.node.contexts import Contexts
from pyagent_node.sharding.context.embedder import Embedder, Vectors

DIMENSIONS = 64
PEER = PeerId("12D3KooWme")


class WordEmbedder:
    """An encoder without a model: a text's vector is the sum of those of its words.

    After ``stop_after`` texts it stops with ``trouble``.
    """

    identity = "words/test/64"
    dimensions = DIMENSIONS

    def __init__(self) -> None:
        self.embedded = 0
        self.stop_after = 1 << 60
        self.trouble: BaseException = RuntimeError("the encoder broke")
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            if self.embedded + len(texts) > self.stop_after:
                raise self.trouble
            self.embedded += len(texts)
        return np.stack([_vector(text) for text in texts])

    @property
    def centre(self) -> NDArray[np.float32] | None:
        return None

    def embed_question(self, question: str) -> NDArray[np.float32]:
        return np.asarray(self.embed([question])[0], np.float32)

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32] | None:
        return None

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def _vector(text: str) -> np.ndarray:
    total = np.full(DIMENSIONS, 1e-3, np.float32)
    for word in text.casefold().split():
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        generator = np.random.Generator(np.random.PCG64(seed))
        total += generator.standard_normal(DIMENSIONS).astype(np.float32)
    return (total / np.linalg.norm(total)).astype(np.float32)


class GivenEncoder:
    """An encoder that is there already."""

    def __init__(self, embedder: WordEmbedder) -> None:
        self.embedder = embedder
        self.identity = embedder.identity

    async def choose(self) -> str:
        return self.identity

    def check(self, identity: str) -> None:
        if identity != self.identity:
            raise Conflict("another encoder", code="context_encoder_differs")

    async def open(self, identity: str, report: Report) -> Embedder:
        report(Progress(step="encoder"))
        return self.embedder


class World(NamedTuple):
    """The contexts of one node, and what is behind them; ``clock[0]`` is the time."""

    contexts: Contexts
    mesh: LocalContexts
    store: SqliteContextStore
    encoder: WordEmbedder
    clock: list[float]

    async def create(self, name: str = "docs", **policy: int) -> None:
        await self.contexts.create(CreateContextRequest(name, ContextPolicy(**policy)))

    async def add(self, source: str, text: str | bytes, name: str = "docs") -> AddReply:
        data = text.encode() if isinstance(text, str) else text
        return await self.contexts.add(name, source, data, modified=7, report=lambda _: None)

    async def ask(self, question: str, name: str = "docs", count: int = 8) -> list[str]:
        """Return the sources of the hits."""
        reply = await self.contexts.query(name, QueryRequest(question=question, count=count))
        return [hit.source for hit in reply.hits]


@asynccontextmanager
async def one_node(
    folder: Path, *, limit_bytes: int = 1 << 30, known: World | None = None
) -> AsyncIterator[World]:
    """Open the contexts of a node in ``folder``; ``known`` is the same node before."""
    clock = known.clock if known else [1_000_000.0]
    encoder = WordEmbedder()
    async with open_context_store(folder, limit_bytes=limit_bytes) as store:
        mesh = LocalContexts(
            PEER, store, clock=lambda: clock[0], contexts=known.mesh.contexts() if known else ()
        )
        contexts = Contexts(
            mesh,
            GivenEncoder(encoder),
            held=store.held,
            drafts=Drafts(folder),
            clock=lambda: clock[0],
        )
        yield World(contexts, mesh, store, encoder, clock)
