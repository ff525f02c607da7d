"""Composes one running node: mesh, membership, log, requests, pipeline, models.

Each part is opened after what it needs and closed before it.  A background task of a part guards
itself against whatever peers do; if it fails all the same, the node as a whole fails with
``subsystem_failed``, because half a node would answer wrongly for a long time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import psutil
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.llama.memory import available_memory
from pyagent_node.inference.models.fetching import TransferStats
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.pipeline.engine import PipelineEngine
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.node.assets import LocalAssets
from pyagent_node.node.config import Settings
from pyagent_node.node.context_encoder import open_encoders
from pyagent_node.node.context_mesh import Pace
from pyagent_node.node.context_parts import NodeContexts, open_node_contexts
from pyagent_node.node.draft_model import DraftModel, keep_drafting
from pyagent_node.node.engines import open_consensus
from pyagent_node.node.governance import Governance
from pyagent_node.node.home import Home
from pyagent_node.node.hosting import open_models
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.joining import keep_fresh, merge_bootstrap
from pyagent_node.node.journals import JournalKeeper, open_journals
from pyagent_node.node.kv_service import KvService, open_kv
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.node.live_sessions import LiveSessions
from pyagent_node.node.log_check import LogCheck
from pyagent_node.node.logs import Redactor
from pyagent_node.node.membership import Membership, enforce
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig, MeshLimits, MeshMetrics
from pyagent_node.node.models import ModelDefaults, NodeModels
from pyagent_node.node.nurseries import background
from pyagent_node.node.profiles import active_profile
from pyagent_node.node.registrar import Registrar
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.node.session_moves import MovedSessions
from pyagent_node.node.session_recovery import SessionRecovery, open_sessions
from pyagent_node.node.shaping import parse_shape
from pyagent_node.node.speeds import SpeedBook
from pyagent_node.node.steward import Steward
from pyagent_node.sharding.block_disk import open_real_disk
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.kv_codec import level_named

log = logging.getLogger("pyagent_node.daemon")

IDLE_LOOK_SECONDS: Final = 0.05
"""How often a node that is ending looks whether its sessions are over."""


@dataclass(frozen=True, slots=True)
class Node:
    """The parts of a running node, for the API in front of them."""

    settings: Settings
    home: Home
    key: NodeKey
    membership: Membership
    mesh: Libp2pMesh
    metrics: MeshMetrics
    consensus: Consensus
    rpc: Rpc
    pipeline: Pipeline
    models: NodeModels
    transfers: TransferStats
    journals: JournalKeeper
    kv: KvService
    contexts: NodeContexts
    recovery: SessionRecovery
    live: LiveSessions
    moved: MovedSessions
    governance: Governance
    started: float

    @property
    def engine(self) -> PipelineEngine:
        """Answers generation requests."""
        return self.pipeline.engine

    async def idle(self) -> None:
        """Wait until no session is in progress on this node, as head or as rank."""
        while self.engine.sessions():  # noqa: ASYNC110 - of three owners, none tells
            await trio.sleep(IDLE_LOOK_SECONDS)


@asynccontextmanager
async def open_node(settings: Settings, home: Home, redactor: Redactor) -> AsyncIterator[Node]:
    """Run a node while the context lasts.

    Raises what its parts raise when they cannot start: :class:`NotFound` (``no_mesh``),
    :class:`CorruptData` (``log_corrupt``, ``bad_profile``), :class:`ConfigError`
    (``cannot_listen``), :class:`Unsupported` (``unknown_engine``).
    """
    key = home.node_key()
    profile = active_profile(home, settings.mesh)
    if profile.psk is not None:
        redactor.hide(profile.psk.hex())
    membership = Membership(profile, clock=time.time)
    metrics = MeshMetrics()
    config = MeshConfig(
        key=key,
        membership=membership,
        psk=profile.psk,
        listen=settings.listen,
        announce=settings.announce,
        bootstrap=merge_bootstrap(profile, settings.bootstrap),
        mdns=settings.mdns,
        fingerprint=profile.genesis.fingerprint,
        limits=MeshLimits(max_peers=settings.max_peers),
        metrics=metrics,
        shape=parse_shape(settings.shape),
    )
    store = await trio.to_thread.run_sync(ModelStore, settings.models_dir(home))
    transfers = TransferStats()
    threads = settings.threads or None
    book = await trio.to_thread.run_sync(SpeedBook, home.speeds_path)
    suffix = SuffixDrafters()
    speculators = Speculators([suffix], default=settings.speculation)
    async with (
        open_mesh(config) as mesh,
        open_consensus(mesh, home, membership) as consensus,
        open_rpc(mesh) as rpc,
        open_journals(mesh, consensus, rpc, key) as journals,
        open_kv(
            mesh,
            consensus,
            KvVault(block_store(settings, home)),
            stream_bytes_per_second=settings.kv_stream_bytes_per_second,
            level=level_named(settings.kv_level),
        ) as kv,
        open_encoders(mesh, store, settings) as encoders,
        open_node_contexts(
            mesh,
            consensus,
            home.contexts_dir(profile.mesh_id),
            encoders,
            limit_bytes=settings.context_disk_bytes,
            pace=Pace(
                bytes_per_second=settings.context_bytes_per_second,
                collect=settings.context_keep_seconds,
            ),
        ) as contexts,
        open_pipeline(
            mesh,
            journal=journals,
            speculators=speculators,
            shelf=kv if settings.kv_memory_bytes else None,
            landmarks=settings.context_landmarks,
        ) as pipeline,
        open_models(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            pipeline=pipeline,
            store=store,
            name=profile.name,
            defaults=ModelDefaults(settings.n_ctx, settings.n_seq),
            threads=threads,
            memory=memory_budget(settings.memory_limit),
            assets=LocalAssets(mesh, store, threads=threads, stats=transfers, speeds=book),
            behind=kv.behind,
            speed_book=book,
            on_battery=settings.on_battery,
        ) as models,
        open_sessions(mesh.peer_id, consensus, rpc, journals, pipeline.engine) as sessions,
        background() as nursery,
    ):
        membership.bind(consensus)
        kv.on_report = journals.blocks_held
        kv.rests.moved_on = pipeline.stages.moved_on
        registrar = _registrar(mesh, membership, consensus, key)
        steward = Steward(mesh, consensus, clock=time.time)
        tasks: dict[str, Callable[[], Awaitable[None]]] = {
            "membership": lambda: enforce(consensus, mesh.recheck),
            "steward": steward.run,
            "certificate": lambda: keep_fresh(
                home, membership, mesh, key, clock=time.time, registrar=registrar
            ),
        }
        if registrar is not None:
            tasks["registrar"] = registrar.admit_self
        if settings.drafter:
            draft_model = DraftModel(settings.drafter, settings.n_ctx, settings.n_seq, threads)
            tasks["drafter"] = lambda: keep_drafting(draft_model, store, speculators, suffix)
        for name, task in tasks.items():
            nursery.start_soon(_guard, name, task)
        yield Node(
            settings=settings,
            home=home,
            key=key,
            membership=membership,
            mesh=mesh,
            metrics=metrics,
            consensus=consensus,
            rpc=rpc,
            pipeline=pipeline,
            models=models,
            transfers=transfers,
            journals=journals,
            kv=kv,
            contexts=contexts,
            recovery=sessions.recovery,
            live=sessions.live,
            moved=sessions.moved,
            governance=Governance(
                mesh, consensus, membership, LogCheck(mesh, consensus, rpc), clock=time.time
            ),
            started=time.time(),
        )


def block_store(settings: Settings, home: Home) -> BlockStore:
    """Return the store of KV blocks as the settings say."""
    memory, limit = settings.kv_memory_bytes, settings.kv_disk_bytes
    disk = open_real_disk(home.kv_dir, limit) if memory and limit else None
    return BlockStore(memory_bytes=memory, disk=disk)


def memory_budget(limit: int) -> Callable[[], int]:
    """Return a function that tells how much memory a model may take now.

    ``limit`` bounds what all runners use together; 0 means whatever is free.
    """

    def free() -> int:
        if not limit:
            return available_memory()
        return max(0, min(available_memory(), limit - runner_bytes()))

    return free


def runner_bytes() -> int:
    """Return the resident memory of this process's children: the runners."""
    used = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            used += int(child.memory_info().rss)
    return used


def _registrar(
    mesh: Libp2pMesh, membership: Membership, consensus: Consensus, key: NodeKey
) -> Registrar | None:
    if membership.profile.authority_key is None:
        return None
    registrar = Registrar(membership, consensus, key.peer_id, clock=time.time)
    registrar.attach(mesh)
    return registrar


async def _guard(name: str, task: Callable[[], Awaitable[None]]) -> None:
    """Run a part; its failure ends the node, with a line that says which part it was."""
    try:
        await task()
    except Exception as error:
        log.critical("the %s failed, the node cannot go on: %s", name, error, exc_info=error)
        raise PyAgentError(
            f"The node's {name} failed: {error}",
            code="subsystem_failed",
            remedy="See the log; if it happens again, please report it.",
            subsystem=name,
        ) from error
