"""Where the files of the model store lie.

::

    <root>/<digest>/manifest            the encoded manifest (written first)
                    model.gguf          the whole file, if it is here
                    partial.gguf        a sparse file ...
                    partial.chunks      ... and the bitmap of its verified chunks
                    about               its name on this node, where the whole file came from
                    slices/<digest>.<slice>.v<format>.gguf
                    slices/<digest>.vocabulary.v<format>.gguf
    <root>/.downloads/                  unfinished downloads
    <root>/.trash-*/                    models being removed

Every file appears by a rename after a sync, so a crash leaves no half file under these names; what
it may leave under temporary names is removed a day later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.files import mapped
from pyagent_node.base.types import Digest
from pyagent_node.inference.models.manifest import check_digest
from pyagent_node.inference.models.slice_plan import SLICE_FORMAT

STALE_SECONDS: Final = 86400.0
"""A temporary file that nobody touched for so long was left by a crash."""
_DOWNLOADS: Final = ".downloads"
_TRASH: Final = ".trash-"


class StoreLayout:
    """The paths under ``root``; digests are checked before they become part of one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with mapped(root, "creating"):
            root.mkdir(parents=True, exist_ok=True)
            for trash in root.glob(f"{_TRASH}*"):
                shutil.rmtree(trash, ignore_errors=True)
            self._remove_stale()

    def folder(self, digest: Digest) -> Path:
        """Return the folder of a model."""
        return self.root / check_digest(digest)

    def whole(self, digest: Digest) -> Path:
        """Return the place of the whole file."""
        return self.folder(digest) / "model.gguf"

    def is_whole(self, digest: Digest) -> bool:
        """Whether the whole file is here."""
        return self.whole(digest).is_file()

    def manifest(self, digest: Digest) -> Path:
        """Return the place of the manifest."""
        return self.folder(digest) / "manifest"

    def slice(self, digest: Digest, what: str) -> Path:
        """Return the place of a slice, or of the vocabulary."""
        return self.folder(digest) / "slices" / f"{digest}.{what}.v{SLICE_FORMAT}.gguf"

    def slices(self, digest: Digest) -> tuple[str, ...]:
        """Return what was written out of a model."""
        folder = self.folder(digest) / "slices"
        with mapped(folder, "reading"):
            return tuple(sorted(p.name.split(".")[1] for p in folder.glob("[0-9a-f]*.gguf")))

    def digests(self) -> list[Digest]:
        """Return the names that are digests."""
        with mapped(self.root, "reading"):
            names = [entry.name for entry in os.scandir(self.root) if entry.is_dir()]
        return [Digest(name) for name in names if len(name) == 64 and name.isalnum()]

    def downloads(self) -> Path:
        """Return the folder of unfinished downloads, creating it."""
        folder = self.root / _DOWNLOADS
        with mapped(folder, "creating"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard(self, digest: Digest) -> Path:
        """Move a model out of the way at once; returns the folder to delete."""
        folder = self.folder(digest)
        with mapped(folder, "removing"):
            trash = Path(tempfile.mkdtemp(prefix=_TRASH, dir=self.root))
            os.replace(folder, trash / digest)
        return trash

    def check_room(self, nbytes: int) -> None:
        """Check that this many more bytes fit; raises :class:`Unavailable` (``disk_full``)."""
        with mapped(self.root, "checking"):
            free = shutil.disk_usage(self.root).free
        if free < nbytes:
            raise Unavailable(
                f"The disk of {self.root} has {free} bytes free; {nbytes} are needed.",
                code="disk_full",
                remedy="Free some space, then try again.",
                free=free,
                needed=nbytes,
            )

    def _remove_stale(self) -> None:
        before = time.time() - STALE_SECONDS
        patterns = (f"{_DOWNLOADS}/copy.*", f"{_DOWNLOADS}/wheel.*", "*/.*.tmp", "*/slices/.*.tmp")
        for path in (path for pattern in patterns for path in self.root.glob(pattern)):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < before:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
