"""Errors as HTTP replies, in OpenAI's shape, whatever went wrong.

Every reply with an error is ``{"error": {"message", "type", "param", "code", "pyagent"}}``:
the first four as OpenAI documents them, the last with our own :class:`ErrorInfo`, from which
:mod:`pyagent_node.node.client` rebuilds the exception.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

from pyagent_node.base.errors import (
    ErrorInfo,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    Unavailable,
)

log = logging.getLogger("pyagent_node.api")

RETRY_SECONDS: Final = 2
"""What ``Retry-After`` says with 429 and 503."""

_STATUS: Final = {
    "unauthorized": 401,
    "route_not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "request_too_large": 413,
}
_CODES: Final = {"prompt_too_long": "context_length_exceeded"}
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorBody(msgspec.Struct, frozen=True):
    """What stands under ``error``."""

    message: str
    type: str
    param: str | None
    code: str
    pyagent: ErrorInfo


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of a failed request."""

    error: ErrorBody


def status_of(error: PyAgentError) -> int:
    """Return the HTTP status for ``error``."""
    return _STATUS.get(error.code, error.http_status)


def body_of(error: PyAgentError) -> ErrorReply:
    """Return the reply body for ``error``."""
    status = status_of(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    parameter = error.facts.get("parameter")
    return ErrorReply(
        ErrorBody(
            message=str(error),
            type=kind,
            param=None if parameter is None else str(parameter),
            code=_CODES.get(error.code, error.code),
            pyagent=error.to_info(),
        )
    )


def encode_error(error: PyAgentError) -> bytes:
    """Return the JSON body for ``error``."""
    return msgspec.json.encode(body_of(error))


def error_headers(error: PyAgentError) -> dict[str, str]:
    """Return the headers that belong to the status of ``error``."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if status in (429, 503):
        headers["retry-after"] = str(RETRY_SECONDS)
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="pyagent-node"'
    allowed = error.facts.get("allowed")
    if status == 405 and isinstance(allowed, str):
        headers["allow"] = allowed
    return headers


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def as_pyagent_error(error: Exception) -> PyAgentError:
    """Return the project's error behind ``error``, which may be a group from a nursery.

    Anything unexpected is logged with its traceback and becomes ``internal_error``, whose text
    tells nothing of the inside.
    """
    for leaf in _leaves(error):
        if isinstance(leaf, PyAgentError):
            return leaf
    log.error("an unexpected error in a request", exc_info=error)
    return PyAgentError(
        "The node failed while it answered this request.",
        code="internal_error",
        remedy="Its log has the details.",
    )


T = TypeVar("T")

_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a JSON request body into a struct.

    Raises :class:`InvalidRequest`: ``empty_body``, ``invalid_json``, or ``bad_parameter`` with the
    fact ``parameter`` naming the field that does not fit.
    """
    if not body.strip():
        raise InvalidRequest("The request has no body; send a JSON object.", code="empty_body")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _AT.search(text)
        if at is None or not at["path"]:
            raise InvalidRequest(
                f"The request does not fit: {text}", code="bad_parameter"
            ) from None
        reason = text[: at.start()]
        raise InvalidRequest(
            f"{at['path']}: {reason}.", code="bad_parameter", parameter=at["path"]
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: {str(error)[:200]}", code="invalid_json"
        ) from None


def shutting_down() -> Unavailable:
    """Return the error for a request that meets a node on its way out."""
    return Unavailable("The node is shutting down.", code="shutting_down")


def too_busy(limit: int, code: str = "too_many_requests") -> LimitExceeded:
    """Return the error for a request over a concurrency limit."""
    return LimitExceeded(
        f"The node answers {limit} requests already.",
        code=code,
        remedy="Try again in a moment.",
        limit=limit,
    )
