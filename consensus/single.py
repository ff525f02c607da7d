"""The engine ``"single"``: a durable replicated log that one node, the mesh's creator, writes.

Every node holds the whole log.  The writer orders proposals, makes them durable, then hands them
out; the others forward their proposals to it and follow.  Each keeps what it was given (synced
before it is acknowledged), and catches up from there when it is back.  If the writer is away,
nothing can be decided, and everything that was decided stays in force.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from pyagent_node.base.limits import RPC_SECONDS
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.journal import COMPACT_ENTRIES, Journal
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.replica import REQUEST_BYTES
from pyagent_node.consensus.single_follower import Follower
from pyagent_node.consensus.single_leader import Leader
from pyagent_node.consensus.single_messages import PROTOCOL

SingleEngine = Leader | Follower


@asynccontextmanager
async def open_single(
    mesh: Mesh,
    store: LogStore,
    *,
    leader: PeerId,
    role: str = "voter",
    propose_seconds: float = RPC_SECONDS,
    compact_entries: int = COMPACT_ENTRIES,
    new_request: Callable[[], bytes] = lambda: os.urandom(REQUEST_BYTES),
    rng: random.Random | None = None,
) -> AsyncIterator[SingleEngine]:
    """Run the engine on this node; leaving the context stops it and closes the store.

    ``leader`` is the mesh's writer (``Genesis.writer``), ``role`` this node's own.  Raises
    :class:`CorruptData` (``log_corrupt``, ``bad_snapshot``) naming the file and the remedy.
    """
    journal = Journal(store, compact_entries=compact_entries)
    failure: BaseException | None = None
    try:
        await journal.open()
        async with trio.open_nursery() as nursery:
            engine: SingleEngine
            if mesh.peer_id == leader:
                engine = Leader(
                    mesh, journal, propose_seconds=propose_seconds, new_request=new_request
                )
                nursery.start_soon(engine.write)
                mesh.handle(PROTOCOL, engine.serve)
            else:
                engine = Follower(
                    mesh,
                    journal,
                    leader=leader,
                    role=role,
                    propose_seconds=propose_seconds,
                    new_request=new_request,
                    rng=rng,
                )
                nursery.start_soon(engine.watch)
                nursery.start_soon(engine.follow)
            try:
                yield engine
            except BaseException as error:  # raised again below, not inside a group
                failure = error
            engine.close()
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()
    if failure is not None:
        raise failure
