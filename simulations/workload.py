"""People who ask the simulated swarm, and know what must come out.

Every request has a seed, so the toy model's answer to it is known beforehand.  Whatever breaks
meanwhile, the tokens that arrive must be a prefix of it, and in the end all of it.  Somebody whose
node dies goes on reading at another one, or asks again if the session was too young to be saved.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.live_sessions import Reader
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.faults import N_LAYERS
from pyagent_node.simulations.machine import session_ids
from pyagent_node.simulations.pipeline import NAME

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

MARK: Final = "TOP-SECRET"
"""Begins every prompt; it must never show in a log line or in the replicated log."""
PAUSE_SECONDS: Final = 0.5


class Person:
    """Asks one question and reads the answer to its end."""

    def __init__(self, number: int, swarm: Swarm, rng: random.Random) -> None:
        self.number = number
        self.finished = False
        self._swarm = swarm
        self._rng = rng
        self._ids = session_ids(rng)
        count = rng.randint(1, 60)
        self._prompt = [*MARK.encode(), *(rng.randrange(1, 128) for _ in range(count))]
        self._n = rng.randint(2, 120)
        self._params = SamplingParams(
            seed=rng.randrange(1 << 32),
            temperature=rng.choice((0.0, 0.8)),
            top_k=rng.choice((0, 20)),
        )
        self.expected = toy_generate(N_LAYERS, self._prompt, self._n, self._params)
        self.got: list[int] = []

    async def ask(self) -> None:
        """Ask until the whole answer is here."""
        session = self._ids()
        while not self.finished:
            machine = self._choose()
            if machine is not None:
                try:
                    await self._read(machine, session)
                except PyAgentError as error:
                    self._swarm.trace.add(machine.number, "asker", f"{self.number}: {error.code}")
                    if error.code in ("session_not_found", "beyond_end", "bad_journal"):
                        self.got = []
                if not self.got:
                    session = self._ids()
            if not self.finished:
                await trio.sleep(PAUSE_SECONDS)

    def _choose(self) -> Machine | None:
        up = [m for m in self._swarm.machines if m.up and not m.gone]
        return self._rng.choice(up) if up else None

    async def _read(self, machine: Machine, session: SessionId) -> None:
        """Read from one node until the answer or the node ends; goes on with what has begun."""
        assert machine.parts is not None, "chosen among those that run"
        live = machine.parts.sessions.live
        with trio.CancelScope() as scope:
            machine.readers.add(scope)
            try:
                if self.got:
                    opened = live.attach(session, len(self.got))
                else:
                    opened = live.generate(
                        GenerationRequest(
                            NAME,
                            tokens=tuple(self._prompt),
                            max_tokens=self._n,
                            sampling=self._params,
                            session=session,
                        )
                    )
                async with opened as reader:
                    await self._follow(machine, reader)
            finally:
                machine.readers.discard(scope)

    async def _follow(self, machine: Machine, reader: Reader) -> None:
        async for event in reader:
            if not isinstance(event, Generated):
                self._end(machine)
                return
            at = len(self.got)
            if at >= len(self.expected) or event.token != self.expected[at]:
                self._swarm.violation(
                    "tokens",
                    f"request {self.number}: token {at} is {event.token},"
                    f" not {self.expected[at] if at < len(self.expected) else 'the end'}",
                )
                self.finished = True
                return
            self.got.append(event.token)

    def _end(self, machine: Machine) -> None:
        self.finished = True
        self._swarm.trace.add(machine.number, "answered", f"{self.number}: {len(self.got)} tokens")
        if self.got != self.expected:
            self._swarm.violation(
                "tokens", f"request {self.number} ended after {len(self.got)} tokens"
            )
