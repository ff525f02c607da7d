"""Committed entries become state: applied in order, once, alike on every node."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from pyagent_node.base.errors import ErrorInfo, PyAgentError, Unsupported
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.history import History
from pyagent_node.consensus.raft_core import Core
from pyagent_node.consensus.raft_disk import Snapshot
from pyagent_node.consensus.raft_members import Members
from pyagent_node.consensus.raft_storage import Loaded, decode_peers, to_log_entry
from pyagent_node.consensus.replica import Outcome, Replica
from pyagent_node.native import RaftEntry

log = logging.getLogger("pyagent_node.consensus.raft")


class AppliedCounters(msgspec.Struct):
    """What was applied, for ``/metrics``."""

    commits: int = 0
    refused_entries: int = 0
    snapshots_installed: int = 0


class Applier:
    """State and members of one node; ``held`` says why commands are not applied any more."""

    def __init__(
        self, loaded: Loaded, members: Members, applied: Callable[[Outcome], None]
    ) -> None:
        self.counters = AppliedCounters()
        self.history = History()
        self.history.reset(loaded.replica)
        self.held: ErrorInfo | None = None
        self.bytes_applied = 0
        self._members = members
        self._applied = applied
        members.install(loaded.conf, loaded.peers)

    def install(self, snapshot: Snapshot, peers: dict[int, PeerId], replica: Replica) -> None:
        """Go on from a snapshot of the leader."""
        self._members.install(snapshot[2], peers)
        self.history.reset(replica)
        self.counters.snapshots_installed += 1

    def apply(self, core: Core, entries: list[RaftEntry]) -> bool:
        """Apply what is committed; says whether the configuration changed."""
        changed = False
        for entry in entries:
            if entry.kind == 1:
                conf = core.apply_conf(entry)
                self._members.change(conf, decode_peers(entry.context))
                changed = True
            if entry.index > self.history.index:  # not seen before a core was replaced
                self._apply_one(entry)
        if entries:
            core.advance_apply(entries[-1].index)
            self.history.wake()
        return changed

    def _apply_one(self, entry: RaftEntry) -> None:
        """Apply an entry; whatever is wrong with it, every node goes on alike."""
        if self.held is not None:
            return
        stored = to_log_entry(entry)
        replica = self.history.replica
        outcome: Outcome | None = None
        try:
            if entry.kind == 0 and entry.data:
                outcome = replica.apply_once(stored, entry.data)
                self.counters.commits += 1
            else:
                replica.skip(stored)
        except Unsupported as error:  # others may know the command: this node must not go on
            log.error("the log is not applied any further: %s", error)
            self.held = error.to_info()
            return
        except PyAgentError as error:
            self.counters.refused_entries += 1
            log.error("an entry of the log was skipped: %s", error)
            replica.skip(stored)
        self.bytes_applied += len(stored.data)
        fresh = outcome is not None and not outcome.repeated
        self.history.keep(stored, outcome.applied if outcome and fresh else None, replica.chain)
        if outcome is not None:
            self._applied(outcome)
