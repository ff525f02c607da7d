"""The kinds of things that can go wrong in a simulated swarm, as data.

Every fault has a beginning (``at``, virtual seconds after the faults begin); those with ``seconds``
last.  Nodes are named by number.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

DiskAfterCrash = Literal["synced", "torn", "erased", "corrupt"]
"""``synced``: what was synced is there, the rest as a real disk leaves it; ``torn``: the power went
in the middle of a disk operation; ``erased``: the disk is new; ``corrupt``: a bit of an old file is
another one, so the node must refuse to start, and its operator erases the log."""
Blow = Literal["crash", "pause", "cut", "slow_disk", "full_disk"]
"""What befalls the node that leads."""
BLOWS: Final[tuple[Blow, ...]] = get_args(Blow)
Malice = Literal[
    "garbage",
    "mutation",
    "replay",
    "stale_epoch",
    "flood",
    "false_result",
    "false_close",
    "false_raft",
    "false_proposal",
    "false_claim",
    "false_journal",
    "false_facts",
]
"""What a malicious member does: noise instead of frames; whole messages with changed bytes; what it
said before, again; sessions and steps of another epoch; more steps than may wait; results and
endings of sessions that are not its own; Raft ids and messages of others; changes that it may not
propose; taking others' sessions over; journals that are not its own, and changed copies; lies about
itself when it is asked."""
MALICE: Final[tuple[Malice, ...]] = get_args(Malice)
Phase = Literal["never", "proposed", "loading", "ready", "committed"]
"""How far moving layers has come: it is in the log; the new slices are being loaded beside the old;
all of them are; the new epoch is in the log."""
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)


class Crash(msgspec.Struct, frozen=True, tag="crash"):
    """A node dies at once and comes back after ``seconds``."""

    at: float
    node: int
    seconds: float
    disk: DiskAfterCrash = "synced"


class Blackout(msgspec.Struct, frozen=True, tag="blackout"):
    """Several nodes, or all, lose their power at once, and come back at once."""

    at: float
    seconds: float
    nodes: tuple[int, ...]


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


class Jitter(msgspec.Struct, frozen=True, tag="jitter"):
    """Each frame to or from a node is late by up to ``most`` seconds.

    Within a stream frames keep their order, as the transport promises; between streams they do not.
    """

    at: float
    seconds: float
    node: int
    most: float


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


class LowMemory(msgspec.Struct, frozen=True, tag="low_memory"):
    """A node has no memory to give: no runner can be loaded; with ``kill`` those there are die."""

    at: float
    seconds: float
    node: int
    kill: bool


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


class HitLeader(msgspec.Struct, frozen=True, tag="hit_leader"):
    """The node that leads when the time comes is hit; ``cut``: all its links are."""

    at: float
    seconds: float
    blow: Blow


class ClockJump(msgspec.Struct, frozen=True, tag="clock_jump"):
    """A node's wall clock jumps by ``by`` seconds and stays so."""

    at: float
    node: int
    by: float


class ClockDrift(msgspec.Struct, frozen=True, tag="clock_drift"):
    """A node's wall clock gains ``rate`` seconds each second (loses, if negative)."""

    at: float
    seconds: float
    node: int
    rate: float


class MoveLeader(msgspec.Struct, frozen=True, tag="move_leader"):
    """The leadership is handed to another voter."""

    at: float
    to: int


class ChurnLeaders(msgspec.Struct, frozen=True, tag="churn_leaders"):
    """The leadership is handed on ``times`` times within ``seconds``, to one after the other."""

    at: float
    seconds: float
    times: int


class Replace(msgspec.Struct, frozen=True, tag="replace"):
    """An operator places the model anew, cut at ``boundaries``, on ``nodes``."""

    at: float
    boundaries: tuple[int, ...]
    nodes: tuple[int, ...]


class Reshard(msgspec.Struct, frozen=True, tag="reshard"):
    """An operator moves the model's layers while it serves, as ``placement apply`` on ``asked``.

    When that has come to the phase ``hit``, the node ``victim`` dies for ``seconds``.
    """

    at: float
    boundaries: tuple[int, ...]
    nodes: tuple[int, ...]
    asked: int
    hit: Phase = "never"
    victim: int = 0
    seconds: float = 0.0


class Draft(msgspec.Struct, frozen=True, tag="draft"):
    """An operator lets another node draft for the model's sessions."""

    at: float
    node: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """A node is drained, and taken back into service after ``seconds``."""

    at: float
    seconds: float
    node: int


class Join(msgspec.Struct, frozen=True, tag="join"):
    """``count`` new nodes join at once."""

    at: float
    count: int


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Nodes leave for good: they are removed, run on for ``seconds``, and are switched off."""

    at: float
    seconds: float
    nodes: tuple[int, ...]


class Revoke(msgspec.Struct, frozen=True, tag="revoke"):
    """A member is shut out; for ``seconds`` it goes on as if nothing had happened."""

    at: float
    seconds: float
    node: int


class Evil(msgspec.Struct, frozen=True, tag="evil"):
    """A member sends what it must not, to everybody, for ``seconds``."""

    at: float
    seconds: float
    node: int
    how: Malice


Fault = (
    Crash
    | Blackout
    | Partition
    | OneWay
    | Flap
    | SlowLink
    | Jitter
    | Pause
    | SlowRunner
    | KillRunner
    | LowMemory
    | SlowDisk
    | FullDisk
    | HitLeader
    | ClockJump
    | ClockDrift
    | MoveLeader
    | ChurnLeaders
    | Replace
    | Reshard
    | Draft
    | Drain
    | Join
    | Leave
    | Revoke
    | Evil
)
