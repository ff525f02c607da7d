"""What a malicious member does: everything here must be refused, and cost others nothing.

A malicious *voter* that lies inside Raft's own messages, or a rank that computes wrongly, is not
defended against (docs/security.md says who can become one).  Whatever else a member sends must do
no harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    PIPE_PROTOCOL,
    CloseSession,
    PipeMessage,
    Result,
    Step,
)
from pyagent_node.inference.sampling import Sampled
from pyagent_node.simulations.faults import Malice
from pyagent_node.simulations.pipeline import MODEL

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

PROTOCOLS: Final = ("/pyagent/raft/1", PIPE_PROTOCOL, "/pyagent/rpc/1", "/pyagent/journal/1")
PAUSE_SECONDS: Final = 0.05


async def misbehave(swarm: Swarm, machine: Machine, how: Malice) -> None:
    """Harass every other node from ``machine`` until cancelled, or until its node dies."""
    while machine.parts is not None and not _ranked(swarm, machine):
        for other in swarm.up():
            if other is not machine:
                await _harass(swarm, machine, other.peer_id, how)
        await trio.sleep(PAUSE_SECONDS)


def _ranked(swarm: Swarm, machine: Machine) -> bool:
    """Say whether the machine holds a rank of any placement that a node still knows."""
    return any(
        rank.peer_id == machine.peer_id
        for other in swarm.up()
        if other.parts is not None
        for placement in other.parts.consensus.state.placements.values()
        for rank in placement.ranks
    )


async def _harass(swarm: Swarm, machine: Machine, victim: PeerId, how: Malice) -> None:
    if machine.parts is None:
        return
    mesh = machine.parts.mesh
    protocol = swarm.rng.choice(PROTOCOLS) if how == "garbage" else PIPE_PROTOCOL
    try:
        with trio.move_on_after(1.0):
            stream = await mesh.open(victim, protocol)
            for frame in _frames(swarm, how):
                await stream.send(frame)
            await stream.aclose()
    except PyAgentError as error:
        swarm.trace.add(machine.number, "evil", f"{how}: {error.code}")


def _frames(swarm: Swarm, how: Malice) -> list[Frame]:
    rng = swarm.rng
    if how == "garbage":
        return [Frame(rng.randbytes(rng.randrange(200)), rng.randbytes(rng.randrange(200)))]
    leader = swarm.leader()
    parts = leader.parts if leader is not None else None
    placement = parts.consensus.state.placements.get(MODEL) if parts is not None else None
    epoch = placement.epoch if placement is not None else 1
    rank = rng.randrange(len(placement.ranks)) if placement is not None else 0
    known = [
        session.session
        for machine in swarm.up()
        if machine.parts is not None
        for session in machine.parts.pipeline.stages.sessions()
    ]
    session = rng.choice(known) if known else SessionId("0" * 32)
    messages: list[PipeMessage]
    match how:
        case "stale_epoch":
            messages = [Step(session, MODEL, max(0, epoch - 1), rank, 0, 0, 1, True)]
        case "false_result":
            messages = [
                Result(session, MODEL, epoch, rank, step, 0.0, Sampled(65)) for step in range(4)
            ]
        case "replay":
            messages = [Step(session, MODEL, epoch, rank, step, step, 1, True) for step in range(4)]
        case _:
            messages = [CloseSession(session, MODEL, epoch, rank)]
    return [Frame(PIPE_CODEC.encode(message), bytes(4)) for message in messages]
