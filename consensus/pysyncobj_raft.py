"""PySyncObj's ``SyncObj``, hardened: what it makes of messages that are late, doubled or false.

Each method says what the class as shipped does there.  Pure.
"""

from __future__ import annotations

from typing import Any

from pyagent_node.base.errors import CorruptData, Refused
from pyagent_node.consensus.pysyncobj_messages import (
    Append,
    InstallSnapshot,
    Membership,
    NextIndex,
    RequestVote,
    TimeoutNow,
    Vote,
)
from pyagent_node.consensus.pysyncobj_parts import Node
from pyagent_node.consensus.pysyncobj_quiet import CANDIDATE, FOLLOWER, LEADER, QuietSyncObj


class HardenedSyncObj(QuietSyncObj):
    """One node of PySyncObj that neither a late nor a false message can damage."""

    def _library(self, sender: int, message: dict[str, Any]) -> None:
        self.run(lambda: self._SyncObj__onMessageReceived(Node(sender), message))

    def take_request_vote(self, sender: int, ask: RequestVote) -> None:
        """Answer a candidate, or one that would be (``ask``)."""
        if ask.ask:
            self._take_ask(sender, ask)
            return
        fields = {
            "type": "request_vote",
            "term": ask.term,
            "last_log_index": ask.last_index,
            "last_log_term": ask.last_term,
        }
        self._library(sender, fields)

    def _take_ask(self, sender: int, ask: RequestVote) -> None:
        term = self._SyncObj__raftCurrentTerm
        if ask.term <= term:
            self.stale += 1
            if ask.term < term + 1:  # it does not know the term: it would ask in vain for ever
                self.put(sender, NextIndex(term, 0, reset=False, success=False, round=0))
            return
        # a heartbeat less than the shortest timeout, for the one that stands first heard it first
        led = self._SyncObj__raftState == LEADER or self.now - self._heard < self._lease_ticks
        mine = (self.log[-1][2], self.log.last_index)
        if not led and (ask.last_term, ask.last_index) >= mine:
            self.put(sender, Vote(ask.term, ask=True))

    def take_vote(self, sender: int, vote: Vote) -> None:
        """Count a vote once: as shipped, one that comes twice counts twice."""
        if not self.votes(sender):
            raise Refused(f"Node {sender:x} does not vote.", code="not_a_voter")
        term = self._SyncObj__raftCurrentTerm
        if vote.ask:
            if vote.term != term + 1 or self._asking != vote.term or sender in self._promised:
                self.stale += 1
                return
            self._promised.add(sender)
            if self.majority(self._promised):
                self._SyncObj__raftElectionDeadline = self.now - 1
            return
        candidate = self._SyncObj__raftState == CANDIDATE
        if vote.term != term or not candidate or sender in self._granted:
            self.stale += 1
            return
        self._granted.add(sender)
        self._library(sender, {"type": "response_vote", "term": vote.term})

    def take_timeout_now(self, sender: int, message: TimeoutNow) -> None:
        """Stand for election at once, if the present leader says so."""
        if message.term != self._SyncObj__raftCurrentTerm:
            self.stale += 1
            return
        self._library(sender, {"type": "timeout_now", "term": message.term})

    def take_next_index(self, sender: int, reply: NextIndex) -> None:
        """Take a follower's word for what it holds.

        As shipped an acknowledgement names no term, so one for an earlier leadership counts for
        this one, and none is checked against the log: it may acknowledge more than there is.
        """
        term = self._SyncObj__raftCurrentTerm
        if reply.term > term:
            if self.votes(sender):
                self._step_down(reply.term)
            return
        node = Node(sender)
        matched = self._SyncObj__raftMatchIndex.get(node)
        if reply.term < term or self._SyncObj__raftState != LEADER or matched is None:
            self.stale += 1
            return
        last = self.log.last_index
        beyond = reply.next_index - 1 > last or reply.round > self.round
        if reply.success and (beyond or reply.reset or reply.next_index == 0):
            raise CorruptData(
                f"Node {sender:x} acknowledged entry {reply.next_index - 1} of {last}.",
                code="protocol_error",
            )
        sent = self._SyncObj__raftNextIndex[node]
        following = min(max(reply.next_index, matched + 1), last + 1)
        fields = {
            "type": "next_node_idx",
            "next_node_idx": following,
            "reset": reply.reset,
            "success": reply.success,
        }
        self._library(sender, fields)
        known = self.acknowledged_round.get(sender, 0)
        self.acknowledged_round[sender] = max(known, min(reply.round, self.round))
        if reply.success:
            if reply.next_index > self.log.base_index:
                self._snapshot_until.pop(sender, None)
            # as shipped, entries that are on their way already are sent again
            following = max(following, sent)
            self._SyncObj__raftNextIndex[node] = following
        if self.log.base_index < following <= last:
            self._send_to(node)

    def _check_leader(self, sender: int, term: int) -> None:
        leader = self._SyncObj__raftLeader
        other = leader is not None and leader.id != sender
        if sender == self.me or (term == self._SyncObj__raftCurrentTerm and other):
            raise Refused(f"Node {sender:x} does not lead term {term}.", code="not_the_leader")

    def _follow(self, sender: int, term: int) -> None:
        if term > self._SyncObj__raftCurrentTerm:
            self._SyncObj__transferInProgress = False
            self._SyncObj__setCurrentTerm(term, None)
        if not self._SyncObj__transferInProgress:
            timeout: float = self.run(self._SyncObj__generateRaftTimeout)
            self._SyncObj__raftElectionDeadline = self.now + timeout
        self._SyncObj__raftLeader = Node(sender)
        self._SyncObj__setState(FOLLOWER)
        self._heard = self.now

    def _late_leader(self, sender: int, term: int) -> bool:
        """Tell a leader of an earlier term of the later one; as shipped it hears nothing."""
        current = self._SyncObj__raftCurrentTerm
        if term >= current:
            return False
        self.stale += 1
        self.put(sender, NextIndex(current, 0, reset=False, success=False, round=0))
        return True

    def take_append(self, sender: int, message: Append) -> None:
        """Take entries from the leader.

        As shipped, everything behind ``prev_index`` is cut off before the entries are added, so a
        late or repeated message takes away entries that were acknowledged, committed and applied;
        and what a leader says is committed is believed of entries that were never compared.
        """
        if self._late_leader(sender, message.term):
            return
        self._check_leader(sender, message.term)
        _check_entries(sender, message)
        differs = self._first_difference(sender, message)
        self._follow(sender, message.term)
        log, prev = self.log, message.prev_index
        if prev > log.last_index:
            self._reply(sender, message, log.last_index + 1, success=False)
            return
        if log.term_at(prev) not in (None, message.prev_term):
            self._reply(sender, message, self._retreat(prev), success=False)
            return
        if differs <= log.last_index:
            log.truncate(differs)
        for entry in message.entries:
            if entry.index > log.last_index:
                log.add(entry.content, entry.index, entry.term)
        self.adopt()
        verified = max(prev + len(message.entries), log.base_index)
        self._advance_commit(min(message.commit, verified))
        self._reply(sender, message, verified + 1, success=True)

    def _reply(
        self, to: int, message: Append | InstallSnapshot, following: int, *, success: bool
    ) -> None:
        reply = NextIndex(message.term, following, not success, success, message.round)
        self.put(to, reply)

    def _first_difference(self, sender: int, message: Append) -> int:
        """Return the index from which the log differs from the entries; past its end if nowhere.

        Raises :class:`CorruptData` (``log_diverged``) if that is committed here.
        """
        commit, log = self._SyncObj__raftCommitIndex, self.log
        mine = log.term_at(message.prev_index)
        if mine not in (None, message.prev_term) and message.prev_index <= commit:
            raise _diverged(sender, message.prev_index)
        for entry in message.entries:
            if not log.base_index < entry.index <= log.last_index:
                continue
            if log.entry(entry.index) == entry:
                continue
            if entry.index <= commit or log.term_at(entry.index) == entry.term:
                raise _diverged(sender, entry.index)
            return entry.index
        return log.last_index + 1

    def _retreat(self, index: int) -> int:
        """Return where to try next: the first entry of the term that does not agree."""
        term = self.log.term_at(index)
        while index - 1 > self._SyncObj__raftCommitIndex and self.log.term_at(index - 1) == term:
            index -= 1
        return index

    def _advance_commit(self, commit: int) -> None:
        if commit > self._SyncObj__raftCommitIndex:
            self._SyncObj__raftCommitIndex = commit
            self._SyncObj__leaderCommitIndex = commit
            self.log.setRaftCommitIndex(commit)

    def take_snapshot(self, sender: int, message: InstallSnapshot) -> None:
        """Take a snapshot, unless the log holds all of it: it then only says what is committed."""
        if self._late_leader(sender, message.term):
            return
        self._check_leader(sender, message.term)
        if message.snapshot_term > message.term:
            raise CorruptData(f"Node {sender:x} sent a snapshot of a later term.")
        self._follow(sender, message.term)
        index, term = message.index, message.snapshot_term
        if self.log.term_at(index) == term:
            self._advance_commit(index)
        elif index > self._SyncObj__raftCommitIndex:
            membership = Membership(
                message.voters, message.learners, message.voters, message.learners
            )
            self.log.install(index, term, membership)
            self.installed = self.last_snapshot = (index, term, membership, message.data)
            self.committed.clear()
            self._SyncObj__raftCommitIndex = self._SyncObj__raftLastApplied = index
            self.adopt()
        self._reply(sender, message, index + 1, success=True)


def _check_entries(sender: int, message: Append) -> None:
    index, term = message.prev_index, message.prev_term
    for entry in message.entries:
        index += 1
        if entry.index != index or not term <= entry.term <= message.term:
            raise CorruptData(
                f"Node {sender:x} sent entry {entry.index} of term {entry.term} after {index - 1}"
                f" of term {term}.",
                code="protocol_error",
            )
        term = entry.term


def _diverged(sender: int, index: int) -> CorruptData:
    return CorruptData(
        f"Node {sender:x} sent another entry {index} than the one that is here already.",
        code="log_diverged",
        remedy="A log was restored from an old backup; compare the logs of all nodes.",
        index=index,
    )
