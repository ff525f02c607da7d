"""Composes the contexts of a running node: what it keeps, the mesh's part, what the API asks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from pyagent_node.base.mesh import Mesh
from pyagent_node.node.context_encoder import EncoderSource
from pyagent_node.node.context_local import LocalContexts
from pyagent_node.node.context_store import SqliteContextStore, open_context_store
from pyagent_node.node.contexts import Contexts


class NodeContexts(NamedTuple):
    """The contexts of a node: what the API asks, and what lies behind it."""

    service: Contexts
    mesh: LocalContexts
    store: SqliteContextStore


@asynccontextmanager
async def open_node_contexts(
    mesh: Mesh, folder: Path, encoder: EncoderSource, *, limit_bytes: int
) -> AsyncIterator[NodeContexts]:
    """Run the contexts of a node while the context lasts."""
    async with open_context_store(folder, limit_bytes=limit_bytes) as store:
        local = LocalContexts(mesh.peer_id, store, clock=time.time)
        yield NodeContexts(Contexts(local, encoder, held=store.held), local, store)
