"""What people ask shows in no log line, and never reaches the replicated log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import msgspec

from pyagent_node.simulations.invariants.port import Always
from pyagent_node.simulations.workload import MARK

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class _Listener(logging.Handler):
    """Remembers lines with a secret in them."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if MARK in line or str(list(MARK.encode()))[1:-1] in line:
            self.caught.append(line)


class NoSecrets(Always):
    """Prompts begin with a mark that is looked for in all that nodes log and store."""

    name: ClassVar[str] = "no secrets"

    def __init__(self) -> None:
        self.listener = _Listener()
        self._seen: dict[int, object] = {}

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Look at the lines logged since the last look, and at what the log says of sessions."""
        for line in self.listener.caught:
            yield f"a prompt was logged: {line[:80]}"
        self.listener.caught.clear()
        for machine in swarm.machines:
            if machine.parts is None:
                continue
            checkpoints = machine.parts.consensus.state.checkpoints
            if self._seen.get(machine.number) is checkpoints:
                continue
            self._seen[machine.number] = checkpoints
            if MARK.encode() in msgspec.msgpack.encode(list(checkpoints.values())):
                yield f"a prompt is in the state of node {machine.number}"

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Look at every disk."""
        for machine in swarm.machines:
            for name in machine.disk.names():
                if MARK.encode() in machine.disk.read(name, 1 << 30):
                    yield f"a prompt is in {name} of node {machine.number}"
