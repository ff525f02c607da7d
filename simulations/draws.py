"""How each kind of fault is drawn from a generator, and in which mixes.  Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

from pyagent_node.simulations.fault_kinds import (
    BLOWS,
    MALICE,
    PHASES,
    Blackout,
    ChurnLeaders,
    ClockDrift,
    ClockJump,
    Crash,
    DiskAfterCrash,
    Draft,
    Drain,
    Evil,
    Fault,
    Flap,
    FullDisk,
    HitLeader,
    Jitter,
    Join,
    KillRunner,
    Leave,
    LowMemory,
    MoveLeader,
    OneWay,
    Partition,
    Pause,
    Replace,
    Reshard,
    Revoke,
    SlowDisk,
    SlowLink,
    SlowRunner,
)

Draw = Callable[[random.Random, float, int], Fault]
"""Draws a fault at a time for a swarm of so many nodes."""

N_LAYERS: Final = 10
"""Layers of the toy model that is served."""
DISKS_AFTER_CRASH: Final[Mapping[DiskAfterCrash, int]] = {
    "synced": 12,
    "torn": 6,
    "erased": 1,
    "corrupt": 1,
}
"""How often a crash leaves a disk like that, of twenty."""


def _length(rng: random.Random) -> float:
    return round(rng.choice((0.2, 1.0, 3.0, 8.0)) * rng.uniform(0.5, 1.5), 3)


def _two(rng: random.Random, nodes: int) -> tuple[int, int]:
    a, b = rng.sample(range(nodes), 2)
    return a, b


def _some(rng: random.Random, nodes: int, fewest: int, most: int) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(nodes), rng.randint(min(fewest, most), most))))


def _crash(rng: random.Random, at: float, nodes: int) -> Fault:
    disk = rng.choices(list(DISKS_AFTER_CRASH), list(DISKS_AFTER_CRASH.values()))[0]
    return Crash(at, rng.randrange(nodes), _length(rng), disk)


def _bad_disk(rng: random.Random, at: float, nodes: int) -> Fault:
    disk: DiskAfterCrash = rng.choice(("erased", "corrupt"))
    return Crash(at, rng.randrange(nodes), _length(rng), disk)


def _blackout(rng: random.Random, at: float, nodes: int) -> Fault:
    everyone = tuple(range(nodes))
    struck = everyone if rng.random() < 0.4 else _some(rng, nodes, 2, nodes)
    return Blackout(at, _length(rng), struck)


def _partition(rng: random.Random, at: float, nodes: int) -> Fault:
    return Partition(at, _length(rng), _some(rng, nodes, 1, max(1, nodes // 2)))


def _one_way(rng: random.Random, at: float, nodes: int) -> Fault:
    return OneWay(at, _length(rng), *_two(rng, nodes))


def _flap(rng: random.Random, at: float, nodes: int) -> Fault:
    return Flap(at, _length(rng), *_two(rng, nodes), rng.randint(2, 6))


def _slow_link(rng: random.Random, at: float, nodes: int) -> Fault:
    latency = round(rng.uniform(0.02, 0.4), 3)
    return SlowLink(at, _length(rng), *_two(rng, nodes), latency)


def _jitter(rng: random.Random, at: float, nodes: int) -> Fault:
    return Jitter(at, _length(rng), rng.randrange(nodes), round(rng.uniform(0.01, 0.3), 3))


def _pause(rng: random.Random, at: float, nodes: int) -> Fault:
    return Pause(at, _length(rng), rng.randrange(nodes))


def _slow_runner(rng: random.Random, at: float, nodes: int) -> Fault:
    return SlowRunner(at, _length(rng), rng.randrange(nodes), round(rng.uniform(2, 30), 1))


def _kill_runner(rng: random.Random, at: float, nodes: int) -> Fault:
    return KillRunner(at, rng.randrange(nodes))


def _low_memory(rng: random.Random, at: float, nodes: int) -> Fault:
    return LowMemory(at, _length(rng), rng.randrange(nodes), rng.random() < 0.5)


def _slow_disk(rng: random.Random, at: float, nodes: int) -> Fault:
    return SlowDisk(at, _length(rng), rng.randrange(nodes), round(rng.uniform(0.01, 0.3), 3))


def _full_disk(rng: random.Random, at: float, nodes: int) -> Fault:
    return FullDisk(at, _length(rng), rng.randrange(nodes))


def _hit_leader(rng: random.Random, at: float, nodes: int) -> Fault:
    return HitLeader(at, _length(rng), rng.choice(BLOWS))


def _clock_jump(rng: random.Random, at: float, nodes: int) -> Fault:
    return ClockJump(at, rng.randrange(nodes), round(rng.uniform(-120, 120), 3))


def _clock_drift(rng: random.Random, at: float, nodes: int) -> Fault:
    return ClockDrift(at, 3 * _length(rng), rng.randrange(nodes), round(rng.uniform(-0.5, 1), 3))


def _move_leader(rng: random.Random, at: float, nodes: int) -> Fault:
    return MoveLeader(at, rng.randrange(nodes))


def _churn_leaders(rng: random.Random, at: float, nodes: int) -> Fault:
    return ChurnLeaders(at, _length(rng), rng.randint(2, 8))


def _replace(rng: random.Random, at: float, nodes: int) -> Fault:
    count = rng.randint(1, min(4, nodes))
    boundaries = sorted(rng.sample(range(1, N_LAYERS), count - 1))
    return Replace(at, tuple(boundaries), tuple(rng.sample(range(nodes), count)))


def _reshard(rng: random.Random, at: float, nodes: int) -> Fault:
    count = rng.randint(1, min(4, nodes))
    boundaries = sorted(rng.sample(range(1, N_LAYERS), count - 1))
    where = tuple(rng.sample(range(nodes), count))
    hit = "never" if rng.random() < 0.4 else rng.choice(PHASES[1:])
    return Reshard(
        at,
        tuple(boundaries),
        where,
        rng.randrange(nodes),
        hit,
        rng.randrange(nodes),
        _length(rng),
    )


def _draft(rng: random.Random, at: float, nodes: int) -> Fault:
    return Draft(at, rng.randrange(nodes))


def _drain(rng: random.Random, at: float, nodes: int) -> Fault:
    return Drain(at, _length(rng), rng.randrange(nodes))


def _join(rng: random.Random, at: float, nodes: int) -> Fault:
    return Join(at, rng.randint(1, 3))


def _depart(rng: random.Random, at: float, nodes: int) -> Fault:
    """Never node 0, which holds the mesh's authority and cannot go."""
    if nodes == 1 or rng.random() < 0.5:
        return Join(at, 1)
    if rng.random() < 0.5:
        return Revoke(at, _length(rng), rng.randrange(1, nodes))
    who = rng.sample(range(1, nodes), rng.randint(1, max(1, (nodes - 1) // 3)))
    return Leave(at, _length(rng), tuple(sorted(who)))


def _evil(rng: random.Random, at: float, nodes: int) -> Fault:
    return Evil(at, _length(rng), rng.randrange(nodes), rng.choice(MALICE))


BETWEEN_TWO: Final[tuple[Draw, ...]] = (_one_way, _flap, _slow_link)
"""Kinds that a node alone cannot have."""

_NETWORK: Final = (_partition, _one_way, _flap, _slow_link, _jitter)
_NODES: Final = (_crash, _crash, _pause, _slow_runner, _kill_runner, _low_memory)
_CLOCKS: Final = (_clock_jump, _clock_drift)
_DISKS: Final = (_crash, _slow_disk, _full_disk)
_OPERATORS: Final = (_move_leader, _replace, _reshard, _draft, _drain, _join, _depart)

CONTEXTS: Final = "contexts"
"""In this mix documents are added to a context, and asked for, besides everything else."""

MIXES: Final[Mapping[str, tuple[Draw, ...]]] = {
    "none": (),
    "network": _NETWORK,
    "crashes": (*_NODES, *_CLOCKS, _blackout, _hit_leader),
    "blackouts": (_blackout, _blackout, _crash, _bad_disk, _hit_leader),
    "disks": (*_DISKS, _bad_disk, _hit_leader),
    "operators": _OPERATORS,
    "churn": (_join, _depart, _depart, _churn_leaders, _hit_leader, _drain, _crash),
    "evil": (_evil,),
    CONTEXTS: (
        *(_crash, _crash, _crash, _blackout, _pause, _hit_leader),
        *(_partition, _one_way, _flap, _join, _drain, _evil),
    ),
    "standard": (
        *_NETWORK,
        *_NODES,
        *_CLOCKS,
        *_DISKS,
        *_OPERATORS,
        _hit_leader,
        _churn_leaders,
        _blackout,
        _evil,
    ),
}
"""The named mixes of faults that ``--faults`` takes; each kind of a mix comes equally often."""
