"""A group of Raft cores on a network and on disks that do as they are told.

It holds what Raft promises against what happens: one leader a term, one command an index, applied
in order and once, reads that are not behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from random import Random

from pyagent_node.native import RaftConf, RaftCore, RaftDropped, RaftEntry, RaftReady, RaftStatus

HEARTBEAT = 2
ELECTION = 10


class Crashed(Exception):
    """The node was told to crash at this point of its loop."""


class Disk:
    """What has reached the disk of a node, which outlives the node."""

    def __init__(self) -> None:
        self.hard: tuple[int, int, int] = (0, 0, 0)
        self.snapshot: tuple[int, int, RaftConf, bytes] = (0, 0, RaftConf(), b"")
        self.entries: list[RaftEntry] = []

    def write(self, ready: RaftReady) -> None:
        if ready.snapshot is not None:
            self.snapshot, self.entries = ready.snapshot, []
        if ready.entries:
            first = ready.entries[0].index
            self.entries = [e for e in self.entries if e.index < first] + ready.entries
        if ready.hard_state is not None:
            self.hard = ready.hard_state

    def keep(self, snapshot: tuple[int, int, RaftConf, bytes]) -> None:
        self.snapshot = snapshot
        self.entries = [e for e in self.entries if e.index > snapshot[0]]


class Host:
    """One node: its core, its disk and what it has applied."""

    def __init__(self, group: Group, node_id: int) -> None:
        self.group, self.id, self.disk = group, node_id, Disk()
        self.applied: list[tuple[int, int, str]] = []
        self.reads: dict[bytes, int] = {}
        self.crash_at = ""
        self.core: RaftCore | None = None

    def found(self) -> None:
        self.disk.snapshot = (1, 1, RaftConf([self.id]), b"[]")
        self.disk.hard = (1, 0, 1)

    def start(self, **changes: int) -> RaftCore:
        index, term, conf, data = self.disk.snapshot
        sizes = {"max_message_bytes": 4096, "max_inflight": 8, "max_uncommitted_bytes": 16384}
        self.core = RaftCore(
            self.id,
            conf=conf,
            term=self.disk.hard[0],
            vote=self.disk.hard[1],
            commit=self.disk.hard[2],
            snapshot_index=index,
            snapshot_term=term,
            snapshot_data=data,
            entries=self.disk.entries,
            heartbeat_ticks=HEARTBEAT,
            election_ticks=ELECTION,
            **(sizes | changes),
        )
        self.applied = [tuple(item) for item in json.loads(data or b"[]")]
        self.reads, self.crash_at, self.seen = {}, "", (-1, "")
        return self.core

    def crash(self) -> None:
        self.core = None

    def point(self, name: str) -> None:
        if self.crash_at == name:
            self.crash()
            raise Crashed

    def pump(self) -> None:
        """Do all that is to be done, in the order that the core asks for."""
        core = self.core
        while core is not None and core.has_ready():
            ready = core.ready()
            self.group.send(self.id, ready.messages)
            self.point("before the write")
            self.disk.write(ready)
            self.point("after the write")
            self.group.send(self.id, ready.persisted_messages)
            self.point("before advance")
            light = core.advance()
            self.disk.write(light)
            self.group.send(self.id, light.messages)
            if ready.snapshot is not None:
                self.applied = [tuple(item) for item in json.loads(ready.snapshot[3])]
            self.apply(core, ready.committed + light.committed)
            for index, context in ready.read_states:
                if context in self.reads:
                    assert index >= self.reads.pop(context), "a read is behind"
            if core.snapshot_wanted:
                core.snapshot(core.status().applied, self.dump())
            if (now := (core.term, core.role)) != self.seen:
                self.seen = now
                core.set_election_ticks(self.group.rng.randrange(ELECTION, 2 * ELECTION))
            if core.role == "leader":
                leader = self.group.leaders.setdefault(core.term, self.id)
                assert leader == self.id, f"two leaders in term {core.term}"

    def apply(self, core: RaftCore, committed: Iterable[RaftEntry]) -> None:
        for entry in committed:
            known = self.group.log.setdefault(entry.index, entry)
            assert known == entry, f"entry {entry.index} changed after it was committed"
            self.group.committed = max(self.group.committed, entry.index)
            if entry.kind == 1:
                self.group.confs[entry.index] = core.apply_conf(entry)
            elif entry.data:
                assert not self.applied or self.applied[-1][0] < entry.index
                self.applied.append((entry.index, entry.term, entry.data.decode()))
            core.advance_apply(entry.index)

    def dump(self) -> bytes:
        return json.dumps(self.applied).encode()

    def compact(self) -> None:
        core = self.core
        assert core is not None
        applied = core.status().applied
        if applied > self.disk.snapshot[0]:
            self.disk.keep(core.snapshot(applied, self.dump()))
            core.compact(applied)

    def read(self) -> bytes:
        """Ask for a read that must see all that is committed now."""
        assert self.core is not None
        self.group.reads += 1
        context = b"read %d" % self.group.reads
        self.core.read_index(context)
        self.reads[context] = self.group.committed
        return context


class Group:
    """Hosts and the messages between them."""

    def __init__(self, *ids: int, seed: int = 0) -> None:
        self.rng = Random(seed)
        self.hosts = {node_id: Host(self, node_id) for node_id in ids}
        self.wire: list[tuple[int, int, str, bytes]] = []
        self.cut: set[tuple[int, int]] = set()
        self.log: dict[int, RaftEntry] = {}
        self.confs: dict[int, RaftConf] = {}
        self.leaders: dict[int, int] = {}
        self.committed = self.reads = 0
        self.kinds: set[str] = set()
        self.tap: Callable[[int, int, str, bytes], None] | None = None
        for host in self.hosts.values():
            if host.id == ids[0]:
                host.found()
            host.start()

    def send(self, sender: int, messages: Iterable[tuple[int, str, bytes]]) -> None:
        for to, kind, data in messages:
            self.kinds.add(kind)
            self.wire.append((sender, to, kind, data))

    def core(self, node_id: int) -> RaftCore:
        core = self.hosts[node_id].core
        assert core is not None
        return core

    def status(self, node_id: int) -> RaftStatus:
        return self.core(node_id).status()

    def deliver(self, message: tuple[int, int, str, bytes]) -> None:
        sender, to, kind, data = message
        host, origin = self.hosts.get(to), self.hosts[sender]
        lost = host is None or host.core is None or (sender, to) in self.cut
        if not lost and host is not None and host.core is not None:
            if self.tap is not None:
                self.tap(sender, to, kind, data)
            host.core.step(sender, data)
        if origin.core is not None and kind == "snapshot":
            origin.core.report_snapshot(to, not lost)
        elif origin.core is not None and lost:
            origin.core.report_unreachable(to)

    def lose(self, message: tuple[int, int, str, bytes]) -> None:
        """Lose a message without its sender being told, but for the end of a snapshot's."""
        sender, to, kind, _ = message
        origin = self.hosts[sender].core
        if origin is not None and kind == "snapshot":
            origin.report_snapshot(to, True)

    def settle(self) -> None:
        """Deliver and do everything until nothing is left."""
        while True:
            for host in self.hosts.values():
                host.pump()
            if not self.wire:
                return
            batch, self.wire = self.wire, []
            for message in batch:
                self.deliver(message)

    def run(self, ticks: int = 1) -> None:
        for _ in range(ticks):
            for host in self.hosts.values():
                if host.core is not None:
                    host.core.tick()
            self.settle()

    def until(self, what: Callable[[], bool], ticks: int = 200) -> None:
        for _ in range(ticks):
            if what():
                return
            self.run()
        raise AssertionError("it did not come to that")

    def leader(self) -> int:
        """The one leader that a majority follows, once there is one."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [
                host.id
                for host in self.hosts.values()
                if host.core is not None and host.core.role == "leader"
            ]
            return len(found) == 1 and self.status(found[0]).commit >= self.committed

        self.until(look)
        return found[0]

    def propose(self, text: str) -> int:
        while True:
            try:
                index, _ = self.core(self.leader()).propose(text.encode())
            except RaftDropped:
                self.run()
            else:
                self.settle()
                return index

    def reconfigure(self, voters: Iterable[int], learners: Iterable[int] = ()) -> None:
        """Change the configuration and wait until all that are in it have applied it."""
        wanted, following = tuple(sorted(voters)), tuple(sorted(learners))

        def propose() -> bool:
            try:
                self.core(self.leader()).propose_conf(wanted, following)
            except RaftDropped:
                return False
            return True

        def done() -> bool:
            confs = [
                self.status(node_id).conf
                for node_id in wanted + following
                if self.hosts[node_id].core is not None
            ]
            return all(
                (conf.voters, conf.learners, conf.joint) == (wanted, following, False)
                for conf in confs
            )

        self.until(propose)
        self.until(done)

    def same(self) -> bool:
        """Whether all running hosts have applied everything that is committed."""
        live = [host for host in self.hosts.values() if host.core is not None]
        return all(host.applied == live[0].applied for host in live) and all(
            self.status(host.id).applied >= self.committed for host in live
        )


def group_of(*ids: int, learners: Iterable[int] = (), seed: int = 0) -> Group:
    """A group in which all of these vote already, led by the first."""
    learners = tuple(learners)
    group = Group(*ids, *learners, seed=seed)
    if len(ids) + len(learners) > 1:
        group.reconfigure(ids, learners)
    group.leader()
    return group
