"""What a leader does besides feeding its followers: reads, new voters, handing over.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pyagent_node.consensus.pysyncobj_messages import (
    Membership,
    ToldIndex,
    check_members,
    encode_membership,
)
from pyagent_node.consensus.pysyncobj_quiet import LEADER
from pyagent_node.consensus.pysyncobj_raft import HardenedSyncObj
from pyagent_node.consensus.pysyncobj_steps import next_step
from pyagent_node.native import RaftDropped, RaftRefused

MAX_READS = 1024


class _Read(msgspec.Struct, frozen=True):
    """A read that waits for a majority to acknowledge the leader in ``round``."""

    round: int
    index: int
    asker: int
    context: bytes


class Leadership:
    """A node's work as the leader; nothing while it is not."""

    def __init__(self, raft: HardenedSyncObj, election_ticks: int) -> None:
        self.unsent = False
        """Whether something was appended or asked that the followers have not been sent."""
        self.transferee = 0
        self.read_states: list[tuple[int, bytes]] = []
        self._raft = raft
        self._election_ticks = election_ticks
        self._reads: list[_Read] = []
        self._transfer_sent = False
        self._transfer_until = 0.0

    @property
    def leads(self) -> bool:
        """Whether this node leads."""
        return self._raft.state == LEADER

    def look(self) -> None:
        """Go on with what is under way."""
        if self.leads:
            self._advance_change()
        else:
            self._reads.clear()
        self._hand_over()

    def append(self, content: bytes) -> tuple[int, int]:
        """Append an entry; returns its index and term."""
        raft = self._raft
        index = raft.log.last_index + 1
        raft.log.add(content, index, raft.term)
        self.unsent = True
        return index, raft.term

    # --- reads ----------------------------------------------------------------------------------

    def begin_read(self, asker: int, context: bytes) -> None:
        """Note what is committed, and ask the voters whether this node still leads.

        PySyncObj has no such reads: a leader deposed without knowing would answer with old state.
        Raises ``RaftDropped``.
        """
        raft = self._raft
        if not raft.settled or len(self._reads) >= MAX_READS:
            raise RaftDropped("this node does not lead, or not yet, or too many reads wait")
        raft.round += 1
        self._reads.append(_Read(raft.round, raft.commit, asker, context))
        self.unsent = True
        self.settle_reads()

    def settle_reads(self) -> None:
        """Answer the reads that a majority has confirmed."""
        raft = self._raft
        while self._reads:
            read = self._reads[0]
            acknowledged = raft.acknowledged_round.items()
            if not raft.majority({raft.me, *(n for n, at in acknowledged if at >= read.round)}):
                return
            del self._reads[0]
            if read.asker == raft.me:
                self.read_states.append((read.index, read.context))
            else:
                raft.put(read.asker, ToldIndex(raft.term, read.index, read.context))

    # --- changes of voters ----------------------------------------------------------------------

    def propose_conf(
        self, voters: Sequence[int], learners: Sequence[int], context: bytes
    ) -> tuple[int, int] | None:
        """Begin the change to these voters and learners; returns where its first step is."""
        target_voters, target_learners = tuple(sorted(voters)), tuple(sorted(learners))
        try:
            check_members(target_voters, target_learners)
        except ValueError as error:
            raise RaftRefused(str(error)) from None
        raft = self._raft
        now = raft.log.membership
        if not raft.settled or self.transferee or raft.log.membership_index > raft.commit:
            raise RaftDropped("this node does not lead, or changes the voters already")
        target = Membership(now.voters, now.learners, target_voters, target_learners, context)
        if target.complete:
            if now.complete:
                return None
        elif (target_voters, target_learners) == (now.target_voters, now.target_learners):
            raise RaftDropped("that change is under way")
        return self._change(self._next_step(target) or target)

    def _next_step(self, now: Membership) -> Membership | None:
        raft = self._raft
        return next_step(now, raft.me, raft.log.last_index, raft.matched)

    def _change(self, membership: Membership) -> tuple[int, int]:
        placed = self.append(encode_membership(membership))
        self._raft.adopt()
        return placed

    def _advance_change(self) -> None:
        """Take the next step of a change when the last one is committed."""
        raft = self._raft
        now = raft.log.membership
        if now.complete or not raft.settled or raft.log.membership_index > raft.commit:
            return
        step = self._next_step(now)
        if step is not None:
            self._change(step)

    def retire(self, applied: int) -> None:
        """Lead no longer, if the membership without this node is applied."""
        log = self._raft.log
        gone = self._raft.me not in log.membership.voters
        if self.leads and gone and applied >= log.membership_index:
            self._raft.retire()

    # --- handing over ---------------------------------------------------------------------------

    def transfer(self, to: int) -> None:
        """Begin to hand the leadership to a voter; given up after an election timeout."""
        raft = self._raft
        if to not in raft.log.membership.voters:
            raise RaftRefused(f"node {to:x} has no vote")
        if not self.leads:
            raise RaftDropped("this node does not lead")
        if to not in (raft.me, self.transferee):
            self.transferee, self._transfer_sent = to, False
            self._transfer_until = raft.now + self._election_ticks
            self._hand_over()

    def _hand_over(self) -> None:
        raft = self._raft
        if not self.transferee:
            return
        if not self.leads or raft.now > self._transfer_until:
            self.transferee = 0
        elif not self._transfer_sent and raft.matched(self.transferee) == raft.log.last_index:
            self._transfer_sent = True
            raft.tell_to_stand(self.transferee)
