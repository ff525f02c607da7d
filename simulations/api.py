"""A node without a network or a model, behind the real HTTP API.

:class:`SimulatedServices` is the node around a :class:`WordEngine`; :func:`simulated_api` serves it
on a free port of the loopback interface.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio

from pyagent_node.base.errors import NotFound, Unavailable
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.node.api.app import ApiOptions, create_app
from pyagent_node.node.api.context_routes import ContextServices
from pyagent_node.node.api.exchange import Drain
from pyagent_node.node.api.following import Report
from pyagent_node.node.api.guard import GuardOptions
from pyagent_node.node.api.openai import GenerationOptions
from pyagent_node.node.api.placement_schema import (
    DrainReply,
    DrainRequest,
    PlannedNode,
    PlanView,
)
from pyagent_node.node.api.schema import (
    Check,
    ConnectReply,
    DoctorReply,
    InviteReply,
    InviteRequest,
    LoadRequest,
    ModelsReply,
    ModelView,
    NodeView,
    PlacementView,
    Progress,
    PullRequest,
    Readiness,
    StatusView,
)
from pyagent_node.node.api.server import ApiServer, ServerOptions, open_api
from pyagent_node.node.api.session_schema import (
    ImportReply,
    MoveReply,
    MoveRequest,
    SessionRow,
    SessionsReply,
)
from pyagent_node.node.live_sessions import LiveSessions, Recovered, open_live_sessions
from pyagent_node.node.session_recovery import session_not_found
from pyagent_node.node.telemetry import Telemetry
from pyagent_node.simulations.api_kv import SimulatedKvServices
from pyagent_node.simulations.api_mesh import SimulatedMeshServices
from pyagent_node.simulations.word_engine import DIGEST, PEER, WordEngine

TOKEN = "test-token-of-32-characters-0000"  # noqa: S105 (of simulated nodes only)


PLANNED_NODE = PlannedNode(
    peer_id=PeerId("peer-a"),
    name="ann",
    layers=((0, 12),),
    backend="llama.cpp",
    version="0.3",
    device="cpu",
    backend_why="the fastest on a processor",
    threads=3,
    source="sessions",
    decode_bytes_per_second=5e9,
    prefill_flops_per_second=40e9,
    token_seconds=0.01,
    prompt_seconds=0.002,
    memory="ram",
    total_bytes=16_000_000_000,
    free_bytes=9_000_000_000,
    usable_bytes=8_100_000_000,
    need_bytes=700_000_000,
    supply="battery",
    charge=80.0,
    saver=False,
    throttled=False,
    share=0.5,
    power="battery at 80%",
    why="a layer more would cost +0.10 ms",
)
"""A node of the plan that a simulated API makes."""


class Forgetful:
    """Keeps no journals."""

    def retain(self, session: SessionId, claim: int = 1) -> None:
        """Do nothing."""

    def release(self, session: SessionId) -> None:
        """Do nothing."""


async def no_session(session: SessionId) -> Recovered:
    """Know no session of others."""
    raise session_not_found(session)


class SimulatedSessionServices:
    """One session, which can be moved, written out and read in."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    async def list(self) -> SessionsReply:
        """Return one session."""
        row = SessionRow(
            session=SessionId("0" * 32),
            public=SessionId("1" * 32),
            part="head",
            model="words",
            head=PEER,
            head_name="n",
            completion_tokens=3,
        )
        return SessionsReply((row,))

    async def move(self, request: MoveRequest) -> MoveReply:
        """Note the wish."""
        self.calls.append(request)
        return MoveReply(session=request.session, peer_id=PEER, name=request.to, tokens=3)

    async def write_out(self, session: SessionId) -> dict[str, str]:
        """Return its id."""
        self.calls.append(session)
        return {"session": session}

    async def read_in(self, data: bytes) -> ImportReply:
        """Note the bytes."""
        self.calls.append(data)
        return ImportReply(
            session=SessionId("2" * 32),
            model=DIGEST,
            name="words",
            prompt_tokens=1,
            completion_tokens=3,
            seconds=600.0,
        )


class SimulatedServices:
    """A node whose operations succeed at once and are noted in ``calls``."""

    live: LiveSessions

    def __init__(self, contexts: ContextServices | None = None) -> None:
        self._contexts = contexts
        self.engine = WordEngine()
        self.mesh = SimulatedMeshServices()
        self.sessions = SimulatedSessionServices()
        self.kv = SimulatedKvServices()
        self.telemetry = Telemetry()
        self.reasons: tuple[str, ...] = ()
        self.stopped = False
        self.load_error: Exception | None = None
        self.calls: list[object] = []

    @property
    def contexts(self) -> ContextServices:
        """The given ones."""
        if self._contexts is None:
            raise Unavailable("This node has no contexts.")
        return self._contexts

    def session_ttl(self) -> int:
        """Return ten minutes."""
        return 600

    def readiness(self) -> Readiness:
        """Return ready, unless ``reasons`` were set."""
        return Readiness(not self.reasons, self.reasons)

    async def status(self) -> StatusView:
        """Return a node without a mesh."""
        node = NodeView(peer_id=PEER, name="n", version="0", pid=1, started=0.0, api="http://x")
        return StatusView(
            time=1.0,
            node=node,
            mesh=None,
            consensus=None,
            sessions=tuple(self.engine.sessions()),
        )

    async def connect(self, address: str) -> ConnectReply:
        """Note the address."""
        self.calls.append(address)
        return ConnectReply(PEER)

    async def invite(self, request: InviteRequest) -> InviteReply:
        """Return a made-up ticket."""
        self.calls.append(request)
        return InviteReply("pyagent1secret", 2.0)

    async def models(self) -> ModelsReply:
        """Return the model ``words``."""
        return ModelsReply((ModelView(digest=DIGEST, name="words", size=1),))

    async def pull(self, request: PullRequest, report: Report) -> ModelView:
        """Report three steps and succeed."""
        self.calls.append(request)
        for done in range(3):
            report(Progress(step="download", done=done, total=2))
            await trio.lowlevel.checkpoint()
        return ModelView(digest=DIGEST, name=request.source, size=2, local_bytes=2)

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """Report once; fail with ``load_error`` when there is one."""
        self.calls.append(request)
        report(Progress(step="plan", text="planning"))
        if self.load_error is not None:
            raise self.load_error
        return PlacementView(
            model=DIGEST, name="words", epoch=7, n_ctx=64, n_seq=8, ready=True, ranks=()
        )

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """Plan nothing."""
        self.calls.append(request)
        report(Progress(step="plan", text="planning"))
        if self.load_error is not None:
            raise self.load_error
        return PlanView(
            model=DIGEST,
            name="words",
            epoch=7,
            n_ctx=64,
            n_seq=8,
            token_seconds=0.01,
            token_seconds_now=None,
            ranks=(),
            changes=(),
            explanation=("nothing is better",),
            nodes=(PLANNED_NODE,),
        )

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """Load."""
        return await self.load(request, report)

    async def drain_node(self, request: DrainRequest, report: Report) -> DrainReply:
        """Note the node."""
        self.calls.append(request)
        report(Progress(step="drain", done=1, total=1, unit="parts"))
        return DrainReply(peer_id=PEER, name=request.node, draining=not request.undo)

    async def unload(self, model: str) -> None:
        """Succeed for ``words`` only."""
        if model != "words":
            raise NotFound(f"{model} is not placed.", code="model_not_found")

    async def remove(self, digest: Digest) -> None:
        """Note the digest."""
        self.calls.append(digest)

    async def doctor(self) -> DoctorReply:
        """Return one good finding."""
        return DoctorReply((Check(name="clock", result="ok", detail="fine"),))

    def shutdown(self) -> None:
        """Note the wish in ``stopped``."""
        self.stopped = True


class SimulatedApi:
    """A served API with its parts; ``http`` is a client of it, ``auth`` its admin header."""

    def __init__(self, services: SimulatedServices, server: ApiServer, drain: Drain) -> None:
        self.services = services
        self.engine = services.engine
        self.server = server
        self.drain = drain
        self.url = server.urls[0]
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20)
        self.auth = {"authorization": f"Bearer {TOKEN}"}


@asynccontextmanager
async def simulated_api(
    *,
    guard_options: GuardOptions | None = None,
    generation: GenerationOptions | None = None,
    server: ServerOptions | None = None,
    contexts: ContextServices | None = None,
) -> AsyncIterator[SimulatedApi]:
    """Serve a simulated node on 127.0.0.1 at a free port; the random source gives 42."""
    services = SimulatedServices(contexts)
    drain = Drain()
    options = ApiOptions(
        guard=guard_options or GuardOptions(token=TOKEN),
        generation=generation or GenerationOptions(random_bits=lambda bits: 42, now=lambda: 17.0),
    )
    app = create_app(services, options, drain)
    async with (
        open_live_sessions(services.engine, Forgetful(), no_session) as live,
        open_api(app, server or ServerOptions(), drain) as running,
    ):
        services.live = live
        api = SimulatedApi(services, running, drain)
        async with api.http:
            yield api
