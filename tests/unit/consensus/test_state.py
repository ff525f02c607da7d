"""The state machine: every command with its refusals, golden files, and random histories."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.types import Digest, Drafting, PeerId, Rank, SessionId, Slice
from pyagent_node.consensus import member_changes, model_changes, session_changes
from pyagent_node.consensus.checks import decode_command, encode_command
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    Checkpoint,
    ClaimSession,
    Command,
    DropCheckpoints,
    ForgetModel,
    ModelRecord,
    PutCheckpoints,
    RegisterModel,
    RemoveMember,
    RemovePlacement,
    RevokeMember,
    SetBuckets,
    SetDrafting,
    SetDraining,
    SetMeshSetting,
    SetPlacement,
    SetStandbys,
    SetVote,
)
from pyagent_node.consensus.member_changes import FORGET_BURNT_AFTER
from pyagent_node.consensus.settings import MESH_SETTINGS
from pyagent_node.consensus.snapshots import SNAPSHOT_MAGIC, SNAPSHOT_VERSION
from pyagent_node.consensus.state import (
    State,
    apply,
    check_invariants,
    decode_snapshot,
    encode_snapshot,
)

GOLDEN = Path(__file__).with_name("golden")
A, B, C = PeerId("12D3KooWA"), PeerId("12D3KooWB"), PeerId("12D3KooWC")
D1, D2 = Digest("1" * 64), Digest("2" * 64)
S1, S2, S3 = (SessionId(c * 32) for c in "123")


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


def checkpoint(session: SessionId = S1, head: PeerId = A, **changes: object) -> Checkpoint:
    plain = Checkpoint(session, D1, head, 100, (B, C), 1000, (b"key",))
    return msgspec.structs.replace(plain, **changes)


ADMIT_ALL: list[Command] = [
    AdmitMember(A, "ann", "voter", b"\x01", 10),
    AdmitMember(B, "bob", "learner", b"\x02", 10),
    AdmitMember(C, "cat", "client", b"\x03", 10),
]

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
    "set_standbys": [
        SetStandbys(D1, ((B,), (A,)), ((C,), ()), 1),
        *ADMIT_ALL,
        RegisterModel(record()),
        place(),
        SetStandbys(D1, ((B,), (A,)), ((C,), ()), 0),
        SetStandbys(D1, ((B,), (A,)), ((C,), ()), 2),
        SetStandbys(D1, ((B,), (A,)), ((C,), ()), 1),
        SetStandbys(D1, ((B,),), ((),), 1),
        SetStandbys(D1, ((A,), ()), ((), ()), 1),
        SetStandbys(D1, ((B,), ()), ((B,), ()), 1),
        SetDraining(C, True),
        SetStandbys(D1, ((B,), (A,)), ((C,), (C,)), 1),
        SetStandbys(D1, ((), (A,)), ((), ()), 1),
        SetStandbys(D1, ((), (A,)), ((), (C,)), 1),
        RevokeMember(C, "stolen"),
        SetStandbys(D1, ((B,), (A,)), ((C,), ()), 1),
        SetPlacement(D1, ranks(0, 4), 64, 2, 1, 2, 0),
        SetPlacement(D1, ranks(0, 4), 64, 2, 2, 9, 0),
        RemovePlacement(D1, 2),
        SetStandbys(D1, ((B,),), ((),), 2),
    ],
    "set_drafting": [
        SetDrafting(D1, Drafting("auto"), 1),
        *ADMIT_ALL,
        RegisterModel(record()),
        place(),
        SetDrafting(D1, Drafting("auto"), 0),
        SetDrafting(D1, Drafting("auto", 4, 2), 1),
        SetDrafting(D1, Drafting(None, None, None, D2, C), 1),
        RegisterModel(record(D2, "two")),
        SetDrafting(D1, Drafting(None, None, None, D2), 1),
        SetDrafting(D1, Drafting("", None, None, D2, C), 1),
        SetDrafting(D1, Drafting("two", 1000), 1),
        SetDrafting(D1, Drafting("two", 3, None, D2, C), 1),
        ForgetModel(D2),
        place(1, D1, 0, 1, 4),
        SetDraining(C, True),
        SetDrafting(D1, Drafting("two+suffix", None, None, D2, C), 2),
        SetDrafting(D1, None, 2),
        SetDrafting(D1, Drafting("two", None, None, D2, C), 2),
        RevokeMember(B, "stolen"),
        SetDrafting(D1, Drafting("two", None, None, D2, B), 2),
        SetDrafting(D1, Drafting("two", None, None, D2, A), 2),
        RemovePlacement(D1, 2),
        ForgetModel(D2),
    ],
    "remove_placement": [
        RemovePlacement(D1, 0),
        RegisterModel(record()),
        RemovePlacement(D1, 0),
        place(),
        RemovePlacement(D1, 0),
        RemovePlacement(D1, 1),
    ],
    "set_vote": [
        SetVote(A, "always"),
        *ADMIT_ALL,
        SetVote(A, "never"),
        SetVote(B, "always"),
        SetVote(C, "always"),
        SetVote(C, "never"),
        AdmitMember(B, "bob", "learner", b"\x04", 20),
        SetVote(A, "auto"),
        RevokeMember(A, "stolen"),
        SetVote(A, "always"),
        RemoveMember(B, 30),
        SetVote(B, "auto"),
    ],
    "remove_member": [
        RemoveMember(A, 5),
        *ADMIT_ALL,
        SetVote(A, "always"),
        SetDraining(A, True),
        RemoveMember(A, 50),
        RemoveMember(A, 40),
        RemoveMember(A, 60),
        RegisterModel(record()),
        place(),
        AdmitMember(A, "ann", "voter", b"\x01", 10),
        AdmitMember(A, "ann", "voter", b"\x01", 60),
        AdmitMember(A, "bob", "voter", b"\x05", 61),
        AdmitMember(A, "ann", "learner", b"\x05", 61),
        RemoveMember(B, 70),
        AdmitMember(A, "bob", "voter", b"\x06", 71),
        RevokeMember(B, "stolen"),
        AdmitMember(B, "ben", "voter", b"\x07", 99),
        RemoveMember(B, 100),
    ],
    "set_draining": [
        SetDraining(A, True),
        *ADMIT_ALL,
        SetDraining(A, True),
        RegisterModel(record()),
        place(),
        place(0, D1, 0, 4),
        SetDraining(A, False),
        place(),
        SetDraining(A, True),
        AdmitMember(A, "ann", "voter", b"\x04", 20),
        place(1, D1, 0, 1, 4),
        SetPlacement(D1, (Rank(0, Slice(0, 4, True), B, (A,)),), 64, 2, 2),
        SetPlacement(D1, (Rank(0, Slice(0, 4, True), B),), 64, 2, 3),
        SetPlacement(D1, (Rank(0, Slice(0, 4, True), B, (), (A,)),), 64, 2, 4),
    ],
    "set_mesh_setting": [
        SetMeshSetting("standbys", 0),
        SetMeshSetting("standbys", 4),
        SetMeshSetting("standbys", 5),
        SetMeshSetting("voters_max", 0),
        SetMeshSetting("session_ttl", 30),
        SetMeshSetting("colour", 1),
        SetMeshSetting("standbys", None),
        SetMeshSetting("spares", None),
        SetMeshSetting("journal_copies", -1),
    ],
    "set_buckets": [
        SetBuckets(((A, B), (C,)), 1),
        SetBuckets(((A, B), (C,)), 0),
        SetBuckets(((A, B), (C,)), 0),
        SetBuckets(((B,), (C, A)), 1),
        *ADMIT_ALL,
        RemoveMember(A, 20),
        SetBuckets(((A,),), 2),
        SetBuckets((), 2),
    ],
    "put_checkpoints": [
        PutCheckpoints((checkpoint(), checkpoint(S2, B, expires=500)), 400),
        PutCheckpoints((checkpoint(tokens=200),), 410),
        PutCheckpoints((checkpoint(S1, B, tokens=300),), 420),
        PutCheckpoints((checkpoint(claim=2, tokens=400),), 430),
        PutCheckpoints((), 500),
        PutCheckpoints((checkpoint(S3, expires=499),), 501),
        *ADMIT_ALL,
        RevokeMember(B, "stolen"),
        PutCheckpoints((checkpoint(S3), checkpoint(S2, B)), 510),
        PutCheckpoints((checkpoint(S3, blocks=(), claim=7),), 520),
    ],
    "drop_checkpoints": [
        PutCheckpoints((checkpoint(), checkpoint(S2, B)), 400),
        DropCheckpoints((S1, S2), C),
        DropCheckpoints((S1, S2, S3), A),
        DropCheckpoints((S2,), B),
    ],
    "claim_session": [
        ClaimSession(S1, B, 1, 400),
        PutCheckpoints((checkpoint(), checkpoint(S2)), 400),
        ClaimSession(S1, B, 1, 900),
        ClaimSession(S1, C, 1, 900),
        ClaimSession(S1, C, 2, 901),
        PutCheckpoints((checkpoint(tokens=300),), 902),
        PutCheckpoints((checkpoint(S1, C, claim=3, tokens=301),), 903),
        DropCheckpoints((S1,), A),
        ClaimSession(S2, B, 1, 1001),
        SetMeshSetting("session_ttl", 10),
        ClaimSession(S1, A, 3, 1000),
        ClaimSession(S1, A, 4, 1011),
        *ADMIT_ALL,
        RevokeMember(B, "stolen"),
        ClaimSession(S1, B, 4, 1000),
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
    "malformed_since_v2": [
        SetPlacement(D1, (Rank(0, Slice(0, 4, True), A, (B,), (B,)),), 64, 1, 0),
        AdmitMember(A, "x", "voter", b"\x01", -1),
        SetVote(A, "maybe"),
        SetVote(PeerId("no peer"), "auto"),
        RemoveMember(A, -1),
        SetDraining(PeerId(""), True),
        SetBuckets(((),), 0),
        SetBuckets(((A, A),), 0),
        SetBuckets(((A,),), -1),
        PutCheckpoints((checkpoint(SessionId("xyz")),), 0),
        PutCheckpoints((checkpoint(holders=(A, A)),), 0),
        PutCheckpoints((checkpoint(tokens=-1),), 0),
        PutCheckpoints((checkpoint(claim=0),), 0),
        PutCheckpoints((checkpoint(blocks=(b"",)),), 0),
        PutCheckpoints((checkpoint(),), -1),
        DropCheckpoints((SessionId("xyz"),), A),
        DropCheckpoints((S1,), PeerId("")),
        ClaimSession(S1, A, 0, 0),
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


def same(golden: object, now: object) -> bool:
    """Compare with a golden file; fields younger than the file must have their first default."""
    if isinstance(golden, dict) and isinstance(now, dict):
        young = (now[key] for key in now.keys() - golden.keys())
        return (
            golden.keys() <= now.keys()
            and all(same(golden[key], now[key]) for key in golden)
            and all(value in ("auto", None) or not value for value in young)
        )
    if isinstance(golden, list) and isinstance(now, list):
        return len(golden) == len(now) and all(map(same, golden, now))
    return golden == now


@pytest.mark.parametrize("name", HISTORIES)
def test_golden(name: str) -> None:
    """Set UPDATE_GOLDEN to write missing files, then read them; old ones are for ever."""
    path = GOLDEN / f"{name}.json"
    _, lines = run(HISTORIES[name])
    if os.environ.get("UPDATE_GOLDEN") and not path.exists():
        path.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
    assert same(json.loads(path.read_text()), lines)


def test_every_command_has_a_history() -> None:
    seen = {type(command) for history in HISTORIES.values() for command in history}
    assert seen == set(Command.__args__)


V1_HISTORY: list[Command] = [
    *HISTORIES["admit_member"],
    *HISTORIES["burn_ticket"],
    *HISTORIES["set_placement"],
    RevokeMember(B, "lost"),
]
V2_HISTORY: list[Command] = [
    *V1_HISTORY,
    *HISTORIES["remove_member"],
    *HISTORIES["set_mesh_setting"],
    *HISTORIES["set_buckets"],
    *HISTORIES["claim_session"],
]


def test_golden_snapshot_of_version_1_loads() -> None:
    """A snapshot that version 1 wrote must load for ever."""
    state, _ = run(V1_HISTORY)
    assert decode_snapshot((GOLDEN / "snapshot-v1.bin").read_bytes()) == state


def test_golden_snapshot_of_this_version() -> None:
    state, _ = run(V2_HISTORY)
    path = GOLDEN / "snapshot-v2.bin"
    if os.environ.get("UPDATE_GOLDEN") and not path.exists():
        path.write_bytes(encode_snapshot(state))
    assert decode_snapshot(path.read_bytes()) == state
    assert encode_snapshot(state) == path.read_bytes()


def test_settings_have_defaults_within_bounds() -> None:
    assert State().settings == {name: each.default for name, each in MESH_SETTINGS.items()}
    assert all(each.low <= each.default <= each.high for each in MESH_SETTINGS.values())
    state, _ = run([SetMeshSetting("spares", 0)])
    assert state.settings == {**State().settings, "spares": 0}


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
    ("module", "constant", "make"),
    [
        (
            member_changes,
            "MAX_MEMBERS",
            lambda n: AdmitMember(PeerId(f"p{n}"), f"n{n}", "client", b"c"),
        ),
        (
            model_changes,
            "MAX_MODELS",
            lambda n: RegisterModel(record(Digest(f"{n:064x}"), f"m{n}")),
        ),
        (member_changes, "MAX_BURNT", lambda n: BurnTicket(f"{n:032x}", A, 10**9, 0)),
        (
            session_changes,
            "MAX_CHECKPOINTS",
            lambda n: PutCheckpoints((checkpoint(SessionId(f"{n:032x}")),), 0),
        ),
    ],
)
def test_limits(
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    constant: str,
    make: Callable[[int], Command],
) -> None:
    monkeypatch.setattr(module, constant, 3)
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
        st.integers(0, 5),
    ),
    st.builds(RemoveMember, st.sampled_from([A, B, C]), st.integers(0, 5)),
    st.builds(
        SetVote, st.sampled_from([A, B, C]), st.sampled_from(["auto", "always", "never", "no"])
    ),
    st.builds(SetDraining, st.sampled_from([A, B, C]), st.booleans()),
    st.builds(
        SetMeshSetting,
        st.sampled_from(["standbys", "session_ttl", "unknown"]),
        st.none() | st.integers(0, 20),
    ),
    st.builds(
        SetBuckets,
        st.lists(st.lists(st.sampled_from([A, B, C]), max_size=2).map(tuple), max_size=2).map(
            tuple
        ),
        st.integers(0, 3),
    ),
    st.builds(
        PutCheckpoints,
        st.lists(
            st.builds(
                checkpoint,
                st.sampled_from([S1, S2]),
                st.sampled_from([A, B]),
                claim=st.integers(1, 3),
                expires=st.integers(0, 10),
            ),
            max_size=3,
        ).map(tuple),
        st.integers(0, 10),
    ),
    st.builds(DropCheckpoints, st.just((S1,)), st.sampled_from([A, B])),
    st.builds(
        ClaimSession,
        st.sampled_from([S1, S2]),
        st.sampled_from([A, B]),
        st.integers(1, 3),
        st.integers(0, 10),
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
        decode_snapshot(SNAPSHOT_MAGIC + msgspec.msgpack.encode({"version": SNAPSHOT_VERSION + 1}))
    assert caught.value.code == "snapshot_version"


def test_contradicting_snapshots_are_refused() -> None:
    state, _ = run(HISTORIES["set_placement"])
    for bad in (
        msgspec.structs.replace(state, last_epoch=0),
        msgspec.structs.replace(state, models={}),
        msgspec.structs.replace(state, index=0),
        msgspec.structs.replace(state, bucket_epoch=-1),
        msgspec.structs.replace(state, buckets=((A,),)),
        msgspec.structs.replace(state, checkpoints={S1: checkpoint(claim=0)}),
    ):
        with pytest.raises(CorruptData):
            decode_snapshot(encode_snapshot(bad))
