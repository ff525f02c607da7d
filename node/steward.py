"""Keeps the mesh's voters and learners right, and its log tidy, while this node leads.

Every node watches who is connected, so that whichever comes to lead knows how steady the others
are.  :func:`plan` decides, purely; :class:`Steward` does what it says and tries again later when
that fails: nothing here is urgent, and a committed entry of the engine decides in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError, Unsupported
from pyagent_node.base.mesh import Mesh, PeerInfo
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import PutCheckpoints
from pyagent_node.consensus.port import ClusterState, Consensus, ConsensusStatus, MemberRecord
from pyagent_node.consensus.state import is_member
from pyagent_node.consensus.voters import Candidate, choose_voters

log = logging.getLogger("pyagent_node.steward")

MAX_FOLLOWERS: Final = 256
"""Voters and learners together."""
FORGET_SECONDS: Final = 600.0
"""A node that is away for longer, and no member, is sent the log no more."""
CAUGHT_UP_ENTRIES: Final = 1000
"""A learner further behind than this does not begin to vote."""
LOOK_SECONDS: Final = 1.0
"""Time between two looks when nothing happens."""
RETRY_SECONDS: Final = 5.0
"""How long a node that could not be reached is left alone."""
TIDY_SECONDS: Final = 30.0
"""Time between two looks for checkpoints that expired."""
CHANGE_SECONDS: Final = 30.0
"""Longest wait for one change."""


class Reconfigure(msgspec.Struct, frozen=True):
    """Make these the voters and learners."""

    voters: frozenset[PeerId]
    learners: frozenset[PeerId]


class Transfer(msgspec.Struct, frozen=True):
    """Hand the leadership to a voter that stays one."""

    to: PeerId


Action = Reconfigure | Transfer


class _Sight:
    __slots__ = ("info", "present", "since")

    def __init__(self, info: PeerInfo | None, since: float) -> None:
        self.info = info
        self.present = info is not None
        self.since = since


class Sightings:
    """Since when each node has been connected or away, on a monotonic clock in seconds."""

    def __init__(self, peer_id: PeerId, now: float) -> None:
        self.peer_id = peer_id
        self._started = self._now = now
        self._seen: dict[PeerId, _Sight] = {}

    def look(self, peers: Iterable[PeerInfo], expected: Iterable[PeerId], now: float) -> None:
        """Note who is connected now; ``expected`` are nodes whose absence counts as well."""
        self._now = now
        here = {peer.peer_id: peer for peer in peers}
        for peer, info in here.items():
            known = self._seen.get(peer)
            if known is None or not known.present:
                self._seen[peer] = _Sight(info, now)
            else:
                known.info = info
        wanted = set(expected)
        for peer in wanted - self._seen.keys():
            self._seen[peer] = _Sight(None, now)
        for peer, sight in list(self._seen.items()):
            if peer in here:
                continue
            if sight.present:
                sight.present, sight.since = False, now
            elif peer not in wanted and now - sight.since > FORGET_SECONDS:
                del self._seen[peer]

    def up(self, peer: PeerId) -> float:
        """Return for how long a node has been connected; negative: for how long it is away."""
        if peer == self.peer_id:
            return self._now - self._started
        sight = self._seen.get(peer)
        if sight is None:
            return 0.0
        return self._now - sight.since if sight.present else sight.since - self._now

    def info(self, peer: PeerId) -> PeerInfo | None:
        """Return what was last known of a node that was connected."""
        sight = self._seen.get(peer)
        return sight.info if sight is not None else None

    def known(self) -> Collection[PeerId]:
        """Return every node that is connected, or was a short while ago."""
        return [peer for peer, sight in self._seen.items() if sight.info is not None]

    def present(self, peer: PeerId) -> bool:
        """Say whether a node is connected."""
        sight = self._seen.get(peer)
        return sight is not None and sight.present


def candidates(
    status: ConsensusStatus, members: Mapping[PeerId, MemberRecord], sightings: Sightings
) -> list[Candidate]:
    """Return everybody who may be asked to vote, as this node sees them."""
    behind = {
        each.peer_id
        for each in status.progress
        if not each.voter and each.matched + CAUGHT_UP_ENTRIES < status.commit
    }
    me = sightings.peer_id
    found = []
    for peer in {me, *members, *sightings.known()}:
        record, info = members.get(peer), sightings.info(peer)
        role = record.role if record is not None else info.role if info is not None else "voter"
        rtt = info.rtt_ms / 1000 if info is not None and info.rtt_ms is not None else None
        up = sightings.up(peer)
        found.append(
            Candidate(
                peer_id=peer,
                role=role,
                vote=record.vote if record is not None else "auto",
                barred=record is not None and (not is_member(record) or record.draining),
                up=min(up, 0.0) if peer in behind else up,
                rtt=0.0 if peer == me else rtt,
            )
        )
    return sorted(found, key=lambda each: each.peer_id)


def choose_learners(
    voters: Collection[PeerId],
    current: Collection[PeerId],
    members: Mapping[PeerId, MemberRecord],
    sightings: Sightings,
) -> frozenset[PeerId]:
    """Return who else is sent the log: whoever is connected, and members that may come back.

    A stranger that left keeps its place for :data:`FORGET_SECONDS`.  When there are too many, who
    is away gives way first, and then who came last.
    """
    wanted = []
    for peer in {*sightings.known(), *current} - set(voters):
        record = members.get(peer)
        if record is not None and not is_member(record):
            continue
        up, present = sightings.up(peer), sightings.present(peer)
        if present or (peer in current and (record is not None or up > -FORGET_SECONDS)):
            wanted.append((not present, peer not in current, -up, peer))
    return frozenset(peer for *_, peer in sorted(wanted)[: MAX_FOLLOWERS - len(voters)])


def plan(
    status: ConsensusStatus,
    state: ClusterState,
    sightings: Sightings,
    *,
    unreachable: Collection[PeerId] = (),
) -> Action | None:
    """Return what this node, the leader, should change about voters and learners, if anything.

    ``unreachable`` nodes are not added now.  Whoever is to vote follows the log first, or the next
    commit would wait for it.  A leader that is to vote no more hands over before it goes.
    """
    me = sightings.peer_id
    current, learners = frozenset(status.voters), frozenset(status.learners)
    fit = [
        each
        for each in candidates(status, state.members, sightings)
        if each.peer_id in current or (each.peer_id in learners and each.peer_id not in unreachable)
    ]
    voters = choose_voters(fit, current, state.settings["voters_max"])
    if me not in voters:
        heirs = [each for each in fit if each.peer_id in voters & current and each.up >= 0]
        if heirs:
            best = min(heirs, key=lambda c: (c.rtt is None, c.rtt or 0.0, c.peer_id))
            return Transfer(best.peer_id)
        voters |= {me}
    follow = choose_learners(voters, learners | current, state.members, sightings)
    follow -= set(unreachable) - learners - current
    if voters == current and follow == learners:
        return None
    return Reconfigure(voters, follow)


class Steward:
    """Watches on every node, acts on the one that leads.

    ``clock`` gives Unix seconds.  ``changes`` counts what was done, ``failures`` what was not.
    """

    def __init__(self, mesh: Mesh, consensus: Consensus, *, clock: Callable[[], float]) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._clock = clock
        self._sightings = Sightings(mesh.peer_id, trio.current_time())
        self._unreachable: dict[PeerId, float] = {}
        self._tidied = -TIDY_SECONDS
        self._fixed = False
        self.changes = 0
        self.failures = 0

    async def run(self) -> None:
        """Watch and act for ever."""
        wake = trio.Event()

        async def listen() -> None:
            nonlocal wake
            async with self._mesh.events() as events:
                async for _ in events:
                    wake.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            while True:
                wake = trio.Event()
                await self.look()
                with trio.move_on_after(LOOK_SECONDS):
                    await wake.wait()

    async def look(self) -> None:
        """Look once, and do one thing if something is to be done."""
        now = trio.current_time()
        status = self._consensus.status()
        self._sightings.look(self._mesh.peers(), (*status.voters, *status.learners), now)
        if status.role != "leader" or status.joint:
            return
        try:
            with trio.fail_after(CHANGE_SECONDS):
                await self._tidy(now)
                if not self._fixed:
                    await self._arrange(status, now)
        except Unsupported:
            log.info("the engine %s keeps its voters", status.engine)
            self._fixed = True
        except PyAgentError as error:
            self.failures += 1
            peer = error.facts.get("peer_id")
            if isinstance(peer, str):
                self._unreachable[PeerId(peer)] = now + RETRY_SECONDS
            log.info("the voters could not be changed, trying again later: %s", error)
        except trio.TooSlowError:
            self.failures += 1
            log.warning("a change of voters took longer than %g s", CHANGE_SECONDS)

    async def _arrange(self, status: ConsensusStatus, now: float) -> None:
        self._unreachable = {p: until for p, until in self._unreachable.items() if until > now}
        state = self._consensus.state
        action = plan(status, state, self._sightings, unreachable=self._unreachable.keys())
        match action:
            case Reconfigure(voters, learners):
                log.info("voters: %s; learners: %s", _names(state, voters), len(learners))
                await self._consensus.reconfigure(voters, learners)
            case Transfer(to):
                log.info("this node is to vote no more; %s leads next", _names(state, [to]))
                await self._consensus.transfer(to)
            case None:
                return
        self.changes += 1

    async def _tidy(self, now: float) -> None:
        """Have the mesh forget sessions that can be resumed no more."""
        if now < self._tidied + TIDY_SECONDS:
            return
        self._tidied = now
        today = int(self._clock())
        if any(each.expires < today for each in self._consensus.state.checkpoints.values()):
            await self._consensus.propose(PutCheckpoints((), today))


def _names(state: ClusterState, peers: Iterable[PeerId]) -> Sequence[str]:
    return sorted(m.name if (m := state.members.get(peer)) else peer for peer in peers)
