"""Downloads one file over https, resuming where it stopped.

The one module that talks to ``httpx``; its exceptions are mapped here.  Only https is followed, the
hub's token goes to the hub's own host alone and is never logged.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import msgspec
import trio

from pyagent_node.base.errors import (
    CorruptData,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.files import mapped, read_limited, write_atomic
from pyagent_node.base.httpx_light import httpx
from pyagent_node.inference.models.sources import HttpSource
from pyagent_node.inference.models.store import ModelStore

Progress = Callable[[int, int | None], None]
"""Called with the bytes done so far and their total, if it is known."""

MAX_MODEL_BYTES: Final = 1 << 40
"""Largest file that is downloaded."""
MAX_REDIRECTS: Final = 5
ATTEMPTS: Final = 5
"""Tries in a row without one new byte before a download is given up."""
RETRY_SECONDS: Final = 0.5
"""Wait before the second try; doubled for each further one, up to half a minute."""
IDLE_SECONDS: Final = 60.0
"""Longest silence of a server."""
_RANGE: Final = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", re.ASCII)

_log = logging.getLogger("pyagent_node.models.downloads")


class _Resume(msgspec.Struct, frozen=True):
    """What is known of an unfinished download: it goes on only if the server still has this."""

    url: str
    etag: str
    size: int


class _TryAgain(Exception):
    """A passing fault; what was received so far is kept."""


async def download(
    source: HttpSource,
    target: Path,
    store: ModelStore,
    *,
    token: str | None = None,
    progress: Progress | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> None:
    """Download ``source`` to ``target``, going on from what ``target`` holds if that is sound.

    ``token`` is sent to the source's own host only.  Raises :class:`NotFound`
    (``source_not_found``), :class:`Refused` (``source_refused``, ``certificate_untrusted``),
    :class:`Unavailable` (``download_failed``, ``disk_full``), :class:`LimitExceeded`
    (``model_too_large``) and :class:`CorruptData` (``download_corrupt``).  When cancelled, what was
    received stays.
    """
    timeout = httpx.Timeout(IDLE_SECONDS, connect=20.0)
    headers = {"Accept-Encoding": "identity", "User-Agent": "pyagent-node"}
    attempt = 0
    async with httpx.AsyncClient(
        timeout=timeout, headers=headers, follow_redirects=False, transport=transport
    ) as client:
        while True:
            before = _size(target)
            try:
                await _attempt(client, source, target, store, token=token, progress=progress)
                return
            except (httpx.HTTPError, _TryAgain) as error:
                if any(isinstance(e, ssl.SSLCertVerificationError) for e in _causes(error)):
                    raise Refused(
                        f"The certificate of {urlsplit(source.url).hostname} is not trusted:"
                        f" {_reason(error)}.",
                        code="certificate_untrusted",
                        remedy="Behind a proxy of your own, name its certificate: SSL_CERT_FILE.",
                    ) from None
                attempt = 1 if _size(target) > before else attempt + 1
                reason = _reason(error)
                if attempt >= ATTEMPTS:
                    raise Unavailable(
                        f"The download from {urlsplit(source.url).hostname} failed: {reason}.",
                        code="download_failed",
                        remedy="Check the network and try again: it goes on where it stopped.",
                        received=_size(target),
                    ) from None
                _log.warning("download interrupted (%s); attempt %d", reason, attempt + 1)
            await trio.sleep(min(30.0, RETRY_SECONDS * 2 ** (attempt - 1)))


async def _attempt(
    client: httpx.AsyncClient,
    source: HttpSource,
    target: Path,
    store: ModelStore,
    *,
    token: str | None,
    progress: Progress | None,
) -> None:
    note = target.with_name(target.name + ".resume")
    known = _read_note(note, source.url, target)
    headers = {}
    if known is not None:
        headers = {"Range": f"bytes={_size(target)}-", "If-Range": known.etag}
    response = await _open(client, source.url, headers, token)
    try:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            note.unlink(missing_ok=True)
            raise _TryAgain("the file changed on the server")
        start, total = _check(response, known, _size(target))
        if total is not None:
            if total > MAX_MODEL_BYTES:
                raise _too_large()
            store.layout.check_room(total - start)
        etag = response.headers.get("etag", "")
        if total is None or not etag or etag.startswith("W/"):
            note.unlink(missing_ok=True)
        else:
            await trio.to_thread.run_sync(
                write_atomic, note, msgspec.json.encode(_Resume(source.url, etag, total))
            )
        done = await _receive(response, target, start, total, progress)
    finally:
        await response.aclose()
    if total is not None and done != total:
        if done > total:
            os.unlink(target)
            raise CorruptData("The server sent more than it promised.", code="download_corrupt")
        raise _TryAgain(f"the connection ended after {done} of {total} bytes")
    note.unlink(missing_ok=True)


async def _open(
    client: httpx.AsyncClient, url: str, headers: dict[str, str], token: str | None
) -> httpx.Response:
    """Send the request, following https redirects; the token stays with the first host."""
    host = urlsplit(url).netloc
    for _ in range(MAX_REDIRECTS + 1):
        extra = dict(headers)
        if token is not None and urlsplit(url).netloc == host:
            extra["Authorization"] = f"Bearer {token}"
        response = await client.send(client.build_request("GET", url, headers=extra), stream=True)
        if not response.is_redirect:
            return response
        await response.aclose()
        url = urljoin(url, response.headers["location"])
        if urlsplit(url).scheme != "https":
            raise Refused(
                "The server redirects to an address that is not https.", code="source_refused"
            )
    raise Refused(f"The server redirects more than {MAX_REDIRECTS} times.", code="source_refused")


def _check(response: httpx.Response, known: _Resume | None, held: int) -> tuple[int, int | None]:
    """Return where the body begins in the file and the file's size."""
    status = response.status_code
    if status == httpx.codes.PARTIAL_CONTENT and known is not None:
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != held or int(match[3]) != known.size:
            raise CorruptData(
                "The server answered with another range than was asked for.",
                code="download_corrupt",
                remedy="Try again.",
            )
        return held, known.size
    if status == httpx.codes.OK:
        length = response.headers.get("content-length", "")
        return 0, int(length) if length.isascii() and length.isdigit() else None
    if status in (401, 403):
        raise Refused(
            f"The server refused the file (status {status}).",
            code="source_refused",
            remedy="A gated model of the hub needs a token in HF_TOKEN.",
        )
    if status in (404, 410):
        raise NotFound("The server does not have the file.", code="source_not_found")
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"status {status}")
    raise Unavailable(f"The server answered with status {status}.", code="download_failed")


async def _receive(
    response: httpx.Response,
    target: Path,
    start: int,
    total: int | None,
    progress: Progress | None,
) -> int:
    done = start
    with mapped(target, "opening"):
        file = await trio.open_file(target, "r+b" if start else "wb", buffering=0)
    failure: PyAgentError | None = None
    async with file:
        with mapped(target, "writing"):
            await file.seek(start)
            await file.truncate()
        # A fault of ours ends the loop by cancelling the next read, not by leaving it: only so are
        # the generators inside httpx unwound at once.
        with trio.CancelScope() as scope:
            async for block in response.aiter_raw():
                if failure is not None:
                    continue
                try:
                    with mapped(target, "writing"):
                        view = memoryview(block)
                        while view:
                            view = view[await file.write(view) :]
                    done += len(block)
                    if done > MAX_MODEL_BYTES:
                        raise _too_large()
                except PyAgentError as error:
                    failure = error
                    scope.cancel()
                    continue
                if progress is not None:
                    progress(done, total)
    if failure is not None:
        raise failure
    return done


def _read_note(note: Path, url: str, target: Path) -> _Resume | None:
    """Return what allows to go on; without it the download begins anew."""
    try:
        known = msgspec.json.decode(read_limited(note, 65536), type=_Resume)
    except (PyAgentError, msgspec.DecodeError):
        return None
    held = _size(target)
    return known if known.url == url and 0 < held < known.size else None


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it (httpx often says nothing itself)."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _reason(error: Exception) -> str:
    text = next((str(e) for e in _causes(error) if str(e)), type(error).__name__)
    return re.sub(r"https?://\S+", "(address)", text)[:200]


def _too_large() -> LimitExceeded:
    return LimitExceeded(
        f"The file is larger than {MAX_MODEL_BYTES} bytes.", code="model_too_large"
    )
