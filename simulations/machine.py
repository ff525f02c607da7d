"""One machine of the simulated swarm: a disk that outlives it, and the node's program on it.

The program is the real node but for what touches the outside: the mesh, the disk, the clock and the
model are simulated.  A machine is started, dies (with what its disk then holds), and is started
again under the same identity.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest, PeerId, SessionId, Slice
from pyagent_node.consensus.raft import RaftEngine, open_raft
from pyagent_node.consensus.replica import REQUEST_BYTES
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.node.context_mesh import ContextService
from pyagent_node.node.governance import Governance
from pyagent_node.node.healer import Healer
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.journal_book import JournalBook
from pyagent_node.node.journals import JournalKeeper, open_journals
from pyagent_node.node.log_check import LogCheck
from pyagent_node.node.membership import enforce
from pyagent_node.node.nurseries import background
from pyagent_node.node.placement_board import PlacementBoard
from pyagent_node.node.placement_messages import (
    AskFacts,
    AskPlacements,
)
from pyagent_node.node.placements import PlacementController
from pyagent_node.node.planning import facts_reply, survey
from pyagent_node.node.registrar import Registrar
from pyagent_node.node.resharding import Resharder
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.node.session_recovery import Sessions, open_sessions
from pyagent_node.node.steward import Steward
from pyagent_node.simulations.contexts import MemoryContextStore, open_simulated_contexts
from pyagent_node.simulations.disk import SimulatedDisk, SimulatedLog
from pyagent_node.simulations.guessers import Guessers, SwarmAssets
from pyagent_node.simulations.kv import open_simulated_kv
from pyagent_node.simulations.members import EPOCH, membership_of
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork
from pyagent_node.simulations.pipeline import peer
from pyagent_node.simulations.placements import SHAPE, ToyAssets, ToyFacts
from pyagent_node.simulations.trace import HERE, Trace

T = TypeVar("T")

Lie = Callable[[msgspec.Struct], msgspec.Struct]
"""Given what a node would answer, says what it answers instead."""


@dataclass(frozen=True)
class Parts:
    """A running node."""

    mesh: SimulatedMesh
    consensus: RaftEngine
    pipeline: Pipeline
    controller: PlacementController
    board: PlacementBoard
    healer: Healer
    resharder: Resharder
    journals: JournalKeeper
    sessions: Sessions
    steward: Steward
    rpc: Rpc
    governance: Governance
    contexts: ContextService


class Machine:
    """A machine by its number; ``parts`` are there while its node runs."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.number = number
        self.key = NodeKey(number.to_bytes(32, "big"))
        self.peer_id: PeerId = peer(number)
        self.disk = SimulatedDisk(random.Random(rng.random()), name=f"disk{number}")  # noqa: S311
        self.slices: set[Slice] = set()
        self.contexts = MemoryContextStore()
        """What it keeps of contexts."""
        self.skew = 0.0
        """How far its wall clock is ahead, in seconds, besides what it has drifted."""
        self.drifts: list[tuple[float, float]] = []
        """Since when it gains so many seconds a second."""
        self.membership = membership_of(number, self.wall)
        self.starved = False
        """It has no memory for runners."""
        self.lie: Lie | None = None
        """It lies about itself when it is asked."""
        self.lost_log = False
        """Its log was erased, and the mesh has not yet given it a place under a new id."""
        self.gone = False
        """It left for good, or was shut out; nobody counts on it any more."""
        self.lingers = 0.0
        """For how many seconds it runs on then."""
        self.slowness = 1.0
        """By what factor its runners are slower than they should be."""
        self.founder = number == 0
        self.holds = 0
        """How many faults keep it off."""
        self.lives = 0
        self.failures: list[PyAgentError] = []
        """What its last life ended with."""
        self.parts: Parts | None = None
        self.assets: ToyAssets | None = None
        self.guessers: Guessers | None = None
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self.over.set()
        self.readers: set[trio.CancelScope] = set()
        """Those who read an answer from it; they notice its death as a broken connection."""
        self._rng = rng

    def tell(self, answer: msgspec.Struct) -> msgspec.Struct:
        """Return what it answers where the truth is ``answer``."""
        return answer if self.lie is None else self.lie(answer)

    @property
    def up(self) -> bool:
        """Whether its node runs."""
        return self.parts is not None

    def wall(self) -> float:
        """Return Unix seconds on its clock."""
        now = trio.current_time()
        return EPOCH + now + self.skew + sum((now - since) * rate for since, rate in self.drifts)

    def switch_on(self) -> bool:
        """Say whether it was off; :meth:`live` must follow if so."""
        if not self.over.is_set():
            return False
        self.over = trio.Event()
        return True

    async def live(
        self,
        network: SimulatedNetwork,
        trace: Trace,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run its node until it dies; ``task_status`` tells that it is up, or has failed."""
        self.scope, self.lives, self.failures = trio.CancelScope(), self.lives + 1, []
        told = False
        HERE.set(self.peer_id)
        try:
            with self.scope:
                async with _node(self, network) as parts:
                    self.parts, self.founder = parts, False
                    trace.add(self.number, "up", f"life {self.lives}")
                    told = True
                    task_status.started()
                    await trio.sleep_forever()
        except* PyAgentError as errors:
            codes = sorted(error.code for error in leaves(errors))
            trace.add(self.number, "failed", ", ".join(codes))
            self.failures = leaves(errors)
        finally:
            self._gone(network)
            self.over.set()
            if not told:
                task_status.started()

    def _gone(self, network: SimulatedNetwork) -> None:
        self.parts = None
        self.assets = None
        self.guessers = None
        if network.runs(self.peer_id):
            network.crash(self.peer_id)
        for scope in list(self.readers):
            scope.cancel()

    def die(self, network: SimulatedNetwork) -> None:
        """Lose the power now: nobody hears a good-bye, the disk keeps what it keeps."""
        self.disk.crash()
        self._gone(network)
        self.scope.cancel()

    def kill_runners(self) -> None:
        """Kill its runners, and the one that drafts."""
        for runner in list(self.assets.runners) if self.assets is not None else ():
            runner.kill()
        if self.guessers is not None:
            self.guessers.kill()

    def set_starved(self, starved: bool, *, kill: bool = False) -> None:
        """Give it memory for runners, or none; with ``kill`` those that run die."""
        self.starved = starved
        if self.assets is not None:
            self.assets.starved = starved
        if kill:
            self.kill_runners()

    def set_slowness(self, factor: float) -> None:
        """Make its runners, now and later, compute ``factor`` times slower."""
        self.slowness = factor
        if self.assets is not None:
            self.assets.pace = STEP_SECONDS * factor
            for runner in self.assets.runners:
                runner.seconds = STEP_SECONDS * factor
        if self.guessers is not None:
            self.guessers.set_seconds(DRAFT_SECONDS * factor)


STEP_SECONDS: Final = 0.01
"""What one decode takes on a healthy machine."""
DRAFT_SECONDS: Final = 0.001
"""What one decode of its drafting model takes."""
LOAD_SECONDS: Final = 0.5
KV_BYTES: Final = 256 * 1024
"""What a machine keeps of KV: some thousand tokens of the toy, so that it has to give up some."""
KV_STREAM: Final = 64 * 1024
"""Bytes a second of KV that it sends on while sessions run."""
COMPACT_ENTRIES: Final = 25
"""Entries after which a node compacts its log: few, so that snapshots are made and read."""


def leaves(group: BaseExceptionGroup[PyAgentError]) -> list[PyAgentError]:
    """Return the errors inside a group."""
    found: list[PyAgentError] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found += leaves(error)
        else:
            found.append(error)
    return found


@asynccontextmanager
async def _node(machine: Machine, network: SimulatedNetwork) -> AsyncIterator[Parts]:
    rng = random.Random(machine._rng.random())  # noqa: S311 - must repeat itself
    membership = machine.membership
    mesh = network.node(
        machine.peer_id, name=f"n{machine.number}", role="voter", authoriser=membership
    )
    log = SimulatedLog(machine.disk, on_power_loss=lambda: machine.die(network))
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        consensus = await enter(
            open_raft(
                mesh,
                log,
                founder=machine.founder,
                role="voter",
                authorise=membership.authorise,
                rng=rng,
                new_request=lambda: rng.randbytes(REQUEST_BYTES),
                compact_entries=COMPACT_ENTRIES,
            )
        )
        membership.bind(consensus)
        if membership.profile.authority_key is not None:
            registrar = Registrar(
                membership,
                consensus,
                mesh.peer_id,
                clock=machine.wall,
                random_bytes=rng.randbytes,
            )
            registrar.attach(mesh)
        rpc = await enter(open_rpc(mesh))
        journals = await enter(
            open_journals(mesh, consensus, rpc, machine.key, wall=machine.wall, book=JournalBook())
        )
        guesses = random.Random(rng.random())  # noqa: S311 - must repeat itself
        guessers = Guessers(guesses, DRAFT_SECONDS * machine.slowness)
        machine.guessers = guessers
        kv = await enter(
            open_simulated_kv(mesh, consensus, memory_bytes=KV_BYTES, stream_bytes=KV_STREAM)
        )
        kv.on_report = journals.blocks_held
        ids = random.Random(f"contexts {machine.number} {machine.lives}")  # noqa: S311
        contexts = await enter(open_simulated_contexts(mesh, consensus, machine.contexts, rng=ids))
        pipeline = await enter(
            open_pipeline(
                mesh,
                journal=journals,
                session_ids=session_ids(rng),
                wall=machine.wall,
                speculators=guessers.speculators,
                shelf=kv,
            )
        )
        kv.rests.moved_on = pipeline.stages.moved_on
        assets = SwarmAssets(LOAD_SECONDS, guesses)
        assets.disk = machine.slices
        assets.starved = machine.starved
        assets.pace = STEP_SECONDS * machine.slowness
        machine.assets = assets
        provider = ToyFacts(mesh.peer_id, f"n{machine.number}", assets)
        controller = PlacementController(mesh.peer_id, consensus, pipeline, assets, rng=rng)

        async def facts(model: Digest) -> dict[PeerId, NodeFacts]:
            found = await survey(mesh, rpc, provider, model, distances=False)
            return {n.peer_id: n for n in found.nodes}

        healer = Healer(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            own=controller.reports,
            facts=facts,
            shapes=_shape,
        )

        board = PlacementBoard(mesh, rpc, consensus, healer.reports)
        resharder = Resharder(mesh.peer_id, consensus, board)

        async def answer_placements(
            asker: PeerId, ask: AskPlacements, tail: bytes
        ) -> tuple[msgspec.Struct, bytes]:
            return machine.tell(healer.reports()), b""

        async def answer_facts(
            asker: PeerId, ask: AskFacts, tail: bytes
        ) -> tuple[msgspec.Struct, bytes]:
            return machine.tell(await facts_reply(mesh, provider, ask)), b""

        rpc.register(AskPlacements, answer_placements)
        rpc.register(AskFacts, answer_facts)
        sessions = await enter(
            open_sessions(
                mesh.peer_id, consensus, rpc, journals, pipeline.engine, wall=machine.wall
            )
        )
        steward = Steward(mesh, consensus, clock=machine.wall)
        governance = Governance(
            mesh, consensus, membership, LogCheck(mesh, consensus, rpc), clock=machine.wall
        )
        nursery = await enter(background())
        for task in (controller.run, healer.run, resharder.run, steward.run):
            nursery.start_soon(task)
        nursery.start_soon(guessers.keep_drafting)
        nursery.start_soon(enforce, consensus, mesh.recheck)
        yield Parts(
            mesh=mesh,
            consensus=consensus,
            pipeline=pipeline,
            controller=controller,
            board=board,
            healer=healer,
            resharder=resharder,
            journals=journals,
            sessions=sessions,
            steward=steward,
            rpc=rpc,
            governance=governance,
            contexts=contexts,
        )


async def _shape(digest: Digest) -> ModelShape:
    return SHAPE


def session_ids(rng: random.Random) -> Callable[[], SessionId]:
    """Return a source of session ids that ``rng`` decides."""
    return lambda: SessionId(rng.randbytes(16).hex())
