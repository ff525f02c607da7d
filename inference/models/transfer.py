"""Makes what a rank or a head needs of a model be here, fetching only those bytes from peers.

Everything is checked against the manifest, whose digest the caller trusts (it stands in the
replicated log).  What was fetched stays on disk and is served to others; a transfer that was
interrupted goes on where it stopped, also after a restart.  Of two calls for one model at the same
time the second waits for the first and then fetches only what is still missing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.inference.models.blob_client import open_blob_client
from pyagent_node.inference.models.chunks import chunks_of
from pyagent_node.inference.models.embeddings import EmbeddingTable, embedding_ranges
from pyagent_node.inference.models.fetching import ChunkFetch, Progress, TransferStats
from pyagent_node.inference.models.gguf_header import GgufHeader
from pyagent_node.inference.models.gguf_types import ByteRange
from pyagent_node.inference.models.manifest import (
    ModelManifest,
    check_name,
    decode_manifest,
)
from pyagent_node.inference.models.slice_plan import slice_plan
from pyagent_node.inference.models.store import ModelStore

MANIFEST_PEERS: Final = 4
"""Peers that are asked for a manifest at the same time."""
MANIFEST_SECONDS: Final = 120.0
"""Longest time to get a manifest."""

_log = logging.getLogger("pyagent_node.models.transfer")


class ModelRef(Protocol):
    """A model as the caller knows it; a ``ModelRecord`` of the log or a ``StoredModel`` will do."""

    @property
    def digest(self) -> Digest:
        """BLAKE3 of the whole file."""
        ...

    @property
    def manifest(self) -> Digest:
        """BLAKE3 of the encoded manifest: what everything is checked against."""
        ...

    @property
    def name(self) -> str:
        """What a node to which the model is new will call it."""
        ...


class HeadAssets:
    """What a head needs of a model: embeddings and a tokenizer.

    ``tokenizer`` is a GGUF file without tensors, for ``vocab_only``.  Close it, or use it as a
    context manager.
    """

    def __init__(self, embeddings: EmbeddingTable, tokenizer: Path) -> None:
        self.embeddings = embeddings
        self.tokenizer = tokenizer

    def close(self) -> None:
        """Release the embedding table; idempotent."""
        self.embeddings.close()

    def __enter__(self) -> HeadAssets:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


async def ensure_manifest(
    mesh: Mesh,
    store: ModelStore,
    model: ModelRef,
    peers: Sequence[PeerId],
    *,
    epoch: int = 0,
) -> ModelManifest:
    """Return the model's manifest, fetching it from one of ``peers`` if it is not here.

    ``epoch`` is that of the placement for which it is needed, 0 for none; a peer that knows a
    later one gives nothing.  Raises :class:`Conflict` (``stale_epoch``) when only such peers have
    it, :class:`Unavailable` (``no_source``) and :class:`CorruptData` (``manifest_mismatch``)
    when the peers that answered sent another one than ``model.manifest``.
    """
    async with store.busy(model.digest):
        return await _manifest(mesh, store, model, peers, epoch)


async def ensure_slice(
    mesh: Mesh,
    store: ModelStore,
    model: ModelRef,
    part: Slice,
    peers: Sequence[PeerId],
    *,
    progress: Progress | None = None,
    stats: TransferStats | None = None,
    epoch: int = 0,
) -> Path:
    """Return the GGUF file of a slice, fetching its bytes from ``peers`` where they are missing.

    For all layers with the output head that is the whole model file.  ``progress`` gets the bytes
    here and their total, once that is known.  Besides the errors of :func:`ensure_manifest`:
    :class:`CorruptData` (``chunk_corrupt``, ``gguf_malformed``, ``digest_mismatch``),
    :class:`Unsupported` (``unsupported_architecture``), :class:`InvalidRequest` (``bad_slice``) and
    :class:`Unavailable` (``disk_full``).
    """
    async with store.busy(model.digest):
        cached = await trio.to_thread.run_sync(_cached, store, model, part)
        if cached is not None:
            return cached
        manifest = await _manifest(mesh, store, model, peers, epoch)
        fetch = _Fetch(mesh, store, manifest, peers, progress=progress, stats=stats, epoch=epoch)
        await fetch.header()
        file = await trio.to_thread.run_sync(store.model_file, model.digest)
        await fetch.ranges(slice_plan(file.header, part).copy.needs)
        return await trio.to_thread.run_sync(store.make_slice, model.digest, part)


async def ensure_header(
    mesh: Mesh,
    store: ModelStore,
    model: ModelRef,
    peers: Sequence[PeerId],
) -> GgufHeader:
    """Return the model's header, fetching it where it is missing; errors as for slices."""
    async with store.busy(model.digest):
        manifest = await _manifest(mesh, store, model, peers, 0)
        await _Fetch(mesh, store, manifest, peers, progress=None, stats=None, epoch=0).header()
        return (await trio.to_thread.run_sync(store.model_file, model.digest)).header


async def ensure_head_assets(
    mesh: Mesh,
    store: ModelStore,
    model: ModelRef,
    peers: Sequence[PeerId],
    *,
    progress: Progress | None = None,
    stats: TransferStats | None = None,
    epoch: int = 0,
) -> HeadAssets:
    """Return embeddings and tokenizer, fetching header and embedding table where missing.

    Errors as for :func:`ensure_slice`, and :class:`Unsupported` (``unsupported_embedding``).
    """
    async with store.busy(model.digest):
        manifest = await _manifest(mesh, store, model, peers, epoch)
        fetch = _Fetch(mesh, store, manifest, peers, progress=progress, stats=stats, epoch=epoch)
        await fetch.header()
        file = await trio.to_thread.run_sync(store.model_file, model.digest)
        await fetch.ranges(embedding_ranges(file))
        file = await trio.to_thread.run_sync(store.model_file, model.digest)
        tokenizer = await trio.to_thread.run_sync(store.make_vocabulary, model.digest)
        return HeadAssets(EmbeddingTable(file), tokenizer)


async def ensure_model(
    mesh: Mesh,
    store: ModelStore,
    model: ModelRef,
    peers: Sequence[PeerId],
    *,
    progress: Progress | None = None,
    stats: TransferStats | None = None,
    epoch: int = 0,
) -> Path:
    """Return the whole model file, fetching what is missing; errors as for :func:`ensure_slice`."""
    async with store.busy(model.digest):
        manifest = await _manifest(mesh, store, model, peers, epoch)
        fetch = _Fetch(mesh, store, manifest, peers, progress=progress, stats=stats, epoch=epoch)
        await fetch.ranges([ByteRange(0, manifest.size)])
        return await trio.to_thread.run_sync(store.complete, model.digest)


class _Fetch:
    """Fetches byte ranges of one model while its lock is held."""

    def __init__(
        self,
        mesh: Mesh,
        store: ModelStore,
        manifest: ModelManifest,
        peers: Sequence[PeerId],
        *,
        progress: Progress | None,
        stats: TransferStats | None,
        epoch: int,
    ) -> None:
        self._mesh = mesh
        self._epoch = epoch
        self._store = store
        self._manifest = manifest
        self._peers = peers
        self._progress = progress
        self._stats = stats if stats is not None else TransferStats()
        self._banned: set[PeerId] = set()

    async def header(self) -> None:
        """Make the header be here."""
        await self._chunks(self._manifest.header_chunks(), report=False)

    async def ranges(self, ranges: Sequence[ByteRange]) -> None:
        """Make the chunks of these ranges be here."""
        await self._chunks(chunks_of(ranges, self._manifest.chunk_bytes), report=True)

    async def _chunks(self, wanted: list[int], *, report: bool) -> None:
        store, manifest = self._store, self._manifest
        have = await trio.to_thread.run_sync(store.have, manifest.digest)
        missing = have.missing(wanted)
        sizes = {i: manifest.range(i).stop - manifest.range(i).start for i in wanted}
        total = sum(sizes.values())
        done = total - sum(sizes[index] for index in missing)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self._progress is not None:
                self._progress(done, total if report else None)

        if missing:
            await trio.to_thread.run_sync(store.layout.check_room, sum(sizes[i] for i in missing))
            partial = await trio.to_thread.run_sync(store.partial, manifest.digest)
            fetch = ChunkFetch(
                self._mesh,
                partial,
                missing,
                stats=self._stats,
                banned=self._banned,
                progress=advance,
                epoch=self._epoch,
            )
            await fetch.run(self._peers)
        advance(0)


def _known(store: ModelStore, model: ModelRef) -> ModelManifest | None:
    """Return the manifest that is here, if it is the right one or the whole file is here."""
    try:
        stored = store.get(model.digest)
    except (NotFound, CorruptData):
        return None
    right = stored.path is not None or stored.manifest == model.manifest
    return store.manifest(model.digest) if right else None


def _cached(store: ModelStore, model: ModelRef, part: Slice) -> Path | None:
    """Return a slice that is here, if it was made under the manifest that is asked for."""
    return store.cached_slice(model.digest, part) if _known(store, model) else None


async def _manifest(
    mesh: Mesh, store: ModelStore, model: ModelRef, peers: Sequence[PeerId], epoch: int
) -> ModelManifest:
    manifest = await trio.to_thread.run_sync(_known, store, model)
    if manifest is not None:
        return manifest
    found: list[ModelManifest] = []
    errors: list[PyAgentError] = []
    limit = trio.CapacityLimiter(MANIFEST_PEERS)

    async def ask(peer: PeerId, scope: trio.CancelScope) -> None:
        async with limit:
            try:
                async with open_blob_client(mesh, peer, epoch) as client:
                    data = bytes(await client.manifest(model.digest))
                manifest = await trio.to_thread.run_sync(_decode, data, model)
            except PyAgentError as error:
                _log.info("no manifest from %s: %s", peer, error)
                errors.append(error)
                return
        found.append(manifest)
        scope.cancel()

    with trio.move_on_after(MANIFEST_SECONDS):
        async with trio.open_nursery() as nursery:
            for peer in dict.fromkeys(peers):
                if peer != mesh.peer_id:
                    nursery.start_soon(ask, peer, nursery.cancel_scope)
    if found:
        return await trio.to_thread.run_sync(_add, store, found[0], model.name)
    for error in errors:
        if isinstance(error, CorruptData) or error.code == "stale_epoch":
            raise error
    raise Unavailable(
        f"No connected peer has the manifest of model {model.digest[:16]}"
        + (f" (last error: {errors[-1].message})" if errors else "")
        + ".",
        code="no_source",
        remedy="Connect to a node that holds the model, then try again.",
    )


def _add(store: ModelStore, manifest: ModelManifest, name: str) -> ModelManifest:
    """Take a manifest under the name that the mesh gives the model, if this node can use that."""
    try:
        return store.add_manifest(manifest, check_name(name))
    except InvalidRequest:
        return store.add_manifest(manifest)


def _decode(data: bytes, model: ModelRef) -> ModelManifest:
    manifest = decode_manifest(data, model.manifest)
    if manifest.digest != model.digest:
        raise CorruptData("The manifest describes another model.", code="manifest_mismatch")
    return manifest
