"""Configurations of a Raft group and their changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.native import RaftConf, RaftCore, RaftDropped, RaftEntry, RaftRefused

from .raft_group import ELECTION, Group, group_of


def test_a_configuration_is_a_value() -> None:
    conf = RaftConf([3, 1], [9], [2, 1], [2], True)
    assert (conf.voters, conf.learners) == ((1, 3), (9,))
    assert (conf.voters_outgoing, conf.learners_next) == ((1, 2), (2,))
    assert conf.joint
    assert conf.auto_leave
    assert conf == RaftConf([1, 3], [9], [1, 2], [2], True) != RaftConf([1, 3], [9])
    assert hash(conf) == hash(RaftConf([1, 3], [9], [1, 2], [2], True))
    assert eval(repr(conf)) == conf
    assert RaftConf() == RaftConf([]) != RaftConf([1])
    assert RaftConf([1]) != 1


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        (([], [1]), "no voters"),
        (([1, 1],), "twice"),
        (([0],), "id 0"),
        (([1], [1]), "learner votes"),
        (([1], [2], [2]), "learner votes"),
        (([1], [], [], [2]), "learners_next"),
        (([1, 2], [], [2], [2]), "learners_next"),
        (([1], [], [], [], True), "auto_leave"),
        ((range(1, 600),), "512 nodes"),
    ],
)
def test_contradictions_are_refused(sets: tuple[list[int], ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RaftConf(*sets)  # type: ignore[arg-type]


ids = st.lists(st.integers(0, 6), max_size=4)


@given(ids, ids, ids, ids, st.booleans())
def test_every_configuration_that_is_made_can_be_started_from(
    voters: list[int], learners: list[int], outgoing: list[int], later: list[int], leave: bool
) -> None:
    try:
        conf = RaftConf(voters, learners, outgoing, later, leave)
    except ValueError:
        return
    core = RaftCore(
        1,
        conf=conf,
        term=1,
        vote=0,
        commit=1,
        snapshot_index=1,
        snapshot_term=1,
        snapshot_data=b"",
        entries=[],
        heartbeat_ticks=2,
        election_ticks=10,
        max_message_bytes=4096,
        max_inflight=8,
        max_uncommitted_bytes=8192,
    )
    assert core.status().conf == conf


def test_entries_are_values() -> None:
    entry = RaftEntry(5, 2, 0, b"data", b"context")
    assert entry == RaftEntry(5, 2, 0, b"data", b"context") != RaftEntry(5, 2, 0, b"data")
    assert hash(entry) == hash(RaftEntry(5, 2, 0, b"data", b"context"))
    assert entry != "entry"
    assert b"data".decode() not in repr(entry)
    with pytest.raises(ValueError, match="kind"):
        RaftEntry(1, 1, 2, b"")


def test_one_node_at_a_time() -> None:
    group = Group(1, 2, 3, 4, 5)
    for count in range(2, 6):
        group.reconfigure(range(1, count + 1))
        group.propose(f"{count} vote")
    for count in range(4, 1, -1):
        group.reconfigure(range(1, count + 1))
        group.propose(f"{count} vote")
    assert not any(conf.joint for conf in group.confs.values())
    assert [text for _, _, text in group.hosts[group.leader()].applied][-1] == "2 vote"


def test_all_at_once_by_joint_consensus() -> None:
    group = group_of(1, 2, 3)
    for node_id in (4, 5, 6):
        group.hosts[node_id] = type(group.hosts[1])(group, node_id)
        group.hosts[node_id].start()
    group.propose("before")
    group.reconfigure([4, 5, 6], [1])
    assert any(conf.joint and conf.auto_leave for conf in group.confs.values())
    assert group.leader() in (4, 5, 6)
    group.propose("after")
    group.until(lambda: group.hosts[1].applied == group.hosts[4].applied)
    assert [text for _, _, text in group.hosts[6].applied] == ["before", "after"]


def test_the_end_of_a_joint_change_does_not_wait_for_a_heartbeat() -> None:
    group = Group(1, 2, 3)
    group.leader()
    group.reconfigure([1, 2, 3])
    core = group.core(group.leader())
    core.propose_conf([1, 2], [3])
    core.propose(b"x")
    group.settle()
    assert all(not group.status(n).conf.joint for n in (1, 2))


def test_a_joint_change_needs_both_majorities() -> None:
    group = Group(1, 2, 3, 4, 5)
    group.leader()
    group.reconfigure([1, 2, 3], [4, 5])
    leader = group.leader()
    others = {1, 2, 3} - {leader}
    # Old and new majorities: the leader alone is none of the old one.
    group.cut = {pair for n in others for pair in ((leader, n), (n, leader))}
    group.core(leader).propose_conf([leader, 4, 5], [])
    before = group.committed
    group.settle()
    assert group.committed == before
    group.cut.clear()
    group.until(lambda: group.status(group.leader()).conf == RaftConf([leader, 4, 5]))


def test_a_leader_that_was_removed_steps_down_and_hands_over() -> None:
    for rest, learners in (([2, 3], []), ([2, 3], [1])):
        group = group_of(1, 2, 3)
        if group.leader() != 1:
            group.core(group.leader()).transfer(1)
            group.settle()
        term = group.core(1).term
        group.core(1).propose_conf(rest, learners)
        group.run(2)
        assert group.core(1).role == "learner"
        # Without waiting for an election timeout.
        leader = group.leader()
        assert leader in rest
        assert group.core(leader).term == term + 1
        group.run(3 * ELECTION)
        assert group.leader() == leader
        group.propose("goes on")


def test_a_node_that_was_removed_keeps_quiet() -> None:
    group = group_of(1, 2, 3)
    leader = group.leader()
    gone = next(n for n in (1, 2, 3) if n != leader)
    group.cut = {(leader, gone)}
    group.core(leader).propose_conf(sorted({1, 2, 3} - {gone}), [])
    term = group.core(leader).term
    group.run(5 * ELECTION)
    # It does not know that it was removed, stands for election and is not heard.
    assert group.core(gone).role == "precandidate"
    assert (group.leader(), group.core(leader).term) == (leader, term)


def test_one_change_at_a_time() -> None:
    group = group_of(1, 2)
    leader = group.leader()
    core = group.core(leader)
    assert core.propose_conf([1, 2], []) is None
    assert core.propose_conf([1, 2], [3]) is not None
    assert core.status().pending_conf
    with pytest.raises(RaftDropped, match="under way"):
        core.propose_conf([1, 2], [4])
    group.settle()
    with pytest.raises(RaftDropped, match="not the leader"):
        group.core(3 - leader).propose_conf([1], [])


@pytest.mark.parametrize(
    ("voters", "learners", "match"),
    [
        ([], [1], "must be a voter"),
        ([1], [1], "as a voter and as a learner"),
        ([0, 1], [], "id 0"),
        ([1, 1], [], "twice"),
        ([1], range(2, 300), "at most 256"),
    ],
)
def test_impossible_configurations_are_not_proposed(
    voters: list[int], learners: list[int], match: str
) -> None:
    group = Group(1)
    group.leader()
    with pytest.raises(RaftRefused, match=match):
        group.core(1).propose_conf(voters, learners)


def test_an_impossible_change_in_the_log_changes_nothing() -> None:
    # Such an entry is never proposed; a log that has one must not stop anybody.
    group = Group(1)
    host = group.hosts[1]
    leave = RaftEntry(2, 1, 1, b"")
    remove_all = RaftEntry(3, 1, 1, bytes([0x12, 4, 8, 1, 16, 1]))
    host.disk.entries, host.disk.hard = [leave, remove_all], (1, 0, 3)
    core = host.start()
    host.pump()
    assert core.status().conf == RaftConf([1])
    assert [line for level, line in core.take_log() if level == "warning"] == [
        "the change of the configuration in entry 2 is impossible: can't leave a non-joint config",
        "the change of the configuration in entry 3 is impossible: removed all voters",
    ]
    assert group.leader() == 1


def test_a_newcomer_gets_a_snapshot_that_knows_it() -> None:
    group = group_of(1)
    for i in range(5):
        group.propose(f"command {i}")
    group.hosts[1].compact()
    group.propose("later")
    group.hosts[2] = type(group.hosts[1])(group, 2)
    group.hosts[2].start()
    group.core(1).propose_conf([1], [2])
    group.until(group.same)
    assert len(group.hosts[2].applied) == 6
    assert group.hosts[2].disk.snapshot[2] == RaftConf([1], [2])


def test_a_change_that_a_snapshot_overtook_is_not_applied_over_it() -> None:
    group = group_of(1, 2)
    if group.leader() != 1:
        group.core(2).transfer(1)
        group.settle()
    core, other = group.core(1), group.core(2)
    core.propose_conf([1, 2], [3])
    group.hosts[1].pump()
    kept, group.wire = group.wire, []
    for sender, to, _, data in kept:
        if to == 2:
            other.step(sender, data)
    # Node 2 is told that the change is committed and does not come round to applying it.
    ready = other.ready()
    answers = [(2, *m) for m in ready.messages + ready.persisted_messages]
    other.advance()
    for answer in answers:
        group.deliver(answer)
    group.hosts[1].pump()
    for sender, to, _, data in group.wire:
        if to == 2:
            other.step(sender, data)
    ready = other.ready()
    (change,) = ready.committed + other.advance().committed
    conf = bytes([8, 1, 8, 2, 16, 4])
    index = change.index + 5
    metadata = bytes([10, len(conf), *conf, 16, index, 24, core.term])
    content = bytes([18, len(metadata), *metadata])
    head = bytes([8, 7, 16, 2, 24, 1, 32, core.term, 74, len(content)])
    other.step(1, head + content)
    assert other.apply_conf(change) == RaftConf([1, 2], [4])
    other.advance_apply(change.index)
    ready = other.ready()
    assert ready.snapshot == (index, core.term, RaftConf([1, 2], [4]), b"")
    other.advance()
    assert other.status().applied == index
    assert other.status().conf == RaftConf([1, 2], [4])
