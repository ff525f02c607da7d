"""What commands about contexts do to the state.  Pure."""

from __future__ import annotations

import msgspec

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import Conflict, NotFound
from pyagent_node.base.types import ContextId
from pyagent_node.consensus.cluster import State, room
from pyagent_node.consensus.commands import (
    CollectContext,
    CreateContext,
    DropContext,
    RaiseContext,
    SpreadContext,
)

MAX_CONTEXTS = 1024


def create(state: State, command: CreateContext) -> State:
    """Make a context known."""
    new = command.context
    known = state.contexts.get(new.name)
    if known == new:
        return state
    if known is not None:
        raise Conflict(
            f"There is a context {new.name!r} already.",
            code="context_exists",
            remedy="Add to it, choose another name, or remove it first.",
        )
    if any(each.id == new.id for each in state.contexts.values()):
        raise Conflict("A context has this id already.", code="context_exists")
    room("contexts", len(state.contexts), MAX_CONTEXTS)
    return msgspec.structs.replace(state, contexts={**state.contexts, new.name: new})


def spread(state: State, command: SpreadContext) -> State:
    """Say where the sketches of a context lie."""
    known = _known(state, command.name, command.id)
    new = msgspec.structs.replace(known, spread=command.spread)
    return msgspec.structs.replace(state, contexts={**state.contexts, new.name: new})


def drop(state: State, command: DropContext) -> State:
    """Forget a context."""
    _known(state, command.name, command.id)
    rest = {name: each for name, each in state.contexts.items() if name != command.name}
    return msgspec.structs.replace(state, contexts=rest)


def raise_horizon(state: State, command: RaiseContext) -> State:
    """Have new versions count from above a horizon on."""
    known = _known(state, command.name, command.id)
    if known.floor != known.horizon or command.horizon <= known.horizon:
        raise _stale(known)
    new = msgspec.structs.replace(
        known, horizon=command.horizon, raised=command.at, raised_index=state.index + 1
    )
    return msgspec.structs.replace(state, contexts={**state.contexts, new.name: new})


def collect(state: State, command: CollectContext) -> State:
    """Have removals up to the horizon forgotten."""
    known = _known(state, command.name, command.id)
    if command.floor != known.horizon or command.floor <= known.floor:
        raise _stale(known)
    new = msgspec.structs.replace(known, floor=command.floor)
    return msgspec.structs.replace(state, contexts={**state.contexts, new.name: new})


def _stale(known: ContextInfo) -> Conflict:
    return Conflict(
        f"The context {known.name!r} has the horizon {known.horizon} and the floor {known.floor}.",
        code="stale_horizon",
    )


def _known(state: State, name: str, context: ContextId) -> ContextInfo:
    known = state.contexts.get(name)
    if known is None or known.id != context:
        raise NotFound(
            f"There is no context {name!r}.",
            code="context_not_found",
            remedy="'pyagent-node context list' shows those that there are.",
        )
    return known
