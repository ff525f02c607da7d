"""Runs a program on virtual time with a schedule that a seed decides.

Trio runs tasks that are ready at once in an order of its own choosing, drawn from a private
generator, so that no program relies on it.  Hypothesis and pytest-trio seed that generator to make
a failure repeat itself; we do the same (there is no public way), for the length of one run.
What is left is the order of sets of strings: a run that must be the same in another process
needs a fixed ``PYTHONHASHSEED`` (see :func:`fixed_hashing`).
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import trio
import trio._core._run as trio_run
import trio.testing

T = TypeVar("T")

HASH_SEED: Final = "0"
COLLECT: Final = (50_000, 20, 100)
"""Thresholds of Python's garbage collector during a run; its own cost 40% of one of 50 nodes."""


def fixed_hashing() -> bool:
    """Say whether sets of strings have the same order in every process like this one."""
    return os.environ.get("PYTHONHASHSEED") == HASH_SEED and not sys.flags.ignore_environment


def scheduler_state() -> int:
    """Return a number of 64 bits that tells how often the scheduler has drawn, and from what."""
    _, numbers, _ = trio_run._r.getstate()
    return hash(numbers) & (1 << 64) - 1


@contextmanager
def _seeded_scheduler(seed: int) -> Iterator[None]:
    ours = random.Random(seed)  # noqa: S311 - must repeat itself
    before = trio_run._r, trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    trio_run.__dict__.update(_r=ours, _ALLOW_DETERMINISTIC_SCHEDULING=True)
    try:
        yield
    finally:
        trio_run.__dict__.update(_r=before[0], _ALLOW_DETERMINISTIC_SCHEDULING=before[1])


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage less often: a large swarm is many live objects, and all are looked at."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_deterministic(program: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run ``program`` to its end and return its result.

    Time is virtual: it stands still while anything can run, then jumps to the next deadline.  The
    program must not use threads, sockets or the wall clock.
    """
    with _seeded_scheduler(seed), _rare_collections():
        return trio.run(program, clock=trio.testing.MockClock(autojump_threshold=0))
