"""Bugs of contexts: what is lost, what is not moved, what is out of date."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.node import context_keeper, context_mesh, context_mover, context_steward
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.owners import Table
from pyagent_node.sharding.context.records import ChunkBody, ChunkId, DocumentRecord
from pyagent_node.simulations.fault_kinds import Fault, Join, Leave
from pyagent_node.simulations.faults import Schedule

from .kit import Bug, same, swap

SECONDS = 12.0
CAUGHT = frozenset({"contexts"})


def _with_contexts(nodes: int, *faults: Fault) -> Callable[[int], Schedule]:
    schedule = msgspec.structs.replace(same(nodes, SECONDS, *faults)(0), contexts=True)
    return lambda seed: schedule


async def _release(mover: context_mover.Mover, surplus: dict[ChunkId, int], epoch: int) -> None:
    await mover._store.forget(list(surplus))


async def _copy_nothing(mover: object, lacking: object, epoch: object, budget: object) -> None:
    return None


_plan = context_steward.plan_owners


def _once(table: Table, weights: dict[PeerId, float], up: object, **rest: object) -> Table | None:
    return None if table else _plan(table, weights, up, **rest)  # type: ignore[arg-type]


def _first_counts(catalog: Catalog, record: DocumentRecord, digest: bytes) -> bool:
    return catalog.get(record.source) is None


_table = Catalog.table


def _first_table(catalog: Catalog, *args: object) -> object:
    if not hasattr(catalog, "first"):
        found = _table(catalog, *args)  # type: ignore[arg-type]
        if len(found.records) < 3:
            return found
        catalog.first = found  # type: ignore[attr-defined]
    return catalog.first  # type: ignore[attr-defined]


async def _place_nothing(service: object, record: DocumentRecord, bodies: list[ChunkBody]) -> None:
    return None


async def _get_nothing(keeper: object, info: object, wanted: object) -> int:
    return 0


def _lacks_nothing(catalog: Catalog, *args: object, **rest: object) -> list[ChunkId]:
    return []


BUGS = (
    Bug(
        "chunks_dropped_before_others_have_them",
        "a node gives up chunks as soon as it owns them no more, whoever has them",
        swap(context_mover.Mover, "_release", _release),
        _with_contexts(4, Join(6.0, 3)),
        CAUGHT,
    ),
    Bug(
        "chunks_never_copied",
        "a node that owns chunks does not fetch them",
        swap(context_mover.Mover, "_copy", _copy_nothing),
        _with_contexts(4, Join(6.0, 3)),
        CAUGHT,
    ),
    Bug(
        "ownership_not_moved",
        "the owners stay those of the first time, also when one leaves for good",
        swap(context_steward, "plan_owners", _once),
        _with_contexts(5, Leave(6.0, 1.0, (3,))),
        CAUGHT,
    ),
    Bug(
        "first_version_stays",
        "a document that was changed stays as nodes first saw it",
        swap(Catalog, "newer", _first_counts),
        _with_contexts(4),
        CAUGHT,
    ),
    Bug(
        "answers_from_the_first_table",
        "questions are answered from the documents of the first time",
        swap(Catalog, "table", _first_table),
        _with_contexts(4),
        CAUGHT,
    ),
    Bug(
        "acknowledged_without_owners",
        "a document counts as taken though no node has its chunks",
        swap(context_mesh.ContextService, "_place", _place_nothing),
        _with_contexts(4),
        CAUGHT,
    ),
    Bug(
        "sketches_never_made",
        "a node that is to keep sketches does not get them",
        swap(context_keeper.SketchKeeper, "_get", _get_nothing),
        _with_contexts(4),
        CAUGHT,
    ),
    Bug(
        "sketches_given_up_unseen",
        "a node takes it that all sketches are where they should be, and gives up its own",
        swap(Catalog, "lacking", _lacks_nothing),
        _with_contexts(5),
        CAUGHT,
    ),
)
