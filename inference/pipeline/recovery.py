"""Which errors a session survives, and for how long it tries."""

from __future__ import annotations

from typing import Final

from pyagent_node.base.errors import PyAgentError, RunnerFailed

RECOVERY_SECONDS: Final = 120.0
"""How long a session that had begun waits for ranks that work before its error is shown."""
READY_SECONDS: Final = 30.0
"""How long a request waits for ranks, or for this node to become head, before it has begun."""
FIRST_PAUSE: Final = 0.02
"""Pause before a placement that failed is tried again; each one after is twice as long."""
LONGEST_PAUSE: Final = 1.0
MAX_DEATHS: Final = 5
"""Runners that may die under a session in a row, without a token between: it may be the cause."""
MAX_FUTILE: Final = 50
"""Attempts in a row that got somewhere, but not to a new token."""

_PASSING: Final = frozenset(
    {
        "head_not_ready",
        "kv_pruned",
        "peer_lost",
        "peer_unreachable",
        "pieces_refused",
        "session_unknown",
        "stage_not_ready",
        "stale_epoch",
        "step_deadline",
        "stream_closed",
    }
)
"""Errors that a restart or a new placement causes or cures."""
_PASSING_ONCE_BEGUN: Final = frozenset({"too_many_sessions", "too_many_steps"})
"""Errors that tell a new request to come back later, but that a running one waits out."""


class Patience:
    """Decides after each error of a session whether it tries again, when, and until when.

    ``started`` is when the request came.
    """

    def __init__(self, started: float) -> None:
        self.error: PyAgentError | None = None
        """What the session waits to see cured."""
        self.retry_at = started
        """When the placement that failed is worth another attempt."""
        self.until = started + READY_SECONDS
        """When the session is given up if no attempt has had a result by then."""
        self._started = started
        self._since: float | None = None
        self._pause = FIRST_PAUSE
        self._epoch = 0
        self._deaths = 0
        self._futile = 0

    def forgives(
        self, error: PyAgentError, *, epoch: int, begun: bool, got: bool, held: bool, now: float
    ) -> bool:
        """Take the error of an attempt under ``epoch``; say whether to try again.

        ``begun``: the session has had any result, in whichever attempt; ``got``: this attempt has
        had one; ``held``: the session's reader is away, so that nothing was asked of the ranks.
        """
        if not _passes(error, begun=begun, held=held):
            return False
        if got or self._since is None:
            self._since = now
        self._deaths += isinstance(error, RunnerFailed)
        self._futile += got
        if self._deaths > MAX_DEATHS or self._futile > MAX_FUTILE:
            tries = self._deaths if self._deaths > MAX_DEATHS else self._futile
            error.message += f" The answer made no progress in {tries} attempts."
            return False
        if epoch > self._epoch:
            self._epoch = epoch
            self._pause = FIRST_PAUSE
        if got or not begun or self.error is None:  # what came after is what came of it
            self.error = error
        self.retry_at = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self.until = self._since + RECOVERY_SECONDS if begun else self._started + READY_SECONDS
        return now < self.until

    def cured(self) -> None:
        """Note a new token."""
        self.error = None
        self._since = None
        self._pause = FIRST_PAUSE
        self._deaths = self._futile = 0


def _passes(error: PyAgentError, *, begun: bool, held: bool) -> bool:
    if isinstance(error, RunnerFailed):
        return True
    if error.code == "session_idle":
        return not held
    return error.code in _PASSING or (begun and error.code in _PASSING_ONCE_BEGUN)
