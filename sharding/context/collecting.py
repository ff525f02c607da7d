"""When the record of a removal may be forgotten, and what is kept out from then on.  Pure.

A removal must outlive every older version of its document, or one of those would bring it back.
It is collected in three steps, each of which holds for all removals of a context up to a counter.

1. The log says a *horizon*.  Who has applied it makes new versions above it only, so the set of
   versions up to the horizon grows no more.
2. A node is *covered* up to the horizon when it holds all of that set, or newer versions of the
   same sources.  It is if it has looked through what every member has, each at an index of the log
   where that member knew the horizon and the same members (:class:`Round`), or has taken over
   exactly what a covered node has up to there (:func:`takes_over`).  From then on it refuses
   versions up to there: what it lacks was not added.
3. When every member has said that it is covered, and the grace period is over, the log says the
   *floor*.  A covered node then *settles*: it forgets removals up to the floor.  A node that is not
   covered (it came later, came back, or has the disk of an earlier day) may hold what was removed,
   and lack what says so.  It is *behind*: it takes nothing up to the floor from anybody, until it
   takes over what a settled node has.

The proof, and what follows from it, is in ``docs/context.md`` ("What was removed").
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from pyagent_node.base.contexts import MAX_HORIZON, ContextInfo
from pyagent_node.base.types import PeerId


class Standing(NamedTuple):
    """How far a node is with a context; kept with its records, in one transaction."""

    covered: int = 0
    settled: int = 0

    def joined(self, other: Standing) -> Standing:
        """Return how far this node is by both: it only ever gets further."""
        return Standing(max(self.covered, other.covered), max(self.settled, other.settled))

    @property
    def refused(self) -> int:
        """Versions with a counter up to this, which are not held, were removed."""
        return max(self.covered, self.settled)


class Told(NamedTuple):
    """What a node said of itself and a context when it was looked at.

    ``applied``: the index of the log up to which all that it has taken in shows; -1: it does not
    know of any of this.
    """

    applied: int
    covered: int = 0
    settled: int = 0


class Round:
    """Whom a node has looked at for a horizon: all members at one index of the log, or a later.

    A member that was removed before that index gave nothing to any of those later on; one that was
    admitted after the horizon makes versions above it.
    """

    def __init__(self) -> None:
        self._of: tuple[int, frozenset[PeerId]] = (0, frozenset())
        self._index = 0
        self._seen: set[PeerId] = set()

    def begin(self, horizon: int, members: frozenset[PeerId], index: int) -> None:
        """Begin anew at an index of the log, unless it is the same horizon and the same members."""
        if self._of != (horizon, members):
            self._of, self._index, self._seen = (horizon, members), index, set()

    def looked(self, peer: PeerId, told: Told) -> None:
        """Note that all was taken in that ``peer`` had when it told this.

        One that settled for this horizon, or is further, may have forgotten removals already: the
        log says so, or will, and then it is too late for this round.
        """
        horizon = self._of[0]
        forgot = told.covered > horizon or told.settled >= horizon
        if self._index and told.applied >= self._index and not forgot:
            self._seen.add(peer)

    def complete(self, here: PeerId, horizon: int, applied: int) -> bool:
        """Whether nobody is missing for a horizon; ``applied`` is of the node ``here`` itself."""
        of, members = self._of
        return of == horizon and applied >= self._index and members <= self._seen | {here}


def may_cover(info: ContextInfo, standing: Standing, applied: int) -> bool:
    """Whether a node whose round is complete is covered; ``applied`` is its own.

    One that is behind is not: it may hold what was removed.
    """
    later = standing.covered < info.horizon and standing.settled >= info.floor
    return later and applied >= info.raised_index


def takes_over(info: ContextInfo, standing: Standing, told: Told) -> bool:
    """Whether a node should hold, up to where another one is covered, exactly what that one holds.

    All that was added up to there is held by the other one; so what this one has beyond it was
    removed, or was added by a disk of an earlier day.  Nobody is believed to be further than this
    node's own log: it catches up first, and what was never said there would end all documents.
    """
    said = told.covered <= info.horizon and told.settled <= info.floor
    further = told.covered > standing.covered
    return said and further and told.settled >= max(info.floor, standing.settled)


class Raise(NamedTuple):
    """Have the log say this horizon."""

    horizon: int


class Collect(NamedTuple):
    """Have the log say this floor."""

    floor: int


def plan(
    info: ContextInfo,
    removals: Iterable[int],
    told: Mapping[PeerId, Told],
    members: Collection[PeerId],
    *,
    now: float,
    grace: float,
) -> Raise | Collect | None:
    """Return what the leader has committed next for a context, ``None`` while nothing is due.

    ``removals`` are the counters of removals that it knows, ``told`` what each member said last,
    itself too; a member of an earlier version of this program holds everything up.
    """
    if any(told.get(peer, Told(-1)).applied < 0 for peer in members) or not members:
        return None
    if info.floor < info.horizon:
        # However long ago or ahead: clocks are set, and this one must not hold anything up.
        ready = not held_up(info, told, members) and abs(now - info.raised) >= grace
        return Collect(info.horizon) if ready else None
    highest = max((each for each in removals if each <= MAX_HORIZON), default=0)
    return Raise(highest) if highest > info.horizon else None


def held_up(
    info: ContextInfo, told: Mapping[PeerId, Told], members: Collection[PeerId]
) -> list[PeerId]:
    """Return the members that have not said yet that they are covered up to the horizon."""
    if info.floor >= info.horizon:
        return []
    return sorted(peer for peer in members if told.get(peer, Told(-1)).covered < info.horizon)
