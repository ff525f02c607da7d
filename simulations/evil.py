"""What a malicious member does: everything here must be refused, and cost others nothing.

A malicious *voter* that lies inside Raft's own messages, or a rank that computes wrongly, is not
defended against (docs/security.md says who can become one).  Whatever else a member sends must do
no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import ClaimSession
from pyagent_node.inference.pipeline.frames import PIPE_CODEC, PIPE_PROTOCOL, CloseSession
from pyagent_node.simulations.evil_frames import PROTOCOLS, Sight, compose, mutated
from pyagent_node.simulations.evil_lies import lying_journals, untruth
from pyagent_node.simulations.fault_kinds import Malice
from pyagent_node.simulations.pipeline import MODEL

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

PAUSE_SECONDS: Final = 0.05
CLAIM_SECONDS: Final = 1.0
HANG_UP_SECONDS: Final = 60.0
HANG_UP_LOOK_SECONDS: Final = 0.5
REMEMBERED: Final = 64
"""Frames of one stream that are said again, at most."""

Said = dict[tuple[PeerId, str], list[Frame]]
"""What a member sent to whom under which protocol."""


async def misbehave(swarm: Swarm, machine: Machine, how: Malice) -> None:
    """Harass every other node from ``machine`` until cancelled, or until its node dies."""
    if machine.number == 0 and how == "false_proposal":
        how = "garbage"  # it holds the mesh's authority: what it proposes is lawful
    life = machine.lives
    with _prepared(swarm, machine, how) as said:
        while machine.lives == life and machine.parts is not None and not _ranked(swarm, machine):
            if how == "false_claim":
                await _claim(swarm, machine)
            for other in swarm.up():
                if other is not machine:
                    await _harass(swarm, machine, other, how, said)
            await trio.sleep(PAUSE_SECONDS)


@contextmanager
def _prepared(swarm: Swarm, machine: Machine, how: Malice) -> Iterator[Said]:
    """Do what has to be done before, and undo it."""
    said: Said = {}
    parts, network = machine.parts, swarm.network
    if parts is None:
        yield said
        return
    honest = parts.journals.holder.own
    match how:
        case "false_facts":
            machine.lie = lambda truth: untruth(truth, swarm.rng)
        case "false_journal":
            parts.journals.holder.own = lying_journals(parts.journals.holder, swarm.rng)
        case "replay":
            network.meddler = _recorder(machine.peer_id, said)
            for other in swarm.machines:
                if other is not machine and network.reachable(machine.peer_id, other.peer_id):
                    network.cut(machine.peer_id, other.peer_id)
                    network.heal(machine.peer_id, other.peer_id)
        case _:
            pass
    try:
        yield said
    finally:
        machine.lie = None
        parts.journals.holder.own = honest
        network.meddler = None
        if how in ("flood", "replay", "mutation"):
            swarm.nursery.start_soon(_hang_up, swarm, machine)


def _recorder(peer: PeerId, said: Said) -> Callable[[PeerId, PeerId, str, Frame], Sequence[Frame]]:
    def hear(sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> Sequence[Frame]:
        if sender == peer:
            known = said.setdefault((receiver, protocol), [])
            if len(known) < REMEMBERED:
                known.append(frame)
        return (frame,)

    return hear


def _ranked(swarm: Swarm, machine: Machine) -> bool:
    """Say whether the machine holds a rank of any placement that a node still knows."""
    return any(
        rank.peer_id == machine.peer_id
        for other in swarm.up()
        if other.parts is not None
        for placement in other.parts.consensus.state.placements.values()
        for rank in placement.ranks
    )


async def _claim(swarm: Swarm, machine: Machine) -> None:
    """Take over a session that others serve."""
    if machine.parts is None:
        return
    consensus = machine.parts.consensus
    foreign = [c for c in consensus.state.checkpoints.values() if c.head != machine.peer_id]
    with trio.move_on_after(CLAIM_SECONDS):
        if foreign:
            victim = swarm.rng.choice(sorted(foreign, key=lambda c: c.session))
            at = int(machine.wall())
            command = ClaimSession(victim.session, machine.peer_id, victim.claim, at)
            try:
                await consensus.propose(command)
            except PyAgentError as error:
                swarm.trace.add(machine.number, "evil", f"false_claim: {error.code}")
        await trio.sleep(CLAIM_SECONDS)


async def _harass(swarm: Swarm, machine: Machine, victim: Machine, how: Malice, said: Said) -> None:
    if machine.parts is None or victim.parts is None:
        return
    protocol, frames = _what(swarm, machine, victim, how, said)
    await _say(swarm, machine, victim, protocol, frames)


async def _say(
    swarm: Swarm, machine: Machine, victim: Machine, protocol: str, frames: Sequence[Frame]
) -> None:
    assert machine.parts is not None, "it runs"
    try:
        with trio.move_on_after(1.0):
            stream = await machine.parts.mesh.open(victim.peer_id, protocol)
            for frame in frames:
                await stream.send(frame)
            await stream.aclose()
    except PyAgentError as error:
        swarm.trace.add(machine.number, "evil", f"{protocol}: {error.code}")


def _what(
    swarm: Swarm, machine: Machine, victim: Machine, how: Malice, said: Said
) -> tuple[str, list[Frame]]:
    """Return what to send and under which protocol."""
    rng = swarm.rng
    if how == "garbage":
        noise = [
            Frame(rng.randbytes(rng.randrange(200)), rng.randbytes(rng.randrange(200)))
            for _ in range(rng.randint(1, 3))
        ]
        return rng.choice(PROTOCOLS), noise
    if how == "replay" and said:
        to, protocol = rng.choice(sorted(said))
        frames = said[to, protocol]
        again = rng.choices(frames, k=min(len(frames), 8))
        return protocol, [frames[0], *again]
    sight = _look(swarm, machine, victim)
    if how == "flood":
        return PIPE_PROTOCOL, [*_endings(machine, victim), *compose(how, sight, rng)[1]]
    if how == "mutation":
        protocol, frames = compose(None, sight, rng)
        return protocol, [mutated(frame, rng) for frame in frames]
    return compose(how, sight, rng)


def _endings(machine: Machine, victim: Machine) -> list[Frame]:
    """Return what ends the sessions that ``machine`` opened on ``victim`` to do harm."""
    assert machine.parts is not None, "it runs"
    assert victim.parts is not None, "it runs"
    stages, engine = victim.parts.pipeline.stages, machine.parts.pipeline.engine
    return [
        Frame(PIPE_CODEC.encode(CloseSession(held.session, held.model, held.epoch, view.rank)), b"")
        for held in stages.sessions()
        if held.head == machine.peer_id and not engine.heads(held.session)
        for view in stages.views()
    ]


async def _hang_up(swarm: Swarm, machine: Machine) -> None:
    """End what is left of such sessions; otherwise they would end when they had idled.

    What opens them may still be under way, so it looks for a while.
    """
    life, until = machine.lives, trio.current_time() + HANG_UP_SECONDS
    while machine.lives == life and machine.parts is not None and trio.current_time() < until:
        for victim in swarm.up():
            if machine.parts is None or victim.parts is None or victim is machine:
                continue
            if frames := _endings(machine, victim):
                await _say(swarm, machine, victim, PIPE_PROTOCOL, frames)
        await trio.sleep(HANG_UP_LOOK_SECONDS)


def _look(swarm: Swarm, machine: Machine, victim: Machine) -> Sight:
    """Return what a member can know, and what it can guess at best."""
    assert machine.parts is not None, "it runs"
    assert victim.parts is not None, "it runs"
    state = machine.parts.consensus.state
    placement = state.placements.get(MODEL)
    return Sight(
        me=machine.peer_id,
        victim=victim.peer_id,
        now=int(machine.wall()),
        hello=machine.parts.consensus.hello(),
        victim_hello=victim.parts.consensus.hello(),
        epoch=placement.epoch if placement is not None else 1,
        ranks=len(placement.ranks) if placement is not None else 1,
        sessions=[
            session.session
            for other in swarm.up()
            if other.parts is not None
            for session in other.parts.pipeline.stages.sessions()
        ],
        checkpoints=sorted(state.checkpoints.values(), key=lambda c: c.session),
    )
