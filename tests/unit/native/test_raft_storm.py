"""Random crashes, partitions, lost, late and doubled messages, changes of membership.

Every storm comes from its seed; :class:`Host` and :class:`Group` watch over what Raft promises
while it lasts, and afterwards the group must come to rest with all that was committed.
"""

from __future__ import annotations

import pytest

from pyagent_node.native import RaftDropped, RaftRefused

from .raft_group import Crashed, Group, Host

NODES = 6
POINTS = ("before the write", "after the write", "before advance")


class Storm:
    """One storm."""

    def __init__(self, seed: int) -> None:
        self.group = Group(*range(1, NODES + 1), seed=seed)
        self.rng = self.group.rng
        self.count = 0
        self.actions = [
            (40, self.tick),
            (60, self.deliver),
            (12, self.propose),
            (6, self.read),
            (2, self.crash),
            (5, self.start),
            (2, self.cut),
            (4, self.heal),
            (2, self.reconfigure),
            (2, self.transfer),
            (2, self.compact),
            (1, self.campaign),
        ]

    def live(self) -> list[Host]:
        return [host for host in self.group.hosts.values() if host.core is not None]

    def pick(self) -> Host | None:
        return self.rng.choice(self.live()) if self.live() else None

    def tick(self) -> None:
        for host in self.live():
            if host.core is not None and self.rng.random() < 0.8:
                host.core.tick()

    def deliver(self) -> None:
        wire = self.group.wire
        if len(wire) > 200:
            for _ in range(len(wire) // 2):
                self.group.lose(wire.pop(0))
        for _ in range(min(len(wire), self.rng.randrange(1, 9))):
            # Mostly in order; now and then late, lost or doubled.
            place = 0 if self.rng.random() < 0.8 else self.rng.randrange(len(wire))
            message = wire[place]
            if self.rng.random() > 0.05:
                del wire[place]
            if self.rng.random() > 0.05:
                # Sound nodes never send what is refused.
                self.group.deliver(message)
            else:
                self.group.lose(message)

    def propose(self) -> None:
        host = self.pick()
        if host is None or host.core is None:
            return
        for _ in range(self.rng.randrange(1, 4)):
            self.count += 1
            try:
                host.core.propose(b"%d " % self.count + b"x" * self.rng.randrange(1500))
            except RaftDropped:
                return

    def read(self) -> None:
        host = self.pick()
        if host is not None:
            try:
                host.read()
            except RaftDropped:
                return

    def crash(self) -> None:
        host = self.pick()
        if host is not None:
            if self.rng.random() < 0.5:
                host.crash()
            else:
                host.crash_at = self.rng.choice(POINTS)

    def start(self) -> None:
        for host in self.group.hosts.values():
            if host.core is None and self.rng.random() < 0.6:
                host.start()

    def cut(self) -> None:
        nodes = range(1, NODES + 1)
        side = {n for n in nodes if self.rng.random() < 0.4}
        one_way = self.rng.random() < 0.3
        for a in nodes:
            for b in nodes:
                if (a in side and b not in side) or (not one_way and b in side and a not in side):
                    self.group.cut.add((a, b))

    def heal(self) -> None:
        self.group.cut.clear()

    def reconfigure(self) -> None:
        host = self.pick()
        if host is None or host.core is None:
            return
        nodes = list(range(1, NODES + 1))
        self.rng.shuffle(nodes)
        voters = self.rng.choice((1, 2, 3, 3, 4, 5))
        learners = self.rng.randrange(NODES - voters + 1)
        try:
            host.core.propose_conf(nodes[:voters], nodes[voters : voters + learners])
        except RaftDropped:
            return

    def transfer(self) -> None:
        host = self.pick()
        if host is not None and host.core is not None:
            try:
                host.core.transfer(self.rng.randrange(1, NODES + 1))
            except (RaftDropped, RaftRefused):
                return

    def compact(self) -> None:
        host = self.pick()
        if host is not None:
            host.compact()

    def campaign(self) -> None:
        host = self.pick()
        if host is not None and host.core is not None:
            host.core.campaign()

    def pump(self) -> None:
        for host in self.group.hosts.values():
            try:
                host.pump()
            except Crashed:
                continue

    def rage(self, steps: int) -> None:
        weights = [weight for weight, _ in self.actions]
        for _ in range(steps):
            self.rng.choices(self.actions, weights)[0][1]()
            if self.rng.random() < 0.7:
                self.pump()

    def rest(self) -> None:
        self.group.cut.clear()
        for host in self.group.hosts.values():
            host.crash_at = ""
            if host.core is None:
                host.start()
        self.group.settle()
        index = self.group.propose("the end")
        self.group.until(lambda: self.group.committed >= index)
        self.group.until(lambda: not self.group.status(self.group.leader()).conf.joint)
        self.group.reconfigure(range(1, NODES + 1))
        self.group.until(self.group.same)
        for host in self.group.hosts.values():
            assert [text for _, _, text in host.applied].count("the end") == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_storm(seed: int) -> None:
    storm = Storm(seed)
    storm.rage(2000)
    storm.rest()
    assert len(storm.group.leaders) > 1
    assert storm.group.committed > 30


def test_a_storm_can_be_repeated() -> None:
    def run() -> tuple[object, ...]:
        storm = Storm(99)
        storm.rage(400)
        return (storm.group.leaders, storm.group.log, [h.applied for h in storm.live()])

    assert run() == run()
