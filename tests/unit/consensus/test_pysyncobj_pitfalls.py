"""What PySyncObj 0.3.17 does wrong as shipped, shown on itself, and that the engine does not.

Each test first drives the class as shipped into the fault, so that it says when a later version
has mended it; then it does the same to the hardened core.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pysyncobj
import pysyncobj.journal
import pysyncobj.syncobj
import pysyncobj.transport
import pytest
from pysyncobj.node import Node

from pyagent_node.base.errors import ConfigError, Unsupported
from pyagent_node.consensus import pysyncobj_stock
from pyagent_node.consensus.pysyncobj_core import PySyncCore
from pyagent_node.consensus.pysyncobj_messages import (
    MESSAGES,
    NO_OP,
    REGULAR,
    Append,
    Entry,
    InstallSnapshot,
    Membership,
    Message,
    NextIndex,
    RequestVote,
    TimeoutNow,
    Vote,
    encode_membership,
)
from pyagent_node.consensus.pysyncobj_quiet import QuietSyncObj
from pyagent_node.consensus.pysyncobj_steps import Ready
from pyagent_node.consensus.pysyncobj_stock import stock
from pyagent_node.native import RaftConf, RaftEntry, RaftRefused

A, B, C = 1, 2, 3
NODES = {A: Node("a:1"), B: Node("b:1"), C: Node("c:1")}
MARK = "WHAT_A_PEER_SENT"


class Bomb:
    """Unpickling it runs what the sender wants: here it counts in an environment variable."""

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"import os; os.environ[{MARK!r}] = os.environ.get({MARK!r}, '') + '.'"
        return exec, (code,)


def ran() -> int:
    return len(os.environ.get(MARK, ""))


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of the class as shipped, which is a global of its module."""
    clock = Clock()
    monkeypatch.setattr(pysyncobj.syncobj, "monotonicTime", lambda: clock.now)
    monkeypatch.setenv(MARK, "")
    return clock


class Wire(pysyncobj.transport.Transport):  # type: ignore[misc]
    """Collects what a node as shipped sends."""

    ready = True

    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.sent: list[dict[str, Any]] = []

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.sent.append(message)
        return True


class Shipped(pysyncobj.SyncObj):  # type: ignore[misc]
    """Node A of three, as shipped but for its sockets."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.tries = 0
        conf = pysyncobj.SyncObjConf(autoTick=False, dynamicMembershipChange=True)
        self.wire = Wire()
        super().__init__(NODES[A], [NODES[B], NODES[C]], conf=conf, transport=self.wire)
        for node in (NODES[B], NODES[C]):
            self.wire._onNodeConnected(node)

    @pysyncobj.replicated
    def note(self, what: str) -> None:
        self.applied.append(what)

    @pysyncobj.replicated
    def refuse(self) -> None:
        self.tries += 1
        raise ValueError("this command cannot be applied")

    def hear(self, sender: int, **message: Any) -> None:
        self.wire._onMessageReceived(NODES[sender], message)

    def append(self, term: int, prev: tuple[int, int], entries: list[Any], commit: int) -> None:
        self.hear(
            B,
            type="append_entries",
            term=term,
            commit_index=commit,
            entries=entries,
            prevLogIdx=prev[0],
            prevLogTerm=prev[1],
        )

    @property
    def log(self) -> list[tuple[bytes, int, int]]:
        return list(self._SyncObj__raftLog[:])

    @property
    def leads(self) -> bool:
        return bool(self._isLeader())

    def elect(self, clock: Clock) -> None:
        clock.now += 10
        self.doTick(0.0)
        self.hear(B, type="response_vote", term=self._getTerm())
        assert self.leads


def command(*, refuse: bool = False, what: str = "") -> bytes:
    """Return what the class as shipped logs for a call of a replicated method."""
    return b"\x00" + pickle.dumps(1 if refuse else (0, (what,)), 2)


class Hard:
    """Node A of three, hardened; it starts after entry 1."""

    def __init__(
        self, entries: Sequence[RaftEntry] = (), *, term: int = 1, commit: int = 1
    ) -> None:
        self.core = PySyncCore(
            A,
            conf=RaftConf([A, B, C]),
            term=term,
            vote=0,
            commit=commit,
            snapshot_index=1,
            snapshot_term=1,
            snapshot_data=b"",
            entries=entries,
            heartbeat_ticks=2,
            election_ticks=10,
            max_message_bytes=1 << 16,
            max_inflight=16,
            max_uncommitted_bytes=1 << 20,
        )
        self.last = self.work_off()

    def work_off(self) -> list[tuple[int, Message]]:
        """Do what is to be done; returns what is sent."""
        sent: list[tuple[int, Message]] = []
        self.ready: list[Ready] = []
        while self.core.has_ready():
            ready = self.core.ready()
            self.ready.append(ready)
            assert {kind for _, kind, _ in ready.messages} <= {"append"}
            out = (*ready.messages, *ready.persisted_messages)
            sent += [(to, MESSAGES.decode(data)) for to, _, data in out]
            self.core.advance()
            for entry in ready.committed:
                if entry.kind == 1:
                    self.core.apply_conf(entry)
                self.core.advance_apply(entry.index)
        return sent

    def hear(self, sender: int, message: Message) -> list[tuple[int, Message]]:
        self.core.step(sender, MESSAGES.encode(message))
        self.last = self.work_off()
        return self.last

    def append(
        self, term: int, prev: tuple[int, int], entries: list[Entry], commit: int
    ) -> list[tuple[int, Message]]:
        return self.hear(B, Append(term, *prev, commit, 0, entries))

    def ticks(self, count: int) -> list[tuple[int, Message]]:
        sent = []
        for _ in range(count):
            self.core.tick()
            sent += self.work_off()
        return sent

    def elect(self) -> None:
        self.core.campaign()
        self.work_off()
        self.hear(B, Vote(self.core.term + 1, ask=True))
        self.hear(B, Vote(self.core.term, ask=False))
        assert self.core.role == "leader"

    @property
    def last_index(self) -> int:
        return self.core.status().last_index


def entry(index: int, term: int = 1, text: bytes = b"x") -> Entry:
    return Entry(index, term, REGULAR + text)


def kinds(sent: list[tuple[int, Message]]) -> set[type]:
    return {type(message) for _, message in sent}


def test_a_peer_that_sends_a_pickle_has_it_run(clock: Clock) -> None:
    node = Shipped()
    whole = {"type": "append_entries", "term": 1, "commit_index": 1, "prevLogIdx": 7}
    for part, data in (("start", pickle.dumps(Bomb())), ("finish", b"")):
        node.hear(B, **whole, prevLogTerm=0, transmission=part, data=data)
    assert ran() == 1

    hard = Hard()
    for data in (pickle.dumps(Bomb()), REGULAR + pickle.dumps(Bomb())):
        with pytest.raises(RaftRefused):
            hard.core.step(B, data)
    hard.append(1, (1, 1), [Entry(2, 1, REGULAR + pickle.dumps(Bomb()))], 2)
    for content in (b"\x02" + pickle.dumps(["add", Bomb()]), b"\x03" + pickle.dumps(Bomb())):
        with pytest.raises(RaftRefused):
            hard.append(1, (2, 1), [Entry(3, 1, content)], 2)
    assert ran() == 1


def test_a_pickled_command_and_membership_run_too(clock: Clock) -> None:
    node = Shipped()
    node.append(1, (1, 0), [(b"\x02" + pickle.dumps([Bomb(), "d:1"]), 2, 1)], 1)
    node.append(1, (2, 1), [(b"\x00" + pickle.dumps(Bomb()), 3, 1)], 3)
    with pytest.raises((TypeError, KeyError)):
        node.doTick(0.0)
    assert ran() >= 2


def test_every_way_to_pickle_is_closed() -> None:
    for name in ("loads", "dumps", "load", "dump", "to_bytes"):
        with pytest.raises(Unsupported, match=f"pickle.{name}"):
            getattr(stock().pickle, name)


def test_a_late_heartbeat_takes_acknowledged_entries_away(clock: Clock) -> None:
    node = Shipped()
    node.append(1, (1, 0), [], 1)
    node.append(1, (1, 0), [(b"\x01", 2, 1), (b"\x01", 3, 1)], 3)
    assert node.wire.sent[-1]["next_node_idx"] == 4
    node.append(1, (1, 0), [], 1)  # the first one again
    assert len(node.log) == 1

    hard = Hard()
    hard.append(1, (1, 1), [entry(2), entry(3)], 3)
    assert hard.append(1, (1, 1), [], 1) == [(B, NextIndex(1, 2, False, True, 0))]
    hard.append(1, (1, 1), [entry(2)], 1)
    assert hard.last_index == 3
    assert hard.core.status().commit == 3


def test_entries_that_are_committed_are_never_replaced() -> None:
    hard = Hard()
    hard.append(1, (1, 1), [entry(2), entry(3)], 2)
    for message in (
        Append(2, 1, 1, 3, 0, [entry(2, 2, b"another")]),
        Append(2, 2, 2, 3, 0, []),
        Append(1, 2, 1, 3, 0, [entry(3, 1, b"another of the same term")]),
    ):
        with pytest.raises(RaftRefused, match="another entry"):
            hard.hear(B, message)
    assert (hard.core.term, hard.last_index) == (1, 3)
    hard.append(2, (2, 1), [entry(3, 2)], 2)  # entry 3 was not committed
    assert hard.core.status().commit == 2


def test_a_vote_that_comes_twice_counts_twice(clock: Clock) -> None:
    conf = pysyncobj.SyncObjConf(autoTick=False)
    others = [Node(f"{n}:1") for n in "bcde"]
    wire = Wire()
    node = pysyncobj.SyncObj(NODES[A], others, conf=conf, transport=wire)
    wire._onNodeConnected(others[0])
    clock.now += 10
    node.doTick(0.0)
    for _ in range(2):
        wire._onMessageReceived(others[0], {"type": "response_vote", "term": 1})
    assert node._isLeader()  # with two of five

    hard = Hard()
    hard.core = PySyncCore(
        A,
        conf=RaftConf([1, 2, 3, 4, 5]),
        term=1,
        vote=0,
        commit=1,
        snapshot_index=1,
        snapshot_term=1,
        snapshot_data=b"",
        entries=[],
        heartbeat_ticks=2,
        election_ticks=10,
        max_message_bytes=1 << 16,
        max_inflight=16,
        max_uncommitted_bytes=1 << 20,
    )
    hard.core.campaign()
    for _ in range(3):
        hard.hear(B, Vote(2, ask=True))
    assert hard.core.term == 1
    hard.hear(C, Vote(2, ask=True))
    assert hard.core.role == "candidate"
    for _ in range(3):
        hard.hear(B, Vote(2, ask=False))
    with pytest.raises(RaftRefused, match="does not vote"):
        hard.hear(99, Vote(2, ask=False))
    assert hard.core.role == "candidate"
    hard.hear(C, Vote(2, ask=False))
    assert hard.core.role == "leader"


def test_a_command_that_raises_stops_everything_after_it(clock: Clock) -> None:
    node = Shipped()
    node.append(1, (1, 0), [(command(refuse=True), 2, 1), (command(what="next"), 3, 1)], 3)
    for _ in range(3):
        with pytest.raises(ValueError, match="cannot be applied"):
            node.doTick(0.0)
    assert node.tries == 3
    assert node.applied == []

    hard = Hard()
    hard.append(1, (1, 1), [entry(2), entry(3)], 3)
    assert [e.index for ready in hard.ready for e in ready.committed] == [2, 3]


def test_nothing_reaches_the_disk_before_it_is_acknowledged(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(pysyncobj.journal.ResizableFile, "flush", lambda self: synced.append(0))
    journal = pysyncobj.journal.FileJournal(str(tmp_path / "journal"))
    journal.add(b"\x01", 1, 0)
    journal.setCurrentTerm(3, "b:1")
    journal._destroy()
    assert synced == []

    hard = Hard()
    hard.append(1, (1, 1), [entry(2)], 1)
    (ready,) = hard.ready
    assert ready.must_sync
    assert [e.index for e in ready.entries] == [2]
    assert [kind for _, kind, _ in ready.persisted_messages] == ["append_response"]
    hard.hear(C, RequestVote(5, 9, 4, ask=False))
    (ready,) = hard.ready
    assert ready.must_sync
    assert ready.hard_state == (5, C, 1)


def test_a_node_that_is_cut_off_counts_its_term_up(clock: Clock) -> None:
    node = Shipped()
    for _ in range(20):
        clock.now += 10
        node.doTick(0.0)
    assert node._getTerm() == 20

    hard = Hard()
    assert kinds(hard.ticks(400)) == {RequestVote}
    assert hard.core.term == 1


def test_nobody_votes_against_a_leader_that_is_heard() -> None:
    hard = Hard()
    hard.ticks(1)
    hard.append(1, (1, 1), [], 1)
    assert hard.hear(C, RequestVote(2, 9, 1, ask=True)) == []
    hard.ticks(10)
    assert hard.hear(C, RequestVote(2, 9, 1, ask=True)) == [(C, Vote(2, ask=True))]
    assert hard.core.term == 1


def test_a_leader_of_the_past_never_hears_of_it(clock: Clock) -> None:
    node = Shipped()
    node._SyncObj__setCurrentTerm(7, None)
    node.append(1, (1, 0), [], 1)
    assert node.wire.sent == []

    hard = Hard(term=7)
    assert hard.append(1, (1, 1), [], 1) == [(B, NextIndex(7, 0, False, False, 0))]
    leader = Hard()
    leader.elect()
    leader.hear(B, NextIndex(7, 0, reset=False, success=False, round=0))
    assert (leader.core.role, leader.core.term) == ("follower", 7)


def test_an_acknowledgement_of_an_earlier_leadership_counts(clock: Clock) -> None:
    node = Shipped()
    node.elect(clock)
    node.append(2, (1, 0), [(b"\x01", 2, 2)], 1)  # another leads
    clock.now += 10
    node.doTick(0.0)
    node.hear(C, type="response_vote", term=node._getTerm())
    assert node.leads
    # B acknowledged entry 3 of term 1 to this node, long ago
    node.hear(B, type="next_node_idx", next_node_idx=4, reset=False, success=True)
    node.doTick(0.0)
    assert node.raftCommitIndex == 3  # which B does not have

    hard = Hard()
    hard.elect()
    late = NextIndex(hard.core.term, 3, reset=False, success=True, round=0)
    hard.append(5, (1, 1), [entry(2, 5)], 1)
    hard.ticks(40)
    hard.elect()
    hard.hear(B, late)
    assert hard.core.status().commit == 1


def test_a_node_may_acknowledge_more_than_there_is(clock: Clock) -> None:
    node = Shipped()
    node.elect(clock)
    node.hear(B, type="next_node_idx", next_node_idx=1000, reset=False, success=True)
    node.note("kept by nobody else")
    for _ in range(2):
        clock.now += 1
        node.doTick(0.0)
    assert node.applied == ["kept by nobody else"]

    hard = Hard()
    hard.elect()
    with pytest.raises(RaftRefused, match="acknowledged"):
        hard.hear(B, NextIndex(2, 1000, reset=False, success=True, round=0))
    assert hard.core.status().commit == 1


def test_what_was_never_compared_is_committed(clock: Clock) -> None:
    node = Shipped()
    node.append(1, (1, 0), [(b"\x00" + b"never committed", 2, 1)], 1)
    # a new leader has begun to send its snapshot, and says what is committed
    node.hear(C, type="append_entries", term=2, commit_index=5, serialized=(b"part", True, False))
    assert node.raftCommitIndex == 2

    hard = Hard()
    hard.append(1, (1, 1), [entry(2)], 1)
    hard.hear(C, Append(2, 1, 1, 5, 0, []))
    assert hard.core.status().commit == 1
    hard.hear(C, InstallSnapshot(2, 5, 2, 0, (A, B, C), (), b"state"))
    assert hard.core.status().commit == 5
    assert [ready.snapshot is not None for ready in hard.ready] == [True]


def test_a_snapshot_of_the_past_takes_nothing_away() -> None:
    hard = Hard()
    hard.append(1, (1, 1), [entry(2), entry(3), entry(4)], 2)
    hard.hear(B, InstallSnapshot(1, 3, 1, 0, (A, B, C), (), b"state"))
    assert hard.last_index == 4
    assert hard.core.status().commit == 3
    hard.hear(B, InstallSnapshot(1, 2, 1, 0, (A, B, C), (), b"state"))
    assert hard.core.status().commit == 3
    for bad in (((), ()), ((A, A), ()), ((B, A), ()), ((A,), (A,))):
        with pytest.raises(RaftRefused):
            hard.hear(B, InstallSnapshot(1, 9, 1, 0, *bad, b"state"))
    with pytest.raises(RaftRefused):
        hard.hear(B, InstallSnapshot(1, 9, 2, 0, (A, B, C), (), b"state"))
    assert hard.last_index == 4


def test_entries_on_their_way_are_sent_again_at_each_acknowledgement() -> None:
    hard = Hard()
    hard.elect()
    for _ in range(3):
        hard.core.propose(b"x" * 40_000)
    first = [m for to, m in hard.work_off() if to == B and isinstance(m, Append)]
    indices = [e.index for m in first for e in m.entries]
    assert indices == sorted(set(indices))
    again = hard.hear(B, NextIndex(2, indices[0] + 1, reset=False, success=True, round=0))
    assert not [m for _, m in again if isinstance(m, Append) and m.entries]


def test_it_draws_from_the_clock_and_generator_of_the_module() -> None:
    assert pysyncobj.SyncObjConf().useFork
    assert pysyncobj.SyncObjConf().autoTick
    names = ("monotonicTime", "random", "time", "pickle", "createPoller", "Serializer")
    for name in names:
        assert getattr(stock(), name) is not getattr(pysyncobj.syncobj, name)
    assert stock() not in sys.modules.values()
    state = random.getstate()
    logs = []
    for _ in range(2):
        hard = Hard()
        logs.append([(to, m) for to, m in hard.ticks(200)])
    assert logs[0] == logs[1]
    assert random.getstate() == state


def test_only_the_known_version_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pysyncobj_stock.importlib.metadata, "version", lambda name: "0.3.18")
    with pytest.raises(Unsupported) as caught:
        stock.__wrapped__()
    assert caught.value.code == "pysyncobj_version"


def test_no_name_of_the_library_is_taken_by_accident() -> None:
    ours = {name for kind in QuietSyncObj.__mro__[:1] for name in vars(kind)}
    theirs = set(dir(stock().SyncObj)) - set(dir(object))
    meant = {
        "_SyncObj__connectedToAnyone",
        "_SyncObj__applyLogEntries",
        "_SyncObj__tryLogCompaction",
        "_SyncObj__setState",
        "_SyncObj__onBecomeLeader",
        "_SyncObj__sendAppendEntries",
        "_checkCommandsToApply",
    }
    assert {name for name in ours & theirs if not name.endswith("__")} == meant


def test_a_timing_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        PySyncCore(
            A,
            conf=RaftConf([A]),
            term=1,
            vote=0,
            commit=1,
            snapshot_index=1,
            snapshot_term=1,
            snapshot_data=b"",
            entries=[],
            heartbeat_ticks=4,
            election_ticks=10,
            max_message_bytes=1 << 16,
            max_inflight=16,
            max_uncommitted_bytes=1 << 20,
        )
    assert caught.value.code == "bad_timing"


def test_messages_that_cannot_be_are_refused_and_change_nothing() -> None:
    hard = Hard()
    hard.append(1, (1, 1), [entry(2)], 1)
    before = hard.core.status()
    bad: list[Message] = [
        Append(1 << 61, 1, 1, 1, 0, []),
        RequestVote(1 << 40, 1, 1, ask=False),
        Append(2, 2, 1, 1, 0, [entry(9)]),
        Append(2, 2, 1, 1, 0, [entry(3, 3)]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, b"")]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, NO_OP + b"more")]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, REGULAR)]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, b"\x03version")]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, encode_membership(Membership((), (), (), ())))]),
        Append(2, 2, 1, 1, 0, [Entry(3, 1, encode_membership(Membership((A, A), (), (A,), ())))]),
        NextIndex(1, 1, False, True, 0),
    ]
    for message in bad[:-1]:
        with pytest.raises(RaftRefused):
            hard.hear(C, message)
    hard.hear(C, bad[-1])  # late, not false
    with pytest.raises(RaftRefused, match="does not lead"):
        hard.hear(C, Append(1, 2, 1, 2, 0, []))  # B leads term 1
    with pytest.raises(RaftRefused):
        hard.hear(A, Append(1, 2, 1, 2, 0, []))
    after = hard.core.status()
    assert (after.term, after.commit, after.last_index) == (
        before.term,
        before.commit,
        before.last_index,
    )


def test_only_the_leader_hands_over() -> None:
    hard = Hard()
    hard.append(1, (1, 1), [], 1)
    hard.hear(C, TimeoutNow(1))
    hard.ticks(1)
    assert hard.core.role == "follower"
    hard.hear(B, TimeoutNow(1))
    hard.ticks(1)
    assert hard.core.role == "candidate"
