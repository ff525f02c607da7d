"""Sessions: each has one head, and what the mesh knows of one it knows until its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final

import trio

from pyagent_node.base.types import SessionId
from pyagent_node.node.journal_messages import public_id
from pyagent_node.simulations.invariants.port import Always

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm

EVERY: Final = 10
"""Looks between two that this file takes part in."""
STOP_SECONDS: Final = 2.0
"""How long a head may go on after it has applied that another one took its session over."""
GONE_SECONDS: Final = 2.0
"""How long a session may be missing from the log while its answer is being read."""


class OneHeadASession(Always):
    """Whoever sees that a session was claimed by another node stops it."""

    name: ClassVar[str] = "one head a session"

    def __init__(self) -> None:
        self._since: dict[tuple[int, SessionId], float] = {}
        self._looks = 0

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Compare what nodes head with what the log says on the same node."""
        self._looks += 1
        if self._looks % EVERY:
            return
        now, found = trio.current_time(), set()
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            checkpoints = machine.parts.consensus.state.checkpoints
            for view in machine.parts.pipeline.engine.sessions() if checkpoints else ():
                known = checkpoints.get(public_id(view.session))
                if view.head != machine.peer_id or known is None or known.head == machine.peer_id:
                    continue
                key = (machine.number, view.session)
                found.add(key)
                if now - self._since.setdefault(key, now) > STOP_SECONDS:
                    yield f"node {machine.number} heads a session that {known.head} took over"
        for key in self._since.keys() - found:
            del self._since[key]


class SessionsStayKnown(Always):
    """A session that got into the log can be gone on with for as long as somebody reads it."""

    name: ClassVar[str] = "sessions stay known"

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._missing: dict[str, float] = {}
        self._looks = 0

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look for the sessions that are being read in the log of the node that serves them."""
        self._looks += 1
        if self._looks % EVERY:
            return
        now = trio.current_time()
        for person in swarm.people:
            machine = person.reading
            if person.finished or machine is None or machine.parts is None:
                self._missing.pop(person.public, None)
                continue
            if person.public in machine.parts.consensus.state.checkpoints:
                self._known.add(person.public)
                self._missing.pop(person.public, None)
            elif (
                person.public in self._known
                and now - self._missing.setdefault(person.public, now) > GONE_SECONDS
            ):
                yield f"the log forgot the session of request {person.number}"
                return
