"""Nodes of a simulated network, by short names."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pyagent_node.base.types import PeerId
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network


class Place:
    """A node that may run or not: a name, the peer id made of it, a role."""

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        self.role = role
        self.peer_id: PeerId = NodeKey(hashlib.sha256(name.encode()).digest()).peer_id


class Network:
    """A simulated network in which every node that starts knows all that run."""

    def __init__(self, network: SimulatedNetwork) -> None:
        self.simulated = network
        self.running: dict[PeerId, SimulatedMesh] = {}

    def node(self, name: str, role: str = "learner") -> Place:
        return Place(name, role)

    @asynccontextmanager
    async def started(self, place: Place) -> AsyncIterator[SimulatedMesh]:
        """Run a node; at the end it crashes, so its next life begins with nothing in memory."""
        mesh = self.simulated.node(place.peer_id, name=place.name, role=place.role)
        self.running[place.peer_id] = mesh
        try:
            for peer, other in list(self.running.items()):
                if peer != place.peer_id and self.simulated.reachable(place.peer_id, peer):
                    await mesh.connect(other.addresses[0])
            yield mesh
        finally:
            del self.running[place.peer_id]
            self.simulated.crash(place.peer_id)

    def cut(self, a: Place, b: Place) -> None:
        self.simulated.cut(a.peer_id, b.peer_id)

    def heal(self, a: Place, b: Place) -> None:
        self.simulated.heal(a.peer_id, b.peer_id)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    async with open_network(latency=0.01) as simulated:
        yield Network(simulated)
