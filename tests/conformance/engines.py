"""The engines under test, opened alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.pysyncobj_engine import open_pysyncobj
from pyagent_node.consensus.raft import open_raft

from .cluster import Opener


def anyone(command: Command, proposer: PeerId, role: str | None) -> None:
    """Let everyone propose everything."""


def opener(open_engine: Callable[..., AbstractAsyncContextManager[Consensus]]) -> Opener:
    """Return what opens an engine as the suite does: all voters, all trusted."""

    def open_it(
        mesh: Mesh,
        store: LogStore,
        *,
        founder: bool,
        rng: random.Random,
        new_request: Callable[[], bytes],
        compact_entries: int,
        **others: Any,
    ) -> AbstractAsyncContextManager[Consensus]:
        settings: dict[str, Any] = {"role": "voter", "authorise": anyone, **others}
        return open_engine(
            mesh,
            store,
            founder=founder,
            rng=rng,
            new_request=new_request,
            compact_entries=compact_entries,
            **settings,
        )

    return open_it


ENGINES: Final[dict[str, Opener]] = {
    "raft-rs": opener(open_raft),
    "pysyncobj": opener(open_pysyncobj),
}
