"""Read barriers on their way (ReadIndex).  No I/O.

Barriers that begin together share one question to the leader.  It may be lost, and is then asked
again under another context; an answer to a forgotten context is ignored.
"""

from __future__ import annotations

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError

MAX_WAITING = 1024
MAX_ASKED = 16
"""Questions that are out at the same time."""


class Read:
    """One barrier; ``index`` is what must be applied, once that is known."""

    __slots__ = ("born", "done", "error", "index")

    def __init__(self, tick: int) -> None:
        self.born = tick
        self.index: int | None = None
        self.error: PyAgentError | None = None
        self.done = trio.Event()


class Reads:
    """All barriers of this node that are not passed yet."""

    def __init__(self) -> None:
        self._waiting: list[Read] = []
        self._asked: dict[bytes, tuple[list[Read], int]] = {}
        self._answered: list[Read] = []

    def add(self, tick: int) -> Read:
        """Begin a barrier; raises :class:`LimitExceeded` (``too_many_reads``)."""
        if len(self._waiting) + len(self._answered) >= MAX_WAITING:
            raise LimitExceeded(
                f"{MAX_WAITING} reads wait for the log already.",
                code="too_many_reads",
                limit=MAX_WAITING,
            )
        read = Read(tick)
        self._waiting.append(read)
        return read

    def drop(self, read: Read) -> None:
        """Forget a barrier."""
        for each in (self._waiting, self._answered, *(reads for reads, _ in self._asked.values())):
            if read in each:
                each.remove(read)

    @property
    def question_due(self) -> bool:
        """Whether the leader should be asked (see :meth:`asked`)."""
        return bool(self._waiting) and len(self._asked) < MAX_ASKED

    def asked(self, context: bytes, tick: int) -> None:
        """Note that everything that waits was asked for under ``context``."""
        self._asked[context] = (self._waiting, tick)
        self._waiting = []

    def answered(self, context: bytes, index: int) -> None:
        """Take the answer to a question."""
        reads, _ = self._asked.pop(context, ([], 0))
        for read in reads:
            read.index = index
        self._answered += reads

    def expire(self, tick: int, patience: int) -> None:
        """Ask again for what had no answer for ``patience`` ticks."""
        for context, (reads, since) in list(self._asked.items()):
            if tick - since >= patience:
                del self._asked[context]
                self._waiting += reads

    def applied(self, index: int) -> None:
        """End the barriers that are passed now."""
        rest = []
        for read in self._answered:
            if read.index is not None and read.index <= index:
                read.done.set()
            else:
                rest.append(read)
        self._answered = rest

    def starve(self, tick: int, patience: int, error: PyAgentError) -> None:
        """End with ``error`` what could not be asked for ``patience`` ticks."""
        starved = [read for read in self._waiting if tick - read.born > patience]
        for read in starved:
            self._waiting.remove(read)
            read.error = error
            read.done.set()

    def fail(self, error: PyAgentError) -> None:
        """End every barrier with ``error``."""
        asked = [read for reads, _ in self._asked.values() for read in reads]
        for read in (*self._waiting, *asked, *self._answered):
            read.error = error
            read.done.set()
        self._waiting, self._asked, self._answered = [], {}, []
