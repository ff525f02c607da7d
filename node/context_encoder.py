"""The encoders of this node's contexts: found, fetched and opened when they are first needed.

A context keeps the encoder that it was made with; the setting ``context_encoder`` says which one
new contexts get.  A GGUF encoder is known by its digest, so a node that was never told of it
fetches it from its peers when a context that uses it is added to or asked there.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.errors import Conflict, NotFound, PyAgentError, Unavailable
from pyagent_node.base.files import read_limited, write_atomic
from pyagent_node.base.mesh import Mesh
from pyagent_node.inference.gguf_embedder import GgufEmbedder, GgufIdentity
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.downloads import Progress as Downloaded
from pyagent_node.inference.models.encoders import minilm_files
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About, StoredModel
from pyagent_node.inference.models.transfer import ensure_model
from pyagent_node.native import blake3
from pyagent_node.node.api.following import Report
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.config import Settings
from pyagent_node.node.context_readers import missing_extra
from pyagent_node.sharding.context import minilm
from pyagent_node.sharding.context.defaults import calibration_texts
from pyagent_node.sharding.context.embedder import Embedder

LIBRARIES: Final = ("datasketch", "onnxruntime", "tokenizers")
ALIVE: Final = 2
"""GGUF encoders whose processes stay; those of others end, and start again when needed."""
_SUM: Final = 32

Fetch = Callable[[StoredModel, Downloaded], Awaitable[Path]]
"""Brings the whole file of a model from peers."""


class EncoderSource(Protocol):
    """Where encoders come from."""

    async def choose(self) -> str:
        """Return the identity of the encoder that new contexts get."""
        ...

    def check(self, identity: str) -> None:
        """Check that an encoder can be opened here, as far as that is known at once.

        Raises :class:`Unavailable` (``context_extra_missing``) and :class:`Conflict`
        (``context_encoder_differs``) for one that this version does not know.
        """
        ...

    async def open(self, identity: str, report: Report) -> Embedder:
        """Return an encoder, the same one each time; ``report`` gets the progress of fetching."""
        ...


class Encoders:
    """MiniLM and GGUF models in ``store``, with as many threads as the node gives (0: one a core).

    ``chosen`` is what new contexts get: ``minilm``, or a model by its name or digest, with
    ``question`` and ``text`` before questions and texts.  ``fetch`` brings files from peers.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        chosen: str = minilm.NAME,
        question: str = "",
        text: str = "",
        threads: int = 0,
        fetch: Fetch | None = None,
    ) -> None:
        self._store, self._threads, self._fetch = store, threads, fetch
        self._chosen, self._question, self._text = chosen, question, text
        self._opening: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)
        self._open: dict[str, Embedder] = {}
        self._made: list[GgufEmbedder] = []
        """Those of GGUF models, the one that was used last first; :attr:`_order` guards it."""
        self._order = threading.Lock()

    async def choose(self) -> str:
        """See :class:`EncoderSource`.

        Raises :class:`NotFound` (``model_not_found``), :class:`Conflict` (``ambiguous_model``) for
        a GGUF model that the store does not have, and :class:`ConfigError` (``bad_setting``).
        """
        if self._chosen == minilm.NAME:
            return minilm.IDENTITY
        try:
            model = await trio.to_thread.run_sync(self._store.find, self._chosen)
        except NotFound:
            raise NotFound(
                f"The setting context_encoder names the model {self._chosen[:80]!r}, which is not"
                " on this node.",
                code="model_not_found",
                remedy="Run: pyagent-node model pull SOURCE --name NAME (any GGUF embedding"
                f" model), or set context_encoder to {minilm.NAME}.",
            ) from None
        return GgufIdentity(model.digest, model.manifest, self._question, self._text).checked()

    def check(self, identity: str) -> None:
        """See :class:`EncoderSource`."""
        if identity == minilm.IDENTITY:
            wanted: tuple[str, ...] = LIBRARIES
        elif GgufIdentity.parse(identity) is not None:
            wanted = LIBRARIES[:1]
        else:
            raise Conflict(
                f"The context was made with the encoder {identity}, which this version of"
                " pyagent-node does not have.",
                code="context_encoder_differs",
                remedy="Use the version that made it, or make another context.",
            )
        if any(find_spec(name) is None for name in wanted):
            raise missing_extra()

    async def open(self, identity: str, report: Report) -> Embedder:
        """See :class:`EncoderSource`.

        Raises what fetching and reading a model do, and :class:`Unavailable` (``encoder_missing``)
        where neither this node nor a peer has it.
        """
        self.check(identity)

        def told(done: int, total: int | None) -> None:
            text = "fetching the encoder of contexts"
            report(Progress(step="encoder", text=text, done=done, total=total))

        async with self._opening[identity]:
            found = self._open.get(identity)
            if found is None:
                wanted = GgufIdentity.parse(identity)
                found = await (self._minilm(told) if wanted is None else self._gguf(wanted, told))
                self._open[identity] = found
            if isinstance(found, GgufEmbedder):
                await trio.to_thread.run_sync(self._used, found)
            return found

    async def close(self) -> None:
        """End the processes of encoders for good; requests that they are at fail."""
        with self._order:
            made, self._made = self._made, []
        for each in made:
            await trio.to_thread.run_sync(each.shut)

    async def _minilm(self, told: Downloaded) -> Embedder:
        files = await minilm_files(self._store, progress=told)
        return await trio.to_thread.run_sync(
            lambda: minilm.MiniLm(files.model, files.tokenizer, threads=self._threads)
        )

    async def _gguf(self, wanted: GgufIdentity, told: Downloaded) -> Embedder:
        path = await self._file(wanted, told)
        shape = model_shape(await trio.to_thread.run_sync(read_header, path))
        opened = GgufEmbedder(
            path,
            wanted,
            dimensions=shape.n_embd,
            threads=self._threads,
            on_start=lambda: self._used(opened),
        )
        with self._order:
            self._made.append(opened)
        try:
            opened.centre = await trio.to_thread.run_sync(centre_of, opened, self._store.root)
        except BaseException:
            with self._order:
                self._made = [each for each in self._made if each is not opened]
            opened.shut()
            raise
        return opened

    async def _file(self, wanted: GgufIdentity, told: Downloaded) -> Path:
        """Return the file of a model: from the store, or from a peer."""
        try:
            held = await trio.to_thread.run_sync(self._store.get, wanted.digest)
        except NotFound:
            held = None
        if held is not None and held.path is not None:
            return held.path
        name = held.name if held is not None else f"encoder-{wanted.digest[:12]}"
        model = StoredModel(wanted.digest, About(name), 0, wanted.manifest, None, 0, ())
        try:
            if self._fetch is None:
                raise Unavailable("there are no peers", code="no_source")
            return await self._fetch(model, told)
        except PyAgentError as error:
            raise Unavailable(
                f"The context was made with the encoder {wanted.digest[:16]} (a GGUF model), which"
                f" is not on this node, and no peer gave it: {error.message}",
                code="encoder_missing",
                remedy="Connect to a node that has it, or pull it here: pyagent-node model pull.",
            ) from error

    def _used(self, used: GgufEmbedder) -> None:
        """End the processes of encoders that were not used lately.  In a worker thread.

        One that is at a request goes on: it is looked at when another one is used or starts.
        """
        with self._order:
            self._made = [used, *(each for each in self._made if each is not used)]
            over = [each for each in self._made if each is used or each.runs][ALIVE:]
        for each in over:
            each.rest()


@asynccontextmanager
async def open_encoders(
    mesh: Mesh, store: ModelStore, settings: Settings
) -> AsyncIterator[Encoders]:
    """Have the encoders of a node while the block lasts."""

    async def fetch(model: StoredModel, told: Downloaded) -> Path:
        peers = [peer.peer_id for peer in mesh.peers()]
        return await ensure_model(mesh, store, model, peers, progress=told)

    encoders = Encoders(
        store,
        chosen=settings.context_encoder,
        question=settings.context_question_prefix,
        text=settings.context_text_prefix,
        threads=settings.threads,
        fetch=fetch,
    )
    try:
        yield encoders
    finally:
        with trio.CancelScope(shield=True):
            await encoders.close()


def centre_of(encoder: Embedder, root: Path) -> NDArray[np.float32]:
    """Return the mean of an encoder's vectors of fixed texts; kept under ``root``.  Blocking."""
    place = root / ".encoders" / blake3(encoder.identity.encode()).hex() / "centre"
    size = 4 * encoder.dimensions
    with contextlib.suppress(PyAgentError):
        data = read_limited(place, size + _SUM)
        if len(data) == size + _SUM and blake3(data[:size]) == data[size:]:
            return np.frombuffer(data, "<f4", encoder.dimensions).astype(np.float32)
    centre = np.asarray(encoder.embed(calibration_texts()).mean(axis=0), np.float32)
    data = centre.astype("<f4").tobytes()
    write_atomic(place, data + blake3(data))
    return centre
