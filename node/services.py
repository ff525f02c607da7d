"""What the HTTP API asks of a running node; implements :class:`ApiServices`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

import psutil

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Digest
from pyagent_node.inference.drafting.remote_messages import DRAFT_PROTOCOL
from pyagent_node.inference.models import blob_messages
from pyagent_node.inference.pipeline.engine import PipelineEngine
from pyagent_node.inference.pipeline.frames import PIPE_PROTOCOL
from pyagent_node.node import (
    context_messages,
    context_views,
    journal_messages,
    kv_messages,
    kv_views,
    rpc,
    session_moves,
)
from pyagent_node.node.api.following import Report
from pyagent_node.node.api.placement_schema import DrainReply, DrainRequest, PlanView
from pyagent_node.node.api.schema import (
    ConnectReply,
    DoctorReply,
    InviteReply,
    InviteRequest,
    LoadRequest,
    MeshView,
    ModelsReply,
    ModelView,
    NodeView,
    PlacementView,
    PullRequest,
    Readiness,
    StatusView,
)
from pyagent_node.node.certificates import read_certificate
from pyagent_node.node.contexts import Contexts
from pyagent_node.node.genesis import ROLES, Role
from pyagent_node.node.governance import Governance
from pyagent_node.node.kv_service import KvService
from pyagent_node.node.live_sessions import LiveSessions
from pyagent_node.node.placement_messages import (
    DrafterReport,
    HeadReport,
    RankReport,
    ReserveReport,
)
from pyagent_node.node.runtime import Node
from pyagent_node.node.self_check import examine
from pyagent_node.node.session_admin import SessionAdmin
from pyagent_node.node.telemetry import Sample, Telemetry, resident_bytes
from pyagent_node.node.tickets import make_ticket
from pyagent_node.node.version import VERSION


class NodeServices:
    """A running node as its API sees it.

    ``shutdown`` begins the daemon's end; ``api_url`` is set once the API listens.
    """

    def __init__(self, node: Node, *, shutdown: Callable[[], None]) -> None:
        self._node = node
        self._shutdown = shutdown
        self.api_url = ""
        self.telemetry = Telemetry()
        self.telemetry.bridge(self._mesh_samples)
        self.telemetry.bridge(self._pipeline_samples)
        self.telemetry.bridge(self._part_samples)
        self.telemetry.bridge(self._transfer_samples)
        self.telemetry.bridge(self._session_samples)
        self.telemetry.bridge(lambda: kv_views.samples(node.kv))
        self.telemetry.bridge(lambda: context_views.samples(node.contexts.mesh))
        self.telemetry.bridge(self._refusal_samples)

    @property
    def engine(self) -> PipelineEngine:
        """See :class:`ApiServices`."""
        return self._node.engine

    @property
    def live(self) -> LiveSessions:
        """See :class:`ApiServices`."""
        return self._node.live

    def session_ttl(self) -> int:
        """See :class:`ApiServices`."""
        return self._node.consensus.state.settings["session_ttl"]

    @property
    def mesh(self) -> Governance:
        """See :class:`ApiServices`."""
        return self._node.governance

    @property
    def sessions(self) -> SessionAdmin:
        """See :class:`ApiServices`."""
        node = self._node
        return SessionAdmin(node.mesh, node.consensus, node.engine, node.live, node.journals.holder)

    @property
    def kv(self) -> KvService:
        """See :class:`ApiServices`."""
        return self._node.kv

    @property
    def contexts(self) -> Contexts:
        """See :class:`ApiServices`."""
        return self._node.contexts.service

    def shutdown(self) -> None:
        """See :class:`ApiServices`."""
        self._shutdown()

    # The node ----------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        """Ready when every loaded model can be asked, as far as this node can tell."""
        node = self._node
        state = node.consensus.state
        here = node.mesh.peer_id
        connected = {peer.peer_id for peer in node.mesh.peers()} | {here}
        parts = {(r.model, r.epoch, r.rank): r.state for r in node.models.parts().ranks}
        heads = {model.digest for model in node.engine.models()}
        reasons = []
        for digest, placement in state.placements.items():
            name = self._model_name(digest)
            if digest not in heads:
                reasons.append(f"this node cannot take requests for {name} yet")
            for rank in placement.ranks:
                where = parts.get((digest, placement.epoch, rank.rank), "starting")
                if rank.peer_id not in connected:
                    member = state.members.get(rank.peer_id)
                    who = member.name if member is not None else rank.peer_id
                    reasons.append(f"{who}, which holds rank {rank.rank} of {name}, is away")
                elif rank.peer_id == here and where != "ready":
                    reasons.append(f"rank {rank.rank} of {name} is {where} on this node")
        return Readiness(not reasons, tuple(reasons))

    async def status(self) -> StatusView:
        """See :class:`ApiServices`."""
        node = self._node
        return StatusView(
            time=time.time(),
            node=self._node_view(),
            mesh=self._mesh_view(),
            consensus=node.consensus.status(),
            peers=tuple(node.mesh.peers()),
            placements=await node.models.placements(),
            sessions=tuple(node.engine.sessions()),
            kv=await node.kv.view(),
        )

    def _node_view(self) -> NodeView:
        node = self._node
        memory = psutil.virtual_memory()
        return NodeView(
            peer_id=node.mesh.peer_id,
            name=node.membership.profile.name,
            version=VERSION,
            pid=os.getpid(),
            started=node.started,
            api=self.api_url,
            addresses=node.mesh.addresses,
            memory_bytes=resident_bytes(),
            system_memory_bytes=memory.total,
            system_memory_available_bytes=memory.available,
            cpus=os.cpu_count() or 1,
        )

    def _mesh_view(self) -> MeshView:
        profile = self._node.membership.profile
        genesis = profile.genesis
        expires = (
            float(read_certificate(profile.certificate).expires) if profile.certificate else None
        )
        return MeshView(
            mesh_id=profile.mesh_id,
            name=genesis.name,
            visibility=genesis.visibility,
            engine=genesis.engine,
            authority=genesis.writer,
            role=profile.role,
            certificate_expires=expires,
        )

    async def doctor(self) -> DoctorReply:
        """See :class:`ApiServices`."""
        return DoctorReply(tuple(await examine(self._node)))

    # The mesh ----------------------------------------------------------------------------------

    async def connect(self, address: str) -> ConnectReply:
        """See :class:`ApiServices`."""
        return ConnectReply(await self._node.mesh.connect(address))

    async def invite(self, request: InviteRequest) -> InviteReply:
        """See :class:`ApiServices`."""
        roles: dict[str, Role] = {role: role for role in ROLES}
        role = roles.get(request.role)
        if role is None:
            raise InvalidRequest(
                f"role is {request.role[:40]!r}; it must be one of {', '.join(ROLES)}.",
                code="bad_parameter",
                parameter="role",
            )
        ticket = make_ticket(
            self._node.membership.profile,
            role=role,
            seconds=request.ttl_seconds,
            addresses=self._node.mesh.addresses,
            now=time.time(),
        )
        return InviteReply(ticket.text, ticket.expires)

    # Models ------------------------------------------------------------------------------------

    async def models(self) -> ModelsReply:
        """See :class:`ApiServices`."""
        return ModelsReply(await self._node.models.list())

    async def pull(self, request: PullRequest, report: Report) -> ModelView:
        """See :class:`ApiServices`."""
        return await self._node.models.pull(request, report)

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """See :class:`ApiServices`."""
        return await self._node.models.load(request, report)

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """See :class:`ApiServices`."""
        return await self._node.models.plan(request, report)

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """See :class:`ApiServices`."""
        return await self._node.models.apply(request, report)

    async def drain_node(self, request: DrainRequest, report: Report) -> DrainReply:
        """See :class:`ApiServices`."""
        return await self._node.models.drain(request, report)

    async def unload(self, model: str) -> None:
        """See :class:`ApiServices`."""
        await self._node.models.unload(model)

    async def remove(self, digest: Digest) -> None:
        """See :class:`ApiServices`."""
        await self._node.models.remove(digest)
        await self._node.kv.vault.drop_model(digest)

    def _model_name(self, digest: Digest) -> str:
        record = self._node.consensus.state.models.get(digest)
        return record.name if record is not None else digest[:12]

    # Metrics -----------------------------------------------------------------------------------

    def _mesh_samples(self) -> Iterator[Sample]:
        node, m = self._node, self._node.metrics
        yield Sample("peers", "Connected, authorised peers.", len(node.mesh.peers()), "gauge")
        yield Sample("log_index", "Last applied log entry.", node.consensus.state.index, "gauge")
        for name, count in node.consensus.counters().items():
            yield Sample(f"log_{name}", "Counted by the engine of the log.", count)
        directions = ((m.frames_in, m.bytes_in, "in"), (m.frames_out, m.bytes_out, "out"))
        for frames, size, way in directions:
            labels = {"direction": way}
            yield Sample("mesh_frames", "Frames on the mesh.", frames, labels=labels)
            yield Sample("mesh_bytes", "Bytes of frames on the mesh.", size, labels=labels)
        for count, way in ((m.connections_in, "in"), (m.connections_out, "out")):
            labels = {"direction": way}
            yield Sample("mesh_connections", "Authorised connections.", count, labels=labels)
        yield Sample("mesh_dial_failures", "Dials that failed.", m.dial_failures)
        yield Sample("mesh_reconnects", "Lost peers connected again.", m.reconnects)
        for code, count in m.refused.items():
            labels = {"code": code}
            yield Sample("mesh_refused", "Refused connections and streams.", count, labels=labels)

    def _part_samples(self) -> Iterator[Sample]:
        """Ranks and heads of this node: their states, failures (each one a restart), memory."""
        told = self._node.models.parts()
        failures: Counter[tuple[str, str]] = Counter()
        parts: list[RankReport | HeadReport | ReserveReport | DrafterReport]
        parts = [*told.ranks, *told.heads, *told.reserves, *told.drafters]
        for part in parts:
            what = _part_name(part)
            key = (self._model_name(part.model), what)
            failures[key] += part.failures
            labels = {"model": key[0], "part": what, "state": part.state}
            yield Sample("part_state", "State of a rank or head (1).", 1, "gauge", labels)
        for (model, what), count in failures.items():
            labels = {"model": model, "part": what}
            text = "Failures of a rank or head, each followed by a restart."
            yield Sample("part_failures", text, count, labels=labels)
        text = "Memory of the runner processes of this node's ranks and standbys."
        used = sum(rank.memory_bytes or 0 for rank in told.ranks)
        used += sum(standby.memory_bytes or 0 for standby in told.reserves)
        used += sum(drafter.memory_bytes or 0 for drafter in told.drafters)
        yield Sample("runner_resident_bytes", text, used, "gauge")
        for drafter in told.drafters:
            labels = {"model": self._model_name(drafter.model)}
            load = drafter.load
            text = "Sessions that a drafter rank guesses for."
            yield Sample("drafter_sessions", text, load.sessions, "gauge", labels)
            text = "Questions that a drafter rank answered."
            yield Sample("drafter_questions", text, load.questions, labels=labels)
            yield Sample("drafter_guesses", "Its guesses.", load.guesses, labels=labels)

    def _transfer_samples(self) -> Iterator[Sample]:
        stats = self._node.transfers
        yield Sample("transfer_bytes", "Model bytes from peers.", stats.bytes_fetched)
        yield Sample("transfer_wasted_bytes", "Bytes that came twice.", stats.bytes_wasted)
        yield Sample("transfer_chunks", "Chunks fetched from peers.", stats.chunks_fetched)
        text = "Chunks refused because their digest was wrong."
        yield Sample("transfer_corrupt_chunks", text, stats.chunks_corrupt)

    def _session_samples(self) -> Iterator[Sample]:
        """Journals of sessions, and sessions that changed their head."""
        node = self._node
        yield from node.journals.samples()
        taken = "Sessions that this node took over from other heads."
        yield Sample("sessions_taken_over", taken, node.live.taken_over)
        bad = "Copies of journals that were refused because they had been changed."
        yield Sample("journals_refused", bad, node.recovery.bad_copies)

    def _refusal_samples(self) -> Iterator[Sample]:
        """What peers sent under each protocol and was refused; the log counts for itself."""
        node = self._node
        refused = dict(node.metrics.streams_failed)
        for protocol, counted in (
            (rpc.PROTOCOL, node.rpc.server.refused),
            (blob_messages.PROTOCOL, node.models.blobs.refused),
            (journal_messages.PROTOCOL, node.journals.holder.refused),
            (kv_messages.PROTOCOL, node.kv.server.refused),
            (context_messages.PROTOCOL, node.contexts.mesh.rpc.server.refused),
            (PIPE_PROTOCOL, node.pipeline.stages.refused),
            (PIPE_PROTOCOL, node.engine.refused),
            (DRAFT_PROTOCOL, node.pipeline.drafts.refused),
            (session_moves.PROTOCOL, node.moved.refused),
        ):
            for code, count in counted.items():
                refused[protocol, code] = refused.get((protocol, code), 0) + count
        for (protocol, code), count in sorted(refused.items()):
            if code != "stream_closed":  # a peer that went away
                labels = {"protocol": protocol, "code": code}
                yield Sample("refused", "What peers sent and was refused.", count, labels=labels)

    def _pipeline_samples(self) -> Iterator[Sample]:
        node = self._node
        yield Sample("sessions", "Sessions on this node.", len(node.engine.sessions()), "gauge")
        for view in node.pipeline.stages.views():
            labels = {"model": self._model_name(view.model), "rank": str(view.rank)}
            gauges = (
                ("stage_sessions", "Sessions of a stage.", view.sessions),
                ("stage_queued_steps", "Steps waiting in a stage.", view.queued),
                ("stage_epoch", "Epoch of a stage.", view.epoch),
            )
            for name, text, value in gauges:
                yield Sample(name, text, value, "gauge", labels)
            counters = (
                ("stage_tokens", "Tokens computed by a stage.", float(view.tokens)),
                ("stage_batches", "Batches computed by a stage.", float(view.batches)),
                ("stage_busy_seconds", "Time a stage's runner computed.", view.busy_seconds),
                ("stage_refused", "Frames refused by a stage.", float(view.refused)),
                ("stage_dropped", "Void steps dropped by a stage.", float(view.dropped)),
                ("stage_restored", "Tokens restored from KV blocks.", float(view.restored)),
                ("stage_kept", "KV blocks given to the shelf.", float(view.kept)),
                ("stage_unfit", "KV blocks that a stage could not use.", float(view.unfit)),
                ("stage_evicted", "Cells given up by pruned sessions.", float(view.evicted)),
                ("stage_evicted_bytes", "Bytes of these cells.", float(view.evicted_bytes)),
                ("stage_marked", "Chunks of which landmarks were kept.", float(view.marked)),
                (
                    "stage_joined_landmarks",
                    "Tokens taken over from landmarks of chunks.",
                    float(view.joined_landmarks),
                ),
            )
            for name, text, number in counters:
                yield Sample(name, text, number, labels=labels)


def _part_name(part: RankReport | HeadReport | ReserveReport | DrafterReport) -> str:
    match part:
        case DrafterReport():
            return "drafter"
        case HeadReport():
            return "head"
        case RankReport():
            return f"rank {part.rank}"
        case ReserveReport():
            return f"{'standby' if part.loaded else 'spare'} of rank {part.rank}"
