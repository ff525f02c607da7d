"""Whether a disk may be used now: said once when it may not, and once when it may again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

from pyagent_node.base.errors import Conflict, PyAgentError

log = logging.getLogger("pyagent_node.sharding.store")

RETRY_SECONDS: Final = 30.0
"""A disk that could not be used is tried again after so long."""


class DiskTrouble:
    """The last error of a disk that is not used for now; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.error: PyAgentError | None = None
        self._clock = clock
        self._retry_at = -math.inf

    def note(self, error: PyAgentError) -> None:
        """Go on without the disk for a while; the first error of several is logged."""
        self._retry_at = self._clock() + RETRY_SECONDS
        if self.error is None:
            why = "another process has it" if isinstance(error, Conflict) else str(error)
            log.warning("KV blocks are kept in memory only for now: %s", why)
        self.error = error

    def over(self, label: str) -> None:
        """The disk works."""
        if self.error is not None:
            log.info("KV blocks are kept in %s again", label)
        self.error = None

    @property
    def due(self) -> bool:
        """Whether the disk may be used, or tried again."""
        return self.error is None or self._clock() >= self._retry_at
