"""Bugs of the replicated log: what is durable, who votes, what is applied."""

from __future__ import annotations

from typing import Any
from unittest import mock

import msgspec
import trio

from pyagent_node.consensus import member_changes, raft_disk, replica
from pyagent_node.consensus.commands import BurnTicket
from pyagent_node.consensus.raft_applier import Applier
from pyagent_node.consensus.raft_core import Core
from pyagent_node.consensus.raft_disk import Disk, Snapshot
from pyagent_node.consensus.raft_engine import RaftEngine
from pyagent_node.consensus.raft_node import RaftNode
from pyagent_node.consensus.raft_storage import HardState, to_log_entry
from pyagent_node.consensus.segmented import SegmentedLog
from pyagent_node.consensus.snapshots import decode_snapshot
from pyagent_node.consensus.state import Burn, State
from pyagent_node.native import RaftEntry
from pyagent_node.simulations.fault_kinds import (
    Crash,
    Join,
    MoveLeader,
    OneWay,
    Partition,
    SlowDisk,
)
from pyagent_node.simulations.faults import Schedule, check_schedule

from .kit import Bug, same, swap

CRASHES = same(
    3, 9.0, Crash(1.0, 0, 1.0), Crash(3.0, 1, 1.0), Crash(5.0, 2, 1.0), Crash(7.0, 0, 1.0)
)
SLOW_DISKS = same(
    3,
    9.0,
    *(SlowDisk(0.5, 8.0, node, 0.06) for node in range(3)),
    *(Crash(2.0 + 2.0 * node, node, 0.2) for node in range(3)),
)
"""Entries come in while others are being written, so that few logs end where they are applied."""


FOLLOWERS_CUT_OFF = same(3, 6.0, Partition(1.0, 1.0, (1,)), Partition(3.0, 1.0, (2,)))
"""Each has several entries to apply at once when it is back."""


def _two_elections(seed: int) -> Schedule:
    """Node 1 is elected by node 0 alone, which dies before it hears of it; 2 stands next.

    The moment between the vote and the first entry of the new leader is short: each seed tries
    another one.
    """
    moved, dies = 2.0, 2.0055 + 0.001 * seed
    return check_schedule(
        Schedule(
            3,
            7.0,
            (
                OneWay(moved - 0.01, 4.0, 1, 2),
                MoveLeader(moved, 1),
                Crash(dies, 0, 0.05),
                Partition(dies, 4.0, (1,)),
            ),
        )
    )


# ---- the disk -----------------------------------------------------------------------------------

_write = SegmentedLog._write


def _write_without_sync(self: SegmentedLog, file: Any, record: bytes) -> None:
    with mock.patch.object(type(file), "sync", return_value=None):
        _write(self, file, record)


_encode_hard_state = raft_disk.encode_hard_state


def _without_vote(hard: HardState) -> bytes:
    return _encode_hard_state(msgspec.structs.replace(hard, vote=0))


async def _compact_all(self: Disk, snapshot: Snapshot) -> None:
    await self._store.compact(raft_disk.encode_snapshot(*snapshot), ())
    self._snapshot = snapshot
    while self._log and self._log[0].index <= snapshot[0]:
        self._log.popleft()


# ---- applying -----------------------------------------------------------------------------------

_apply_ready = RaftNode._apply


def _apply_what_is_appended(self: RaftNode, ready: Any, light: Any, content: Any) -> None:
    _apply_ready(self, ready, light, content)
    for entry in ready.entries:
        if entry.index == self.history.index + 1:
            self.applier._apply_one(entry)


_apply = Applier.apply


def _apply_swapped(self: Applier, core: Core, entries: list[RaftEntry]) -> bool:
    plain = [at for at, entry in enumerate(entries) if entry.kind == 0 and entry.data]
    if len(plain) > 1:
        a, b = (entries[at] for at in plain[:2])
        entries[plain[0]] = RaftEntry(a.index, a.term, b.kind, b.data, b.context)
        entries[plain[1]] = RaftEntry(b.index, b.term, a.kind, a.data, a.context)
    return _apply(self, core, entries)


_apply_one = Applier._apply_one


def _apply_but_the_last(self: Applier, core: Core, entries: list[RaftEntry]) -> bool:
    skipped = entries[-1].index if len(entries) > 1 else None

    def apply_one(entry: RaftEntry) -> None:
        if entry.index == skipped:
            self.history.replica.skip(to_log_entry(entry))
        else:
            _apply_one(self, entry)

    with mock.patch.object(self, "_apply_one", apply_one):
        return _apply(self, core, entries)


def _decode_without_a_member(data: bytes) -> State:
    state = decode_snapshot(data)
    return msgspec.structs.replace(state, members=dict(list(state.members.items())[:-1]))


# ---- members ------------------------------------------------------------------------------------


def _burn_again(state: State, command: BurnTicket) -> State:
    burn = Burn(command.peer_id, command.expires)
    return msgspec.structs.replace(state, burnt={**state.burnt, command.ticket_id: burn})


# ---- reading ------------------------------------------------------------------------------------


async def _read_what_is_here(self: RaftEngine) -> None:
    await trio.lowlevel.checkpoint()


BUGS = (
    Bug(
        "fsync_skipped",
        "the log acknowledges what it has written but not synced",
        swap(SegmentedLog, "_write", _write_without_sync),
        CRASHES,
        frozenset(
            {"what was applied stays", "nothing goes back", "committed entries never change"}
        ),
    ),
    Bug(
        "vote_forgotten",
        "whom a node voted for is not in the hard state: restarted, it votes again in that term",
        swap(raft_disk, "encode_hard_state", _without_vote),
        _two_elections,
        frozenset({"one leader a term"}),
        within=5,
    ),
    Bug(
        "compaction_drops_the_rest",
        "a snapshot replaces the whole log, also the entries after it",
        swap(Disk, "compact", _compact_all),
        SLOW_DISKS,
        frozenset({"what was applied stays"}),
        compact=2,
        asks=0.2,
        within=5,
    ),
    Bug(
        "applied_before_commit",
        "an entry is applied as soon as it is in the own log",
        swap(RaftNode, "_apply", _apply_what_is_appended),
        same(3, 5.0, Partition(1.0, 2.0, (0,))),
        frozenset({"nothing goes back", "committed entries never change"}),
        asks=0.2,
    ),
    Bug(
        "applied_in_another_order",
        "two entries that are committed together are applied in the wrong order",
        swap(Applier, "apply", _apply_swapped),
        FOLLOWERS_CUT_OFF,
        frozenset({"committed entries never change"}),
    ),
    Bug(
        "entry_lost_in_a_batch",
        "the last of several entries that are committed together has no effect",
        swap(Applier, "apply", _apply_but_the_last),
        FOLLOWERS_CUT_OFF,
        frozenset({"committed entries never change"}),
    ),
    Bug(
        "snapshot_without_a_member",
        "a member is lost when a node starts from a snapshot",
        swap(replica, "decode_snapshot", _decode_without_a_member),
        same(3, 6.0, Crash(2.0, 1, 0.5), Join(3.0, 1)),
        frozenset({"committed entries never change"}),
        compact=5,
    ),
    Bug(
        "read_without_barrier",
        "a node answers from its own state, without asking the leader how far the log is",
        swap(RaftEngine, "read_barrier", _read_what_is_here),
        same(3, 6.0, OneWay(1.0, 4.0, 0, 1), OneWay(1.0, 4.0, 0, 2)),
        frozenset({"reads are current"}),
    ),
    Bug(
        "ticket_used_twice",
        "a ticket that has admitted one node admits another one",
        swap(member_changes, "burn", _burn_again),
        same(3, 4.0, Join(1.0, 1)),
        frozenset({"a ticket admits one"}),
    ),
)
