"""How a bug is planted, and where the simulator is sent to look for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.simulations import machine, run, workload
from pyagent_node.simulations.fault_kinds import Fault
from pyagent_node.simulations.faults import Schedule, check_schedule
from pyagent_node.simulations.run import Outcome, Run

SILENCE_SECONDS = 1.5
"""People are less patient here than in a long run."""
HEAL_SECONDS = 60.0
"""What is not whole again after so long stays broken.

The sum of what may come one after the other: 22 s until all is answered that was asked under faults
(the slowest of these schedules), 30 s (``SENT_SECONDS``) in which every answer that is read keeps
two tasks for a reader who may come back, and 8 s for the last answer and the calm after it.
"""


@dataclass(frozen=True)
class Bug:
    """A mistake that somebody could make.

    ``plant`` puts it into the program while its context lasts.  ``schedule`` gives what happens
    under a seed; one of the seeds from 0 on, ``within`` of them, must break one of the invariants
    in ``caught_by``.  ``compact`` is the number of entries after which nodes compact their logs,
    ``asks`` the average time between two requests, in seconds.  Every answer is guessed
    ahead by one of ``drafters``; by all kinds if there are none.
    """

    name: str
    what: str
    plant: Callable[[], AbstractContextManager[None]]
    schedule: Callable[[int], Schedule]
    caught_by: frozenset[str]
    within: int = 3
    compact: int = 200
    asks: float = 0.8
    drafters: tuple[str, ...] = (NO_SPECULATION,)

    def play(self, seed: int, *, planted: bool) -> Outcome:
        """Run one seed, with the bug or without it."""
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(mock.patch.object(run, "ASK_SECONDS", self.asks))
            enter(mock.patch.object(run, "HEAL_SECONDS", HEAL_SECONDS))
            enter(mock.patch.object(workload, "SILENCE_SECONDS", SILENCE_SECONDS))
            enter(mock.patch.object(machine, "COMPACT_ENTRIES", self.compact))
            if self.drafters:
                enter(mock.patch.object(workload, "draw_guessing", self._guessing))
            if planted:
                enter(self.plant())
            return Run(seed, self.schedule(seed)).play()

    def sound_run(self, seed: int) -> Hashable:
        """Return all that the run of a seed without the bug depends on."""
        return seed, self.schedule(seed), self.compact, self.asks, self.drafters

    def _guessing(self, rng: random.Random) -> workload.Guessing:
        return workload.Guessing(rng.choice(self.drafters), rng.choice((2, 4)), rng.choice((1, 3)))


def swap(owner: object, name: str, wrong: object) -> Callable[[], AbstractContextManager[None]]:
    """Return what replaces ``owner.name`` by ``wrong`` for a while."""

    @contextmanager
    def planted() -> Iterator[None]:
        with mock.patch.object(owner, name, wrong):
            yield

    return planted


def both(
    *plants: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """Return what plants several mistakes at once, where one of them alone does no harm."""

    @contextmanager
    def planted() -> Iterator[None]:
        with ExitStack() as stack:
            for plant in plants:
                stack.enter_context(plant())
            yield

    return planted


def same(nodes: int, duration: float, *faults: Fault) -> Callable[[int], Schedule]:
    """Return the same schedule for every seed; what differs is who asks what, and all timings."""
    schedule = check_schedule(Schedule(nodes, duration, faults))
    return lambda seed: schedule
