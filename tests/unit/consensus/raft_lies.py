"""What a node may say in Raft's words that it has no right to say."""

from __future__ import annotations

from collections.abc import Sequence

from pyagent_node.consensus.raft_core import Core, Kind
from pyagent_node.native import RaftConf


def core_of(
    kind: Kind, node_id: int, voters: Sequence[int], term: int, learners: Sequence[int] = ()
) -> Core:
    return kind.new_core(
        node_id,
        conf=RaftConf(voters, learners),
        term=term,
        vote=0,
        commit=1,
        snapshot_index=1,
        snapshot_term=1,
        snapshot_data=b"",
        entries=[],
        heartbeat_ticks=1,
        election_ticks=5,
        max_message_bytes=1 << 20,
        max_inflight=16,
        max_uncommitted_bytes=1 << 20,
    )


def drain(core: Core) -> list[tuple[int, bytes]]:
    """Do what a core has to do, and return what it sends."""
    messages = []
    while core.has_ready():
        ready = core.ready()
        light = core.advance()
        for entry in (*ready.committed, *light.committed):
            if entry.kind == 1:
                core.apply_conf(entry)
            core.advance_apply(entry.index)
        sent = (*ready.messages, *ready.persisted_messages, *light.messages)
        messages += [(to, data) for to, _, data in sent]
    return messages


def orders(kind: Kind, liar: int, victim: int, term: int, forged: bytes) -> list[bytes]:
    """Return what a node says to another one as its leader in a term after ``term``."""
    core = core_of(kind, liar, [liar], term)
    core.campaign()
    drain(core)
    assert core.role == "leader"
    core.propose(forged)
    core.propose_conf([liar], [victim])
    said = []
    for _ in range(10):
        said += [data for to, data in drain(core) if to == victim]
        core.tick()
    assert said
    return said


def candidacies(kind: Kind, liar: int, victim: int, term: int) -> list[bytes]:
    """Return the questions before an election, and those of one."""
    core = core_of(kind, liar, [liar, victim], term)
    core.campaign()
    asked = [data for _, data in drain(core)]
    friend = core_of(kind, victim, [liar, victim], term)
    for data in asked:
        friend.step(liar, data)
    for _, data in drain(friend):
        core.step(victim, data)
    asked += [data for _, data in drain(core)]
    assert len(asked) > 1
    return asked


def answers(kind: Kind, liar: int, leader: int, term: int) -> list[bytes]:
    """Return what a follower in a later term answers the leader of ``term``."""
    core = core_of(kind, liar, [leader], term + 7, [liar])
    said = []
    for data in orders(kind, leader, liar, term, b"x"):
        core.step(leader, data)
        said += [answer for _, answer in drain(core)]
    assert said
    return said
