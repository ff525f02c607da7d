"""A simulated mesh with a log that says what the test likes, and blocks in dictionaries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank, SessionId, Slice
from pyagent_node.consensus.commands import SetMeshSetting
from pyagent_node.consensus.port import Applied, ClusterState
from pyagent_node.consensus.state import State
from pyagent_node.inference.kv.port import SettledBlock
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import Report, Sealed, seal
from pyagent_node.node.kv_rests import Rests
from pyagent_node.node.kv_server import KvServer
from pyagent_node.node.kv_stream import CheckpointStream
from pyagent_node.sharding.kv_keys import BlockKey
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network
from pyagent_node.simulations.pipeline import peer

MODEL = Digest("ab" * 32)
CODEC = "f16-00000000"
A, B, C, D = (peer(number) for number in range(4))
LINKS = tuple(bytes([i]) * 32 for i in range(200))


def rank(number: int, first: int, last: int, who: PeerId, *standbys: PeerId) -> Rank:
    return Rank(number, Slice(first, last, last == 30), who, standbys)


def placed(*ranks: Rank, prepared: tuple[Rank, ...] = (), epoch: int = 4, index: int = 1) -> State:
    placement = Placement(MODEL, epoch, ranks, 2048, 8)
    ready = {MODEL: Prepared(MODEL, 9, epoch, prepared, 2048, 8, A)} if prepared else {}
    return State(index=index, placements={MODEL: placement}, prepared=ready)


class Log:
    """A log whose state is set by hand."""

    def __init__(self, state: State) -> None:
        self.state: State = state
        self._changed = trio.Event()

    def become(self, state: State) -> None:
        self.state = state
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def applied(self, after: int) -> AsyncIterator[_Entries]:
        yield _Entries(self)

    async def changed(self) -> None:
        await self._changed.wait()


class _Entries:
    def __init__(self, log: Log) -> None:
        self._log = log

    def __aiter__(self) -> _Entries:
        return self

    async def __anext__(self) -> Applied:
        await self._log.changed()
        return Applied(self._log.state.index, SetMeshSetting("standbys", None))


class Blocks(dict[BlockKey, bytes]):
    """A vault in memory."""

    def counts(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> list[int]:
        found = []
        for layer in layers:
            count = 0
            while count < len(chain) and BlockKey(model, layer, chain[count], codec) in self:
                count += 1
            found.append(count)
        return found

    async def read(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        await trio.lowlevel.checkpoint()
        return [self.get(key) for key in keys]

    async def write(self, blocks: Sequence[Sealed]) -> None:
        await trio.lowlevel.checkpoint()
        for block in blocks:
            self[block.key] = block.data

    def fill(self, layers: range, count: int, size: int = 100) -> None:
        for number in range(count):
            for layer in layers:
                key = BlockKey(MODEL, layer, LINKS[number], CODEC)
                self[key] = seal(key, bytes([number, layer]) * (size // 2))


class KvNode:
    """One node's parts of the protocol."""

    def __init__(self, mesh: SimulatedMesh, log: Log, *, rate: int = 1 << 30) -> None:
        self.mesh = mesh
        self.blocks = Blocks()
        self.adverts: list[tuple[PeerId, bytes]] = []
        self.reports: list[tuple[PeerId, Report]] = []
        self.client = KvClient(mesh)
        self.rests = Rests(mesh, self.client)
        self.server = KvServer(
            mesh,
            log,  # type: ignore[arg-type]
            self.blocks,
            self.rests,
            on_advert=lambda who, data: self.adverts.append((who, data)),
            on_report=lambda who, report: self.reports.append((who, report)),
        )
        self.stream = CheckpointStream(
            mesh,
            log,  # type: ignore[arg-type]
            self.client,
            self.blocks,
            rate=rate,
            on_report=lambda who, report: self.reports.append((who, report)),
        )


@asynccontextmanager
async def nodes(
    state: ClusterState, *who: PeerId, latency: float = 0.01, rate: int = 1 << 30
) -> AsyncIterator[tuple[SimulatedNetwork, Log, list[KvNode]]]:
    log = Log(state)  # type: ignore[arg-type]
    async with open_network(latency=latency) as network, trio.open_nursery() as nursery:
        made = [KvNode(network.node(each), log, rate=rate) for each in who]
        await network.connect_all()
        for node in made:
            nursery.start_soon(node.stream.run)
        yield network, log, made
        nursery.cancel_scope.cancel()


def settled(index: int, session: str = "5" * 32, layers: range = range(10)) -> SettledBlock:
    return SettledBlock(
        SessionId(session), A, MODEL, 4, index, LINKS[index], layers.start, layers.stop, "cells"
    )
