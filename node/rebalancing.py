"""Moves layers by itself when planning again promises clearly more; acts on the leader only.

The leader plans every placed model again at a steady pace, with what the nodes say of themselves
and with how fast their stages really are.  A better plan must promise so much in several looks in a
row, whichever node asks, and the placement must have been left alone for a while.  Then it is
carried out as ``placement apply`` would: the new slices are loaded beside the old.  Cuts and nodes
that a person chose stay, and so does everything when the mesh's setting ``rebalance`` is 0.  What
heals a lost rank is ``healer``'s, which waits for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, Protocol

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest, PeerId, Placement
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.node.placement_messages import PlacementReports

logger = logging.getLogger("pyagent_node.placements")

LOOK_SECONDS: Final = 15.0
"""Time between two looks; planning asks every node for its facts."""
LOOKS: Final = 2
"""Looks in a row that must promise enough."""
REST_SECONDS: Final = 60.0
"""How long a placement is left alone after a change, and after a change that failed."""
SLOW: Final = 2.0
"""A stage so many times slower than its figures say, against the others, counts as slow."""
SLOWEST: Final = 16.0
MIN_TOKENS: Final = 32
"""Tokens that a stage must have computed between two looks for its speed to count."""


class Improvement(NamedTuple):
    """A better placement: ``gain`` is the share of a token's time that it saves, below 1.

    ``needed`` when the placement as it is must be left: a node of it shall give its work away.
    """

    gain: float
    needed: bool
    why: str
    carry_out: Callable[[], Awaitable[object]]


class Improver(Protocol):
    """Plans a placed model again (see ``placing.Placer``)."""

    async def improve(self, model: Digest, slowness: Mapping[PeerId, float]) -> Improvement | None:
        """Return what planning again would give, ``None`` when it changes nothing.

        ``slowness`` says by what factors nodes are slower than they say.
        """
        ...


class Patience:
    """Decides when a better plan is worth a change; one for each model.  Pure."""

    def __init__(self) -> None:
        self._epoch = 0
        self._since = 0.0
        self._looks = 0

    def accepts(
        self, epoch: int, improvement: Improvement | None, *, least: float, now: float
    ) -> bool:
        """Take what a look found; say whether to carry it out.

        ``least`` is the gain from which on it is worth it.
        """
        if epoch != self._epoch:
            self._epoch, self._since, self._looks = epoch, now, 0
        if improvement is None or not (improvement.needed or improvement.gain >= least):
            self._looks = 0
            return False
        self._looks += 1
        rested = now - self._since >= REST_SECONDS or improvement.needed
        return self._looks >= LOOKS and rested

    def tried(self, now: float) -> None:
        """Note that it was carried out, or failed."""
        self._since, self._looks = now, 0


class Speeds:
    """Compares how long stages take for a token with what their nodes' figures say.  Pure."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Digest, int, int], tuple[float, int]] = {}

    def slowness(
        self,
        placement: Placement,
        shape: ModelShape,
        facts: Mapping[PeerId, NodeFacts],
        told: Mapping[PeerId, PlacementReports],
    ) -> dict[PeerId, float]:
        """Return by what factor nodes are slower than the one that keeps its word best.

        Only what was computed since the last look counts, and only :data:`SLOW` or more.
        """
        ratios: dict[PeerId, float] = {}
        for rank in placement.ranks:
            reports = told.get(rank.peer_id)
            for report in reports.ranks if reports is not None else ():
                key = (report.model, report.epoch, report.rank)
                if key != (placement.model, placement.epoch, rank.rank) or report.load is None:
                    continue
                busy, tokens = report.load.busy_seconds, report.load.tokens
                before = self._seen.get(key)
                self._seen[key] = busy, tokens
                node = facts.get(rank.peer_id)
                if before is None or tokens - before[1] < MIN_TOKENS or node is None:
                    continue
                seconds = (busy - before[0]) / (tokens - before[1])
                ratios[rank.peer_id] = seconds / node.token_seconds(shape.work(rank.slice))
        best = min(ratios.values(), default=0.0)
        if best <= 0:
            return {}
        return {
            peer: min(ratio / best, SLOWEST)
            for peer, ratio in ratios.items()
            if ratio / best >= SLOW
        }

    def forget(self, models: Mapping[Digest, object]) -> None:
        """Forget models that are placed no more."""
        for key in [key for key in self._seen if key[0] not in models]:
            del self._seen[key]


class Rebalancer:
    """Looks on every node, acts on the one that leads."""

    def __init__(
        self,
        consensus: Consensus,
        improver: Improver,
        slowness: Callable[[Placement], Awaitable[Mapping[PeerId, float]]],
    ) -> None:
        self._consensus = consensus
        self._improver = improver
        self._slowness = slowness
        self._patience: dict[Digest, Patience] = {}
        self.moves = 0
        """Changes that were carried out."""

    async def run(self) -> None:
        """Look and act until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Look once at every placement, and carry out at most one change of each."""
        state = self._consensus.state
        least = state.settings["rebalance"] / 100
        if not self._consensus.leads or not least:
            self._patience.clear()
            return
        for digest in self._patience.keys() - state.placements.keys():
            del self._patience[digest]
        for digest, placement in state.placements.items():
            if placement.fixed or digest in state.prepared:
                self._patience.pop(digest, None)
                continue
            try:
                await self._consider(digest, placement, least)
            except PyAgentError as error:
                logger.info("model %s stays as it is placed: %s", digest[:12], error)

    async def _consider(self, digest: Digest, placement: Placement, least: float) -> None:
        patience = self._patience.setdefault(digest, Patience())
        found = await self._improver.improve(digest, await self._slowness(placement))
        now = trio.current_time()
        if not patience.accepts(placement.epoch, found, least=least, now=now):
            return
        assert found is not None, "nothing is not accepted"
        logger.info("model %s: layers are moved: %s", digest[:12], found.why)
        try:
            await found.carry_out()
            self.moves += 1
        finally:
            patience.tried(trio.current_time())
