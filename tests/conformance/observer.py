"""Watches every node of a cluster and says what must never happen, from the outside.

- One leader a term: no two nodes ever say that they lead the same term.
- Log matching: two stored entries of one index and term are the same, and follow on entries of
  the same term.
- Leader completeness: whoever comes to lead has every entry that any node knew to be committed.
- Committed entries never change: the hash chain up to an index is the same on every node, always.
- Applied in order, exactly once: each node's stream of applied entries goes up, each index means
  the same command everywhere, no command is applied twice.
- Terms and commit indices never go back in one life of a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import COMMANDS, Command
from pyagent_node.consensus.log import StoredLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.segmented import SegmentedLog

if TYPE_CHECKING:
    from .cluster import Machine

LOOK_SECONDS: Final = 0.02


class _Life:
    """What was seen of one life of a node."""

    def __init__(self) -> None:
        self.term = 0
        self.commit = 0
        self.chained = 0


class Observer:
    """Collects what nodes say and store, and asserts what must hold."""

    def __init__(self) -> None:
        self.leaders: dict[int, PeerId] = {}
        self.chains: dict[int, bytes] = {}
        self.applied: dict[int, Command] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        """Term and bytes of every entry that some node knew to be committed."""
        self.once: list[Command] = []
        """Commands that were proposed once, each unlike all others."""
        self._entries: dict[tuple[int, int], tuple[bytes, int | None]] = {}
        """By index and term: the bytes, and the term of the entry before where it was seen."""
        self._lives: dict[int, tuple[Machine, _Life]] = {}

    @asynccontextmanager
    async def watching(self, machine: Machine) -> AsyncIterator[None]:
        """Watch one life of a node."""
        self._lives[machine.number] = (machine, _Life())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, machine.running)
            try:
                yield
            finally:
                del self._lives[machine.number]
                nursery.cancel_scope.cancel()

    async def _follow(self, engine: Consensus) -> None:
        after = engine.state.index
        while True:
            try:
                async with engine.applied(after) as stream:
                    async for applied in stream:
                        assert applied.index > after, "applied entries go up"
                        after = applied.index
                        known = self.applied.setdefault(after, applied.command)
                        assert known == applied.command, f"entry {after} is two commands"
            except LimitExceeded:
                after = engine.state.index

    async def poll(self) -> None:
        """Look at every node for ever."""
        while True:
            for machine, life in list(self._lives.values()):
                self._check(machine, life)
            await trio.sleep(LOOK_SECONDS)

    def _check(self, machine: Machine, life: _Life) -> None:
        engine = machine.running
        status = engine.status()
        assert status.term >= life.term, f"node {machine.number}'s term went back"
        assert status.commit >= life.commit, f"node {machine.number}'s commit went back"
        assert status.index <= status.commit, f"node {machine.number} applied what may change"
        life.term, life.commit = status.term, status.commit
        if status.role == "leader" and self.leaders.get(status.term) != machine.peer_id:
            first = self.leaders.setdefault(status.term, machine.peer_id)
            assert first == machine.peer_id, f"two nodes lead term {status.term}"
            self._check_complete(machine)
        top = engine.state.index
        for index in range(max(life.chained + 1, top - 1000), top + 1):
            chain = engine.chain_at(index)
            if chain is not None:
                known = self.chains.setdefault(index, chain)
                assert known == chain, f"node {machine.number} has another log at {index}"
        life.chained = top

    def _check_complete(self, leader: Machine) -> None:
        """A new leader has all that is committed."""
        for machine, _ in list(self._lives.values()):
            if machine is not leader:
                self.look(machine)
        stored = self.look(leader)
        base = stored.snapshot.index if stored.snapshot else 0
        held = {entry.index: (entry.term, entry.data) for entry in stored.entries}
        for index, entry in self.committed.items():
            if index > base:
                assert held.get(index) == entry, f"the new leader lacks committed entry {index}"

    def look(self, machine: Machine) -> StoredLog:
        """Read a node's disk and compare it with what all others ever held."""
        stored = SegmentedLog(machine.disk.image()).load()
        before: int | None = stored.snapshot.term if stored.snapshot else 0
        commit = machine.running.status().commit if machine.engine is not None else 0
        for entry in stored.entries:
            key = (entry.index, entry.term)
            data, previous = self._entries.setdefault(key, (entry.data, before))
            assert data == entry.data, f"entry {key} is two different things"
            assert previous == before, f"entry {key} follows on two different logs"
            before = entry.term
            if entry.index <= commit:
                known = self.committed.setdefault(entry.index, (entry.term, entry.data))
                assert known == (entry.term, entry.data), f"committed entry {key} changed"
        return stored

    def check(self) -> None:
        """What can be said only at the end."""
        applied = Counter(COMMANDS.encode(command) for command in self.applied.values())
        doubled = [each for each in self.once if applied[COMMANDS.encode(each)] > 1]
        assert not doubled, f"applied twice: {doubled}"
