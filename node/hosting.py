"""Puts a node's model services together: hosting of placements, answers to peers, operations."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId, Placement, Slice
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.device_memory import device_memories
from pyagent_node.inference.llama.memory import available_memory
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.pipeline.pipeline import Pipeline
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.inference.power import read_power
from pyagent_node.node.assets import LocalAssets
from pyagent_node.node.draft_maker import ModelDefaults
from pyagent_node.node.facts import FactsProvider
from pyagent_node.node.healer import Healer
from pyagent_node.node.models import NodeModels
from pyagent_node.node.nurseries import background
from pyagent_node.node.outfits import with_speeds
from pyagent_node.node.placement_board import PlacementBoard
from pyagent_node.node.placement_messages import (
    AskFacts,
    AskPlacements,
    FactsReply,
    PlacementReports,
)
from pyagent_node.node.placement_parts import Assets
from pyagent_node.node.placements import PlacementController
from pyagent_node.node.planning import facts_reply, planner_shape, survey
from pyagent_node.node.rebalancing import Rebalancer, Speeds
from pyagent_node.node.resharding import Resharder
from pyagent_node.node.rpc import Rpc
from pyagent_node.node.speeds import SpeedBook

_SLICE: Final = re.compile(r"[0-9]{1,6}-[0-9]{1,6}(\+head)?", re.ASCII)


@asynccontextmanager
async def open_models(
    *,
    mesh: Mesh,
    consensus: Consensus,
    rpc: Rpc,
    pipeline: Pipeline,
    store: ModelStore,
    name: str,
    defaults: ModelDefaults | None = None,
    threads: int | None = None,
    memory: Callable[[], int] | None = None,
    assets: Assets | None = None,
    clock: Callable[[], float] = time.time,
    behind: Callable[[Digest], int] | None = None,
    speed_book: SpeedBook | None = None,
    on_battery: str = "less",
) -> AsyncIterator[NodeModels]:
    """Host this node's parts of all placements, and serve models and facts to peers.

    ``name`` is the node's; ``threads`` is what each slice computes with and ``memory`` what models
    may take (``None``: what is free).  ``assets`` is for tests.  ``behind`` returns how many KV
    blocks of a model's sessions this node has still to send to prepared ranks: a change waits a
    moment for them.  ``speed_book`` knows what slices were measured to do; ``on_battery`` is
    the setting.
    """

    def held(digest: Digest) -> tuple[Slice, ...]:
        return _held(store, digest)

    peer_id: PeerId = mesh.peer_id
    facts = FactsProvider(
        peer_id,
        name,
        held,
        threads=threads,
        memory=memory or available_memory,
        speeds=speed_book,
        power=read_power,
        memories=device_memories,
        on_battery=on_battery,
    )
    controller = PlacementController(
        peer_id,
        consensus,
        pipeline,
        assets or LocalAssets(mesh, store, threads=threads),
        behind=behind,
    )

    async def nodes(model: Digest) -> dict[PeerId, NodeFacts]:
        found = await survey(mesh, rpc, facts, model, distances=False)
        return {node.peer_id: node for node in found.nodes}

    healer = Healer(
        mesh=mesh,
        consensus=consensus,
        rpc=rpc,
        own=controller.reports,
        facts=nodes,
        shapes=Shapes(store).get,
    )

    board = PlacementBoard(mesh, rpc, consensus, healer.reports)
    resharder = Resharder(peer_id, consensus, board)

    speeds, shapes = Speeds(), Shapes(store)

    async def slowness(placement: Placement) -> dict[PeerId, float]:
        speeds.forget(consensus.state.placements)
        shape = await shapes.get(placement.model)
        if shape is None:
            return {}
        told = await board.reports({rank.peer_id for rank in placement.ranks})
        facts = with_speeds(await nodes(placement.model), placement, shape)
        return speeds.slowness(placement, shape, facts, told)

    def epoch_of(model: Digest) -> int:
        placement = consensus.state.placements.get(model)
        return placement.epoch if placement is not None else 0

    async def answer_facts(peer: PeerId, ask: AskFacts, tail: bytes) -> tuple[FactsReply, bytes]:
        return await facts_reply(mesh, facts, ask), b""

    async def answer_placements(
        peer: PeerId, ask: AskPlacements, tail: bytes
    ) -> tuple[PlacementReports, bytes]:
        return healer.reports(), b""

    rpc.register(AskFacts, answer_facts)
    rpc.register(AskPlacements, answer_placements)
    blobs = BlobServer(store, epoch_of=epoch_of)
    blobs.attach(mesh)
    async with background() as nursery:
        nursery.start_soon(controller.run)
        nursery.start_soon(healer.run)
        nursery.start_soon(resharder.run)
        models = NodeModels(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            store=store,
            facts=facts,
            board=board,
            blobs=blobs,
            defaults=defaults or ModelDefaults(),
            clock=clock,
            resharder=resharder,
        )
        rebalancer = Rebalancer(consensus, models.placer, slowness)
        nursery.start_soon(rebalancer.run)
        yield models


class Shapes:
    """The sizes of models, from the headers that lie here."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._known: dict[Digest, ModelShape] = {}

    async def get(self, model: Digest) -> ModelShape | None:
        """Return a model's sizes, ``None`` while its header is not here."""
        if model not in self._known:
            try:
                file = await trio.to_thread.run_sync(self._store.model_file, model)
                self._known[model] = planner_shape(file.header, model[:12])
            except PyAgentError:
                return None
        return self._known[model]


def _held(store: ModelStore, digest: Digest) -> tuple[Slice, ...]:
    """Return the slices whose bytes lie here: all layers of a whole file, or those written out."""
    try:
        stored = store.get(digest)
        if stored.path is None:
            return tuple(map(_parse_slice, filter(_SLICE.fullmatch, stored.slices)))
        return (Slice(0, model_shape(store.model_file(digest).header).n_layers, True),)
    except PyAgentError:
        return ()


def _parse_slice(text: str) -> Slice:
    layers, _, head = text.partition("+")
    first, _, last = layers.partition("-")
    return Slice(int(first), int(last), head == "head")
