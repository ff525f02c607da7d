"""Histories of commands for the state machine: what is applied, and what is refused."""

from __future__ import annotations

import itertools

import msgspec

from pyagent_node.base.types import Digest, Drafting, PeerId, Rank, SessionId, Slice
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
