"""The engine ``"raft-rs"``: tikv's Raft core in a trio shell, over the mesh and a durable log.

Any node proposes; the leader orders, a majority of the voters makes durable, everybody applies.
What the parts do: ``raft_node`` is the loop around the core, ``raft_links`` the streams,
``raft_members`` who is who, ``raft_storage`` the bytes on disk, ``raft_engine`` the port.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.limits import RPC_SECONDS
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.journal import COMPACT_ENTRIES
from pyagent_node.consensus.log import LogStore, StoredLog
from pyagent_node.consensus.raft_core import RAFT_RS, Kind
from pyagent_node.consensus.raft_courier import Authorise
from pyagent_node.consensus.raft_engine import RaftEngine
from pyagent_node.consensus.raft_links import Links
from pyagent_node.consensus.raft_members import Members
from pyagent_node.consensus.raft_node import Hooks, RaftNode, RaftTiming
from pyagent_node.consensus.raft_storage import (
    FOUNDING_INDEX,
    INCARNATION_BYTES,
    HardState,
    Loaded,
    decode_hard_state,
    encode_hard_state,
    founding_snapshot,
    raft_id,
    read_stored,
)
from pyagent_node.consensus.replica import REQUEST_BYTES

__all__ = ["RaftEngine", "RaftTiming", "open_raft"]

log = logging.getLogger("pyagent_node.consensus.raft")


SAVE_SECONDS = 1.0


@asynccontextmanager
async def open_raft(
    mesh: Mesh,
    store: LogStore,
    *,
    founder: bool,
    role: str,
    authorise: Authorise,
    timing: RaftTiming | None = None,
    rng: random.Random | None = None,
    new_request: Callable[[], bytes] = lambda: os.urandom(REQUEST_BYTES),
    propose_seconds: float = RPC_SECONDS,
    compact_entries: int = COMPACT_ENTRIES,
    kind: Kind = RAFT_RS,
) -> AsyncIterator[RaftEngine]:
    """Run the engine on this node; leaving the context stops it and closes the store.

    ``founder`` makes an empty log the beginning of a mesh whose only voter is this node; give it
    once in a mesh's life, for a node that forgot a log and founded another would split the mesh.
    ``role`` is this node's own.  Raises :class:`CorruptData` for a log that cannot be used, and
    the disk's :class:`Unavailable` when it fails while running: nothing is acknowledged then.
    """
    failure: BaseException | None = None
    try:
        loaded, incarnation = await _prepare(store, mesh.peer_id, founder, new_request)
        members = Members(raft_id(mesh.peer_id, incarnation), mesh.peer_id)
        engine = RaftEngine(
            mesh,
            members,
            incarnation,
            name=kind.name,
            role=role,
            propose_seconds=propose_seconds,
            new_request=new_request,
            authorise=authorise,
        )
        draw = rng or random.SystemRandom()
        engine.links = Links(mesh, engine, draw, kind.protocol)
        engine.node = RaftNode(
            store,
            loaded,
            incarnation,
            members,
            timing=timing or RaftTiming(),
            rng=draw,
            compact_entries=compact_entries,
            new_core=kind.new_core,
            hooks=Hooks(
                send=engine.send,
                feed=engine.feed,
                changed=engine.changed,
                applied=engine.applied_one,
                installed=engine.installed,
                advanced=engine.advanced,
                read=engine.read,
                disk_refused=engine.disk_refused,
                may_vote=engine.may_vote,
            ),
        )
        await engine.node.start()
        mesh.handle(kind.protocol, engine.links.serve)
        async with trio.open_nursery() as nursery:

            async def guard(task: Callable[[], Awaitable[None]]) -> None:
                nonlocal failure
                try:
                    await task()
                except (PyAgentError, RuntimeError) as error:
                    failure = failure or _fatal(error)
                    log.critical("the log cannot go on: %s", failure)
                    engine.close(failure if isinstance(failure, PyAgentError) else None)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(guard, engine.node.run)
            nursery.start_soon(engine.node.clock)
            nursery.start_soon(engine.links.run)
            try:
                yield engine
                await engine.resign()
            except BaseException as error:  # raised again below, not inside a group
                if failure is None:
                    failure = error
            engine.close()
            nursery.cancel_scope.cancel()
        if not isinstance(failure, PyAgentError):
            await _save(engine.node)
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()
    if failure is not None:
        raise failure


async def _prepare(
    store: LogStore, peer: PeerId, founder: bool, new_request: Callable[[], bytes]
) -> tuple[Loaded, bytes]:
    """Read the store; give a new one its incarnation, and the founder's its beginning."""
    loaded = read_stored(await store.load())
    if loaded.hard is not None and (loaded.snapshot_index or not founder):
        return loaded, loaded.hard.incarnation
    hard = loaded.hard
    if hard is None:
        hard = HardState(1, new_request()[:INCARNATION_BYTES], 0, 0, 0)
        await store.append((), encode_hard_state(hard))
    if founder:
        snapshot = founding_snapshot(raft_id(peer, hard.incarnation), peer)
        await store.compact(snapshot, ())
        hard = HardState(1, hard.incarnation, FOUNDING_INDEX, 0, FOUNDING_INDEX)
        await store.append((), encode_hard_state(hard))
        loaded = read_stored(StoredLog(snapshot, [], encode_hard_state(hard)))
    return loaded, decode_hard_state(encode_hard_state(hard)).incarnation


async def _save(node: RaftNode) -> None:
    """Write the commit index, so that the next start begins where this one ends."""
    try:
        with trio.move_on_after(SAVE_SECONDS, shield=True):
            await node.disk.save()
    except PyAgentError as error:
        log.debug("the commit index was not saved: %s", error)


def _fatal(error: PyAgentError | RuntimeError) -> PyAgentError:
    if isinstance(error, PyAgentError):
        return error
    return PyAgentError(
        f"The Raft core failed: {error}",
        code="raft_failed",
        remedy="Restart the node; if it happens again, please report it.",
    )
