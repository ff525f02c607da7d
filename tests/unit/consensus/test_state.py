"""The state machine: every command with its refusals, golden files, and random histories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.types import Digest, Drafting, PeerId, Prepared, SessionId
from pyagent_node.consensus import member_changes, model_changes, session_changes
from pyagent_node.consensus.checks import decode_command, encode_command
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    ClaimSession,
    CollectContext,
    Command,
    CreateContext,
    DropCheckpoints,
    DropContext,
    DropPrepared,
    ForgetModel,
    PutCheckpoints,
    RaiseContext,
    RegisterModel,
    RemoveMember,
    RemovePlacement,
    RevokeMember,
    SetBuckets,
    SetDrafting,
    SetDraining,
    SetMeshSetting,
    SetPlacement,
    SetVote,
    SpreadContext,
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

from .state_histories import (
    ADMIT_ALL,
    D1,
    D2,
    HISTORIES,
    S1,
    S2,
    A,
    B,
    C,
    checkpoint,
    commit,
    context,
    place,
    prepare,
    record,
)

GOLDEN = Path(__file__).with_name("golden")


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


def test_who_drafts_is_in_a_snapshot_and_nothing_where_nobody_does() -> None:
    drafting = Drafting("two", 3, None, D2, C)
    history = [*ADMIT_ALL, RegisterModel(record()), RegisterModel(record(D2, "two")), place()]
    plain, _ = run(history)
    assert b"drafting" not in encode_snapshot(plain)
    state, _ = run([*history, SetDrafting(D1, drafting, 1)])
    again = decode_snapshot(encode_snapshot(state))
    assert again == state
    assert again.placements[D1].drafting == drafting
    strange = encode_snapshot(state).replace(D2.encode(), b"3" * 64, 1)
    with pytest.raises(CorruptData):
        decode_snapshot(strange)


def test_what_is_prepared_is_in_a_snapshot_of_version_3() -> None:
    state, _ = run([*ADMIT_ALL, RegisterModel(record()), place(), prepare()])
    path = GOLDEN / "snapshot-v3.bin"
    if os.environ.get("UPDATE_GOLDEN") and not path.exists():
        path.write_bytes(encode_snapshot(state))
    assert decode_snapshot(path.read_bytes()) == state
    assert encode_snapshot(state) == path.read_bytes()
    committed, error = apply(state, commit(state.index))
    assert error is None
    assert not decode_snapshot(encode_snapshot(committed)).prepared
    for bad in (
        msgspec.structs.replace(state, placements={}),
        msgspec.structs.replace(state, placements=committed.placements, last_epoch=2),
        msgspec.structs.replace(state, prepared={D1: prepared(state, number=99)}),
        msgspec.structs.replace(state, prepared={D1: prepared(state, ranks=())}),
    ):
        with pytest.raises(CorruptData):
            decode_snapshot(encode_snapshot(bad))


def test_contexts_are_in_a_snapshot_of_version_4() -> None:
    state, _ = run([*HISTORIES["create_context"], *ADMIT_ALL, RegisterModel(record()), place()])
    path = GOLDEN / "snapshot-v4.bin"
    if os.environ.get("UPDATE_GOLDEN") and not path.exists():
        path.write_bytes(encode_snapshot(state))
    assert decode_snapshot(path.read_bytes()) == state
    assert encode_snapshot(state) == path.read_bytes()
    assert len(state.contexts) == 2
    twice = {"shelf": context(), "other": context("other")}
    with pytest.raises(CorruptData):
        decode_snapshot(encode_snapshot(msgspec.structs.replace(state, contexts=twice)))


def test_how_activations_cross_is_in_a_snapshot_and_nothing_where_that_is_exact() -> None:
    history = [*ADMIT_ALL, RegisterModel(record()), place()]
    plain, _ = run(history)
    assert b"activations" not in encode_snapshot(plain)
    assert plain.placements[D1].crossing == "f32"
    history[-1] = msgspec.structs.replace(place(), activations="bf16")
    state, _ = run(history)
    again = decode_snapshot(encode_snapshot(state))
    assert again == state
    assert again.placements[D1].crossing == "bf16"
    earlier = json.loads(msgspec.json.encode(place()))
    del earlier["activations"]
    assert msgspec.convert(earlier, SetPlacement) == place()


def prepared(state: State, **changes: object) -> Prepared:
    return msgspec.structs.replace(state.prepared[D1], **changes)


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
        CreateContext,
        st.builds(context, st.sampled_from(["a", "b", "../c"]), st.integers(1, 3)),
    ),
    st.builds(
        SpreadContext,
        st.sampled_from(["a", "b"]),
        st.integers(1, 3).map(lambda n: context(number=n).id),
        st.booleans(),
    ),
    st.builds(
        RaiseContext,
        st.sampled_from(["a", "b"]),
        st.integers(1, 3).map(lambda n: context(number=n).id),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    st.builds(
        CollectContext,
        st.sampled_from(["a", "b"]),
        st.integers(1, 3).map(lambda n: context(number=n).id),
        st.integers(0, 9),
    ),
    st.builds(
        DropContext,
        st.sampled_from(["a", "b"]),
        st.integers(1, 3).map(lambda n: context(number=n).id),
    ),
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
    st.builds(
        prepare,
        st.integers(1, 3),
        st.sampled_from([D1, D2]),
        st.just(0),
        st.integers(1, 3),
        st.integers(3, 5),
        by=st.sampled_from([A, B]),
    ),
    st.builds(commit, st.integers(1, 60), st.integers(1, 3), st.sampled_from([D1, D2])),
    st.builds(DropPrepared, st.sampled_from([D1, D2]), st.integers(1, 60)),
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


@pytest.mark.parametrize("rows", [3, 255, 2048])
def test_a_table_of_owners_has_a_power_of_two_of_rows(rows: int) -> None:
    state, lines = run([*HISTORIES["admit_member"][:1], SetBuckets(((A,),) * rows, 0)])
    assert lines[-1]["outcome"] == "invalid_request: bad_command"
    assert state.buckets == ()
