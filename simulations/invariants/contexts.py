"""What was added to a context is never lost, and lies where it belongs once all is well again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pyagent_node.sharding.context.shares import ALL_GROUPS

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class ContextsStay:
    """Looks into the stores of all machines, also of those that are off for now.

    A document counts as lost only while nobody has left for good: two who do so together may take
    both copies with them.
    """

    name: ClassVar[str] = "contexts"

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look for chunks that no machine holds."""
        librarian = swarm.librarian
        if librarian is None or librarian.info is None or _departed(swarm):
            return
        for source, known in librarian.shelf.items():
            newer = any(
                (held := machine.contexts.catalog(librarian.info.id).get(source)) is not None
                and held.record.version > known.version
                for machine in swarm.machines
            )
            if newer:
                continue
            for chunk in known.chunks:
                if not any(machine.contexts.holds(chunk) for machine in swarm.machines):
                    yield f"no node holds a chunk of {source} any more"
                    break

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Look whether records are alike everywhere, and bodies at their owners only."""
        librarian = swarm.librarian
        if librarian is None or librarian.info is None:
            return
        up = [m for m in swarm.up() if m.parts is not None and not m.gone]
        catalogs = [machine.contexts.catalog(librarian.info.id) for machine in up]
        if len({catalog.slots() for catalog in catalogs}) > 1:
            yield "nodes know different documents"
            return
        for source, known in librarian.shelf.items():
            held = catalogs[0].get(source) if catalogs else None
            if held is None or held.record.version < known.version:
                yield f"nodes do not know the version of {source} that one of them took"
        yield from _sketches(swarm, librarian.info.name)
        here = {machine.peer_id for machine in up}
        for chunk in catalogs[0].chunk_ids() if catalogs else ():
            place = catalogs[0].locate(chunk)
            if place is None:
                continue
            bucket = place[0].chunks[place[1]].bucket
            rows = {m.parts.contexts.reach.owners(bucket) for m in up if m.parts is not None}
            if len(rows) != 1:
                yield f"nodes name different owners of bucket {bucket}"
                return
            (owners,) = rows
            holders = {machine.peer_id for machine in up if machine.contexts.holds(chunk)}
            if not holders and _departed(swarm):
                continue
            if not set(owners) <= here or len(owners) < min(2, len(here)):
                yield f"bucket {bucket} is owned by {len(owners)} nodes, some of them away"
                return
            if holders != set(owners):
                yield f"a chunk of {place[0].source} lies at {len(holders)} nodes, not its owners"
                return


def _sketches(swarm: Swarm, name: str) -> Iterator[str]:
    """Look whether every node has the sketches that it is to have, and no others."""
    if _departed(swarm):
        return  # what nobody holds any more has no sketches either
    for machine in swarm.up():
        if machine.parts is None:
            continue
        service = machine.parts.contexts
        info = service.find(name)
        catalog, share = service.catalog(info.id), service.store.share(info.id)
        own = service.keeper.own_groups() if info.spread else ALL_GROUPS
        if catalog.lacking(share, own, bare_only=not info.spread):
            yield f"node {machine.number} lacks sketches that it is to have"
        whole = any(record.windows and not record.whole for record in catalog.documents())
        if info.spread and (whole or share.beyond(own)):
            yield f"node {machine.number} has sketches that others are to have"


def _departed(swarm: Swarm) -> bool:
    return any(machine.gone for machine in swarm.machines)
