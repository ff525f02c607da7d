"""Bugs of moving layers while the model serves: one at least for each phase of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from pyagent_node.base.types import PeerId, Placement, Prepared
from pyagent_node.consensus import model_changes
from pyagent_node.consensus.commands import SetPlacement
from pyagent_node.consensus.state import State
from pyagent_node.node import placements
from pyagent_node.node.holdings import RunnerKey, Wanted, wanted
from pyagent_node.node.placements import PlacementController
from pyagent_node.node.resharding import Resharder
from pyagent_node.simulations.fault_kinds import Replace, Reshard

from .kit import Bug, same, swap

# The model is placed on nodes 1 to 3 of four, cut at 4 and 7.
MOVE = Reshard(1.0, (2, 6), (1, 2, 3), 0)

_place = model_changes.place


def _commit_drops_nothing(state: State, command: SetPlacement) -> State:
    after = _place(state, command)
    return msgspec.structs.replace(after, prepared=state.prepared)


async def _drop_nothing(self: Resharder, *args: Any) -> None:
    await trio.lowlevel.checkpoint()


async def _look_after_nothing(self: Resharder) -> None:
    await trio.sleep_forever()


def _only_the_next(
    current: Collection[Placement], peer_id: PeerId, prepared: Collection[Prepared] = ()
) -> Wanted:
    plain = wanted(current, peer_id, prepared)
    models = {each.model for each in prepared}
    rest = wanted([p for p in current if p.model not in models], peer_id, prepared)
    return plain._replace(runners=rest.runners) if rest.runners else plain


def _as_long_as_it_likes(
    current: Collection[Placement], peer_id: PeerId, prepared: Collection[Prepared] = ()
) -> Wanted:
    found = wanted(current, peer_id, prepared)
    kept = _LOADED.setdefault(peer_id, set())
    kept |= wanted([], peer_id, prepared).runners
    return found._replace(runners=found.runners | frozenset(kept))


_LOADED: dict[PeerId, set[Any]] = {}


@contextmanager
def _keep_as_long_as_it_likes() -> Iterator[None]:
    _LOADED.clear()
    with swap(placements, "wanted", _as_long_as_it_likes)():
        yield


async def _wait_for_nothing(self: Resharder, *args: Any) -> None:
    await trio.lowlevel.checkpoint()


def _stop_what_moves(self: PlacementController) -> dict[RunnerKey, list[trio.Event]]:
    for where, stage in list(self._stages.items()):
        placement = self._wanted.stages.get(where)
        if placement is None or placement.ranks[where[1]].slice != stage.rank.slice:
            stage.scope.cancel()
            del self._stages[where]
    return {}


BUGS = (
    Bug(
        "prepared_outlives_its_epoch",
        "what was prepared stays prepared when the model is placed otherwise",
        swap(model_changes, "place", _commit_drops_nothing),
        same(4, 5.0, MOVE, Replace(1.2, (5,), (0, 1))),
        frozenset({"prepared ranks disturb nothing"}),
    ),
    Bug(
        "prepared_by_the_dead",
        "a node that comes back does not drop the change that it was seeing to",
        swap(Resharder, "run", _look_after_nothing),
        same(4, 6.0, Reshard(1.0, (2, 6), (1, 2, 3), 0, "proposed", 0, 1.0)),
        frozenset({"prepared ranks disturb nothing"}),
    ),
    Bug(
        "loaded_in_place_of_the_old",
        "a node lets go of what serves as soon as the next ranks are prepared",
        swap(placements, "wanted", _only_the_next),
        same(4, 5.0, MOVE),
        frozenset({"prepared ranks disturb nothing", "no error escapes"}),
    ),
    Bug(
        "failed_change_not_dropped",
        "a change whose node died while it loaded stays prepared",
        swap(Resharder, "_drop", _drop_nothing),
        same(4, 6.0, Reshard(1.0, (2, 6), (1, 2, 3), 0, "loading", 0, 1.0)),
        frozenset({"prepared ranks disturb nothing"}),
    ),
    Bug(
        "switched_before_loaded",
        "the change is committed without waiting for the new slices",
        swap(Resharder, "_wait_loaded", _wait_for_nothing),
        same(4, 5.0, MOVE),
        frozenset({"switched when loaded"}),
    ),
    Bug(
        "dropped_but_kept",
        "what was loaded for a change that is dropped when it was ready stays loaded",
        _keep_as_long_as_it_likes,
        same(4, 6.0, Reshard(1.0, (2, 6), (1, 2, 3), 0, "ready", 0, 1.0)),
        frozenset({"prepared ranks disturb nothing"}),
    ),
    Bug(
        "old_stage_where_the_slice_stays",
        "a rank whose slice stays goes on under the epoch before the switch",
        swap(PlacementController, "_stop_stages", _stop_what_moves),
        same(4, 6.0, Reshard(1.0, (2, 7), (1, 2, 3), 0)),
        frozenset({"stale stages stop"}),
    ),
)
