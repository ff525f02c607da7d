"""Drives the collecting of removals: see ``sharding.context.collecting`` for the rules.

Runs on every node.  Looks at peers (``context_sync``) bring what they say; the leader of the log
has horizons and floors committed; each node keeps for itself how far it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import Conflict, LimitExceeded, PyAgentError
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.commands import CollectContext, RaiseContext
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.node.context_client import ContextClient
from pyagent_node.node.context_reach import Reach
from pyagent_node.node.context_sync import MAX_ROUNDS, RecordSync
from pyagent_node.sharding.context.catalog import MAX_CATALOG, MAX_DOCUMENTS, Catalog
from pyagent_node.sharding.context.collecting import (
    Raise,
    Round,
    Standing,
    Told,
    held_up,
    may_cover,
    plan,
    takes_over,
)
from pyagent_node.sharding.context.port import ContextStore
from pyagent_node.sharding.context.record_codec import decode_record, record_digest

log = logging.getLogger("pyagent_node.context")

MAX_TAKEN: Final = MAX_CATALOG + MAX_DOCUMENTS * 1024
"""The most bytes of records that are taken over from a peer; for removals there is always room."""


class Settler:
    """Implements ``context_sync.Settling``; ``clock`` tells Unix seconds."""

    def __init__(
        self,
        consensus: Consensus,
        client: ContextClient,
        store: ContextStore,
        reach: Reach,
        *,
        sync: RecordSync,
        clock: Callable[[], float],
        seconds: float,
    ) -> None:
        self.forgotten = 0
        """Records of removals that were forgotten here."""
        self.dropped = 0
        """Records of versions that were removed while this node did not hear of it."""
        self._consensus = consensus
        self._client = client
        self._store = store
        self._reach = reach
        self._sync = sync
        self._clock = clock
        self._seconds = seconds
        self._told: dict[ContextId, dict[PeerId, Told]] = {}
        self._rounds: dict[ContextId, Round] = {}
        self._taking: set[ContextId] = set()
        self._waiting: dict[ContextId, list[PeerId]] = {}

    async def run(self) -> None:
        """Look for ever at what is due."""
        while True:
            await trio.sleep(self._seconds)
            for info in list(self._consensus.state.contexts.values()):
                try:
                    await self.look(info)
                except Conflict as error:
                    log.debug("what was to be collected changed meanwhile: %s", error)
                except PyAgentError as error:
                    log.info("removals of %r were not collected: %s", info.name, error)

    def catalog(self, info: ContextInfo) -> Catalog:
        """Return a context's catalog, which knows by now what the log says of it."""
        catalog = self._store.catalog(info.id)
        catalog.obey(info.horizon, info.floor)
        return catalog

    def held_up(self, context: ContextId) -> tuple[PeerId, ...]:
        """Return the members that removals wait for before they are forgotten.

        Those that are away, if any are: then the others cannot be covered either.
        """
        info = self._info(context)
        missing = held_up(info, self._all_told(info), self._members()) if info else []
        present = self._reach.present()
        return tuple([peer for peer in missing if peer not in present] or missing)

    async def look(self, info: ContextInfo) -> None:
        """Do what is due for a context, on this node and, if it leads, in the log."""
        catalog, members = self.catalog(info), self._members()
        alone = members == {self._reach.here}
        if catalog.behind and (catalog.standing.covered >= info.floor or alone):
            await self._settle(info, catalog)
        round_ = self._rounds.setdefault(info.id, Round())
        if info.horizon > catalog.standing.covered and self._reach.here in members:
            round_.begin(info.horizon, members, self._consensus.state.index)
            await self._cover(info, catalog, round_)
        self._say_who_is_missing(info)
        if self._consensus.leads and self._reach.present() <= members:
            await self._lead(info, catalog, members)

    async def told(self, peer: PeerId, context: ContextId, told: Told) -> bool:
        """See ``Settling``: what a node that is covered further has is taken over."""
        self._told.setdefault(context, {})[peer] = told
        info = self._info(context)
        if info is None:
            return False
        catalog = self.catalog(info)
        if not takes_over(info, catalog.standing, told) or context in self._taking:
            return False
        self._taking.add(context)
        catalog.keep_out(told.covered)  # from now on nothing up to there comes from anybody else
        try:
            await self._take_over(peer, info, catalog, told)
        finally:
            catalog.keep_out(0)  # done, or it comes from whoever has it again
            self._taking.discard(context)
        return True

    async def looked(self, peer: PeerId, context: ContextId, told: Told) -> None:
        """See ``Settling``."""
        info = self._info(context)
        if info is None or self._reach.here not in self._members():
            return
        catalog = self.catalog(info)
        round_ = self._rounds.setdefault(context, Round())
        round_.looked(peer, told)
        await self._cover(info, catalog, round_)

    # ---- this node -----------------------------------------------------------------------------

    async def _cover(self, info: ContextInfo, catalog: Catalog, round_: Round) -> None:
        standing, applied = catalog.standing, self._sync.applied()
        complete = round_.complete(self._reach.here, info.horizon, applied)
        if complete and may_cover(info, standing, applied):
            await self._store.stand(info.id, Standing(info.horizon, standing.settled), {})

    async def _settle(self, info: ContextInfo, catalog: Catalog) -> None:
        gone = {source: known.digest for source, known in catalog.removals(info.floor).items()}
        covered = max(catalog.standing.covered, info.floor)
        await self._store.stand(info.id, Standing(covered, info.floor), gone)
        self.forgotten += len(gone)
        log.info("%d removals of context %s are forgotten", len(gone), info.name)

    async def _take_over(
        self, peer: PeerId, info: ContextInfo, catalog: Catalog, told: Told
    ) -> None:
        """Hold exactly what a peer holds up to where it is covered, and all that it has above."""
        floor = told.covered
        await self._store.stand(info.id, Standing(), {})  # merges that were under way are over
        theirs = await self._client.slots(peer, info.id)
        own = catalog.slots()
        slots = [at for at, digest in enumerate(theirs) if digest != own[at]]
        seen: dict[str, bytes] = {}
        size = 0
        more = bool(slots)
        for _ in range(MAX_ROUNDS):
            if not more:
                break
            records, more = await self._client.records(peer, info.id, slots, list(seen.values()))
            found = {decode_record(data).source: record_digest(data) for data in records}
            if more and found.items() <= seen.items():
                return
            seen.update(found)
            size += sum(map(len, records))
            if len(seen) > MAX_DOCUMENTS or size > MAX_TAKEN:
                raise LimitExceeded(
                    f"{peer} has more records of context {info.name} than a context may have.",
                    code="context_full",
                )
            await self._store.adopt(info.id, records, floor)
        if more:
            return
        strays = catalog.strays(slots, seen, floor)
        gone = {source: known.digest for source in strays if (known := catalog.get(source))}
        standing = catalog.standing
        covered, settled = max(standing.covered, floor), max(standing.settled, told.settled)
        await self._store.stand(info.id, Standing(covered, settled), gone)
        self.dropped += len(gone)
        if gone:
            log.warning(
                "%d documents of context %s were removed while this node was away (%s); what was"
                " added here meanwhile is to be added again (context_record_collected)",
                len(gone),
                info.name,
                ", ".join(sorted(gone)[:5]),
            )
        self._sync.on_news()

    # ---- the log -------------------------------------------------------------------------------

    async def _lead(self, info: ContextInfo, catalog: Catalog, members: frozenset[PeerId]) -> None:
        now = self._clock()
        due = plan(
            info,
            [known.record.version.counter for known in catalog.removals().values()],
            self._all_told(info),
            members,
            now=now,
            grace=self._consensus.state.settings["context_grace"],
        )
        if isinstance(due, Raise):
            command = RaiseContext(info.name, info.id, due.horizon, max(0, int(now)))
            await self._consensus.propose(command)
        elif due is not None:
            await self._consensus.propose(CollectContext(info.name, info.id, due.floor))

    def _members(self) -> frozenset[PeerId]:
        """Return those whose records count: what a client writes nobody takes."""
        members = self._consensus.state.members.values()
        return frozenset(m.peer_id for m in members if is_member(m) and m.role != "client")

    def _all_told(self, info: ContextInfo) -> dict[PeerId, Told]:
        here = Told(self._sync.applied(), *self._store.catalog(info.id).standing)
        return {**self._told.get(info.id, {}), self._reach.here: here}

    def _info(self, context: ContextId) -> ContextInfo | None:
        infos = self._consensus.state.contexts.values()
        return next((info for info in infos if info.id == context), None)

    def _say_who_is_missing(self, info: ContextInfo) -> None:
        grace = self._consensus.state.settings["context_grace"]
        late = info.floor < info.horizon and self._clock() - info.raised > 2 * grace
        missing = list(self.held_up(info.id)) if late else []
        if missing and missing != self._waiting.get(info.id) and self._consensus.leads:
            log.warning(
                "removals of context %s are kept until these nodes were here, or are removed: %s",
                info.name,
                ", ".join(missing),
            )
        self._waiting[info.id] = missing
