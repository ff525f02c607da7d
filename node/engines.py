"""Opens the consensus engine that a mesh's genesis names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.files import write_atomic
from pyagent_node.base.mesh import Mesh
from pyagent_node.consensus.log import FileLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.raft import open_raft
from pyagent_node.consensus.raft_core import RAFT_RS, Kind
from pyagent_node.consensus.single import open_single
from pyagent_node.node.genesis import Genesis
from pyagent_node.node.home import Home
from pyagent_node.node.membership import Membership


def open_consensus(
    mesh: Mesh, home: Home, membership: Membership
) -> AbstractAsyncContextManager[Consensus]:
    """Open the engine that the mesh's genesis names.

    Raises :class:`Unsupported` (``unknown_engine``).
    """
    profile = membership.profile
    genesis = profile.genesis
    store = FileLog(home.log_dir(profile.mesh_id))
    if genesis.engine == "single":
        return open_single(mesh, store, leader=genesis.writer, role=profile.role)
    marker = home.mesh_dir(profile.mesh_id) / "bootstrapped"
    founder = genesis.writer == mesh.peer_id and not marker.exists()
    engine = open_raft(
        mesh,
        store,
        founder=founder,
        role=profile.role,
        authorise=membership.authorise,
        kind=_kind(genesis),
    )
    return _founded_once(engine, marker if founder else None)


def _kind(genesis: Genesis) -> Kind:
    if genesis.engine == "raft-rs":
        return RAFT_RS
    if genesis.engine == "pysyncobj":
        from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ  # noqa: PLC0415 - seldom

        return PYSYNCOBJ
    raise Unsupported(
        f"The mesh {genesis.name} uses the consensus engine {genesis.engine!r}.",
        code="unknown_engine",
        remedy="Update pyagent-node on this machine.",
    )


@asynccontextmanager
async def _founded_once(
    engine: AbstractAsyncContextManager[Consensus], marker: Path | None
) -> AsyncIterator[Consensus]:
    """Run ``engine``; note that the mesh has begun, so that a lost log never begins it again.

    A creator without its log comes back as any other node: it is given the log by the others.
    """
    async with engine as consensus:
        if marker is not None:
            text = b"This node began the mesh's log; see docs/consensus.md before removing this.\n"
            await trio.to_thread.run_sync(write_atomic, marker, text)
        yield consensus
