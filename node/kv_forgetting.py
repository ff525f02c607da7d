"""What the mesh forgets is not kept: the KV blocks of a removed model go, on every node."""

from __future__ import annotations

import logging
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.types import Digest
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.kv_vault import KvVault

log = logging.getLogger("pyagent_node.kv")

AGAIN_SECONDS: Final = 1.0
"""How soon the log is followed again when it could not be."""


async def forget_models(consensus: Consensus, vault: KvVault) -> None:
    """Give up the blocks of models as the log drops them, for ever.

    A node that was not there keeps them until others need the room: nobody can ask for them.
    """
    known: set[Digest] = set()
    while True:
        known = await _drop_gone(consensus, vault, known)
        try:
            async with consensus.applied(consensus.state.index) as entries:
                known = await _drop_gone(consensus, vault, known)
                async for _ in entries:
                    known = await _drop_gone(consensus, vault, known)
        except (LimitExceeded, Unavailable) as error:
            log.debug("following the log anew: %s", error)
        await trio.sleep(AGAIN_SECONDS)


async def _drop_gone(consensus: Consensus, vault: KvVault, known: set[Digest]) -> set[Digest]:
    """Drop what was known and is no more; returns what is known now."""
    models = set(consensus.state.models)
    for digest in sorted(known - models):
        try:
            count = await vault.drop_model(digest)
        except PyAgentError as error:
            log.warning("KV blocks of the removed model %s could not be removed: %s", digest, error)
        else:
            log.info("%d KV blocks of the removed model %s were given up", count, digest)
    return models
