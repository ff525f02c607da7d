"""How a client talks to a daemon's API: requests, streams of lines, and errors as what they were.

Like the client itself it imports none of the daemon's libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    ErrorInfo,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.httpx_light import httpx
from pyagent_node.node.api.schema import ADMIN_PREFIX, Line, Progress

CONNECT_SECONDS = 5.0
REPLY_SECONDS = 75.0
"""Longest silence of the daemon in a request that reports no progress."""
STREAM_SECONDS = 3700.0
"""Longest silence inside a stream; the daemon's own deadlines are shorter."""

T = TypeVar("T")
Report = Callable[[Progress], None]


class ApiFailure(msgspec.Struct, frozen=True):
    """An error as a reply or a chunk carries it."""

    message: str = ""
    pyagent: ErrorInfo | None = None


class _Failure(msgspec.Struct, frozen=True):
    error: ApiFailure


class Transport:
    """The connections to one daemon; :meth:`close` ends them."""

    def __init__(self, url: str, token: str) -> None:
        # Proxies of the environment are for the internet, not for a daemon of one's own.
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(REPLY_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._http.close()

    def read(self, path: str, kind: type[T]) -> T:
        """Return what is at ``path``, whatever the status of the reply."""
        with _mapped():
            return decode(self._http.get(path).content, kind)

    def get(self, path: str, kind: type[T]) -> T:
        """Return what the admin API answers to a GET below its prefix."""
        return decode(self.request("GET", ADMIN_PREFIX + path, None), kind)

    def post(self, path: str, body: object, kind: type[T]) -> T:
        """Return what the admin API answers to a POST below its prefix."""
        content = None if body is None else msgspec.json.encode(body)
        return decode(self.request("POST", ADMIN_PREFIX + path, content), kind)

    def request(self, method: str, path: str, content: bytes | None) -> bytes:
        """Return the body of a reply, or raise the error in it."""
        with _mapped():
            reply = self._http.request(method, path, content=content)
            _check(reply)
            return reply.content

    def stream(self, method: str, path: str, content: bytes | None) -> Iterator[str]:
        """Yield the lines of a reply that are not empty, as they come."""
        timeout = httpx.Timeout(STREAM_SECONDS, connect=CONNECT_SECONDS)
        with (
            _mapped(),
            self._http.stream(method, path, content=content, timeout=timeout) as reply,
        ):
            if reply.status_code != httpx.codes.OK:
                reply.read()
                _check(reply)
            for line in reply.iter_lines():
                if line:
                    yield line

    def follow(self, path: str, body: object, kind: type[Line[T]], report: Report | None) -> T:
        """Report the progress of a long admin request and return its result."""
        return self.lines("POST", ADMIN_PREFIX + path, msgspec.json.encode(body), kind, report)

    def lines(
        self, method: str, path: str, content: bytes, kind: type[Line[T]], report: Report | None
    ) -> T:
        """Report the progress of a long request and return its result."""
        for text in self.stream(method, path, content):
            line = decode(text, kind)
            if line.error is not None:
                raise error_from_info(line.error)
            if line.done is not None:
                return line.done
            if line.progress is not None and report is not None:
                report(line.progress)
        raise broken_off()


def not_running() -> Unavailable:
    """Return the error for a daemon that is not there."""
    return Unavailable(
        "No daemon runs on this home.",
        code="daemon_not_running",
        remedy="Start it with `pyagent-node up`.",
    )


def broken_off() -> Unavailable:
    """Return the error for an answer that ends in the middle."""
    return Unavailable(
        "The daemon broke off in the middle of its answer.",
        code="daemon_connection_lost",
        remedy="Its log may say why.",
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise not_running() from None
    except httpx.TimeoutException:
        raise DeadlineExceeded(
            "The daemon did not answer in time.", code="daemon_not_answering"
        ) from None
    except httpx.HTTPError:
        raise broken_off() from None


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        failure = msgspec.json.decode(reply.content, type=_Failure).error
    except msgspec.DecodeError:
        failure = ApiFailure()
    raise failure_of(failure, reply.status_code)


def failure_of(failure: ApiFailure, status: int) -> PyAgentError:
    """Return the error that an API reply carries."""
    if failure.pyagent is not None:
        return error_from_info(failure.pyagent)
    message = failure.message or "without saying why"
    return PyAgentError(f"The daemon answered with status {status}: {message}", code="api_error")


def decode(data: str | bytes, kind: type[T]) -> T:
    """Return JSON as ``kind``; raises :class:`CorruptData` (``bad_answer``)."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise CorruptData(
            f"The daemon's answer was not understood: {error}",
            code="bad_answer",
            remedy="The daemon may run another version: restart it.",
        ) from None
