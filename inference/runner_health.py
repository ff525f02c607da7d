"""How the process of a runner fares: whether it hangs, and why it ended.

However slow a machine, a process that computes is given some processor time every second.  One that
owes an answer and uses none for :data:`STALL_SECONDS` will not come by it: it was stopped by a
signal, waits for itself, or for a disk that is gone.  (A runner that turns in a circle uses plenty;
it runs into the deadline of its request, which follows what such requests took: :class:`Pace`.)
"""

from __future__ import annotations

import contextlib
import signal
from typing import Final

import psutil

LOOK_SECONDS: Final = 0.5
"""Time between two looks."""
STALL_SECONDS: Final = 4.0
"""How long a runner may owe an answer without using the processor."""

LEAST_PATIENCE: Final = 20.0
"""No deadline of a computation is shorter, in seconds."""
PATIENCE_FACTOR: Final = 20.0
"""How much slower than the slowest so far a computation may be."""
MEASURED: Final = 8
"""Computations that must have been measured before anything is concluded."""


class Pace:
    """How long the computations of one runner take; pure."""

    def __init__(self) -> None:
        self._count = 0
        self._slowest = 0.0

    def took(self, rows: int, seconds: float) -> None:
        """Note a computation of so many tokens."""
        self._count += 1
        self._slowest = max(self._slowest, seconds / max(1, rows))

    def patience(self, rows: int, most: float) -> float:
        """Return how many seconds, at ``most``, to wait for one of so many tokens."""
        if self._count < MEASURED:
            return most
        return min(most, max(LEAST_PATIENCE, PATIENCE_FACTOR * self._slowest * rows))


class Vigil:
    """Watches one process by what each look shows; pure."""

    def __init__(self) -> None:
        self._at = 0.0
        self._request: int | None = None
        self._used: float | None = None
        self._idle = 0.0

    def look(self, now: float, request: int | None, used: float | None) -> bool:
        """Take a look at time ``now``; return whether the process hangs.

        ``request`` is the number of the request that it works on, if any, and ``used`` the
        processor time in seconds that it has had, ``None`` where the system does not say.  The
        time between two looks counts for at most two of :data:`LOOK_SECONDS`: a longer gap was a
        pause of our own.
        """
        same = request is not None and used is not None
        same = same and (request, used) == (self._request, self._used)
        gap = min(now - self._at, 2 * LOOK_SECONDS)
        self._idle = self._idle + gap if same else 0.0
        self._at, self._request, self._used = now, request, used
        return self._idle >= STALL_SECONDS


def processor_seconds(pid: int) -> float | None:
    """Return the processor time that all threads of a process have had, if it can be told."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def death_reason(code: int, *, oom: bool) -> str:
    """Return why a process with this return code ended, in a few words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if oom and name == "SIGKILL":
        return "out of memory (SIGKILL)"
    return name


def oom_kills() -> int:
    """Return how many processes Linux has killed for memory since it started; 0 elsewhere."""
    with contextlib.suppress(OSError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
