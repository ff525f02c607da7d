"""Clients that read and change the state through any node, and what they saw."""

from __future__ import annotations

import itertools
import math

import trio

from pyagent_node.base.errors import Conflict, PyAgentError, Unavailable

from .cluster import REGISTER, Cluster, Machine, swap, write
from .linearizability import (
    Look,
    Operation,
    Read,
    Swap,
    Write,
    counter,
    linearizable,
    register,
    without_unseen_writes,
)

FIRST_VALUE = 1000
START = 600
"""The register's value before the first write."""


class Clients:
    """Uses a cluster and keeps the history of two objects: a register and a counter."""

    def __init__(self, cluster: Cluster) -> None:
        self.registers: list[Operation[Write | Read]] = []
        self.counters: list[Operation[Swap | Look]] = []
        self.acknowledged: set[int] = set()
        self.unknown = 0
        self._cluster = cluster
        self._now = itertools.count(1)
        self._values = itertools.count(FIRST_VALUE)

    async def write(self, machine: Machine) -> bool:
        """Write a new value through a node; say whether that is known to have happened."""
        value, began = next(self._values), next(self._now)
        command = write(value)
        self._cluster.observer.once.append(command)
        try:
            applied = await machine.running.propose(command)
        except PyAgentError:
            self.unknown += 1
            self.registers.append(Operation(Write(value), began))
            return False
        except trio.Cancelled:
            self.registers.append(Operation(Write(value), began))
            raise
        self.acknowledged.add(value)
        self.registers.append(Operation(Write(value), began, next(self._now), applied.index))
        return True

    async def read(self, machine: Machine) -> bool:
        """Read both objects through a node, whatever it knew before."""
        engine, began = machine.running, next(self._now)
        try:
            await engine.read_barrier()
        except PyAgentError:
            return False
        state, ended = engine.state, next(self._now)
        place = state.index + 0.5
        self.registers.append(Operation(Read(state.settings[REGISTER]), began, ended, place))
        self.counters.append(Operation(Look(*self._counted(machine)), began, ended, place))
        return True

    def _counted(self, machine: Machine) -> tuple[int, int]:
        state = machine.running.state
        numbers = {each.peer_id: each.number for each in self._cluster.machines}
        return state.bucket_epoch, numbers[state.buckets[0][0]] if state.buckets else -1

    async def swap(self, machine: Machine, owner: Machine) -> None:
        """Take the counter one up from where the node believes it to be."""
        expected, began = self._counted(machine)[0], next(self._now)
        ended = place = math.inf
        done = True
        try:
            applied = await machine.running.propose(swap(expected, owner.peer_id))
            ended, place = next(self._now), applied.index
        except Conflict:
            done, ended = False, next(self._now)
            place = machine.running.state.index
        except PyAgentError:
            self.unknown += 1
        finally:
            self.counters.append(Operation(Swap(expected, owner.number, done), began, ended, place))

    def lost_swap(self, owner: Machine, expected: int) -> None:
        """Note a swap that was tried by other means and may have happened."""
        self.counters.append(Operation(Swap(expected, owner.number, True), next(self._now)))

    async def surely_write(self, machine: Machine) -> None:
        """Write, or raise so that it is tried again."""
        if not await self.write(machine):
            raise Unavailable("It is not known to be written.", code="not_written")

    async def surely_read(self, machine: Machine) -> None:
        """Read, or raise so that it is tried again."""
        if not await self.read(machine):
            raise Unavailable("It could not be read.", code="not_read")

    def check(self) -> None:
        """The histories are those of single objects."""
        kept = without_unseen_writes(self.registers)
        assert linearizable(kept, START, register), "the register's history is impossible"
        assert linearizable(self.counters, (0, -1), counter), "the counter's history is impossible"
