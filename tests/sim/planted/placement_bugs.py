"""Bugs of placements: who decides, under which epoch, and who takes over."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from pyagent_node.base.types import Digest, Placement
from pyagent_node.consensus import model_changes
from pyagent_node.consensus.commands import SetPlacement
from pyagent_node.consensus.state import State, apply
from pyagent_node.node import healer
from pyagent_node.node.healer import Healer
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.node.placements import PlacementController
from pyagent_node.node.replacement import Healing, Outlook, heal
from pyagent_node.simulations.fault_kinds import Crash, Drain, Replace

from .kit import Bug, same, swap

CALM = same(4, 4.0)

_place = model_changes.place


def _place_under_the_same_epoch(state: State, command: SetPlacement) -> State:
    after = _place(state, command)
    if not state.last_epoch:
        return after
    placement = msgspec.structs.replace(after.placements[command.model], epoch=state.last_epoch)
    return msgspec.structs.replace(
        after,
        placements={**after.placements, command.model: placement},
        last_epoch=state.last_epoch,
    )


def _stop_no_stage(self: PlacementController) -> dict[RunnerKey, list[trio.Event]]:
    return {}


async def _act_at_once(self: Healer, digest: Digest, healing: Healing) -> None:
    assert healing.command is not None
    replica = self._consensus.node.history.replica  # type: ignore[attr-defined]
    replica.state = apply(replica.state, healing.command)[0]
    self._proposing.discard(digest)


def _no_reserves(placement: Placement, outlook: Outlook) -> Healing:
    healing = heal(placement, outlook)
    return healing if isinstance(healing.command, SetPlacement) else Healing(None)


def _never_replace(placement: Placement, outlook: Outlook) -> Healing:
    healing = heal(placement, outlook)
    return Healing(None) if isinstance(healing.command, SetPlacement) else healing


_outlook_of = healer.outlook_of


def _nobody_is_drained(*args: Any, **kwargs: Any) -> Outlook:
    return msgspec.structs.replace(_outlook_of(*args, **kwargs), draining=frozenset())


BUGS = (
    Bug(
        "two_placements_in_one_epoch",
        "a model that is placed anew keeps its epoch",
        swap(model_changes, "place", _place_under_the_same_epoch),
        same(4, 5.0, Replace(1.0, (5,), (0, 1))),
        frozenset({"one placement an epoch"}),
    ),
    Bug(
        "stale_stage_goes_on",
        "a node goes on serving a rank after the epoch has ended",
        swap(PlacementController, "_stop_stages", _stop_no_stage),
        same(4, 8.0, Replace(1.0, (5,), (0, 1))),
        frozenset({"stale stages stop"}),
    ),
    Bug(
        "healed_without_commit",
        "the leader changes a placement before the log has agreed",
        swap(Healer, "_propose", _act_at_once),
        CALM,
        frozenset({"committed entries never change", "nothing goes back"}),
    ),
    Bug(
        "standbys_not_refilled",
        "the leader names no standbys",
        swap(healer, "heal", _no_reserves),
        CALM,
        frozenset({"restored"}),
    ),
    Bug(
        "never_replaced",
        "the leader leaves a rank with a node that is dead",
        swap(healer, "heal", _never_replace),
        same(5, 23.0, Crash(0.5, 3, 40.0)),
        frozenset({"ranks move"}),
        asks=5.0,
    ),
    Bug(
        "draining_ignored",
        "a node that is being drained keeps its ranks",
        swap(healer, "outlook_of", _nobody_is_drained),
        same(5, 29.0, Drain(0.5, 40.0, 3)),
        frozenset({"ranks move"}),
        asks=5.0,
    ),
)
