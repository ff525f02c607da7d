"""The engine ``"pysyncobj"``: PySyncObj's Raft in the same shell, log and streams as ``"raft-rs"``.

Two implementations of Raft that have nothing in common but the paper keep the same promises here,
under one suite of tests.  What this one costs more is said in ``pysyncobj_core``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from pyagent_node.base.limits import RPC_SECONDS
from pyagent_node.base.mesh import Mesh
from pyagent_node.consensus.journal import COMPACT_ENTRIES
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.pysyncobj_core import PySyncCore
from pyagent_node.consensus.raft import RaftEngine, RaftTiming, open_raft
from pyagent_node.consensus.raft_core import Kind
from pyagent_node.consensus.raft_courier import Authorise
from pyagent_node.consensus.replica import REQUEST_BYTES

PYSYNCOBJ = Kind("pysyncobj", "/pyagent/pysyncobj/1", PySyncCore)


def open_pysyncobj(
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
) -> AbstractAsyncContextManager[RaftEngine]:
    """Run the engine on this node; see :func:`pyagent_node.consensus.raft.open_raft`.

    Raises what that raises, and :class:`ConfigError` (``bad_timing``) for an election timeout of
    not more than three heartbeats.
    """
    return open_raft(
        mesh,
        store,
        founder=founder,
        role=role,
        authorise=authorise,
        timing=timing,
        rng=rng,
        new_request=new_request,
        propose_seconds=propose_seconds,
        compact_entries=compact_entries,
        kind=PYSYNCOBJ,
    )
