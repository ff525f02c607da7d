"""One voter of the consensus benchmark: a real mesh, an engine, a log on disk; told what to do.

Reads orders from stdin and writes an answer to each to stdout, one JSON object a line; ends at the
end of stdin.  The first line it writes is its address.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, Literal, cast

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command, SetMeshSetting
from pyagent_node.consensus.log import FileLog, LogStore
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.pysyncobj_engine import open_pysyncobj
from pyagent_node.consensus.raft import RaftTiming, open_raft
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh.authoriser import PeerAdmission
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig

EngineName = Literal["raft-rs", "pysyncobj"]

LOW, HIGH = 10, 86_400
"""The values that the mesh setting which serves as a payload may have."""


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """Connect to these nodes."""

    addresses: list[str]


class Vote(msgspec.Struct, frozen=True, tag="vote"):
    """Make these the voters; on the leader."""

    voters: list[str]


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """Make ``count`` changes, so many at once; the answer has the milliseconds of each."""

    count: int
    at_once: int = 1


class CommitOne(msgspec.Struct, frozen=True, tag="commit_one"):
    """Make one change, trying again until it is made, for at most so many seconds."""

    seconds: float


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Say who leads."""


Order = Connect | Vote | Commit | CommitOne | Look


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to an order; ``problem`` when it failed."""

    problem: str | None = None
    leader: str | None = None
    voters: int = 0
    index: int = 0
    milliseconds: list[float] = []
    seconds: float = 0.0


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """When an election begins: after ``low`` to ``high`` milliseconds without a leader."""

    low_ms: float
    high_ms: float


def timing() -> Timing:
    """Return the election timeout of the engines' default timing."""
    usual = RaftTiming()
    low = usual.tick_ms * usual.election_ticks
    return Timing(low_ms=low, high_ms=2 * low)


class _Anyone:
    """Admits every peer: the benchmark's nodes are on loopback among themselves."""

    def credentials(self) -> bytes:
        return b""

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        return PeerAdmission(peer[-8:], "voter")


def _anything(command: Command, proposer: PeerId, role: str | None) -> None:
    """Let every node propose."""


class Node:
    """What the orders act on."""

    def __init__(self, mesh: Libp2pMesh, engine: Consensus) -> None:
        self._mesh = mesh
        self._engine = engine
        self._value = LOW

    def command(self) -> SetMeshSetting:
        """Return a change that no other one repeats soon."""
        self._value = self._value + 1 if self._value < HIGH else LOW
        return SetMeshSetting("session_ttl", self._value)

    async def carry_out(self, order: Order) -> Done:
        """Do what is ordered."""
        match order:
            case Connect(addresses):
                for address in addresses:
                    await self._mesh.connect(address)
            case Vote(voters):
                await self._engine.reconfigure(frozenset(PeerId(v) for v in voters), frozenset())
            case Commit(count, at_once):
                return await self._commit(count, at_once)
            case CommitOne(seconds):
                return await self._commit_one(seconds)
            case Look():
                pass
        status = self._engine.status()
        return Done(leader=status.leader, voters=len(status.voters), index=status.index)

    async def _commit(self, count: int, at_once: int) -> Done:
        took: list[float] = []
        left = count

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                began = time.perf_counter()
                await self._engine.propose(self.command())
                took.append((time.perf_counter() - began) * 1000)

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(work)
        return Done(milliseconds=took, seconds=time.perf_counter() - began)

    async def _commit_one(self, seconds: float) -> Done:
        began = time.perf_counter()
        command = self.command()
        with trio.fail_after(seconds):
            while True:
                try:
                    await self._engine.propose(command)
                except PyAgentError:
                    await trio.sleep(0.001)
                else:
                    return Done(seconds=time.perf_counter() - began)


ENGINES: Final = {"raft-rs": open_raft, "pysyncobj": open_pysyncobj}

_Open = Callable[..., AbstractAsyncContextManager[Consensus]]


def _open(
    name: str, mesh: Libp2pMesh, store: LogStore, *, founder: bool
) -> AbstractAsyncContextManager[Consensus]:
    open_engine = cast("_Open", ENGINES[name])
    return open_engine(mesh, store, founder=founder, role="voter", authorise=_anything)


async def serve(name: str, seed: int, directory: Path, *, founder: bool) -> None:
    """Run a node until stdin ends."""
    key = NodeKey(bytes([seed]) * 32)
    config = MeshConfig(key, _Anyone(), listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
    async with (
        open_mesh(config) as mesh,
        _open(name, mesh, FileLog(directory), founder=founder) as engine,
    ):
        _say(mesh.addresses[0])
        node = Node(mesh, engine)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            order = msgspec.json.decode(line, type=Order)
            _say(await _answer(node.carry_out, order))


async def _answer(carry_out: Callable[[Order], Awaitable[Done]], order: Order) -> Done:
    done: Done | None = None
    found: list[str] = []
    try:
        done = await carry_out(order)
    except* PyAgentError as errors:
        found = [str(error) for error in leaves(errors)]
    return done or Done(problem=found[0])


def leaves(group: BaseExceptionGroup[PyAgentError]) -> list[PyAgentError]:
    """Return the errors in a group of groups."""
    return [
        leaf
        for each in group.exceptions
        for leaf in (leaves(each) if isinstance(each, BaseExceptionGroup) else [each])
    ]


def _say(what: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Run as a child of the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--founder", action="store_true")
    chosen = parser.parse_args()
    trio.run(lambda: serve(chosen.engine, chosen.seed, chosen.directory, founder=chosen.founder))


if __name__ == "__main__":
    main()
