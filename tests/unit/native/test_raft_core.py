"""What a group of Raft cores does: elections, replication, reads, restarts, snapshots."""

from __future__ import annotations

import pytest

from pyagent_node.native import RaftConf, RaftCore, RaftDropped, RaftEntry, RaftRefused

from .raft_group import ELECTION, Crashed, Group, group_of


def test_a_founder_leads_alone() -> None:
    group = Group(7)
    assert group.leader() == 7
    index = group.propose("first")
    assert group.hosts[7].applied == [(index, 2, "first")]
    status = group.status(7)
    assert (status.role, status.leader, status.vote) == ("leader", 7, 7)
    assert status.commit == status.applied == status.last_index == index
    assert status.conf == RaftConf([7])
    assert status.progress == [(7, index, True, "replicate")]


def test_a_node_in_no_configuration_waits() -> None:
    group = Group(1, 2)
    group.run(100)
    status = group.status(2)
    assert (status.role, status.term, status.leader) == ("learner", 0, 0)
    with pytest.raises(RaftDropped, match="no leader"):
        group.core(2).read_index(b"1")
    with pytest.raises(RaftDropped, match="not the leader"):
        group.core(2).propose(b"1")
    group.core(2).campaign()
    assert not group.core(2).has_ready()


def test_voters_and_learners_hold_the_same_log() -> None:
    group = group_of(1, 2, 3, learners=[4])
    for i in range(50):
        group.propose(f"command {i}")
    group.run(5)
    assert group.same()
    assert [text for _, _, text in group.hosts[4].applied] == [f"command {i}" for i in range(50)]
    assert group.status(4).role == "learner"
    with pytest.raises(RaftDropped, match="not the leader"):
        group.core(4).propose(b"x")


def test_another_leads_when_the_leader_is_gone_and_nothing_is_lost() -> None:
    group = group_of(1, 2, 3)
    group.propose("kept")
    old = group.leader()
    group.hosts[old].crash()
    new = group.leader()
    assert new != old
    group.propose("more")
    group.hosts[old].start()
    group.until(group.same)
    assert [text for _, _, text in group.hosts[old].applied] == ["kept", "more"]


def test_an_election_takes_less_than_two_timeouts() -> None:
    group = group_of(1, 2, 3)
    group.hosts[group.leader()].crash()
    group.run(2 * ELECTION)
    roles = [host.core.role for host in group.hosts.values() if host.core is not None]
    assert roles.count("leader") == 1


def test_a_cut_off_leader_steps_down_and_its_proposals_are_lost_for_good() -> None:
    group = group_of(1, 2, 3)
    old = group.leader()
    group.cut = {pair for n in (1, 2, 3) if n != old for pair in ((old, n), (n, old))}
    lost, term = group.core(old).propose(b"lost")
    group.run(3 * ELECTION)
    assert group.core(old).role != "leader"
    new = group.leader()
    index, new_term = group.core(new).propose(b"kept")
    assert new_term > term
    group.settle()
    group.cut.clear()
    group.until(group.same)
    assert "lost" not in {text for _, _, text in group.hosts[new].applied}
    assert group.log[lost].data != b"lost"
    assert group.log[index].data == b"kept"


def test_a_node_that_was_cut_off_does_not_disturb_when_it_is_back() -> None:
    group = group_of(1, 2, 3)
    leader = group.leader()
    other = next(n for n in (1, 2, 3) if n != leader)
    group.cut = {pair for n in (1, 2, 3) if n != other for pair in ((other, n), (n, other))}
    term = group.core(leader).term
    group.run(10 * ELECTION)
    assert group.core(other).role == "precandidate"
    group.cut.clear()
    group.run(3 * ELECTION)
    assert group.leader() == leader
    assert {group.core(n).term for n in (1, 2, 3)} == {term}


def test_leadership_is_handed_over() -> None:
    group = group_of(1, 2, 3, learners=[4])
    leader = group.leader()
    to = next(n for n in (1, 2, 3) if n != leader)
    group.core(leader).transfer(to)
    assert group.status(leader).transferee == to
    with pytest.raises(RaftDropped, match="handed over"):
        group.core(leader).propose(b"x")
    group.settle()
    assert group.core(to).role == "leader"
    with pytest.raises(RaftRefused, match="no voter"):
        group.core(to).transfer(4)
    with pytest.raises(RaftDropped, match="not the leader"):
        group.core(leader).transfer(to)


@pytest.mark.parametrize("reader", [1, 2, 4])
def test_reads_see_what_was_committed_before(reader: int) -> None:
    group = group_of(1, 2, 3, learners=[4])
    group.propose("seen")
    host = group.hosts[reader]
    host.read()
    group.settle()
    assert not host.reads


def test_a_cut_off_leader_answers_no_reads() -> None:
    group = group_of(1, 2, 3)
    old = group.leader()
    group.cut = {pair for n in (1, 2, 3) if n != old for pair in ((old, n), (n, old))}
    context = group.hosts[old].read()
    group.run(5 * ELECTION)
    assert context in group.hosts[old].reads


def test_a_new_leader_answers_reads_only_after_its_first_commit() -> None:
    group = Group(1)
    core = group.core(1)
    core.campaign()
    with pytest.raises(RaftDropped, match="just become"):
        core.read_index(b"1")
    group.settle()
    group.hosts[1].read()
    group.settle()
    assert not group.hosts[1].reads


@pytest.mark.parametrize("context", [b"", b"x" * 65])
def test_contexts_of_reads_have_a_length(context: bytes) -> None:
    group = Group(1)
    group.leader()
    with pytest.raises(RaftRefused, match="1 to 64"):
        group.core(1).read_index(context)


@pytest.mark.parametrize("point", ["before the write", "after the write", "before advance"])
def test_a_crash_at_any_point_loses_nothing_that_was_acknowledged(point: str) -> None:
    group = group_of(1, 2, 3)
    for i in range(12):
        leader = group.leader()
        victim = group.hosts[(leader, leader % 3 + 1)[i % 2]]
        index = group.propose(f"command {i}")
        assert group.log[index].data == f"command {i}".encode()
        victim.crash_at = point
        group.core(leader).propose(b"perhaps")
        while True:
            try:
                group.settle()
                break
            except Crashed:
                continue
        victim.start()
        group.until(group.same)
    texts = [text for _, _, text in group.hosts[1].applied if text != "perhaps"]
    assert texts == [f"command {i}" for i in range(12)]


def test_a_node_far_behind_gets_a_snapshot() -> None:
    group = group_of(1, 2, 3)
    leader = group.leader()
    slow = next(n for n in (1, 2, 3) if n != leader)
    group.hosts[slow].crash()
    for i in range(20):
        group.propose(f"command {i}")
    group.hosts[leader].compact()
    assert group.status(leader).first_index == group.status(leader).applied + 1
    group.propose("after")
    group.kinds.clear()
    group.hosts[slow].start()
    group.until(group.same)
    assert "snapshot" in group.kinds
    assert group.hosts[slow].disk.snapshot[0] > 1
    # Everybody can start from what is on disk.
    for host in group.hosts.values():
        host.start()
    group.until(group.same)
    assert group.hosts[slow].applied[-1][2] == "after"


def test_a_snapshot_that_was_lost_is_sent_again() -> None:
    group = group_of(1, 2)
    group.hosts[3] = newcomer = type(group.hosts[1])(group, 3)
    newcomer.start()
    group.cut = {(n, 3) for n in (1, 2)}
    group.core(group.leader()).propose_conf([1, 2], [3])
    group.run(10)
    assert newcomer.applied == []
    group.cut.clear()
    group.propose("heard")
    group.until(group.same)


def test_the_newest_snapshot_is_kept_and_the_log_begins_after_it() -> None:
    group = group_of(1)
    core = group.core(1)
    index = group.propose("x")
    group.propose("y")
    assert core.snapshot(index, b"state") == (index, 2, RaftConf([1]), b"state")
    core.compact(index)
    assert core.status().first_index == index + 1
    core.compact(1)
    for bad in (0, index - 1, index + 2):
        with pytest.raises(ValueError, match="must lie between"):
            core.snapshot(bad, b"")
    with pytest.raises(ValueError, match="last snapshot"):
        core.compact(index + 1)


def test_an_old_snapshot_has_its_own_configuration() -> None:
    group = group_of(1, 2)
    index = group.status(group.leader()).applied
    group.reconfigure([1], [2])
    core = group.core(group.leader())
    assert core.snapshot(index, b"")[2] == RaftConf([1, 2])
    assert core.snapshot(core.status().applied, b"")[2] == RaftConf([1], [2])


def test_too_much_uncommitted_is_dropped_and_taken_later() -> None:
    group = group_of(1, 2, 3)
    leader = group.leader()
    core = group.core(leader)
    for _ in range(4):
        core.propose(b"x" * 4096)
    with pytest.raises(RaftDropped, match="no room"):
        core.propose(b"x")
    assert core.status().uncommitted_bytes == 4 * 4096
    group.settle()
    core.propose(b"x")
    assert core.status().uncommitted_bytes == 1


def test_messages_are_no_larger_than_asked_for() -> None:
    group = group_of(1, 2)
    leader = group.leader()
    group.cut = {(1, 2), (2, 1)}
    for _ in range(16):
        group.core(leader).propose(b"x" * 900)
    group.settle()
    group.cut.clear()
    sizes: list[int] = []
    group.tap = lambda _sender, _to, kind, data: sizes.append(len(data))
    group.run(5)
    assert group.hosts[3 - leader].applied == group.hosts[leader].applied != []
    assert 3000 < max(sizes) < 4096 + 500


def test_proposals_between_two_readies_share_a_message_and_a_write() -> None:
    group = group_of(1, 2)
    leader = group.leader()
    core = group.core(leader)
    for i in range(10):
        core.propose(b"%d" % i)
    ready = core.ready()
    assert [entry.data for entry in ready.entries] == [b"%d" % i for i in range(10)]
    assert ready.must_sync
    assert [(to, kind) for to, kind, _ in ready.messages] == [(3 - leader, "append")]


@pytest.mark.parametrize(("data", "match"), [(b"", "empty"), (b"x" * 5000, "at most 4096")])
def test_proposals_have_a_size(data: bytes, match: str) -> None:
    group = Group(1)
    group.leader()
    with pytest.raises(RaftRefused, match=match):
        group.core(1).propose(data)


def test_calls_out_of_order_are_refused() -> None:
    group = Group(1)
    core = group.core(1)
    with pytest.raises(RuntimeError, match="before advance"):
        core.advance()
    core.campaign()
    core.ready()
    for call in (core.tick, core.campaign, core.ready, lambda: core.propose(b"x")):
        with pytest.raises(RuntimeError, match="must follow"):
            call()
    assert not core.has_ready()
    core.advance()
    with pytest.raises(ValueError, match="handed out"):
        core.advance_apply(100)
    with pytest.raises(ValueError, match="not due"):
        core.apply_conf(RaftEntry(2, 2, 1, b""))
    with pytest.raises(ValueError, match="between 10 and 19"):
        core.set_election_ticks(9)


def test_a_change_of_the_configuration_must_be_applied() -> None:
    group = Group(1)
    group.leader()
    core = group.core(1)
    index, _ = core.propose_conf([1], [2]) or (0, 0)
    core.ready()
    entry = core.advance().committed[0]
    with pytest.raises(ValueError, match="apply_conf"):
        core.advance_apply(index)
    with pytest.raises(ValueError, match="not due"):
        core.apply_conf(RaftEntry(index, 1, 1, b""))
    assert core.apply_conf(entry) == RaftConf([1], [2])
    core.advance_apply(index)


def test_the_leader_knows_who_is_there() -> None:
    group = group_of(1, 2, learners=[3])
    leader = group.leader()

    def active() -> list[int]:
        return [peer for peer, _, heard, _ in group.status(leader).progress if heard]

    group.run(5)
    for _ in range(3 * ELECTION):
        group.run()
        assert active() == [1, 2, 3]
    group.hosts[3].crash()
    group.run(ELECTION + 3)
    assert active() == [1, 2]


def test_two_runs_are_the_same() -> None:
    def record() -> list[tuple[int, int, str, bytes]]:
        group = Group(1, 2, 3, seed=5)
        seen: list[tuple[int, int, str, bytes]] = []
        group.tap = lambda *message: seen.append(message)
        group.reconfigure([1, 2, 3])
        for i in range(5):
            group.propose(f"{i}")
            group.hosts[group.leader()].crash()
            group.run(ELECTION)
            for host in group.hosts.values():
                if host.core is None:
                    host.start()
        return seen

    assert record() == record()


def test_the_log_lines_can_be_taken() -> None:
    group = Group(1)
    group.leader()
    lines = group.core(1).take_log()
    assert ("info", "became leader at term 2 term=2") in lines
    assert group.core(1).take_log() == []


GOOD = {
    "conf": RaftConf([1]),
    "term": 2,
    "vote": 1,
    "commit": 2,
    "snapshot_index": 1,
    "snapshot_term": 1,
    "snapshot_data": b"",
    "entries": [RaftEntry(2, 2, 0, b""), RaftEntry(3, 2, 0, b"x")],
    "heartbeat_ticks": 2,
    "election_ticks": 10,
    "max_message_bytes": 4096,
    "max_inflight": 8,
    "max_uncommitted_bytes": 8192,
}


def test_a_node_starts_from_what_it_kept() -> None:
    core = RaftCore(1, **GOOD)  # type: ignore[arg-type]
    ready = core.ready()
    assert [entry.index for entry in ready.committed] == [2]
    assert (ready.entries, ready.hard_state, ready.snapshot) == ([], None, None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"term": 1}, "term is below"),
        ({"commit": 4}, "entries are missing"),
        ({"snapshot_index": 2}, "do not follow"),
        ({"snapshot_term": 0}, "0 together"),
        ({"entries": [RaftEntry(3, 2, 0, b"")]}, "do not follow"),
        ({"entries": [RaftEntry(2, 2, 0, b""), RaftEntry(3, 1, 0, b"")]}, "do not follow"),
        ({"entries": [RaftEntry(2, 2, 1, b"\x0b")]}, "malformed"),
        ({"heartbeat_ticks": 0}, "election_ticks"),
        ({"election_ticks": 2}, "election_ticks"),
        ({"max_inflight": 0}, "max_inflight"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
        ({"max_uncommitted_bytes": 10}, "max_uncommitted_bytes"),
        ({"snapshot_index": 1 << 63}, "too large"),
    ],
)
def test_what_contradicts_itself_is_no_start(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RaftCore(1, **(GOOD | changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="node_id"):
        RaftCore(0, **GOOD)  # type: ignore[arg-type]
