"""Writes down what a simulated swarm does, so that equal traces mean equal runs.

Looks at every node as often as the invariants do, and notes what is new: entries applied, leaders,
placements, stages, runners that died, sessions that were interrupted.  Once a second it adds a
*pulse*: how many frames were sent for what, a hash over all of them in order, and how far the
scheduler's own random numbers have come.  Whatever makes two runs differ shows in the next pulse.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from pyagent_node.base.types import Digest, PeerId, Placement, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.pipeline.stage_types import StageView
from pyagent_node.native import Blake3
from pyagent_node.simulations.deterministic import scheduler_state
from pyagent_node.simulations.trace import HERE, Trace

if TYPE_CHECKING:
    from pyagent_node.inference.generation import SessionView
    from pyagent_node.simulations.backend import ToyRunner
    from pyagent_node.simulations.machine import Machine, Parts
    from pyagent_node.simulations.swarm import Swarm

PULSE_SECONDS: Final = 1.0
SHORT: Final = 12
"""Hexadecimal digits of a hash in the trace; the digest of the trace is over these."""
MAX_LINE: Final = 300
RAFT_LOGGER: Final = "pyagent_node.consensus.raft"


class FrameTally:
    """Hashes and counts every frame, by protocol, as the simulated network's meter."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._hash = Blake3()

    def frame(self, sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> None:
        """Take note of one frame."""
        self.counts[protocol] += 1
        self._hash.update(f"{sender}{receiver}{protocol}".encode())
        self._hash.update(frame.header)
        self._hash.update(frame.tail)

    def pulse(self) -> str:
        """Return what was sent since the last pulse, with a hash over all so far."""
        told = " ".join(
            f"{protocol.removeprefix('/pyagent/').partition('/')[0]}={count}"
            for protocol, count in sorted(self.counts.items())
        )
        self.counts.clear()
        return f"{self._hash.hexdigest()[:SHORT]} {told}"


class LogLines(logging.Handler):
    """Adds what nodes log, above debugging, to the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(logging.INFO)
        self.names: dict[PeerId, int] = {}
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        """Add one line; peers are called by their numbers in it."""
        if record.name == RAFT_LOGGER and record.levelno < logging.WARNING:
            return  # every node says who leads; the observer does so better
        line = record.getMessage()[:MAX_LINE]
        for peer, number in self.names.items():
            if peer in line:
                line = line.replace(peer, f"node {number}")
        area = record.name.removeprefix("pyagent_node.")
        here = HERE.get()
        self._trace.add(self.names.get(here) if here else None, "log", f"{area}: {line}")


class _Life:
    """What was last seen of a node since it was started."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.index = 0
        self.role: tuple[bool, int, int | None] = (False, 0, None)
        self.placements: object = None
        self.stages: dict[tuple[Digest, int, int], StageView] = {}
        self.sessions: dict[SessionId, tuple[int, int, bool]] = {}
        self.dead: list[ToyRunner] = []


class Observer:
    """Looks at a swarm; :attr:`frames` and :attr:`lines` are to be plugged in."""

    def __init__(self, trace: Trace) -> None:
        self.frames = FrameTally()
        self.lines = LogLines(trace)
        self._trace = trace
        self._lives: dict[int, tuple[int, _Life]] = {}
        self._epochs: set[tuple[Digest, int]] = set()
        self._next_pulse = 0.0

    def look(self, swarm: Swarm, now: float) -> None:
        """Write down what is new; ``now`` is in virtual seconds."""
        for machine in swarm.machines:
            if machine.parts is not None:
                self._look_at(machine, machine.parts)
        if now >= self._next_pulse:
            self._next_pulse = now + PULSE_SECONDS
            self._trace.add(None, "pulse", f"{scheduler_state():016x} {self.frames.pulse()}")

    def tell_states(self, swarm: Swarm) -> None:
        """Write down how every node is, for the story of a failure."""
        for machine in swarm.machines:
            self._trace.add(machine.number, "state", _state(machine, machine.parts))

    def _look_at(self, machine: Machine, parts: Parts) -> None:
        lives, life = self._lives.get(machine.number, (0, None))
        if life is None or lives != machine.lives:
            life = _Life(machine.number)
            self._lives[machine.number] = (machine.lives, life)
            self.lines.names[machine.peer_id] = machine.number
        self._log(life, parts)
        self._stages(life, parts)
        self._sessions(life, parts)
        if machine.assets is not None:
            dead = [r for r in machine.assets.runners if r.failure is not None]
            for runner in dead:
                if runner not in life.dead and runner.failure is not None:
                    self._trace.add(life.number, "runner died", runner.failure.message)
            life.dead = dead

    def _log(self, life: _Life, parts: Parts) -> None:
        """Look at what was agreed on, and at who leads."""
        engine = parts.consensus
        role = (engine.leads, engine.node.core.term, engine.node.leader)
        if role != life.role:
            if life.role[0] and not role[0]:
                self._trace.add(life.number, "stands down", f"in term {role[1]}")
            leader = engine.status().leader
            told = f"led by node {self.lines.names.get(leader, '?')}" if leader else "nobody leads"
            self._trace.add(life.number, "term", f"{role[1]}, {told}")
            life.role = role
        state = engine.state
        if state.index == life.index:
            return
        chain = engine.chain_at(state.index)
        link = chain.hex()[:SHORT] if chain is not None else "unknown"
        self._trace.add(life.number, "applied", f"{life.index + 1}..{state.index} {link}")
        life.index = state.index
        if state.placements is not life.placements:
            life.placements = state.placements
            for placement in state.placements.values():
                self._placement(placement)

    def _placement(self, placement: Placement) -> None:
        key = (placement.model, placement.epoch)
        if key in self._epochs:
            return
        self._epochs.add(key)
        ranks = ", ".join(
            f"layers {rank.slice.first}-{rank.slice.last - 1} on node"
            f" {self.lines.names.get(rank.peer_id, '?')}"
            for rank in placement.ranks
        )
        self._trace.add(None, "placed", f"epoch {placement.epoch}: {ranks}")

    def _stages(self, life: _Life, parts: Parts) -> None:
        views = {(v.model, v.epoch, v.rank): v for v in parts.pipeline.stages.views()}
        if views.keys() == life.stages.keys():
            life.stages = views
            return
        for key, view in views.items():
            if key not in life.stages:
                self._trace.add(life.number, "serves", f"rank {view.rank} of epoch {view.epoch}")
        for key, view in life.stages.items():
            if key not in views:
                self._trace.add(
                    life.number,
                    "withdraws",
                    f"rank {view.rank} of epoch {view.epoch}, {view.tokens} tokens",
                )
        life.stages = views

    def _sessions(self, life: _Life, parts: Parts) -> None:
        own = parts.mesh.peer_id
        heads = {s.session: s for s in parts.pipeline.engine.sessions() if s.head == own}
        for session, view in heads.items():
            before = life.sessions.get(session)
            now = (view.epoch, view.failovers, view.suspended)
            if before != now:
                self._session(life.number, view, before)
                life.sessions[session] = now
        for session in [session for session in life.sessions if session not in heads]:
            del life.sessions[session]
            self._trace.add(life.number, "session", f"{session[:6]} is over here")

    def _session(
        self, number: int, view: SessionView, before: tuple[int, int, bool] | None
    ) -> None:
        name, at = view.session[:6], f"after {view.completion_tokens} tokens"
        if before is None:
            self._trace.add(number, "session", f"{name} begins at epoch {view.epoch}")
        elif view.suspended:
            self._trace.add(number, "suspended", f"session {name} {at}")
        elif before[2] or view.failovers > before[1]:
            self._trace.add(
                number,
                "resumed",
                f"session {name} {at}, epoch {view.epoch}, failover {view.failovers}",
            )


def _state(machine: Machine, parts: Parts | None) -> str:
    """Return how a node is, in one line."""
    if parts is None:
        return f"off, life {machine.lives}"
    status = parts.consensus.status()
    told = [f"{status.role} of term {status.term}, entry {status.index} of {status.commit}"]
    if status.role == "leader":
        told.append(f"{len(status.voters)} voters{', joint' if status.joint else ''}")
    told += [f"serves rank {v.rank} of epoch {v.epoch}" for v in parts.pipeline.stages.views()]
    own = [s for s in parts.pipeline.engine.sessions() if s.head == parts.mesh.peer_id]
    waiting = sum(view.suspended for view in own)
    if own:
        told.append(f"heads {len(own)} sessions{f', {waiting} suspended' if waiting else ''}")
    return "; ".join(told)
