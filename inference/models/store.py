"""The models of one node on disk: whole files, partial files, slices.

All methods block (call them in a worker thread) and may be called from several threads at once, and
several processes may use one folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from pyagent_node.base.errors import (
    CorruptData,
    NotFound,
    Unavailable,
)
from pyagent_node.base.files import mapped, sync_dir, write_atomic
from pyagent_node.base.limits import CHUNK_BYTES
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.models.architectures import is_whole, model_shape
from pyagent_node.inference.models.copy_plan import CopyPlan
from pyagent_node.inference.models.copying import write_copy
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.manifest import (
    ModelManifest,
    build_manifest,
    check_name,
)
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.partial import (
    BITMAP,
    PARTIAL,
)
from pyagent_node.inference.models.slice_plan import (
    VOCABULARY,
    slice_plan,
    vocabulary_plan,
)
from pyagent_node.inference.models.store_layout import sync_file
from pyagent_node.inference.models.store_reading import StoreReader
from pyagent_node.inference.models.stored_model import (
    About,
    StoredModel,
    unknown_model,
    write_about,
)


class ModelStore(StoreReader):
    """Changes the store under ``root``, too."""

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
