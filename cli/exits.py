"""The exit codes: those of the error classes, and the few that are the shell's."""

from __future__ import annotations

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    RunnerFailed,
    Unavailable,
    Unsupported,
)

INTERNAL = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

CODES: tuple[tuple[int, str], ...] = (
    (0, "It worked."),
    (PyAgentError.exit_code, "It failed for a reason that has no code of its own."),
    (InvalidRequest.exit_code, "The command line, a setting or the request is wrong."),
    (NotFound.exit_code, "The named model, peer, mesh or file does not exist here."),
    (Refused.exit_code, "Refused: not authenticated or not authorised."),
    (LimitExceeded.exit_code, "A stated limit was reached."),
    (Unavailable.exit_code, "Not there now (no daemon, no peer, a deadline); try again later."),
    (CorruptData.exit_code, "Bytes are not what they claim to be."),
    (Unsupported.exit_code, "Well formed, but of a sort that this version does not handle."),
    (Conflict.exit_code, "It exists already, or changed in the meantime."),
    (RunnerFailed.exit_code, "A process that computes a slice died."),
    (INTERNAL, "A fault in pyagent-node itself; please report it."),
    (INTERRUPTED, "Interrupted with Ctrl-C."),
    (BROKEN_PIPE, "The reader of the output went away."),
)


def kind_of(status: int) -> type[PyAgentError]:
    """Return the class of errors that ends a process with ``status``.

    :class:`Unavailable` for a status that is none of the table: what ended so is not there now.
    """
    kinds = (InvalidRequest, NotFound, Refused, LimitExceeded, CorruptData, Unsupported, Conflict)
    return next((kind for kind in kinds if kind.exit_code == status), Unavailable)


def table() -> str:
    """Return the exit codes as aligned text."""
    return "\n".join(f"{code:>4}  {meaning}" for code, meaning in CODES)
