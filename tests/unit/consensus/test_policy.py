"""Who may propose what: every command, by every kind of proposer."""

from __future__ import annotations

import pytest

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import ContextId, ContextPolicy, Digest, PeerId, SessionId
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    Checkpoint,
    ClaimSession,
    CollectContext,
    Command,
    CreateContext,
    DropCheckpoints,
    DropContext,
    DropPrepared,
    ForgetModel,
    ModelRecord,
    PreparePlacement,
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
    SetStandbys,
    SetVote,
    SpreadContext,
)
from pyagent_node.consensus.policy import check_proposal

KING, ME, OTHER = PeerId("king"), PeerId("me"), PeerId("other")
D, S = Digest("1" * 64), SessionId("1" * 32)
OK = "ok"


def checkpoint(head: PeerId) -> Checkpoint:
    return Checkpoint(S, D, head, 1, (), 100)


# Command, then what becomes of it when proposed by the authority, and by ME as voter, learner,
# client and stranger.
CASES: list[tuple[Command, str, str, str, str, str]] = [
    (AdmitMember(OTHER, "o", "voter", b"c"), OK, *("not_authority",) * 4),
    (BurnTicket("0" * 32, OTHER, 5, 1), OK, *("not_authority",) * 4),
    (RevokeMember(OTHER, "why"), OK, *("not_authority",) * 4),
    (RevokeMember(ME, "why"), OK, *("not_authority",) * 4),
    (RevokeMember(KING, "why"), *("cannot_revoke_writer",) * 5),
    (RemoveMember(OTHER, 5), OK, *("not_authority",) * 4),
    (RemoveMember(ME, 5), *(OK,) * 5),
    (RemoveMember(KING, 5), *("cannot_remove_authority",) * 5),
    (SetVote(OTHER, "never"), OK, *("not_authority",) * 4),
    (SetVote(ME, "never"), *(OK,) * 5),
    (SetDraining(OTHER, True), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (SetMeshSetting("standbys", 1), OK, OK, *("role_not_allowed",) * 3),
    (SetBuckets(((OTHER,),), 0), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (PutCheckpoints((checkpoint(ME),), 0), "not_head", OK, OK, OK, "role_not_allowed"),
    (PutCheckpoints((checkpoint(OTHER),), 0), *("not_head",) * 5),
    (PutCheckpoints((checkpoint(ME), checkpoint(OTHER)), 0), *("not_head",) * 5),
    (PutCheckpoints((), 0), OK, OK, OK, OK, "role_not_allowed"),
    (DropCheckpoints((S,), ME), "not_head", OK, OK, OK, "role_not_allowed"),
    (ClaimSession(S, ME, 1, 0), "not_head", OK, OK, OK, "role_not_allowed"),
    (SetPlacement(D, (), 1, 1, 0), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (SetStandbys(D, 1, (), ()), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (SetDrafting(D, None, 1), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (PreparePlacement(D, (), 1, 1, 1, ME), "not_itself", OK, OK, *("role_not_allowed",) * 2),
    (PreparePlacement(D, (), 1, 1, 1, OTHER), *("not_itself",) * 5),
    (DropPrepared(D, 1), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (RemovePlacement(D, 1), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (
        CreateContext(ContextInfo("c", ContextId(bytes(16)), ContextPolicy(), "e", 1)),
        *(OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    ),
    (DropContext("c", ContextId(bytes(16))), OK, OK, OK, *("role_not_allowed",) * 2),
    (SpreadContext("c", ContextId(bytes(16)), True), OK, OK, OK, *("role_not_allowed",) * 2),
    (RaiseContext("c", ContextId(bytes(16)), 1, 1), OK, OK, OK, *("role_not_allowed",) * 2),
    (CollectContext("c", ContextId(bytes(16)), 1), OK, OK, OK, *("role_not_allowed",) * 2),
    (ForgetModel(D), OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    (
        RegisterModel(ModelRecord(D, "m", 1, "llama", 1, 1, 1, 1, D, 1)),
        *(OK, OK, OK, "role_not_allowed", "role_not_allowed"),
    ),
]


def outcome(command: Command, proposer: PeerId, role: str | None) -> str:
    try:
        check_proposal(command, proposer=proposer, role=role, authority=KING)
    except PyAgentError as error:
        return error.code
    return OK


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]).__name__)
def test_who_may_what(case: tuple[Command, str, str, str, str, str]) -> None:
    command, *expected = case
    by = [(KING, None), (ME, "voter"), (ME, "learner"), (ME, "client"), (ME, None)]
    assert [outcome(command, who, role) for who, role in by] == expected


def test_every_command_has_a_case() -> None:
    assert {type(case[0]) for case in CASES} == set(Command.__args__)
