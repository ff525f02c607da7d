"""What one node has applied, no other node ever has differently, and so forever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

from pyagent_node.consensus.state import encode_snapshot
from pyagent_node.native import blake3
from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm

FAR_BACK: Final = 64


class CommittedNeverChanges(Always):
    """Log matching and state machine safety: one hash chain, and one state, for each index."""

    name: ClassVar[str] = "committed entries never change"

    def __init__(self) -> None:
        self._chains: dict[int, bytes] = {}
        self._states: dict[int, bytes] = {}
        self._looked: dict[tuple[int, int], int] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look at what every node has applied since the last look, and a little before."""
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            engine = machine.parts.consensus
            top = engine.state.index
            life = (machine.number, machine.lives)
            seen = self._looked.get(life, 0)
            if seen == top:
                continue
            self._looked[life] = top
            for index in range(max(1, min(seen, top) - FAR_BACK), top + 1):
                chain = engine.chain_at(index)
                if chain is not None and self._chains.setdefault(index, chain) != chain:
                    yield f"node {machine.number} applied another log up to entry {index}"
                    return
            state = blake3(encode_snapshot(engine.state))
            if self._states.setdefault(top, state) != state:
                yield f"node {machine.number} has another state at entry {top}"
