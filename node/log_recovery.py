"""``raft recover``: begins a mesh's log anew from this node's copy, while its daemon is stopped."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import msgspec
import trio

from pyagent_node.base.errors import NotFound, Unsupported
from pyagent_node.base.files import mapped
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.log import FileLog
from pyagent_node.consensus.raft_recovery import Recovered, recover
from pyagent_node.node.home import Home
from pyagent_node.node.profiles import Clock, active_profile


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the log.

    The state is that after entry ``applied``; what came after ``committed`` was not known here to
    be agreed on.  It counts as entry ``index`` now.  ``lost`` are the other nodes that voted or
    followed before; ``backup`` is the directory with the log as it was.
    """

    mesh: str
    index: int
    term: int
    applied: int
    committed: int
    lost: tuple[PeerId, ...]
    backup: str


def recover_log(home: Home, mesh: str = "", *, clock: Clock = time.time) -> Recovery:
    """Make this node the only voter of its mesh (``mesh`` names one of several).

    The old log is copied aside first.  Raises :class:`Conflict` (``in_use``) while the daemon
    runs, :class:`Unsupported` (``one_writer``) for an engine without voters, :class:`NotFound`
    (``no_log``), :class:`CorruptData` for a damaged log and :class:`Unavailable` when the disk
    fails; the log is then as it was.
    """
    profile = active_profile(home, mesh)
    if profile.genesis.engine == "single":
        raise Unsupported(
            "The engine of this mesh has one writer and no voters; there is nothing to rebuild.",
            code="one_writer",
            remedy="Restore the writer's home from a backup.",
        )
    with home.lock():
        directory = home.log_dir(profile.mesh_id)
        if not directory.is_dir():
            raise NotFound(
                f"This node has no log of the mesh {profile.genesis.name}.",
                code="no_log",
                remedy="Do it on a node that voted or followed.",
            )
        backup = _copy(directory, int(clock()))
        done = trio.run(_recover, directory, home.node_key().peer_id)
    return Recovery(
        mesh=profile.genesis.name,
        index=done.index,
        term=done.term,
        applied=done.applied,
        committed=done.committed,
        lost=done.lost,
        backup=str(backup),
    )


async def _recover(directory: Path, peer_id: PeerId) -> Recovered:
    return await recover(FileLog(directory), peer_id)


def _copy(directory: Path, now: int) -> Path:
    number = now
    while (backup := directory.with_name(f"{directory.name}-before-{number}")).exists():
        number += 1
    with mapped(backup, "copying the log to"):
        shutil.copytree(directory, backup)
    return backup
