"""What is in a node's model store, and what of it is open here; changes are made in ``store``."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    NotFound,
    PyAgentError,
)
from pyagent_node.base.files import mapped, read_limited
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.models.architectures import is_whole, model_shape
from pyagent_node.inference.models.chunks import ChunkSet
from pyagent_node.inference.models.manifest import (
    MAX_MANIFEST_BYTES,
    ModelManifest,
    decode_manifest,
)
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.partial import (
    PartialModel,
    not_held,
    read_bitmap,
)
from pyagent_node.inference.models.sources import CATALOGUE
from pyagent_node.inference.models.store_layout import StoreLayout
from pyagent_node.inference.models.stored_model import (
    StoredModel,
    read_about,
    unknown_model,
)


class StoreReader:
    """Reads the store under ``root``; one instance a process: it shares partial files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = StoreLayout(root)
        self._lock = threading.RLock()
        self._manifests: dict[Digest, ModelManifest] = {}
        self._whole: dict[Digest, ModelFile] = {}
        self._partials: dict[Digest, PartialModel] = {}
        self._busy: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    @contextlib.asynccontextmanager
    async def busy(self, key: str) -> AsyncIterator[None]:
        """Let one task at a time work on ``key``, a digest or a source; others wait."""
        async with self._busy[key]:
            yield

    def list(self) -> list[StoredModel]:
        """Return every model, by name; what cannot be read is left out (see :meth:`get`)."""
        models = []
        for digest in self.layout.digests():
            with contextlib.suppress(PyAgentError):
                models.append(self.get(digest))
        return sorted(models, key=lambda model: (model.name, model.digest))

    def get(self, digest: Digest) -> StoredModel:
        """Return one model.

        Raises :class:`NotFound` (``model_not_found``) and :class:`CorruptData`
        (``manifest_corrupt``) naming the file.
        """
        manifest = self.manifest(digest)
        folder = self.layout.folder(digest)
        whole = self.layout.is_whole(digest)
        return StoredModel(
            digest=digest,
            about=read_about(folder, digest),
            size=manifest.size,
            manifest=manifest.manifest_digest,
            path=self.layout.whole(digest) if whole else None,
            bytes_held=manifest.size if whole else self._bytes_held(manifest),
            slices=self.layout.slices(digest),
        )

    def find(self, name: str) -> StoredModel:
        """Return a model by its name, its digest, or at least 8 first digits of its digest.

        A name of the catalogue finds its file whatever this node calls it.  Raises
        :class:`NotFound` (``model_not_found``) and :class:`Conflict` (``ambiguous_model``).
        """
        models = self.list()
        found = [m for m in models if name in (m.name, m.digest)]
        if not found and name in CATALOGUE:
            found = [m for m in models if m.about.sha256 == CATALOGUE[name].sha256]
        if not found and len(name) >= 8:
            found = [m for m in models if m.digest.startswith(name)]
        if len(found) > 1:
            raise Conflict(
                f"{name!r} names {len(found)} models.",
                code="ambiguous_model",
                remedy="Use a digest: " + ", ".join(m.digest[:16] for m in found[:8]),
            )
        if not found:
            raise unknown_model(name)
        return found[0]

    def find_sha256(self, sha256: str) -> StoredModel | None:
        """Return the whole model that came from a file with this SHA-256, if there is one."""
        for model in self.list():
            if model.path is not None and model.about.sha256 == sha256:
                return model
        return None

    def manifest(self, digest: Digest) -> ModelManifest:
        """Return a model's manifest; errors as for :meth:`get`."""
        folder = self.layout.folder(digest)
        with self._lock:
            known = self._manifests.get(digest)
        if known is not None and self.layout.manifest(digest).exists():
            return known
        try:
            data = read_limited(self.layout.manifest(digest), MAX_MANIFEST_BYTES)
        except NotFound:
            self._forget(digest)  # another process removed it
            raise unknown_model(digest) from None
        try:
            manifest = decode_manifest(data)
            if manifest.digest != digest:
                raise CorruptData("it describes another model", code="manifest_corrupt")
        except PyAgentError as error:
            raise CorruptData(
                f"{folder / 'manifest'} is damaged: {error.message}",
                code="manifest_corrupt",
                remedy=f"Remove {folder} and get the model again.",
            ) from None
        with self._lock:
            return self._manifests.setdefault(digest, manifest)

    def have(self, digest: Digest) -> ChunkSet:
        """Return which chunks this node holds."""
        manifest = self.manifest(digest)
        if self.layout.is_whole(digest):
            return ChunkSet.full(manifest.count)
        return self.partial(digest).have

    def read_chunk(self, digest: Digest, index: int) -> bytes:
        """Return one chunk, checked.

        Raises :class:`NotFound` (``chunk_not_held``) and, when the whole file rotted on disk,
        :class:`CorruptData` (``chunk_corrupt``).
        """
        manifest = self.manifest(digest)
        if not 0 <= index < manifest.count:
            raise not_held(manifest, index)
        path = self.layout.whole(digest)
        if not self.layout.is_whole(digest):
            return self.partial(digest).read_chunk(index)
        place = manifest.range(index)
        with mapped(path, "reading"), path.open("rb", buffering=0) as file:
            file.seek(place.start)
            data = file.read(place.stop - place.start) or b""
        manifest.check_chunk(index, data)
        return data

    def model_file(self, digest: Digest) -> ModelFile:
        """Return the model's file, whole or partial, with its header.

        Raises :class:`NotFound` (``model_not_found``, ``header_missing``) and the errors of
        ``gguf_header``.
        """
        self.manifest(digest)
        if not self.layout.is_whole(digest):
            return self.partial(digest).model_file()
        with self._lock:
            known = self._whole.get(digest)
        if known is None:
            known = ModelFile.open(self.layout.whole(digest))
            with self._lock:
                self._whole[digest] = known
        return known

    def partial(self, digest: Digest) -> PartialModel:
        """Return the shared partial file of a model, creating it."""
        manifest = self.manifest(digest)
        with self._lock:
            partial = self._partials.get(digest)
            if partial is None:
                partial = self._partials[digest] = PartialModel(
                    self.layout.folder(digest), manifest
                )
            return partial

    def cached_slice(self, digest: Digest, part: Slice) -> Path | None:
        """Return the file of a slice if it was made already (the whole file for all layers)."""
        path = self.layout.slice(digest, str(part))
        if path.is_file():
            return path
        if part.first == 0 and part.head and self.layout.is_whole(digest):
            shape = model_shape(self.model_file(digest).header)
            if is_whole(part, shape.n_layers):
                return self.layout.whole(digest)
        return None

    def _bytes_held(self, manifest: ModelManifest) -> int:
        """Count the bytes of a partial file, without opening it for writing."""
        open_here = self._partials.get(manifest.digest)
        held = (
            open_here.have
            if open_here
            else read_bitmap(self.layout.folder(manifest.digest), manifest)
        )
        last = manifest.range(manifest.count - 1)
        short = manifest.chunk_bytes - (last.stop - last.start)
        return len(held) * manifest.chunk_bytes - (short if manifest.count - 1 in held else 0)

    def _forget(self, digest: Digest) -> None:
        """Close and forget what is kept in memory of a model."""
        with self._lock:
            partial = self._partials.pop(digest, None)
            if partial is not None:
                partial.close()
            self._manifests.pop(digest, None)
            self._whole.pop(digest, None)
