"""The engines under test, opened alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.raft import open_raft

from .cluster import Opener


def anyone(command: Command, proposer: PeerId, role: str | None) -> None:
    """Let everyone propose everything."""


def raft_rs(
    mesh: Mesh,
    store: LogStore,
    *,
    founder: bool,
    rng: random.Random,
    new_request: Callable[[], bytes],
    compact_entries: int,
) -> AbstractAsyncContextManager[Consensus]:
    """Open the engine "raft-rs"."""
    return open_raft(
        mesh,
        store,
        founder=founder,
        role="voter",
        authorise=anyone,
        rng=rng,
        new_request=new_request,
        compact_entries=compact_entries,
    )


ENGINES: Final[dict[str, Opener]] = {"raft-rs": raft_rs}
