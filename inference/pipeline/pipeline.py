"""One node's part in all pipelines: its links, its stages and its engine, wired to the mesh."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.drafting.service import DraftService
from pyagent_node.inference.kv.port import KvShelf
from pyagent_node.inference.pipeline.engine import PipelineEngine, new_session_id
from pyagent_node.inference.pipeline.frames import (
    Joined,
    PipeMessage,
    Restored,
    Result,
    StageError,
    Tail,
)
from pyagent_node.inference.pipeline.journal import JournalSink
from pyagent_node.inference.pipeline.links import PipeLinks
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.pipeline.stage_service import StageService
from pyagent_node.inference.pipeline.stage_types import StageLimits


class Pipeline(NamedTuple):
    """What a node needs of its pipeline: ``engine`` to ask, ``stages`` and ``drafts`` to serve."""

    engine: PipelineEngine
    stages: StageService
    drafts: DraftService


@asynccontextmanager
async def open_pipeline(
    mesh: Mesh,
    *,
    limits: StageLimits | None = None,
    journal: JournalSink | None = None,
    session_ids: Callable[[], SessionId] = new_session_id,
    wall: Callable[[], float] = time.time,
    speculators: Speculators | None = None,
    shelf: KvShelf | None = None,
    landmarks: bool = False,
) -> AsyncIterator[Pipeline]:
    """Take part in pipelines over ``mesh`` while the context lasts.

    ``journal`` is told of the sessions that this node heads; ``wall`` gives Unix seconds;
    ``speculators`` guess for the requests that ask for it; ``shelf`` keeps KV blocks, and those of
    pieces that are made for this head's sessions with ``landmarks``, too.
    """
    stages = StageService(mesh.peer_id, limits, shelf)
    drafts = DraftService()
    speculators = speculators or Speculators()

    def deliver(sender: PeerId, message: PipeMessage, tail: Tail) -> None:
        if isinstance(message, Result):
            engine.on_result(sender, message)
        elif isinstance(message, Restored | Joined):
            engine.on_restored(sender, message)
        elif isinstance(message, StageError) and engine.heads(message.session):
            engine.on_error(sender, message)
        else:
            stages.receive(sender, message, tail)

    def lost(peer: PeerId, control: bool, error: PyAgentError) -> None:
        engine.link_lost(peer, control=control)
        stages.link_lost(peer, control=control)

    links = PipeLinks(mesh, deliver, lost)
    stages.attach(links)
    engine = PipelineEngine(
        mesh.peer_id,
        links,
        stages,
        session_ids=session_ids,
        journal=journal,
        wall=wall,
        speculators=speculators,
        shelf=shelf,
    )
    engine.pieces.landmarks = landmarks

    speculators.connect(mesh, engine.offered)

    async def follow_peers() -> None:
        async with mesh.events() as events:
            async for event in events:
                if event.change == "down":
                    engine.peer_down(event.peer_id)
                    stages.peer_down(event.peer_id)
                else:
                    engine.peer_up()

    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        links.start(nursery)
        drafts.start(mesh)
        nursery.start_soon(follow_peers)
        try:
            yield Pipeline(engine, stages, drafts)
        except BaseException as error:  # raised again below, not in a group
            failure = error
        links.stop()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
