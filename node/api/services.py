"""What the HTTP API needs of the node: the port between :mod:`node.api` and the daemon."""

from __future__ import annotations

from typing import Protocol

from pyagent_node.base.types import Digest
from pyagent_node.inference.generation import Engine
from pyagent_node.node.api.context_routes import ContextServices
from pyagent_node.node.api.following import Report
from pyagent_node.node.api.kv_routes import KvServices
from pyagent_node.node.api.mesh_routes import MeshServices
from pyagent_node.node.api.placement_schema import DrainReply, DrainRequest, PlanView
from pyagent_node.node.api.schema import (
    ConnectReply,
    DoctorReply,
    InviteReply,
    InviteRequest,
    LoadRequest,
    ModelsReply,
    ModelView,
    PlacementView,
    PullRequest,
    Readiness,
    StatusView,
)
from pyagent_node.node.api.session_routes import SessionServices
from pyagent_node.node.live_sessions import LiveSessions
from pyagent_node.node.telemetry import Telemetry


class ApiServices(Protocol):
    """A node as its API sees it.  All methods raise errors of ``pyagent_node.base.errors`` only."""

    @property
    def engine(self) -> Engine:
        """Answers generation requests."""
        ...

    @property
    def live(self) -> LiveSessions:
        """Runs the generations, apart from their readers."""
        ...

    def session_ttl(self) -> int:
        """Return for how many seconds a session without its client or its head can be resumed."""
        ...

    @property
    def telemetry(self) -> Telemetry:
        """The node's metrics."""
        ...

    @property
    def mesh(self) -> MeshServices:
        """What operators ask of the mesh itself."""
        ...

    @property
    def sessions(self) -> SessionServices:
        """What operators ask of sessions."""
        ...

    @property
    def kv(self) -> KvServices:
        """What operators ask of the KV blocks that are kept here."""
        ...

    @property
    def contexts(self) -> ContextServices:
        """The contexts of the mesh."""
        ...

    def readiness(self) -> Readiness:
        """Say whether requests can be answered, and what is missing when not."""
        ...

    async def status(self) -> StatusView:
        """Return everything ``status`` shows."""
        ...

    async def connect(self, address: str) -> ConnectReply:
        """Dial a peer."""
        ...

    async def invite(self, request: InviteRequest) -> InviteReply:
        """Make an invitation ticket."""
        ...

    async def models(self) -> ModelsReply:
        """List the models that the mesh knows or this node holds."""
        ...

    async def pull(self, request: PullRequest, report: Report) -> ModelView:
        """Fetch a model into the store."""
        ...

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """Place a model and wait until every rank is ready."""
        ...

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """Say what placing a model anew would change."""
        ...

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """Place a model anew as planned, and wait until every rank is ready."""
        ...

    async def drain_node(self, request: DrainRequest, report: Report) -> DrainReply:
        """Take a node's work away and wait until it has none, or let it work again."""
        ...

    async def unload(self, model: str) -> None:
        """Remove the placement of a model."""
        ...

    async def remove(self, digest: Digest) -> None:
        """Delete a model's files here, and forget it in the mesh where it is not placed."""
        ...

    async def doctor(self) -> DoctorReply:
        """Check what commonly goes wrong in a running daemon."""
        ...

    def shutdown(self) -> None:
        """Begin an orderly end of the daemon."""
        ...
