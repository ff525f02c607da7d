"""Logs that are damaged on purpose: a node must refuse each of them by name."""

from __future__ import annotations

import random

import pytest

from pyagent_node.base.errors import CorruptData
from pyagent_node.consensus.segmented import SegmentedLog
from pyagent_node.consensus.segments import LogEntry, Snapshot
from pyagent_node.simulations.disk import SimulatedDisk
from pyagent_node.simulations.losses import corrupt


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_a_changed_bit_in_an_old_file_is_found_and_named(seed: int, snapshot: bool) -> None:
    rng = random.Random(seed)
    disk = SimulatedDisk(rng)
    log = SegmentedLog(disk, segment_bytes=400)
    log.load()
    for index in range(1, 20):
        log.append([LogEntry(index, 1, rng.randbytes(30))], None)
        if snapshot and index == 10:
            log.compact(Snapshot(10, 1, rng.randbytes(99)), [])
    name = corrupt(disk, rng)
    assert name is not None
    with pytest.raises(CorruptData) as caught:
        SegmentedLog(disk, segment_bytes=400).load()
    assert caught.value.code == "log_corrupt"
    assert name in caught.value.message


def test_an_empty_disk_cannot_be_damaged() -> None:
    rng = random.Random(1)
    assert corrupt(SimulatedDisk(rng), rng) is None
