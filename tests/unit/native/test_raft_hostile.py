"""What peers send that they should not: refused, without effect, never a panic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.native import RaftCore, RaftRefused, RaftStatus

from .raft_group import Group, group_of

MAX = (1 << 64) - 1


def number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def fields(**values: int | bytes | list[bytes]) -> bytes:
    """A message in the encoding that travels, from the fields' names."""
    places = {
        "kind": 1, "to": 2, "sender": 3, "term": 4, "log_term": 5, "index": 6, "entries": 7,
        "commit": 8, "snapshot": 9, "reject": 10, "hint": 11, "context": 12, "request": 13,
        "old_priority": 14, "commit_term": 15, "priority": 16,
    }  # fmt: skip
    out = b""
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bytes):
                out += number(places[name] << 3 | 2) + number(len(item)) + item
            else:
                out += number(places[name] << 3) + number(item)
    return out


def entry(term: int, index: int, data: bytes = b"", kind: int = 0) -> bytes:
    body = b"\x08" + number(kind) + b"\x10" + number(term) + b"\x18" + number(index)
    return body + (b"\x22" + number(len(data)) + data if data else b"")


def snapshot(index: int, term: int, conf: bytes) -> bytes:
    metadata = b"\x0a" + number(len(conf)) + conf + b"\x10" + number(index) + b"\x18" + number(term)
    return b"\x12" + number(len(metadata)) + metadata


def view(status: RaftStatus) -> tuple[object, ...]:
    return (
        status.term, status.vote, status.leader, status.role, status.commit, status.applied,
        status.last_index, status.conf, status.progress, status.uncommitted_bytes,
    )  # fmt: skip


@pytest.fixture(name="group")
def _group() -> Group:
    group = group_of(1, 2, 3)
    if group.leader() != 1:
        group.core(group.leader()).transfer(1)
        group.settle()
    for i in range(3):
        group.propose(f"{i}")
    group.run(3)
    return group


Maker = Callable[[RaftStatus], dict[str, int | bytes | list[bytes]]]

# What the leader (1) sends to node 2, made from node 2's state.
FROM_LEADER: dict[str, tuple[Maker, str]] = {
    "a commit index beyond the log": (
        lambda s: {"kind": 8, "term": s.term, "commit": s.last_index + 1},
        "committed which this node does not have",
    ),
    "the same of a later term": (
        lambda s: {"kind": 8, "term": s.term + 1, "commit": s.last_index + 1},
        "committed which this node does not have",
    ),
    "a term that uses up all terms": (lambda s: {"kind": 8, "term": MAX >> 2}, "too far ahead"),
    "a term beyond all": (lambda s: {"kind": 8, "term": MAX}, "too large"),
    "no term": (lambda s: {"kind": 8}, "term cannot be"),
    "entries after a place without a term": (
        lambda s: {"kind": 3, "term": s.term, "index": 99, "entries": [entry(s.term, 100)]},
        "follows on an entry that cannot be",
    ),
    "a gap between entries": (
        lambda s: {
            "kind": 3,
            "term": s.term,
            "index": s.last_index,
            "log_term": s.term,
            "entries": [entry(s.term, s.last_index + 1), entry(s.term, s.last_index + 3)],
        },
        "do not follow",
    ),
    "entries of a later term than the message": (
        lambda s: {
            "kind": 3,
            "term": s.term,
            "index": s.last_index,
            "log_term": s.term,
            "entries": [entry(s.term + 1, s.last_index + 1)],
        },
        "do not follow",
    ),
    "an entry whose change cannot be read": (
        lambda s: {
            "kind": 3,
            "term": s.term,
            "index": s.last_index,
            "log_term": s.term,
            "entries": [entry(s.term, s.last_index + 1, b"\x0b", kind=2)],
        },
        "malformed",
    ),
    "an entry of the old kind": (
        lambda s: {
            "kind": 3,
            "term": s.term,
            "index": s.last_index,
            "log_term": s.term,
            "entries": [entry(s.term, s.last_index + 1, b"", kind=1)],
        },
        "not used",
    ),
    "a snapshot without a configuration": (
        lambda s: {"kind": 7, "term": s.term, "snapshot": snapshot(99, s.term, b"")},
        "empty configuration",
    ),
    "a snapshot with an impossible configuration": (
        lambda s: {"kind": 7, "term": s.term, "snapshot": snapshot(99, s.term, b"\x08\x01" * 2)},
        "twice",
    ),
    "a snapshot from nowhere": (
        lambda s: {"kind": 7, "term": s.term, "snapshot": snapshot(0, 0, b"\x08\x01")},
        "place in the log",
    ),
    "a snapshot of another log": (
        lambda s: {"kind": 7, "term": s.term, "snapshot": snapshot(s.commit, 1, b"\x08\x02")},
        "not of this node's log",
    ),
    "a snapshot message without one": (lambda s: {"kind": 7, "term": s.term}, "do not agree"),
    "a heartbeat with a strange context": (
        lambda s: {"kind": 8, "term": s.term, "context": b"short"},
        "context",
    ),
    "a proposal": (
        lambda s: {"kind": 2, "term": s.term, "entries": []},
        "does not travel",
    ),
    "the command to stand for election": (lambda s: {"kind": 0, "term": s.term}, "does not travel"),
    "an answer to another's read": (
        lambda s: {"kind": 16, "term": s.term, "entries": [entry(0, 0, number(3) + bytes(8))]},
        "of another node",
    ),
    "an answer to no read": (lambda s: {"kind": 16, "term": s.term}, "cannot be"),
    "a field that is not used": (lambda s: {"kind": 8, "term": s.term, "priority": 1}, "not used"),
    "a request for a snapshot": (lambda s: {"kind": 4, "term": s.term, "request": 1}, "not used"),
}


@pytest.mark.parametrize("name", FROM_LEADER)
def test_a_leader_that_lies_is_refused(group: Group, name: str) -> None:
    make, match = FROM_LEADER[name]
    core = group.core(2)
    before = view(core.status())
    message = fields(to=2, sender=1, **make(core.status()))
    with pytest.raises(RaftRefused, match=match):
        core.step(1, message)
    assert view(core.status()) == before
    assert not core.has_ready()


def test_what_is_for_others_or_by_others_is_refused(group: Group) -> None:
    core = group.core(2)
    term = core.term
    for sender, message in (
        (3, fields(kind=8, to=2, sender=1, term=term)),
        (1, fields(kind=8, to=3, sender=1, term=term)),
        (1, fields(kind=8, sender=1, term=term)),
        (0, fields(kind=8, to=2, term=term)),
        (2, fields(kind=8, to=2, sender=2, term=term)),
    ):
        with pytest.raises(RaftRefused):
            core.step(sender, message)
    with pytest.raises(RaftRefused, match="another leader"):
        core.step(3, fields(kind=8, to=2, sender=3, term=term))
    with pytest.raises(RaftRefused, match="only the leader"):
        core.step(3, fields(kind=14, to=2, sender=3, term=term))
    # A stranger may have been voted in meanwhile: it is heard when its term is higher.
    core.step(9, fields(kind=8, to=2, sender=9, term=term + 1))
    assert core.leader == 9


def test_a_follower_that_lies_is_refused(group: Group) -> None:
    core = group.core(1)
    status = core.status()
    before = view(status)
    with pytest.raises(RaftRefused, match="do not exist"):
        core.step(2, fields(kind=4, to=1, sender=2, term=status.term, index=status.last_index + 1))
    read = [entry(0, 0, (3).to_bytes(8, "little") + b"x")]
    with pytest.raises(RaftRefused, match="another node"):
        core.step(2, fields(kind=15, to=1, sender=2, entries=read))
    with pytest.raises(RaftRefused, match="place in the log"):
        core.step(2, fields(kind=5, to=1, sender=2, term=status.term + 1, index=9, commit=10))
    with pytest.raises(RaftRefused, match="context"):
        core.step(2, fields(kind=5, to=1, sender=2, term=status.term + 1, context=b"now"))
    # Answers of somebody who is in no configuration mean nothing, whatever their term.
    core.step(9, fields(kind=4, to=1, sender=9, term=status.term + 5))
    # So does a request for votes while the leader is there.
    core.step(3, fields(kind=5, to=1, sender=3, term=status.term + 5))
    assert view(core.status()) == before


def test_reads_of_others_are_bounded(group: Group) -> None:
    core = group.core(1)
    group.cut = {(2, 1), (3, 1)}
    for i in range(3000):
        read = [entry(0, 0, (2).to_bytes(8, "little") + b"%d" % i)]
        core.step(2, fields(kind=15, to=1, sender=2, entries=read))
        group.hosts[1].pump()
        group.wire.clear()
    core.tick()


def test_a_vote_delivered_twice_counts_once() -> None:
    group = group_of(1, 2, 3, 4, 5)
    group.cut = {(a, b) for a in range(1, 6) for b in range(1, 6)}
    core = group.core(2)
    group.run(25)
    group.wire.clear()
    assert core.role == "precandidate"
    for _ in range(5):
        core.step(3, fields(kind=18, to=2, sender=3, term=core.term + 1))
    assert core.role == "precandidate"
    core.step(4, fields(kind=18, to=2, sender=4, term=core.term + 1))
    assert core.role == "candidate"


def test_an_answer_before_the_log_is_durable_elects_nobody(group: Group) -> None:
    core = group.core(2)
    status = core.status()
    core.step(
        1,
        fields(
            kind=3,
            to=2,
            sender=1,
            term=status.term,
            index=status.last_index,
            log_term=status.term,
            entries=[entry(status.term, status.last_index + 1, b"x")],
        ),
    )
    core.step(1, fields(kind=14, to=2, sender=1, term=status.term))
    assert core.role == "candidate"
    core.step(3, fields(kind=6, to=2, sender=3, term=core.term))
    assert core.role == "candidate"
    ready = core.ready()
    assert ready.messages == []
    assert {kind for _, kind, _ in ready.persisted_messages} == {"append_response", "vote"}
    core.advance()
    core.step(3, fields(kind=6, to=2, sender=3, term=core.term))
    assert core.role == "leader"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00",
        b"\x08",
        b"\x0b" * 100_000,
        b"\xa3\x01" * 100_000,
        b"\x3a\x00" * 100_000,
        b"\xff" * 11,
        bytes(1 << 20),
    ],
)
def test_noise_is_refused(group: Group, message: bytes) -> None:
    with pytest.raises(RaftRefused):
        group.core(2).step(1, message)


def captured() -> tuple[Group, list[tuple[int, int, str, bytes]]]:
    """A group with real messages of every kind."""
    group = Group(1, 2, 3, 4, seed=3)
    seen: list[tuple[int, int, str, bytes]] = []
    group.tap = lambda *message: seen.append(message)
    group.reconfigure([1, 2, 3], [4])
    for i in range(3):
        group.propose(f"command {i}")
    group.hosts[2].crash()
    group.propose("missed")
    group.hosts[group.leader()].compact()
    group.hosts[2].start()
    group.run(5)
    group.hosts[4].read()
    group.settle()
    group.core(group.leader()).transfer(next(n for n in (1, 2, 3) if n != group.leader()))
    group.settle()
    group.hosts[group.leader()].crash()
    group.run(30)
    for host in group.hosts.values():
        if host.core is None:
            host.start()
    group.run(30)
    return group, seen


GROUP, MESSAGES = captured()
SAMPLES = [
    message
    for kind in sorted(GROUP.kinds)
    for message in [m for m in MESSAGES if m[2] == kind][-12:]
]


def test_the_samples_have_every_kind() -> None:
    assert len({message[2] for message in SAMPLES}) == 12


def feed(messages: list[tuple[int, int, bytes]]) -> None:
    """Give messages to nodes started from the group's disks, and let these go on."""
    group = Group(1, 2, 3, 4)
    for host in group.hosts.values():
        disk = GROUP.hosts[host.id].disk
        host.disk.hard, host.disk.snapshot = disk.hard, disk.snapshot
        host.disk.entries = list(disk.entries)
        host.start()
    cores: dict[int, RaftCore] = {n: group.core(n) for n in group.hosts}
    group.run(12)
    for sender, to, data in messages:
        try:
            cores[to].step(sender, data)
        except RaftRefused:
            continue
        # What was taken was perhaps a lie that Raft cannot see through; but nothing may panic.
        while cores[to].has_ready():
            ready = cores[to].ready()
            light = cores[to].advance()
            for item in ready.committed + light.committed:
                if item.kind:
                    cores[to].apply_conf(item)
                cores[to].advance_apply(item.index)
            if cores[to].snapshot_wanted:
                cores[to].snapshot(cores[to].status().applied, b"[]")
    for core in cores.values():
        for _ in range(25):
            core.tick()
            while core.has_ready():
                core.ready()
                for item in core.advance().committed:
                    if item.kind:
                        core.apply_conf(item)
                    core.advance_apply(item.index)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bits_that_flip_never_cause_a_panic(data: st.DataObject) -> None:
    messages = []
    for _ in range(data.draw(st.integers(1, 6))):
        sender, to, _, message = data.draw(st.sampled_from(SAMPLES))
        changed = bytearray(message)
        for _ in range(data.draw(st.integers(0, 4))):
            place = data.draw(st.integers(0, len(changed) - 1))
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        messages.append((sender, to, bytes(changed)))
    feed(messages)


values = st.one_of(st.integers(0, 20), st.sampled_from([1 << 32, (1 << 62) - 1, 1 << 62, MAX]))
entries = st.lists(
    st.builds(
        entry,
        st.integers(0, 9),
        st.integers(0, 20),
        st.sampled_from([b"", b"x", b"\x12\x04\x08\x01\x10\x01", bytes(8) + b"x"]),
        st.integers(0, 3),
    ),
    max_size=3,
)
snapshots = st.builds(
    snapshot,
    values,
    st.integers(0, 9),
    st.sampled_from([b"", b"\x08\x01", b"\x08\x01\x08\x02\x10\x04", b"\x08\x01\x18\x02\x28\x01"]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 5),
            st.integers(1, 4),
            st.fixed_dictionaries(
                {"kind": st.integers(0, 18), "term": st.integers(0, 12)},
                optional={
                    "log_term": st.integers(0, 12),
                    "index": values,
                    "entries": entries,
                    "commit": values,
                    "snapshot": snapshots,
                    "reject": st.integers(0, 1),
                    "hint": values,
                    "context": st.sampled_from([b"", b"CampaignTransfer", bytes(12)]),
                    "commit_term": st.integers(0, 12),
                },
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_made_up_messages_never_cause_a_panic(
    made: list[tuple[int, int, dict[str, int | bytes | list[bytes]]]],
) -> None:
    feed([(sender, to, fields(to=to, sender=sender, **rest)) for sender, to, rest in made])
