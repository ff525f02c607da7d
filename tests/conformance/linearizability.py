"""Was a history of operations possible on one object, one operation after the other?

The algorithm is Wing and Gong's ("Testing and Verifying Concurrent Objects", 1993) with Lowe's
memory of what was tried ("Testing for Linearizability", 2017): look for an order of the operations
that respects real time (what ended before another began comes first) and in which every answer is
the one that a single object would have given.  An operation whose outcome is unknown may have
happened at any time after it began, or never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)
A = TypeVar("A")


class Operation(NamedTuple, Generic[A]):
    """One operation: what was done, with its answer; ``ended`` is infinite if that is unknown.

    ``began`` and ``ended`` are numbers from one counter, so no two are equal.  ``place`` says where
    in the order to look for it first; a wrong one costs time only.
    """

    action: A
    began: float
    ended: float = math.inf
    place: float = math.inf


MAX_TRIED: Final = 1_000_000

Step = Callable[[S, A], S | None]
"""The object: its state after an action (with its answer), ``None`` if that cannot be."""


def linearizable(operations: Iterable[Operation[A]], start: S, step: Step[S, A]) -> bool:
    """Say whether the operations could have happened one after the other on one object."""
    todo: Sequence[Operation[A]] = sorted(operations, key=lambda each: each.began)
    known = sum(1 << i for i, each in enumerate(todo) if each.ended < math.inf)
    tried: set[tuple[int, S]] = set()
    stack: list[tuple[int, S]] = [(0, start)]
    while stack:
        done, state = stack.pop()
        if done & known == known:
            return True
        if (done, state) in tried:
            continue
        tried.add((done, state))
        assert len(tried) < MAX_TRIED, "the history is too long to judge"
        first_end, found = math.inf, list[tuple[float, tuple[int, S]]]()
        for place, each in enumerate(todo):
            if each.began > first_end:
                break
            if done >> place & 1:
                continue
            first_end = min(first_end, each.ended)
            after = step(state, each.action)
            if after is not None:
                found.append((-each.place, (done | 1 << place, after)))
        stack += [further for _, further in sorted(found, key=lambda one: one[0])]
    return False


class Write(NamedTuple):
    """A value was written."""

    value: int


class Read(NamedTuple):
    """A value was read."""

    value: int


def register(state: int, action: Write | Read) -> int | None:
    """A register: a read gives what was written last."""
    if isinstance(action, Write):
        return action.value
    return state if action.value == state else None


def without_unseen_writes(
    operations: Sequence[Operation[Write | Read]],
) -> list[Operation[Write | Read]]:
    """Leave out writes of unknown outcome whose value nobody read: they change no answer."""
    seen = {each.action.value for each in operations if isinstance(each.action, Read)}
    return [each for each in operations if each.ended < math.inf or each.action.value in seen]


class Swap(NamedTuple):
    """The counter was found at ``expected`` and made one higher, if ``done``; else it was not."""

    expected: int
    owner: int
    done: bool


class Look(NamedTuple):
    """The counter and who changed it last were read."""

    count: int
    owner: int


def counter(state: tuple[int, int], action: Swap | Look) -> tuple[int, int] | None:
    """A counter with compare-and-swap; it knows who changed it last."""
    count, _ = state
    if isinstance(action, Look):
        return state if state == action else None
    if action.done:
        return (count + 1, action.owner) if count == action.expected else None
    return state if count != action.expected else None
