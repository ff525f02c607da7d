"""Peers of the mesh that are no part of the cluster, and talk all the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import SimulatedMesh

from .clients import Clients
from .cluster import Cluster, Opener, cluster, simulate

Recorded = list[tuple[str, Frame]]


async def send_all(
    stranger: SimulatedMesh, made: Cluster, protocol: str, frames: list[Frame]
) -> int:
    """Send frames to every node, each as far as the stream lives; return how many were taken."""
    sent = 0
    for machine in made.machines:
        try:
            stream: FrameStream = await stranger.open(machine.peer_id, protocol)
        except PyAgentError:
            continue
        for frame in frames:
            try:
                with trio.fail_after(5):
                    await stream.send(frame)
            except (PyAgentError, trio.TooSlowError):
                break
            sent += 1
            await trio.sleep(0.01)
        await stream.aclose()
    return sent


def damaged(frame: Frame, rng: random.Random) -> Frame:
    """Return a frame with some bits changed, cut short, or of noise."""
    header, tail = bytearray(frame.header), bytearray(frame.tail)
    match rng.randrange(4):
        case 0 if header:
            header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
        case 1 if tail:
            tail[rng.randrange(len(tail))] ^= 1 << rng.randrange(8)
        case 2:
            return Frame(bytes(header[: rng.randrange(len(header) + 1)]), bytes(tail))
        case _:
            return Frame(rng.randbytes(rng.randrange(200)), rng.randbytes(rng.randrange(2000)))
    return Frame(bytes(header), bytes(tail))


def harmless(engine: Opener, frames: Callable[[Recorded, str, random.Random], list[Frame]]) -> None:
    """Let a stranger send ``frames``, made of what members said; nothing must change."""

    async def program() -> None:
        async with cluster(engine) as made:
            recorded: Recorded = []

            def listen(
                sender: PeerId, receiver: PeerId, protocol: str, frame: Frame
            ) -> list[Frame]:
                if len(recorded) < 3000:
                    recorded.append((protocol, frame))
                return [frame]

            made.network.meddler = listen
            await made.form(3)
            clients = Clients(made)
            for machine in made.machines * 3:
                assert await clients.write(machine)
            leader = await made.leader()
            await made.kill(leader)  # so that votes are among the frames
            await made.start(leader)
            await made.settled()
            made.network.meddler = None
            leader = await made.leader()
            term = leader.running.status().term
            stranger = made.network.node(NodeKey(b"s" * 32).peer_id)
            await made.network.connect_all()
            rng = random.Random(7)
            for protocol in sorted({each for each, _ in recorded}):
                assert await send_all(stranger, made, protocol, frames(recorded, protocol, rng))
            await trio.sleep(10)
            for machine in made.machines:
                assert machine.running.status().term == term
                assert await clients.write(machine)
                assert await clients.read(machine)
            assert await made.leader() is leader
            clients.check()

    simulate(program)


def test_what_members_said_said_by_another(engine: Opener) -> None:
    def frames(recorded: Recorded, protocol: str, rng: random.Random) -> list[Frame]:
        return [frame for each, frame in recorded if each == protocol][:600]

    harmless(engine, frames)


def test_damaged_messages(engine: Opener) -> None:
    def frames(recorded: Recorded, protocol: str, rng: random.Random) -> list[Frame]:
        said = [frame for each, frame in recorded if each == protocol]
        return [damaged(rng.choice(said), rng) for _ in range(300)]

    harmless(engine, frames)


def test_each_message_first_on_a_stream_of_its_own(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            said: dict[tuple[str, bytes], Frame] = {}

            def listen(
                sender: PeerId, receiver: PeerId, protocol: str, frame: Frame
            ) -> list[Frame]:
                said.setdefault((protocol, bytes(frame.header)[:12]), frame)
                return [frame]

            made.network.meddler = listen
            await made.form(3)
            clients = Clients(made)
            for machine in made.machines:
                await clients.write(machine)
            made.network.meddler = None
            term = (await made.leader()).running.status().term
            stranger = made.network.node(NodeKey(b"s" * 32).peer_id)
            await made.network.connect_all()
            for (protocol, _), frame in list(said.items())[:60]:
                await send_all(stranger, made, protocol, [frame])
                await send_all(stranger, made, protocol, [frame, frame])
            await trio.sleep(10)
            assert (await made.leader()).running.status().term == term
            for machine in made.machines:
                assert await clients.write(machine)

    simulate(program)
