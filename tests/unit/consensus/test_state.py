"""The state machine: every command with its refusals, golden files, and random histories."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.types import Digest, PeerId, Rank, Slice
from pyagent_node.consensus import state as state_module
from pyagent_node.consensus.checks import decode_command, encode_command
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    Command,
    ForgetModel,
    ModelRecord,
    RegisterModel,
    RemovePlacement,
    RevokeMember,
    SetPlacement,
)
from pyagent_node.consensus.state import (
    FORGET_BURNT_AFTER,
    SNAPSHOT_MAGIC,
    State,
    apply,
    check_invariants,
    decode_snapshot,
    encode_snapshot,
)

GOLDEN = Path(__file__).with_name("golden")
A, B, C = PeerId("12D3KooWA"), PeerId("12D3KooWB"), PeerId("12D3KooWC")
D1, D2 = Digest("1" * 64), Digest("2" * 64)


def record(digest: Digest = D1, name: str = "one", **changes: object) -> ModelRecord:
    plain = ModelRecord(digest, name, 1000, "llama", 4, 8, 32, 128, Digest("a" * 64), 5)
    return msgspec.structs.replace(plain, **changes)


def ranks(*cuts: int, peers: tuple[PeerId, ...] = (A, B, C)) -> tuple[Rank, ...]:
    return tuple(
        Rank(i, Slice(a, b, b == cuts[-1]), peers[i % len(peers)])
        for i, (a, b) in enumerate(itertools.pairwise(cuts))
    )


def place(after: int = 0, model: Digest = D1, *cuts: int) -> SetPlacement:
    return SetPlacement(model, ranks(*(cuts or (0, 2, 4))), 64, 2, after)


HISTORIES: dict[str, list[Command]] = {
    "admit_member": [
        AdmitMember(A, "ann", "voter", b"\x01"),
        AdmitMember(B, "bob", "learner", b"\x02"),
        AdmitMember(B, "bob", "voter", b"\x03"),
        AdmitMember(C, "ann", "client", b"\x04"),
    ],
    "revoke_member": [
        AdmitMember(A, "ann", "voter", b"\x01"),
        RevokeMember(B, "unknown"),
        RevokeMember(A, "stolen"),
        RevokeMember(A, "again"),
        AdmitMember(A, "ann", "voter", b"\x02"),
        AdmitMember(B, "ann", "voter", b"\x03"),
        RegisterModel(record()),
        place(),
    ],
    "burn_ticket": [
        BurnTicket("0" * 32, A, 1000, 10),
        BurnTicket("0" * 32, B, 1000, 11),
        BurnTicket("0" * 32, A, 1000, 12),
        BurnTicket("1" * 32, B, 9_000_000, 1000 + FORGET_BURNT_AFTER),
        BurnTicket("2" * 32, B, 9_000_000, 1001 + FORGET_BURNT_AFTER),
    ],
    "register_model": [
        RegisterModel(record()),
        RegisterModel(record(created=99)),
        RegisterModel(record(size=1001)),
        RegisterModel(record(name="another")),
        RegisterModel(record(D2)),
        RegisterModel(record(D2, "two")),
    ],
    "forget_model": [
        ForgetModel(D1),
        RegisterModel(record()),
        place(),
        ForgetModel(D1),
        RemovePlacement(D1, 1),
        ForgetModel(D1),
    ],
    "set_placement": [
        place(),
        RegisterModel(record()),
        place(),
        place(),
        place(1, D1, 0, 1, 2, 4),
        place(2, D1, 0, 2),
        place(2, D1, 0, 5),
        SetPlacement(D1, ranks(0, 2, 4)[:1], 64, 2, 2),
        RegisterModel(record(D2, "two")),
        place(0, D2, 0, 4),
        RemovePlacement(D1, 2),
        place(0, D1, 0, 4),
    ],
    "remove_placement": [
        RemovePlacement(D1, 0),
        RegisterModel(record()),
        RemovePlacement(D1, 0),
        place(),
        RemovePlacement(D1, 0),
        RemovePlacement(D1, 1),
    ],
    "malformed": [
        AdmitMember(A, "", "voter", b"\x01"),
        AdmitMember(PeerId(""), "x", "voter", b"\x01"),
        AdmitMember(A, "x", "king", b"\x01"),
        AdmitMember(A, "x", "voter", b""),
        AdmitMember(A, "two\nlines", "voter", b"\x01"),
        BurnTicket("xyz", A, 0),
        BurnTicket("0" * 32, A, -1),
        RegisterModel(record(Digest("short"))),
        RegisterModel(record(size=0)),
        SetPlacement(D1, (), 64, 1, 0),
        SetPlacement(D1, ranks(0, 4), 0, 1, 0),
        SetPlacement(D1, ranks(0, 4), 64, 1000, 0),
        SetPlacement(D1, (Rank(0, Slice(0, 4, True), A, (A,)),), 64, 1, 0),
    ],
}


def run(history: list[Command]) -> tuple[State, list[dict[str, object]]]:
    state = State()
    lines = []
    for command in history:
        state, error = apply(state, command)
        check_invariants(state)
        outcome = "applied" if error is None else f"{error.kind}: {error.code}"
        lines.append(
            {
                "command": json.loads(msgspec.json.encode(command)),
                "outcome": outcome,
                "state": json.loads(msgspec.json.encode(state)),
            }
        )
    return state, lines


@pytest.mark.parametrize("name", HISTORIES)
def test_golden(name: str) -> None:
    """Set UPDATE_GOLDEN to write the files anew, then read the difference."""
    path = GOLDEN / f"{name}.json"
    _, lines = run(HISTORIES[name])
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    assert json.loads(path.read_text()) == lines


def test_every_command_has_a_history() -> None:
    seen = {type(command) for history in HISTORIES.values() for command in history}
    assert seen == set(Command.__args__)


def test_golden_snapshot_loads() -> None:
    """A snapshot that version 1 wrote must load for ever, and give the same bytes again."""
    history = [
        *HISTORIES["admit_member"],
        *HISTORIES["burn_ticket"],
        *HISTORIES["set_placement"],
        RevokeMember(B, "lost"),
    ]
    state, _ = run(history)
    path = GOLDEN / "snapshot-v1.bin"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_bytes(encode_snapshot(state))
    assert decode_snapshot(path.read_bytes()) == state
    assert encode_snapshot(state) == path.read_bytes()


def test_apply_changes_nothing_it_is_given() -> None:
    state, _ = run(HISTORIES["set_placement"])
    before = encode_snapshot(state)
    for history in HISTORIES.values():
        for command in history:
            apply(state, command)
    assert encode_snapshot(state) == before


def test_refused_command_changes_only_the_index() -> None:
    state, _ = run(HISTORIES["admit_member"])
    after, error = apply(state, RevokeMember(C, "unknown"))
    assert error is not None
    assert after == msgspec.structs.replace(state, index=state.index + 1)


@pytest.mark.parametrize(
    ("constant", "make"),
    [
        ("MAX_MEMBERS", lambda n: AdmitMember(PeerId(f"p{n}"), f"n{n}", "client", b"c")),
        ("MAX_MODELS", lambda n: RegisterModel(record(Digest(f"{n:064x}"), f"m{n}"))),
        ("MAX_BURNT", lambda n: BurnTicket(f"{n:032x}", A, 10**9, 0)),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, constant: str, make: object) -> None:
    monkeypatch.setattr(state_module, constant, 3)
    assert callable(make)
    state = State()
    for n in range(3):
        state, error = apply(state, make(n))
        assert error is None
    state, error = apply(state, make(3))
    assert error is not None
    assert error.code == "state_full"
    _, error = apply(state, make(2))
    assert error is None


COMMANDS = st.one_of(
    st.builds(
        AdmitMember,
        st.sampled_from([A, B, C]),
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["voter", "learner", "client"]),
        st.just(b"c"),
    ),
    st.builds(RevokeMember, st.sampled_from([A, B, C]), st.just("r")),
    st.builds(
        BurnTicket,
        st.sampled_from(["0" * 32, "1" * 32]),
        st.sampled_from([A, B]),
        st.integers(0, 10),
        st.integers(0, 3 * FORGET_BURNT_AFTER),
    ),
    st.builds(
        RegisterModel, st.builds(record, st.sampled_from([D1, D2]), st.sampled_from(["a", "b"]))
    ),
    st.builds(ForgetModel, st.sampled_from([D1, D2])),
    st.builds(
        place,
        st.integers(0, 5),
        st.sampled_from([D1, D2]),
        st.just(0),
        st.integers(1, 3),
        st.integers(3, 5),
    ),
    st.builds(RemovePlacement, st.sampled_from([D1, D2]), st.integers(0, 5)),
)


@given(st.lists(COMMANDS, max_size=60))
def test_random_histories(history: list[Command]) -> None:
    state, again = State(), State()
    epochs: list[int] = []
    for given_command in history:
        command = given_command
        if valid(command):
            command = decode_command(encode_command(command))
        state, error = apply(state, command)
        again, _ = apply(decode_snapshot(encode_snapshot(again)), command)
        check_invariants(state)
        if error is None and isinstance(command, SetPlacement):
            epochs.append(state.placements[command.model].epoch)
    assert state.index == len(history)
    assert epochs == sorted(set(epochs))
    assert encode_snapshot(state) == encode_snapshot(again)


def valid(command: Command) -> bool:
    try:
        encode_command(command)
    except InvalidRequest:
        return False
    return True


@given(data=st.binary(max_size=300))
def test_garbage_is_no_command(data: bytes) -> None:
    with pytest.raises((CorruptData, Unsupported)):
        decode_command(data)


def test_unknown_and_oversized_commands_by_name() -> None:
    with pytest.raises(Unsupported, match="coup"):
        decode_command(msgspec.msgpack.encode({"type": "coup"}))
    with pytest.raises(LimitExceeded):
        decode_command(bytes(100_000))


@given(data=st.binary(max_size=300))
def test_garbage_is_no_snapshot(data: bytes) -> None:
    for candidate in (data, SNAPSHOT_MAGIC + data):
        with pytest.raises(CorruptData) as caught:
            decode_snapshot(candidate)
        assert caught.value.code == "bad_snapshot"


def test_snapshot_of_a_later_version_is_named() -> None:
    with pytest.raises(Unsupported) as caught:
        decode_snapshot(SNAPSHOT_MAGIC + msgspec.msgpack.encode({"version": 2, "new": 1}))
    assert caught.value.code == "snapshot_version"


def test_contradicting_snapshots_are_refused() -> None:
    state, _ = run(HISTORIES["set_placement"])
    for bad in (
        msgspec.structs.replace(state, last_epoch=0),
        msgspec.structs.replace(state, models={}),
        msgspec.structs.replace(state, index=0),
    ):
        with pytest.raises(CorruptData):
            decode_snapshot(encode_snapshot(bad))
