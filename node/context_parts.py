"""Composes the contexts of a running node: what it keeps, the mesh's part, what the API asks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from pyagent_node.base.mesh import Mesh
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.context_collector import Collector
from pyagent_node.node.context_drafts import Drafts
from pyagent_node.node.context_encoder import EncoderSource
from pyagent_node.node.context_mesh import ContextService, Pace, open_contexts
from pyagent_node.node.context_store import SqliteContextStore, open_context_store
from pyagent_node.node.contexts import Contexts
from pyagent_node.node.nurseries import background
from pyagent_node.sharding.context.defaults import default_model


class NodeContexts(NamedTuple):
    """The contexts of a node: what the API asks, and what lies behind it."""

    service: Contexts
    mesh: ContextService
    store: SqliteContextStore


@asynccontextmanager
async def open_node_contexts(
    mesh: Mesh,
    consensus: Consensus,
    folder: Path,
    encoder: EncoderSource,
    *,
    limit_bytes: int,
    pace: Pace,
) -> AsyncIterator[NodeContexts]:
    """Run the contexts of a node, kept in ``folder``, while the block lasts.

    At most ``limit_bytes`` of bodies are kept here.  Raises what opening the store does.
    """
    async with (
        open_context_store(folder, limit_bytes=limit_bytes) as store,
        open_contexts(mesh, consensus, store, models=default_model, pace=pace) as together,
        background() as nursery,
    ):
        nursery.start_soon(Collector(together, clock=time.time).run)
        service = Contexts(together, encoder, held=store.held, drafts=Drafts(folder))
        yield NodeContexts(service, together, store)
