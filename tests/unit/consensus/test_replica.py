"""The deterministic core of an engine."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, PyAgentError, Unsupported
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus import replica as replica_module
from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.commands import BurnTicket, Command, ForgetModel
from pyagent_node.consensus.replica import NO_CHAIN, Record, Replica, decode_replica
from pyagent_node.consensus.segments import LogEntry

A = PeerId("a")


def burn(n: int) -> BurnTicket:
    return BurnTicket(f"{n:032x}", A, 100)


def record(n: int, command: Command) -> Record:
    return Record(n.to_bytes(16, "big"), A, encode_command(command))


def filled(count: int) -> tuple[Replica, list[LogEntry]]:
    replica, entries = Replica(), []
    for n in range(count):
        result = replica.propose(record(n, burn(n)), burn(n), 1)
        assert not isinstance(result, PyAgentError)
        entries.append(result[0])
    return replica, entries


def test_proposing_and_applying_lead_to_the_same() -> None:
    leader, entries = filled(20)
    follower = Replica()
    for entry in entries:
        follower.apply(entry)
    assert follower.state == leader.state
    assert follower.chain == leader.chain != NO_CHAIN
    assert follower.requests == leader.requests
    assert follower.encode() == leader.encode()


def test_refused_proposal_changes_nothing() -> None:
    replica, _ = filled(3)
    before = replica.encode()
    command = ForgetModel(Digest("0" * 64))
    result = replica.propose(record(9, command), command, 1)
    assert isinstance(result, PyAgentError)
    assert result.code == "model_not_found"
    assert replica.encode() == before


def test_refused_entry_of_a_log_is_applied_by_all_alike() -> None:
    entry = LogEntry(1, 1, msgspec.msgpack.encode(record(0, ForgetModel(Digest("0" * 64)))))
    replica = Replica()
    _, applied = replica.apply(entry)
    assert applied.error is not None
    assert replica.state.index == 1


def test_a_copy_is_independent() -> None:
    replica, _ = filled(2)
    before = replica.encode()
    draft = replica.copy()
    draft.propose(record(9, burn(9)), burn(9), 1)
    assert replica.encode() == before != draft.encode()


def test_bad_entries_change_nothing() -> None:
    replica, entries = filled(3)
    before = replica.encode()
    unknown = Record(bytes(16), A, msgspec.msgpack.encode({"type": "coup"}))
    cases: list[tuple[LogEntry, str]] = [
        (entries[2], "log_gap"),
        (LogEntry(9, 1, b""), "log_gap"),
        (LogEntry(4, 1, b"junk"), "bad_entry"),
        (LogEntry(4, 1, msgspec.msgpack.encode(Record(b"", A, b"junk"))), "malformed_message"),
        (LogEntry(4, 1, msgspec.msgpack.encode(unknown)), "unknown_command"),
    ]
    for entry, code in cases:
        with pytest.raises((CorruptData, Unsupported)) as caught:
            replica.apply(entry)
        assert caught.value.code == code
        assert replica.encode() == before
    assert "coup" in str(caught.value)


def test_chain_tells_logs_apart() -> None:
    _, entries = filled(3)
    chains = set()
    for last in (entries[2], msgspec.structs.replace(entries[2], term=2)):
        replica = Replica()
        for entry in (*entries[:2], last):
            replica.apply(entry)
        chains.add(replica.chain)
    assert len(chains) == 2


def test_only_so_many_requests_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "REMEMBERED_REQUESTS", 5)
    replica, _ = filled(9)
    assert list(replica.requests.values()) == [5, 6, 7, 8, 9]


def test_snapshot_round_trip() -> None:
    replica, _ = filled(9)
    again = decode_replica(replica.encode())
    assert again.encode() == replica.encode()
    assert list(again.requests) == list(replica.requests)


@given(data=st.binary(max_size=200))
def test_garbage_is_no_snapshot(data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        decode_replica(data)
    assert caught.value.code == "bad_snapshot"
