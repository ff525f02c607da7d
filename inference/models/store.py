"""The models of one node on disk: whole files, partial files, slices.

All methods block (call them in a worker thread) and may be called from several threads at once, and
several processes may use one folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.files import mapped, read_limited, sync_dir, write_atomic
from pyagent_node.base.limits import CHUNK_BYTES
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.models.architectures import is_whole, model_shape
from pyagent_node.inference.models.chunks import ChunkSet
from pyagent_node.inference.models.copy_plan import CopyPlan
from pyagent_node.inference.models.copying import write_copy
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.manifest import (
    MAX_MANIFEST_BYTES,
    ModelManifest,
    build_manifest,
    check_name,
    decode_manifest,
)
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.partial import (
    BITMAP,
    PARTIAL,
    PartialModel,
    not_held,
    read_bitmap,
)
from pyagent_node.inference.models.slice_plan import (
    VOCABULARY,
    slice_plan,
    vocabulary_plan,
)
from pyagent_node.inference.models.store_layout import StoreLayout, sync_file
from pyagent_node.inference.models.stored_model import (
    About,
    StoredModel,
    read_about,
    unknown_model,
    write_about,
)


class ModelStore:
    """The store under ``root``; one instance a process (it shares partial files by digest)."""

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

    # Looking

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

        Raises :class:`NotFound` (``model_not_found``) and :class:`Conflict` (``ambiguous_model``).
        """
        models = self.list()
        found = [m for m in models if name in (m.name, m.digest)]
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

    # Changing

    def add_file(
        self,
        path: Path,
        *,
        about: About,
        move: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        progress: Callable[[int], None] | None = None,
    ) -> StoredModel:
        """Take a whole GGUF file into the store: by rename with ``move``, else by copy.

        ``progress`` gets the bytes hashed so far.  Adding what is there already keeps it, under the
        new name.  Raises the errors of ``gguf_header`` (``gguf_truncated``, ...),
        :class:`InvalidRequest` (``bad_name``), :class:`Unsupported` (``split_model``) and those of
        the disk.
        """
        check_name(about.name)
        model_shape(read_header(path))
        if move:
            return self._take(path, about, chunk_bytes, progress)
        with mapped(path, "reading"):
            self.layout.check_room(path.stat().st_size)
        fd, temporary = tempfile.mkstemp(prefix="copy.", dir=self.layout.downloads())
        os.close(fd)
        copy = Path(temporary)
        try:
            with mapped(path, "copying"):
                shutil.copyfile(path, copy)
            return self._take(copy, about, chunk_bytes, progress)
        finally:
            copy.unlink(missing_ok=True)

    def add_manifest(self, manifest: ModelManifest, name: str | None = None) -> ModelManifest:
        """Make a model known, without any of its chunks; returns the manifest that counts.

        That is the older one when the whole file is here.  Otherwise another manifest of the same
        model throws away what was fetched and made under the older one.
        """
        if name is not None:
            check_name(name)
        folder = self.layout.folder(manifest.digest)
        with self._lock:
            try:
                known = self.manifest(manifest.digest)
            except (NotFound, CorruptData):
                known = None
            if known is not None and (known == manifest or self.layout.is_whole(manifest.digest)):
                return known
            self._forget_partial(manifest.digest)
            shutil.rmtree(folder / "slices", ignore_errors=True)
            write_atomic(self.layout.manifest(manifest.digest), manifest.encode())
            self._manifests[manifest.digest] = manifest
            if name is not None:
                write_about(folder, About(name))
        return manifest

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

    def complete(self, digest: Digest) -> Path:
        """Turn a partial file with every chunk into the whole file, after checking its digest.

        Raises :class:`CorruptData` (``digest_mismatch``): the manifest did not describe this
        model; its partial file is dropped.  :class:`Unavailable` (``bytes_missing``) when chunks
        are missing.
        """
        path = self.layout.whole(digest)
        if self.layout.is_whole(digest):
            return path
        partial = self.partial(digest)
        partial.sync()
        missing = len(partial.have.missing(range(partial.manifest.count)))
        if missing:
            raise Unavailable(
                f"{missing} chunks of model {digest[:16]} are missing.",
                code="bytes_missing",
                chunks=missing,
            )
        found = build_manifest(
            partial.path,
            header_bytes=partial.manifest.header_bytes,
            chunk_bytes=partial.manifest.chunk_bytes,
        )
        with self._lock:
            if self.layout.is_whole(digest):
                return path
            if found.digest != digest:
                self._forget_partial(digest)
                raise CorruptData(
                    f"The chunks of model {digest[:16]} make another file than {digest}.",
                    code="digest_mismatch",
                    remedy="The manifest is wrong: remove the model and register it again.",
                )
            with mapped(path, "writing"):
                partial.close()
                os.replace(partial.path, path)
                sync_dir(path.parent)
            self._forget_partial(digest)
        return path

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

    def make_slice(self, digest: Digest, part: Slice) -> Path:
        """Return the file of a slice, writing it from what is here.

        Raises :class:`Unavailable` (``bytes_missing``) and the errors of ``slicing``.
        """
        cached = self.cached_slice(digest, part)
        if cached is not None:
            return cached
        file = self.model_file(digest)
        plan = slice_plan(file.header, part)
        if is_whole(part, plan.shape.n_layers):
            return self.complete(digest)
        return self._make(digest, str(part), file, plan.copy)

    def make_vocabulary(self, digest: Digest) -> Path:
        """Return a file with the model's tokenizer and no tensors (llama.cpp: ``vocab_only``)."""
        path = self.layout.slice(digest, VOCABULARY)
        if path.is_file():
            return path
        file = self.model_file(digest)
        return self._make(digest, VOCABULARY, file, vocabulary_plan(file.header))

    def rename(self, digest: Digest, name: str) -> None:
        """Give a model another name on this node."""
        about = self.get(digest).about
        write_about(
            self.layout.folder(digest), msgspec.structs.replace(about, name=check_name(name))
        )

    def drop_slices(self, digest: Digest, keep: Iterable[Slice] = ()) -> None:
        """Remove written slices except those to ``keep`` (they can be made again)."""
        kept = {self.layout.slice(digest, str(part)) for part in keep}
        kept.add(self.layout.slice(digest, VOCABULARY))
        folder = self.layout.folder(digest) / "slices"
        with mapped(folder, "removing"):
            for path in folder.glob("*.gguf"):
                if path not in kept:
                    path.unlink(missing_ok=True)

    def remove(self, digest: Digest) -> None:
        """Remove a model and all that was made of it.

        Who has one of its files open keeps it.  Raises :class:`NotFound` (``model_not_found``).
        """
        folder = self.layout.folder(digest)
        with self._lock:
            if not folder.is_dir():
                raise unknown_model(digest)
            self._forget(digest)
            trash = self.layout.discard(digest)
        shutil.rmtree(trash, ignore_errors=True)

    # Inside

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

    def _make(self, digest: Digest, what: str, file: ModelFile, plan: CopyPlan) -> Path:
        path = self.layout.slice(digest, what)
        write_copy(file, plan, path)
        return path

    def _take(
        self,
        path: Path,
        about: About,
        chunk_bytes: int,
        progress: Callable[[int], None] | None,
    ) -> StoredModel:
        """Move a file that nobody else writes into the store."""
        header = read_header(path)
        manifest = build_manifest(
            path, header_bytes=header.length, chunk_bytes=chunk_bytes, progress=progress
        )
        with mapped(path, "syncing"):
            sync_file(path)
        digest = manifest.digest
        with self._lock:
            self.add_manifest(manifest)
            folder = self.layout.folder(digest)
            if not self.layout.is_whole(digest):
                with mapped(path, "moving"):
                    os.replace(path, self.layout.whole(digest))
                    sync_dir(folder)
            self._forget_partial(digest)
            write_about(folder, about)
        return self.get(digest)

    def _forget_partial(self, digest: Digest) -> None:
        partial = self._partials.pop(digest, None)
        if partial is not None:
            partial.close()
        folder = self.layout.folder(digest)
        with mapped(folder, "removing"):
            (folder / BITMAP).unlink(missing_ok=True)
            (folder / PARTIAL).unlink(missing_ok=True)

    def _forget(self, digest: Digest) -> None:
        """Close and forget what is kept in memory of a model."""
        with self._lock:
            partial = self._partials.pop(digest, None)
            if partial is not None:
                partial.close()
            self._manifests.pop(digest, None)
            self._whole.pop(digest, None)
