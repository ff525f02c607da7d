"""Finds a smaller schedule that still fails: delta debugging over its faults, then less of it.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (IEEE TSE 2002):
``ddmin`` on the list of faults.  First halves, then ever smaller parts are left out while the rest
fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from msgspec.structs import replace

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.simulations.fault_kinds import Fault
from pyagent_node.simulations.faults import Schedule, check_schedule

BEFORE_FIRST: Final = 1.0
"""Seconds before the first fault of a schedule that was moved to the beginning."""
AFTER_LAST: Final = 1.0
"""Seconds that a shortened schedule goes on after its last fault began."""

T = TypeVar("T")


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool], *, runs: int) -> list[T]:
    """Return a subsequence of ``items`` that still fails, of which no part found can be left out.

    ``fails`` is asked at most ``runs`` times; ``items`` itself is known to fail.
    """
    kept, parts = list(items), 2
    if runs > 0 and kept:
        runs -= 1
        if fails([]):
            return []
    while len(kept) >= 2 and runs > 0:
        size = -(-len(kept) // parts)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if runs <= 0:
                return kept
            runs -= 1
            if rest and fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(kept):
                return kept
            parts = min(parts * 2, len(kept))
    return kept


class Budget:
    """Asks whether a schedule fails, so many times at most, and remembers the last that did."""

    def __init__(
        self,
        schedule: Schedule,
        fails: Callable[[Schedule], bool],
        runs: int,
        say: Callable[[Schedule], None],
    ) -> None:
        self.best = schedule
        self.left = runs
        self._fails = fails
        self._say = say

    def fails(self, schedule: Schedule) -> bool:
        """Ask; a schedule that cannot be (``check_schedule``) and one too many do not fail."""
        if self.left <= 0 or not _possible(schedule):
            return False
        self.left -= 1
        failed = self._fails(schedule)
        if failed:
            self.best = schedule
        self._say(self.best)
        return failed


def shrink_schedule(
    schedule: Schedule,
    fails: Callable[[Schedule], bool],
    *,
    runs: int,
    say: Callable[[Schedule], None] = lambda best: None,
) -> Schedule:
    """Return a schedule with fewer faults, less time and fewer nodes that still fails.

    ``fails`` is asked at most ``runs`` times; ``schedule`` itself is known to fail.  ``say`` hears
    the best one after every run.
    """
    budget = Budget(schedule, fails, runs, say)

    def without(faults: Sequence[Fault]) -> bool:
        return budget.fails(replace(budget.best, faults=tuple(faults)))

    ddmin(schedule.faults, without, runs=runs)
    if (earlier := _earlier(budget.best)) is not None:
        budget.fails(earlier)
    while (shorter := _shorter(budget.best)) is not None and budget.fails(shorter):
        pass
    for nodes in range(1, budget.best.nodes):
        if budget.fails(replace(budget.best, nodes=nodes)):
            break
    return budget.best


def _earlier(schedule: Schedule) -> Schedule | None:
    """Return the schedule with its first fault near the beginning, the others as long after it."""
    first = min((fault.at for fault in schedule.faults), default=0.0)
    by = first - BEFORE_FIRST
    if by <= BEFORE_FIRST:
        return None
    return replace(
        schedule,
        faults=tuple(replace(fault, at=round(fault.at - by, 3)) for fault in schedule.faults),
    )


def _shorter(schedule: Schedule) -> Schedule | None:
    """Return the schedule with half the time, but enough for its faults to begin."""
    last = max((fault.at for fault in schedule.faults), default=0.0)
    duration = round(max(schedule.duration / 2, last + AFTER_LAST), 3)
    return replace(schedule, duration=duration) if duration < schedule.duration * 0.9 else None


def _possible(schedule: Schedule) -> bool:
    try:
        check_schedule(schedule)
    except InvalidRequest:
        return False
    return True
