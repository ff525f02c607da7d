"""The replicated state machine: a pure function from state and command to state.

Every node applies the same commands in the same order and so reaches the same state, byte for
byte.  Nothing here reads a clock, a file or a random number; a command brings all it needs.
A :class:`State` is never changed: :func:`apply` returns another one that shares what is equal.
"""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import ErrorInfo, PyAgentError
from pyagent_node.consensus import (
    context_changes,
    member_changes,
    model_changes,
    session_changes,
)
from pyagent_node.consensus.checks import check_command
from pyagent_node.consensus.cluster import Burn, State, is_member
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
from pyagent_node.consensus.snapshots import check_invariants, decode_snapshot, encode_snapshot

__all__ = [
    "Burn",
    "State",
    "apply",
    "check_invariants",
    "decode_snapshot",
    "encode_snapshot",
    "is_member",
]


def apply(state: State, command: Command) -> tuple[State, ErrorInfo | None]:
    """Return the state after ``command`` and the error that refused it, if one did.

    The index grows by one either way.  A refused command changes nothing else.
    """
    try:
        after = _step(state, command)
    except PyAgentError as error:
        return msgspec.structs.replace(state, index=state.index + 1), error.to_info()
    return msgspec.structs.replace(after, index=state.index + 1), None


def _step(state: State, command: Command) -> State:
    check_command(command)
    match command:
        case AdmitMember():
            return member_changes.admit(state, command)
        case RevokeMember():
            return member_changes.revoke(state, command)
        case RemoveMember():
            return member_changes.remove(state, command)
        case SetVote():
            return member_changes.set_vote(state, command)
        case SetDraining():
            return member_changes.set_draining(state, command)
        case BurnTicket():
            return member_changes.burn(state, command)
        case RegisterModel():
            return model_changes.register(state, command.model)
        case ForgetModel():
            return model_changes.forget(state, command.digest)
        case SetPlacement():
            return model_changes.place(state, command)
        case PreparePlacement():
            return model_changes.prepare(state, command)
        case DropPrepared():
            return model_changes.drop_prepared(state, command)
        case SetStandbys():
            return model_changes.set_standbys(state, command)
        case SetDrafting():
            return model_changes.set_drafting(state, command)
        case RemovePlacement():
            return model_changes.displace(state, command)
        case SetBuckets():
            return model_changes.set_buckets(state, command)
        case SetMeshSetting():
            return _set(state, command)
        case PutCheckpoints():
            return session_changes.put_checkpoints(state, command)
        case DropCheckpoints():
            return session_changes.drop_checkpoints(state, command)
        case ClaimSession():
            return session_changes.claim(state, command)
        case CreateContext():
            return context_changes.create(state, command)
        case DropContext():
            return context_changes.drop(state, command)
        case SpreadContext():
            return context_changes.spread(state, command)
        case RaiseContext():
            return context_changes.raise_horizon(state, command)
        case CollectContext():
            return context_changes.collect(state, command)


def _set(state: State, command: SetMeshSetting) -> State:
    changed = {k: v for k, v in state.changed_settings.items() if k != command.name}
    if command.value is not None:
        changed[command.name] = command.value
    return msgspec.structs.replace(state, changed_settings=changed)
