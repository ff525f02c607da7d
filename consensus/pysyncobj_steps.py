"""What a :class:`PySyncCore` tells its caller, and the steps of a change of voters.  Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pyagent_node.consensus.pysyncobj_messages import Membership
from pyagent_node.native import RaftConf, RaftEntry

CAUGHT_UP = 256
"""Entries that a newcomer may lack when it gets its vote."""


class Ready(msgspec.Struct, frozen=True):
    """See :class:`pyagent_node.native.RaftReady`."""

    messages: list[tuple[int, str, bytes]]
    persisted_messages: list[tuple[int, str, bytes]]
    entries: list[RaftEntry]
    hard_state: tuple[int, int, int] | None
    must_sync: bool
    snapshot: tuple[int, int, RaftConf, bytes] | None
    committed: list[RaftEntry]
    read_states: list[tuple[int, bytes]]


class Status(msgspec.Struct, frozen=True):
    """See :class:`pyagent_node.native.RaftStatus`."""

    term: int
    vote: int
    leader: int
    role: str
    commit: int
    applied: int
    last_index: int
    first_index: int
    conf: RaftConf
    pending_conf: bool
    transferee: int
    uncommitted_bytes: int
    progress: list[tuple[int, int, bool, str]]


def next_step(
    now: Membership, me: int, last_index: int, matched: Callable[[int], int]
) -> Membership | None:
    """Return the next membership on the way to the target, ``None`` to wait.

    Newcomers learn first, then vote one by one as they catch up, then the leavers go; ``me``, the
    leader, goes last.
    """
    voters, target = set(now.voters), set(now.target_voters)
    newcomers, leavers = target - voters, voters - target
    if newcomers - set(now.learners):
        return _members(now, voters, {*now.learners, *newcomers, *now.target_learners} - voters)
    ready = [node for node in sorted(newcomers) if matched(node) + CAUGHT_UP >= last_index]
    if ready:
        voters.add(ready[0])
    elif newcomers:
        return None
    elif leavers:
        voters.discard(min(leavers - {me}, default=me))
    return _members(now, voters, {*now.target_learners, *newcomers} - voters)


def _members(now: Membership, voters: set[int], learners: set[int]) -> Membership:
    return Membership(
        tuple(sorted(voters)),
        tuple(sorted(learners)),
        now.target_voters,
        now.target_learners,
        now.context,
    )
