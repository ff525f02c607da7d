"""Opens the consensus engine that a mesh's genesis names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.files import write_atomic
from pyagent_node.base.mesh import Mesh
from pyagent_node.consensus.log import FileLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.home import Home
from pyagent_node.node.membership import Membership

ENGINES: Final = ("raft-rs", "single")
"""The engines that a mesh may be created with."""
DEFAULT_ENGINE: Final = "raft-rs"


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
        from pyagent_node.consensus.single import open_single  # noqa: PLC0415 - one engine a mesh

        return open_single(mesh, store, leader=genesis.writer, role=profile.role)
    marker = home.mesh_dir(profile.mesh_id) / "bootstrapped"
    founder = genesis.writer == mesh.peer_id and not marker.exists()
    if genesis.engine == "raft-rs":
        from pyagent_node.consensus.raft import open_raft  # noqa: PLC0415

        engine = open_raft(
            mesh, store, founder=founder, role=profile.role, authorise=membership.authorise
        )
        return _founded_once(engine, marker if founder else None)
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
