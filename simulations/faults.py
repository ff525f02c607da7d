"""What can go wrong in a simulated swarm, and when: schedules of faults.  Pure.

A schedule is data: it can be drawn from a seed, written to a file, changed by hand, shrunk, and
played again.  Every fault has a beginning (``at``, virtual seconds) and most have a length; the
end of the last one begins the healing, in which the swarm must recover.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Final, Literal, get_args

import msgspec

from pyagent_node.base.errors import InvalidRequest

MAX_FAULTS: Final = 4096
MAX_NODES: Final = 256
MAX_SECONDS: Final = 86_400.0

DiskAfterCrash = Literal["synced", "torn", "erased"]
"""``synced``: what was synced is there, the rest as a real disk leaves it; ``torn``: the power went
in the middle of a disk operation; ``erased``: the disk is new."""
Malice = Literal["garbage", "replay", "stale_epoch", "false_result", "false_close"]
"""What a malicious member does: noise instead of frames, steps that were done before, steps of
another epoch, results and endings of sessions that are not its own."""
MALICE: Final[tuple[Malice, ...]] = get_args(Malice)


class Crash(msgspec.Struct, frozen=True, tag="crash"):
    """A node dies at once and comes back after ``seconds``."""

    at: float
    node: int
    seconds: float
    disk: DiskAfterCrash = "synced"


class Partition(msgspec.Struct, frozen=True, tag="partition"):
    """The network falls apart into ``left`` and everybody else."""

    at: float
    seconds: float
    left: tuple[int, ...]


class OneWay(msgspec.Struct, frozen=True, tag="one_way"):
    """What ``source`` sends to ``target`` is lost; the other direction works."""

    at: float
    seconds: float
    source: int
    target: int


class Flap(msgspec.Struct, frozen=True, tag="flap"):
    """The link between two nodes breaks and mends ``times`` times within ``seconds``."""

    at: float
    seconds: float
    a: int
    b: int
    times: int


class SlowLink(msgspec.Struct, frozen=True, tag="slow_link"):
    """Frames between two nodes take ``latency`` seconds one way."""

    at: float
    seconds: float
    a: int
    b: int
    latency: float


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """A node stands still (a closed lid, a swapping host): nothing reaches it, nothing leaves it.

    Its connections do not break; what waits arrives afterwards.
    """

    at: float
    seconds: float
    node: int


class SlowRunner(msgspec.Struct, frozen=True, tag="slow_runner"):
    """The runners of a node compute ``factor`` times slower."""

    at: float
    seconds: float
    node: int
    factor: float


class KillRunner(msgspec.Struct, frozen=True, tag="kill_runner"):
    """Every runner process of a node is killed, as for want of memory."""

    at: float
    node: int


class SlowDisk(msgspec.Struct, frozen=True, tag="slow_disk"):
    """Each operation on a node's disk takes ``delay`` seconds."""

    at: float
    seconds: float
    node: int
    delay: float


class FullDisk(msgspec.Struct, frozen=True, tag="full_disk"):
    """Nothing more fits a node's disk."""

    at: float
    seconds: float
    node: int


class ClockJump(msgspec.Struct, frozen=True, tag="clock_jump"):
    """A node's wall clock jumps by ``by`` seconds and stays so."""

    at: float
    node: int
    by: float


class MoveLeader(msgspec.Struct, frozen=True, tag="move_leader"):
    """The leadership is handed to another voter."""

    at: float
    to: int


class Replace(msgspec.Struct, frozen=True, tag="replace"):
    """An operator places the model anew, cut at ``boundaries``, on ``nodes``."""

    at: float
    boundaries: tuple[int, ...]
    nodes: tuple[int, ...]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """A node is drained, and taken back into service after ``seconds``."""

    at: float
    seconds: float
    node: int


class Join(msgspec.Struct, frozen=True, tag="join"):
    """``count`` new nodes join at once."""

    at: float
    count: int


class Evil(msgspec.Struct, frozen=True, tag="evil"):
    """A member sends what it must not, to everybody, for ``seconds``."""

    at: float
    seconds: float
    node: int
    how: Malice


Fault = (
    Crash
    | Partition
    | OneWay
    | Flap
    | SlowLink
    | Pause
    | SlowRunner
    | KillRunner
    | SlowDisk
    | FullDisk
    | ClockJump
    | MoveLeader
    | Replace
    | Drain
    | Join
    | Evil
)


class Schedule(msgspec.Struct, frozen=True):
    """Everything that happens to a swarm of ``nodes`` nodes, in order of time."""

    nodes: int
    duration: float
    faults: tuple[Fault, ...]

    @property
    def end(self) -> float:
        """When the last fault is over, at least ``duration``."""
        ends = (fault.at + getattr(fault, "seconds", 0.0) for fault in self.faults)
        return max(self.duration, *ends, 0.0)


Draw = Callable[[random.Random, float, int], Fault]
"""Draws a fault at a time for a swarm of so many nodes."""

N_LAYERS: Final = 10
"""Layers of the toy model that is served."""


def _length(rng: random.Random) -> float:
    return round(rng.choice((0.2, 1.0, 3.0, 8.0)) * rng.uniform(0.5, 1.5), 3)


def _two(rng: random.Random, nodes: int) -> tuple[int, int]:
    a, b = rng.sample(range(nodes), 2)
    return a, b


def _crash(rng: random.Random, at: float, nodes: int) -> Fault:
    disk: DiskAfterCrash = rng.choice(("synced", "synced", "torn"))
    return Crash(at, rng.randrange(nodes), _length(rng), disk)


def _partition(rng: random.Random, at: float, nodes: int) -> Fault:
    left = rng.sample(range(nodes), rng.randint(1, max(1, nodes // 2)))
    return Partition(at, _length(rng), tuple(sorted(left)))


def _one_way(rng: random.Random, at: float, nodes: int) -> Fault:
    return OneWay(at, _length(rng), *_two(rng, nodes))


def _flap(rng: random.Random, at: float, nodes: int) -> Fault:
    return Flap(at, _length(rng), *_two(rng, nodes), rng.randint(2, 6))


def _slow_link(rng: random.Random, at: float, nodes: int) -> Fault:
    latency = round(rng.uniform(0.02, 0.4), 3)
    return SlowLink(at, _length(rng), *_two(rng, nodes), latency)


def _pause(rng: random.Random, at: float, nodes: int) -> Fault:
    return Pause(at, _length(rng), rng.randrange(nodes))


def _slow_runner(rng: random.Random, at: float, nodes: int) -> Fault:
    return SlowRunner(at, _length(rng), rng.randrange(nodes), round(rng.uniform(2, 30), 1))


def _kill_runner(rng: random.Random, at: float, nodes: int) -> Fault:
    return KillRunner(at, rng.randrange(nodes))


def _slow_disk(rng: random.Random, at: float, nodes: int) -> Fault:
    return SlowDisk(at, _length(rng), rng.randrange(nodes), round(rng.uniform(0.01, 0.3), 3))


def _full_disk(rng: random.Random, at: float, nodes: int) -> Fault:
    return FullDisk(at, _length(rng), rng.randrange(nodes))


def _clock_jump(rng: random.Random, at: float, nodes: int) -> Fault:
    return ClockJump(at, rng.randrange(nodes), round(rng.uniform(-120, 120), 3))


def _move_leader(rng: random.Random, at: float, nodes: int) -> Fault:
    return MoveLeader(at, rng.randrange(nodes))


def _replace(rng: random.Random, at: float, nodes: int) -> Fault:
    count = rng.randint(1, min(4, nodes))
    boundaries = sorted(rng.sample(range(1, N_LAYERS), count - 1))
    return Replace(at, tuple(boundaries), tuple(rng.sample(range(nodes), count)))


def _drain(rng: random.Random, at: float, nodes: int) -> Fault:
    return Drain(at, _length(rng), rng.randrange(nodes))


def _join(rng: random.Random, at: float, nodes: int) -> Fault:
    return Join(at, rng.randint(1, 3))


def _evil(rng: random.Random, at: float, nodes: int) -> Fault:
    how: Malice = rng.choice(MALICE)
    return Evil(at, _length(rng), rng.randrange(nodes), how)


_NETWORK: Final = (_partition, _one_way, _flap, _slow_link)
_NODES: Final = (_crash, _crash, _pause, _slow_runner, _kill_runner, _clock_jump)
_DISKS: Final = (_crash, _slow_disk, _full_disk)
_OPERATORS: Final = (_move_leader, _replace, _drain, _join)

MIXES: Final[Mapping[str, tuple[Draw, ...]]] = {
    "none": (),
    "network": _NETWORK,
    "crashes": _NODES,
    "disks": _DISKS,
    "operators": _OPERATORS,
    "evil": (_evil,),
    "standard": (*_NETWORK, *_NODES, *_DISKS, *_OPERATORS, _evil),
}
"""The named mixes of faults that ``--faults`` takes."""

MEAN_SECONDS_BETWEEN: Final = 2.5


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
    rng = random.Random(seed)  # noqa: S311 - must repeat itself
    kinds, faults = MIXES[mix], []
    at = 0.0
    while kinds:
        at += rng.expovariate(1 / MEAN_SECONDS_BETWEEN)
        if at >= duration:
            break
        faults.append(rng.choice(kinds)(rng, round(at, 3), nodes))
    return check_schedule(Schedule(nodes, duration, tuple(faults)))


def check_schedule(schedule: Schedule) -> Schedule:
    """Return ``schedule`` in order of time; raises :class:`InvalidRequest` (``bad_schedule``)."""
    if not 1 <= schedule.nodes <= MAX_NODES or len(schedule.faults) > MAX_FAULTS:
        raise _bad(f"it needs 1 to {MAX_NODES} nodes and at most {MAX_FAULTS} faults")
    if not 0 < schedule.duration <= MAX_SECONDS:
        raise _bad(f"its duration must be above 0 and at most {MAX_SECONDS:.0f} s")
    for fault in schedule.faults:
        seconds = getattr(fault, "seconds", 0.0)
        if not (0 <= fault.at <= MAX_SECONDS and 0 <= seconds <= MAX_SECONDS):
            raise _bad(f"a time of {fault} is out of range")
        for field in ("node", "a", "b", "source", "target", "to"):
            number = getattr(fault, field, 0)
            if not 0 <= number < schedule.nodes:
                raise _bad(f"there is no node {number} in {fault}")
        several = getattr(fault, "left", ()) or getattr(fault, "nodes", ())
        if any(not 0 <= number < schedule.nodes for number in several):
            raise _bad(f"{fault} names a node that there is not")
        if isinstance(fault, Replace):
            cuts = (0, *fault.boundaries, N_LAYERS)
            rising = all(a < b for a, b in itertools.pairwise(cuts))
            if not rising or len(fault.nodes) != len(cuts) - 1:
                raise _bad(f"{fault} does not cut the {N_LAYERS} layers for its nodes")
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
