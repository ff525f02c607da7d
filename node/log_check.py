"""Do all nodes hold the same log?  Asks each for the hash chain over it and compares.

A chain is a hash over every entry so far, so equal chains at one index mean equal logs up to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.api.mesh_schema import ChainView, Verdict, VerifyReply
from pyagent_node.node.rpc import Rpc

SECONDS: Final = 5.0
"""Longest wait for a node's answer."""
NEWEST: Final = -1
"""Asks for the chain at the last entry that was applied."""


class AskChain(msgspec.Struct, frozen=True, tag="ask_chain"):
    """What is your chain up to entry ``index``?"""

    index: int


class Chain(msgspec.Struct, frozen=True, tag="chain"):
    """The chain at ``index``, ``None`` when it is not kept; ``applied`` is the last entry here."""

    index: int
    applied: int
    chain: bytes | None


class LogCheck:
    """Answers others, and compares; one for each node."""

    def __init__(self, mesh: Mesh, consensus: Consensus, rpc: Rpc) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._rpc = rpc
        rpc.register(AskChain, self._answer)

    def chain(self, index: int = NEWEST) -> Chain:
        """Return this node's own answer."""
        applied = self._consensus.state.index
        at = applied if index == NEWEST else index
        known = self._consensus.chain_at(at) if 0 <= at <= applied else None
        return Chain(at, applied, known)

    async def _answer(self, peer: PeerId, ask: AskChain, tail: bytes) -> tuple[Chain, bytes]:
        await trio.lowlevel.checkpoint()
        return self.chain(ask.index), b""

    async def compare(self, names: Mapping[PeerId, str]) -> VerifyReply:
        """Compare the logs of all nodes that follow the log with this node's, as it is now.

        A node that is behind is compared at its own last entry; ``names`` are for people.
        """
        own = self.chain()
        status = self._consensus.status()
        here = {peer.peer_id for peer in self._mesh.peers()}
        follow = {*status.voters, *status.learners} or here
        views: list[ChainView] = []

        async def one(peer: PeerId) -> None:
            verdict, index, detail = await self._look(peer, own, peer in here)
            name = names.get(peer, peer)
            views.append(
                ChainView(peer_id=peer, name=name, verdict=verdict, index=index, detail=detail)
            )

        async with trio.open_nursery() as nursery:
            for peer in sorted(follow - {self._mesh.peer_id}):
                nursery.start_soon(one, peer)
        return VerifyReply(
            index=own.index,
            chain=own.chain.hex() if own.chain is not None else None,
            good=not any(view.verdict == "different" for view in views),
            nodes=tuple(sorted(views, key=lambda view: (view.name, view.peer_id))),
        )

    async def _look(
        self, peer: PeerId, own: Chain, present: bool
    ) -> tuple[Verdict, int | None, str | None]:
        """Return the verdict on a peer's log, where it was compared, and what else to say."""
        if not present:
            return "unreachable", None, "not connected"
        try:
            theirs, _ = await self._rpc.call(peer, AskChain(own.index), Chain, seconds=SECONDS)
            mine = own.chain
            behind = theirs.applied < own.index
            if behind:
                mine = self.chain(theirs.applied).chain
                theirs, _ = await self._rpc.call(
                    peer, AskChain(theirs.applied), Chain, seconds=SECONDS
                )
        except PyAgentError as error:
            return "unreachable", None, error.message
        index = theirs.index
        if mine is None or theirs.chain is None:
            return "not_kept", index, "no hash so old is kept"
        if mine != theirs.chain:
            return "different", index, "its log is another one"
        if behind:
            return "behind", index, f"the same as far as it goes, {own.index - index} entries less"
        return "same", index, None
