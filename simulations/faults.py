"""What can go wrong in a simulated swarm, and when: schedules of faults.  Pure.

A schedule is data: it can be drawn from a seed, written to a file, changed by hand, shrunk, and
played again.  Every fault has a beginning (``at``, virtual seconds) and most have a length; the
end of the last one begins the healing, in which the swarm must recover.

What no swarm can be expected to survive is not drawn, and refused in a file: that node 0 goes,
which holds the mesh's authority, or that half of the nodes leave for good.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.simulations.draws import BETWEEN_TWO, CONTEXTS, MIXES, N_LAYERS
from pyagent_node.simulations.fault_kinds import Fault, Leave, Replace, Reshard, Revoke

MAX_FAULTS: Final = 4096
MAX_NODES: Final = 256
MAX_SECONDS: Final = 86_400.0
MEAN_SECONDS_BETWEEN: Final = 2.0


class Schedule(msgspec.Struct, frozen=True):
    """Everything that happens to a swarm of ``nodes`` nodes, in order of time."""

    nodes: int
    duration: float
    faults: tuple[Fault, ...]
    contexts: bool = False
    """Whether somebody adds documents to a context meanwhile, and asks for them."""

    @property
    def end(self) -> float:
        """When the last fault is over, at least ``duration``."""
        ends = (fault.at + getattr(fault, "seconds", 0.0) for fault in self.faults)
        return max(self.duration, *ends, 0.0)


def draw_schedule(seed: int, *, nodes: int, duration: float, mix: str = "standard") -> Schedule:
    """Return the schedule of a seed: the same on every machine.

    Faults come as a Poisson process, one every :data:`MEAN_SECONDS_BETWEEN` on average, each kind
    of the mix equally often.  Raises :class:`InvalidRequest` (``bad_schedule``).
    """
    if mix not in MIXES:
        raise InvalidRequest(
            f"There is no mix of faults called {mix[:40]!r}.",
            code="bad_schedule",
            remedy=f"Choose one of {', '.join(MIXES)}, or name a file.",
        )
    check_schedule(Schedule(nodes, duration, ()))
    rng = random.Random(seed)  # noqa: S311 - must repeat itself
    kinds = [kind for kind in MIXES[mix] if nodes > 1 or kind not in BETWEEN_TWO]
    faults: list[Fault] = []
    at = 0.0
    while kinds:
        at += rng.expovariate(1 / MEAN_SECONDS_BETWEEN)
        if round(at, 3) >= duration:
            break
        faults.append(rng.choice(kinds)(rng, round(at, 3), nodes))
    bearable = tuple(_bearable(faults, nodes))
    return check_schedule(Schedule(nodes, duration, bearable, mix == CONTEXTS))


def most_departures(nodes: int) -> int:
    """Return how many nodes may leave for good of so many: less than half."""
    return (nodes - 1) // 2


def _bearable(faults: Iterable[Fault], nodes: int) -> Iterable[Fault]:
    """Yield the faults, without departures beyond what a swarm can bear."""
    gone: set[int] = set()
    for fault in faults:
        going = _departing(fault)
        if len(gone | going) <= most_departures(nodes) and not gone & going:
            gone |= going
            yield fault


def _departing(fault: Fault) -> set[int]:
    match fault:
        case Leave():
            return set(fault.nodes)
        case Revoke():
            return {fault.node}
        case _:
            return set()


def check_schedule(schedule: Schedule) -> Schedule:
    """Return ``schedule`` in order of time; raises :class:`InvalidRequest` (``bad_schedule``)."""
    if not 1 <= schedule.nodes <= MAX_NODES or len(schedule.faults) > MAX_FAULTS:
        raise _bad(f"it needs 1 to {MAX_NODES} nodes and at most {MAX_FAULTS} faults")
    if not 0 < schedule.duration <= MAX_SECONDS:
        raise _bad(f"its duration must be above 0 and at most {MAX_SECONDS:.0f} s")
    gone: set[int] = set()
    for fault in schedule.faults:
        gone |= _departing(fault)
        seconds = getattr(fault, "seconds", 0.0)
        if not (0 <= fault.at <= MAX_SECONDS and 0 <= seconds <= MAX_SECONDS):
            raise _bad(f"a time of {fault} is out of range")
        for field in ("node", "a", "b", "source", "target", "to", "asked", "victim"):
            number = getattr(fault, field, 0)
            if not 0 <= number < schedule.nodes:
                raise _bad(f"there is no node {number} in {fault}")
        several = getattr(fault, "left", ()) or getattr(fault, "nodes", ())
        if any(not 0 <= number < schedule.nodes for number in several):
            raise _bad(f"{fault} names a node that there is not")
        if isinstance(fault, Replace | Reshard):
            cuts = (0, *fault.boundaries, N_LAYERS)
            rising = all(a < b for a, b in itertools.pairwise(cuts))
            if not rising or len(fault.nodes) != len(cuts) - 1:
                raise _bad(f"{fault} does not cut the {N_LAYERS} layers for its nodes")
    if 0 in gone or len(gone) > most_departures(schedule.nodes):
        raise _bad("node 0, or half of the nodes, would leave")
    return msgspec.structs.replace(
        schedule, faults=tuple(sorted(schedule.faults, key=lambda fault: fault.at))
    )


def encode_schedule(schedule: Schedule) -> bytes:
    """Return the JSON of a schedule, as a file holds it."""
    return msgspec.json.format(msgspec.json.encode(schedule), indent=1) + b"\n"


def decode_schedule(data: bytes) -> Schedule:
    """Return the schedule in a file; raises :class:`InvalidRequest` (``bad_schedule``)."""
    try:
        return check_schedule(msgspec.json.decode(data, type=Schedule))
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(str(error)) from None


def _bad(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The schedule of faults is wrong: {why[:200]}.",
        code="bad_schedule",
        remedy="See docs/simulator.md for its form.",
    )
