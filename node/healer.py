"""Watches the nodes of every placement and proposes what heals them; acts on the leader only.

Every node runs it: it follows connections, answers signs of life and tries peers for others.  The
leader of the log asks the nodes that hold something for their reports at a steady pace; the answers
are the beats of the failure detector.  What :func:`heal` concludes is proposed, and changes
something only when it is committed: without a quorum everything stays as it is.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import Conflict, DeadlineExceeded, PyAgentError, Unavailable
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId, Placement
from pyagent_node.consensus.cluster import holders
from pyagent_node.consensus.commands import DropPrepared, SetPlacement
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.node.detector import (
    BEAT_SECONDS,
    AskWitness,
    Detector,
    Health,
    Probe,
    Question,
)
from pyagent_node.node.nurseries import background
from pyagent_node.node.outlook import Sight, outlook_of
from pyagent_node.node.placement_messages import (
    AreYouThere,
    AskPlacements,
    Here,
    PlacementReports,
    Tried,
    TryPeer,
)
from pyagent_node.node.replacement import Healing, heal
from pyagent_node.node.resharding import given_up
from pyagent_node.node.rpc import Rpc

logger = logging.getLogger("pyagent_node.placements")

ROLE_SECONDS: Final = 0.1
"""How often a node looks whether it leads."""
TICK_SECONDS: Final = 0.25
HURRIED_SECONDS: Final = 0.02
"""Pause between two looks while somebody is under suspicion."""
BEAT_LIMIT: Final = 10.0
"""Longest wait for the answer to a beat; the detector loses patience earlier."""
PROBE_SECONDS: Final = 1.0
FACTS_SECONDS: Final = 10.0
"""Age at which the facts of the nodes are asked for anew."""
REST_SECONDS: Final = 1.0
"""Pause after a proposal that was refused."""

Facts = Callable[[Digest], Awaitable[Mapping[PeerId, NodeFacts]]]
"""Returns the facts of the nodes that answer, with regard to a model."""
Shapes = Callable[[Digest], Awaitable[ModelShape | None]]
"""Returns the sizes of a model, if this node knows them yet."""


class Healer:
    """One node's part in keeping placements alive; ``own`` are its own reports."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        consensus: Consensus,
        rpc: Rpc,
        own: Callable[[], PlacementReports],
        facts: Facts,
        shapes: Shapes,
    ) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._rpc = rpc
        self._own = own
        self._facts_of = facts
        self._shapes_of = shapes
        self._detector = Detector(trio.current_time())
        self._sight = Sight(mesh.peer_id)
        self._lost: dict[PeerId, float] = {}
        self._problems: dict[Digest, tuple[str, ...]] = {}
        self._wake = trio.Event()
        self._curious = trio.Event()
        """Set when a model is placed about which nothing is known."""
        self._polls: dict[PeerId, trio.CancelScope] = {}
        self._proposing: set[Digest] = set()
        self._rest: dict[Digest, float] = {}
        rpc.register(AreYouThere, self._answer)
        rpc.register(TryPeer, self._try)

    def reports(self) -> PlacementReports:
        """Return this node's reports, with its neighbours out of reach and open problems."""
        own, now = self._own(), trio.current_time()
        cut = {peer: now - self._lost[peer] for peer in self._neighbours() if peer in self._lost}
        return msgspec.structs.replace(own, cut=cut, problems=dict(self._problems))

    def health(self, peer: PeerId) -> Health:
        """Return what this node thinks of another one; only the leader's word has weight."""
        if peer == self._mesh.peer_id:
            return "alive"
        return self._detector.health(peer, trio.current_time())

    async def run(self) -> None:
        """Watch and heal until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            while True:
                if self._leads():
                    async with background() as leading:
                        await self._lead(leading)
                    self._polls.clear()
                    self._proposing.clear()
                    self._problems.clear()
                await trio.sleep(ROLE_SECONDS)

    def _leads(self) -> bool:
        return self._consensus.leads

    def _neighbours(self) -> set[PeerId]:
        me = self._mesh.peer_id
        found: set[PeerId] = set()
        for placement in self._consensus.state.placements.values():
            peers = [rank.peer_id for rank in placement.ranks]
            for a, b in itertools.pairwise(peers):
                if me in (a, b):
                    found |= {a, b}
        return found - {me}

    # ---- every node ------------------------------------------------------------------------

    async def _follow(self) -> None:
        async with self._mesh.events() as events:
            async for event in events:
                now = trio.current_time()
                if event.change == "up":
                    self._lost.pop(event.peer_id, None)
                    self._detector.up(event.peer_id, now)
                else:
                    self._lost[event.peer_id] = now
                    self._detector.down(event.peer_id, now)
                self._wake.set()

    async def _answer(self, peer: PeerId, ask: AreYouThere, tail: bytes) -> tuple[Here, bytes]:
        return Here(), b""

    async def _try(self, peer: PeerId, ask: TryPeer, tail: bytes) -> tuple[Tried, bytes]:
        if ask.peer == self._mesh.peer_id:
            return Tried(True), b""
        try:
            await self._rpc.call(ask.peer, AreYouThere(), Here, seconds=ask.seconds)
        except PyAgentError:
            return Tried(False), b""
        return Tried(True), b""

    # ---- the leader ------------------------------------------------------------------------

    async def _lead(self, nursery: trio.Nursery) -> None:
        logger.debug("this node looks after the placements")
        nursery.start_soon(self._keep_facts)
        while self._leads():
            self._wake = trio.Event()
            now = trio.current_time()
            able = [p for p in self._mesh.peers() if p.role != "client"]
            trips = [p.rtt_ms / 1000 for p in able if p.rtt_ms is not None]
            self._detector.tick(now, trip=max(trips, default=0.0))
            state = self._consensus.state
            self._watch(nursery, now)
            questions = self._detector.questions(now, [p.peer_id for p in able])
            for question in questions:
                nursery.start_soon(self._find_out, question)
            for digest, placement in state.placements.items():
                self._consider(nursery, digest, placement, now)
            for digest in self._problems.keys() - state.placements.keys():
                del self._problems[digest]
            hurried = any(self._suspect(peer, now) for peer in self._polls)
            with trio.move_on_after(HURRIED_SECONDS if hurried else TICK_SECONDS):
                await self._wake.wait()
            await trio.lowlevel.checkpoint()

    def _suspect(self, peer: PeerId, now: float) -> bool:
        return self._detector.health(peer, now) == "suspect"

    def _watch(self, nursery: trio.Nursery, now: float) -> None:
        """Ask those that hold something, and nobody else."""
        state = self._consensus.state
        named = {prepared.by for prepared in state.prepared.values()}
        for placement in state.placements.values():
            named |= holders(placement.ranks)
            if placement.drafting is not None and placement.drafting.peer_id is not None:
                named.add(placement.drafting.peer_id)
        for prepared in state.prepared.values():
            named |= holders(prepared.ranks)
        named.discard(self._mesh.peer_id)
        self._detector.watch(named, now)
        for peer in self._polls.keys() - named:
            self._polls.pop(peer).cancel()
            self._sight.forget(peer)
        for peer in named - self._polls.keys():
            scope = self._polls[peer] = trio.CancelScope()
            nursery.start_soon(self._poll, peer, scope)

    async def _poll(self, peer: PeerId, scope: trio.CancelScope) -> None:
        """Ask one node for its reports again and again."""
        with scope:
            while True:
                try:
                    told, _ = await self._rpc.call(
                        peer, AskPlacements(), PlacementReports, seconds=BEAT_LIMIT
                    )
                except (Unavailable, DeadlineExceeded) as error:
                    logger.debug("no beat from %s: %s", peer, error)
                except PyAgentError as error:  # an answer, if not the one that was hoped for
                    logger.warning("%s gives no reports: %s", peer, error)
                    self._detector.beat(peer, trio.current_time())
                else:
                    self._detector.beat(peer, trio.current_time())
                    self._sight.take(peer, told)
                    self._wake.set()
                await trio.sleep(BEAT_SECONDS)

    async def _find_out(self, question: Question) -> None:
        match question:
            case Probe(peer):
                await self._probe(peer)
            case AskWitness(peer, witness):
                hears = False
                patience = self._detector.patience
                try:
                    tried, _ = await self._rpc.call(
                        witness, TryPeer(peer, 0.8 * patience), Tried, seconds=patience
                    )
                    hears = tried.hears
                except PyAgentError as error:
                    logger.debug("%s does not say whether it hears %s: %s", witness, peer, error)
                self._detector.told(peer, witness, trio.current_time(), hears=hears)
        self._wake.set()

    async def _probe(self, peer: PeerId) -> None:
        try:
            await self._rpc.call(peer, AreYouThere(), Here, seconds=PROBE_SECONDS)
        except PyAgentError as error:
            refused = error.facts.get("refused") is True
            self._detector.missed(peer, trio.current_time(), refused=refused)
        else:
            self._detector.beat(peer, trio.current_time())

    async def _keep_facts(self) -> None:
        """Know what the nodes could take."""
        while True:
            for digest, placement in list(self._consensus.state.placements.items()):
                drafting = placement.drafting
                drafter = drafting.drafter if drafting is not None else None
                try:
                    self._sight.shapes[digest] = await self._shapes_of(digest)
                    if drafter is not None:
                        self._sight.shapes[drafter] = await self._shapes_of(drafter)
                    self._sight.facts[digest] = await self._facts_of(digest)
                except PyAgentError as error:
                    logger.debug("what nodes could take of %s is unknown: %s", digest[:12], error)
            self._wake.set()
            stale = self._sight.facts.keys() - self._consensus.state.placements.keys()
            for digest in stale:
                del self._sight.facts[digest]
            self._curious = trio.Event()
            with trio.move_on_after(FACTS_SECONDS):
                await self._curious.wait()

    def _consider(
        self, nursery: trio.Nursery, digest: Digest, placement: Placement, now: float
    ) -> None:
        self._sight.take(self._mesh.peer_id, self.reports())
        self._sight.note(placement, now)
        if digest not in self._sight.facts:
            self._curious.set()
        if digest in self._proposing or now < self._rest.get(digest, now):
            return
        outlook = outlook_of(
            placement,
            self._consensus.state,
            self._sight,
            self._detector,
            self._mesh.peers(),
            now=now,
        )
        healing = self._unprepare(digest, now) or heal(placement, outlook)
        if healing.problems != self._problems.get(digest, ()):
            for problem in healing.problems:
                logger.warning("model %s: %s", digest[:12], problem)
        if healing.problems:
            self._problems[digest] = healing.problems
        else:
            self._problems.pop(digest, None)
        if healing.command is not None:
            self._proposing.add(digest)
            nursery.start_soon(self._propose, digest, healing)

    def _unprepare(self, digest: Digest, now: float) -> Healing | None:
        """Drop what was prepared when it cannot succeed any more."""
        state = self._consensus.state
        prepared = state.prepared.get(digest)
        if prepared is None:
            return None
        members = state.members.values()
        reason = given_up(
            prepared,
            health=self.health,
            expelled=[m.peer_id for m in members if not is_member(m)],
            silent={prepared.by: self._detector.silent_for(prepared.by, now)},
        )
        if reason is None:
            return None
        return Healing(DropPrepared(digest, prepared.number), (f"its change is dropped: {reason}",))

    async def _propose(self, digest: Digest, healing: Healing) -> None:
        assert healing.command is not None, "only changes are proposed"
        try:
            await self._consensus.propose(healing.command)
            moved = isinstance(healing.command, SetPlacement)
            for reason in healing.reasons:
                level = logging.WARNING if moved else logging.INFO
                logger.log(level, "model %s: %s", digest[:12], reason)
        except Conflict as error:
            logger.info("model %s changed meanwhile: %s", digest[:12], error)
        except PyAgentError as error:
            logger.warning("model %s stays as it is placed: %s", digest[:12], error)
            self._problems[digest] = (*healing.reasons, str(error))
            self._rest[digest] = trio.current_time() + REST_SECONDS
        finally:
            self._proposing.discard(digest)
            self._wake.set()
