"""The simulated disk: what it loses, and that the log loses nothing it said was durable."""

from __future__ import annotations

import random

import pytest
import trio

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.consensus.log import StoredLog
from pyagent_node.consensus.segments import LogEntry, Snapshot
from pyagent_node.simulations.disk import PowerLoss, SimulatedDisk, SimulatedLog

SEGMENT_BYTES = 400


def small(disk: SimulatedDisk) -> SimulatedLog:
    return SimulatedLog(disk, segment_bytes=SEGMENT_BYTES)


class Script:
    """Drives a log by a generator and remembers what it must hold."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sure = StoredLog(None, [], None)
        self.maybe = self.sure
        """What it may hold besides, when the last step did not return."""
        self.term = 1

    async def run(self, log: SimulatedLog, steps: int) -> None:
        for _ in range(steps):
            await self.step(log)
            self.sure = self.maybe

    async def step(self, log: SimulatedLog) -> None:
        now = self.sure
        first = now.snapshot.index if now.snapshot else 0
        match self.rng.randrange(8):
            case 0 if now.last_index > first:
                at = self.rng.randint(first + 1, now.last_index)
                snapshot = Snapshot(at, now.entries[at - first - 1].term, b"s" * at)
                kept = now.entries[at - first :]
                self.maybe = StoredLog(snapshot, kept, now.hard_state)
                await log.compact(snapshot, now.entries)
            case 1:
                snapshot = Snapshot(now.last_index + 5, self.term, b"from the leader")
                self.maybe = StoredLog(snapshot, [], now.hard_state)
                await log.compact(snapshot, ())
            case 2 if now.last_index > first:
                self.term += 1
                at = self.rng.randint(first + 1, now.last_index)
                await self.append(log, now.entries[: at - first - 1], at)
            case _:
                await self.append(log, now.entries, now.last_index + 1)

    async def append(self, log: SimulatedLog, kept: list[LogEntry], at: int) -> None:
        added = [
            LogEntry(at + i, self.term, self.rng.randbytes(self.rng.randrange(100)))
            for i in range(self.rng.randrange(4))
        ]
        hard = self.rng.choice([None, self.rng.randbytes(8)])
        if not added:
            kept = self.sure.entries
        self.maybe = StoredLog(self.sure.snapshot, [*kept, *added], hard or self.sure.hard_state)
        await log.append(added, hard)

    def check(self, stored: StoredLog) -> None:
        """The log holds what was acknowledged; of the step under way all of it or nothing."""
        found = (stored.snapshot, stored.entries, stored.hard_state)
        sure, maybe = (
            (one.snapshot, one.entries, one.hard_state) for one in (self.sure, self.maybe)
        )
        assert found in (sure, maybe)
        self.sure = self.maybe = StoredLog(*found)


@pytest.mark.parametrize("seed", range(12))
async def test_a_crash_at_every_operation_loses_nothing_acknowledged(seed: int) -> None:
    disk = SimulatedDisk(random.Random(seed))
    log, script = small(disk), Script(seed)
    await log.load()
    await script.run(log, 60)
    total = disk.operations
    for last in range(1, total + 1, 1 + seed % 3):
        disk, script = SimulatedDisk(random.Random(last)), Script(seed)
        disk.power_for = last
        with pytest.raises(PowerLoss):  # noqa: PT012
            log = small(disk)
            await log.load()
            await script.run(log, 61)
        disk.crash()
        script.check(await small(disk).load())


@pytest.mark.parametrize("seed", range(20))
async def test_many_lives(seed: int) -> None:
    """Crashes, also while the log is being opened, and full disks, one after the other."""
    rng = random.Random(seed)
    disk, script = SimulatedDisk(rng), Script(seed)
    for _ in range(40):
        disk.power_for = rng.randrange(1, 60)
        try:
            log = small(disk)
            script.check(await log.load())
            while True:
                disk.room = rng.choice([10**9, 10**9, rng.randrange(300)])
                try:
                    await script.run(log, 5)
                except Unavailable:
                    script.maybe = script.sure
        except PowerLoss:
            disk.crash()
        except Unavailable:  # no room to open the log
            pass
        disk.room = 10**9


async def test_a_full_disk_refuses_and_goes_on_when_there_is_room() -> None:
    disk, script = SimulatedDisk(random.Random(1)), Script(1)
    log = SimulatedLog(disk)
    await log.load()
    await script.run(log, 20)
    disk.room = 3
    with pytest.raises(Unavailable) as caught:
        await log.append([LogEntry(script.sure.last_index + 1, 9, b"x" * 100)])
    assert caught.value.code == "disk_full"
    assert caught.value.remedy
    script.maybe = script.sure
    disk.room = 10**6
    await script.run(log, 5)
    disk.crash()
    script.check(await SimulatedLog(disk).load())


async def test_what_a_failed_sync_forgot_is_not_taken_for_durable_after_a_restart() -> None:
    for seed in range(10):
        disk = SimulatedDisk(random.Random(seed))
        log = small(disk)
        await log.load()
        await log.append([LogEntry(1, 1, b"sure")])
        disk.failing_syncs = 1
        with pytest.raises(Unavailable) as failed:
            await log.append([LogEntry(2, 1, b"lost")])
        assert failed.value.code == "disk_failed"
        with pytest.raises(Unavailable) as later:
            await log.append([LogEntry(2, 1, b"lost")])
        assert later.value.code == "log_failed"
        log = small(disk)  # the program restarts, the machine does not
        seen = (await log.load()).last_index
        await log.append([LogEntry(seen + 1, 1, b"next")])
        disk.crash()
        assert (await small(disk).load()).last_index == seen + 1


async def test_a_flipped_bit_stops_the_log_or_changes_nothing() -> None:
    rng = random.Random(5)
    disk, script = SimulatedDisk(rng), Script(3)
    log = SimulatedLog(disk)
    await log.load()
    await script.run(log, 30)
    before = script.sure
    for name in disk.names():
        for offset in rng.sample(range(disk.size(name)), 40):
            disk.flip(name, offset, bit := rng.randrange(8))
            with pytest.raises(CorruptData) as caught:
                await SimulatedLog(disk).load()
            assert name in str(caught.value)
            disk.flip(name, offset, bit)
    script.check(await SimulatedLog(disk).load())
    assert script.sure == before


async def test_a_program_hears_nothing_of_its_own_end() -> None:
    disk = SimulatedDisk(random.Random(0))
    with trio.CancelScope() as life:
        log = SimulatedLog(disk, on_power_loss=life.cancel)
        await log.load()
        disk.power_for = 1
        await log.append([LogEntry(1, 1, b"x")])
        raise AssertionError("the append came back")
    assert life.cancelled_caught
    disk.crash()
    assert (await SimulatedLog(disk).load()).last_index in (0, 1)


async def test_a_slow_and_then_an_erased_disk(autojump_clock: trio.testing.MockClock) -> None:
    disk = SimulatedDisk(random.Random(0))
    disk.delay = 0.5
    began = trio.current_time()
    log = SimulatedLog(disk)
    await log.load()
    await log.append([LogEntry(1, 1, b"x")])
    assert trio.current_time() - began == pytest.approx(1.0)
    disk.erase()
    assert (await SimulatedLog(disk).load()) == StoredLog(None, [], None)
    with pytest.raises(PowerLoss):
        await log.append([LogEntry(2, 1, b"x")])
