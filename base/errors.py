"""The exception hierarchy of the project, and its form on the wire.

There is one class for each way a caller can react, and a ``code`` for each reason, so that a test
or a script can match ``error.code == "ticket_expired"`` without reading prose.  Exceptions of
foreign libraries are mapped to these at the module that talks to the library, and nowhere else.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

Fact = str | int | float | bool

MAX_MESSAGE = 2000
"""Longest error text, in characters, that is taken from or sent to a peer."""


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A :class:`PyAgentError` as it travels in frames and HTTP replies.

    ``kind`` names the class, ``code`` the reason, ``facts`` the numbers and names behind it.
    """

    kind: str
    code: str
    message: str
    remedy: str | None = None
    facts: dict[str, Fact] = {}


class PyAgentError(Exception):
    """Base of every error that the project raises on purpose.

    ``message`` says what happened, ``remedy`` what the reader can do about it; neither may hold a
    secret.  ``facts`` are machine-readable details (``rank=1``, ``limit=65536``).
    """

    kind: ClassVar[str] = "error"
    default_code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        remedy: str | None = None,
        **facts: Fact,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.remedy = remedy
        self.facts: dict[str, Fact] = facts

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message

    def to_info(self) -> ErrorInfo:
        """Return the wire form, its texts cut to :data:`MAX_MESSAGE` characters."""
        remedy = self.remedy[:MAX_MESSAGE] if self.remedy else None
        return ErrorInfo(self.kind, self.code, self.message[:MAX_MESSAGE], remedy, self.facts)


class InvalidRequest(PyAgentError):
    """The caller asked for something that can never work as asked; asking again will not help."""

    kind = default_code = "invalid_request"
    exit_code = 2
    http_status = 400


class ConfigError(InvalidRequest):
    """A setting, file or command line is wrong."""

    kind = default_code = "config"


class NotFound(PyAgentError):
    """The named model, peer, mesh or session does not exist here."""

    kind = default_code = "not_found"
    exit_code = 3
    http_status = 404


class Refused(PyAgentError):
    """Authentication or authorisation failed (``wrong_psk``, ``no_certificate``, ...)."""

    kind = default_code = "refused"
    exit_code = 4
    http_status = 403


class LimitExceeded(PyAgentError):
    """A stated bound was reached (``frame_too_large``, ``too_many_sessions``, ...)."""

    kind = default_code = "limit_exceeded"
    exit_code = 5
    http_status = 429


class Unavailable(PyAgentError):
    """Something that may come back is not there now; trying again later can help."""

    kind = default_code = "unavailable"
    exit_code = 6
    http_status = 503


class DeadlineExceeded(Unavailable):
    """A wait reached its deadline."""

    kind = default_code = "deadline_exceeded"
    http_status = 504


class CorruptData(PyAgentError):
    """Bytes are not what they claim to be (checksum, truncation, malformed structure)."""

    kind = default_code = "corrupt_data"
    exit_code = 7
    http_status = 502


class Unsupported(PyAgentError):
    """The input is well formed but is of a sort that this version does not handle, by name."""

    kind = default_code = "unsupported"
    exit_code = 8
    http_status = 400


class Conflict(PyAgentError):
    """The state changed under the caller, or the thing exists already (``stale_epoch``, ...)."""

    kind = default_code = "conflict"
    exit_code = 9
    http_status = 409


class RunnerFailed(Unavailable):
    """A runner process died or broke its protocol; ``facts`` name the reason."""

    kind = default_code = "runner_failed"
    exit_code = 10


_KINDS: dict[str, type[PyAgentError]] = {
    cls.kind: cls
    for cls in (
        PyAgentError,
        InvalidRequest,
        ConfigError,
        NotFound,
        Refused,
        LimitExceeded,
        Unavailable,
        DeadlineExceeded,
        CorruptData,
        Unsupported,
        Conflict,
        RunnerFailed,
    )
}


def error_from_info(info: ErrorInfo) -> PyAgentError:
    """Rebuild an error that a peer or a child process sent; an unknown kind becomes the base."""
    cls = _KINDS.get(info.kind, PyAgentError)
    facts = {k: v for k, v in info.facts.items() if k not in ("message", "code", "remedy", "self")}
    remedy = info.remedy[:MAX_MESSAGE] if info.remedy else None
    return cls(info.message[:MAX_MESSAGE], code=info.code, remedy=remedy, **facts)
