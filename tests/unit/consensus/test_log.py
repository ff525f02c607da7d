"""The durable log: what survives, what is cut off and reported, what stops the node."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, LimitExceeded, Unavailable
from pyagent_node.consensus import directory as directory_module
from pyagent_node.consensus.log import FileLog, LogStore, MemoryLog, StoredLog
from pyagent_node.consensus.segments import (
    MAX_RECORD,
    SECTOR,
    SEGMENT_HEADER_BYTES,
    Batch,
    LogEntry,
    Snapshot,
    decode_segment,
    encode_record,
    encode_segment_header,
)


def entry(index: int, data: bytes = b"", term: int = 1) -> LogEntry:
    return LogEntry(index, term, data or f"entry {index}".encode())


def entries(first: int, last: int) -> list[LogEntry]:
    return [entry(i) for i in range(first, last + 1)]


async def opened(store: LogStore) -> StoredLog:
    stored = await store.load()
    await store.aclose()
    return stored


def only_log(directory: Path) -> Path:
    (path,) = directory.glob("*.log")
    return path


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


@pytest.fixture(params=["file", "memory"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], LogStore]:
    memory = MemoryLog()
    return lambda: FileLog(tmp_path / "log") if request.param == "file" else memory


async def test_what_was_appended_is_there_again(reopen: Callable[[], LogStore]) -> None:
    store = reopen()
    assert await store.load() == StoredLog(None, [], None)
    await store.append(entries(1, 3))
    await store.append([], b"hard")
    await store.append(entries(4, 4))
    await store.aclose()
    stored = await opened(reopen())
    assert stored == StoredLog(None, entries(1, 4), b"hard")
    assert stored.last_index == 4


async def test_an_index_again_replaces_it_and_what_follows(reopen: Callable[[], LogStore]) -> None:
    store = reopen()
    await store.load()
    await store.append(entries(1, 5))
    await store.append([entry(3, b"other", term=2)])
    await store.aclose()
    assert (await opened(reopen())).entries == [*entries(1, 2), entry(3, b"other", 2)]


async def test_compaction(reopen: Callable[[], LogStore]) -> None:
    store = reopen()
    await store.load()
    await store.append(entries(1, 10), b"hard")
    await store.compact(Snapshot(8, 1, b"state"), entries(7, 10))
    await store.append(entries(11, 12))
    await store.aclose()
    stored = await opened(reopen())
    assert stored == StoredLog(Snapshot(8, 1, b"state"), entries(9, 12), b"hard")
    store = reopen()
    await store.load()
    await store.compact(Snapshot(20, 2, b""), ())
    await store.append(entries(21, 21))
    await store.aclose()
    stored = await opened(reopen())
    assert stored == StoredLog(Snapshot(20, 2, b""), entries(21, 21), b"hard")


async def test_compaction_leaves_one_of_each(tmp_path: Path) -> None:
    store = FileLog(tmp_path)
    await store.load()
    for last in range(10, 60, 10):
        await store.append(entries(last - 9, last))
        await store.compact(Snapshot(last, 1, b"s" * 1000), ())
    await store.aclose()
    left = files(tmp_path)
    assert sorted(path.suffix for path in left) == [".log", ".snapshot"]
    if os.name == "posix":
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in left)


@pytest.mark.parametrize("keep", ["nothing", "snapshot", "snapshot and segment"])
async def test_crash_in_the_middle_of_compaction(tmp_path: Path, keep: str) -> None:
    """The steps are: write the snapshot, start a segment, remove the old files."""
    directory = tmp_path / "log"
    store = FileLog(directory)
    await store.load()
    await store.append(entries(1, 10))
    old = only_log(directory).read_bytes()
    await store.compact(Snapshot(8, 1, b"state"), entries(9, 10))
    await store.aclose()
    (directory / f"{1:020d}.log").write_bytes(old)
    if keep != "snapshot and segment":
        (directory / f"{2:020d}.log").unlink()
    if keep == "nothing":
        (directory / f"{2:020d}.snapshot").unlink()
    (directory / ".half.tmp").write_bytes(b"half")
    store = FileLog(directory)
    stored = await store.load()
    if keep != "snapshot and segment":
        assert stored == StoredLog(None, entries(1, 10), None)
    else:
        assert stored == StoredLog(Snapshot(8, 1, b"state"), entries(9, 10), None)
    assert len(files(directory)) == (2 if keep == "snapshot and segment" else 1)
    await store.append(entries(11, 11))
    await store.aclose()
    assert (await opened(FileLog(directory))).last_index == 11
    assert not list(directory.glob(".*"))


async def test_every_torn_tail_is_cut_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileLog(tmp_path)
    await store.load()
    await store.append(entries(1, 3))
    path = only_log(tmp_path)
    good = path.stat().st_size
    await store.append([entry(4, os.urandom(700))])
    await store.aclose()
    whole = path.read_bytes()
    for size in range(good, len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stored = await opened(FileLog(tmp_path))
        assert stored.entries == entries(1, 3)
        assert stored.torn_bytes == size - good
        assert path.stat().st_size == good
        assert (str(path) in caplog.text) is (size > good)
    path.write_bytes(whole)
    assert (await opened(FileLog(tmp_path))).last_index == 4


async def test_sectors_that_were_not_written_are_a_torn_tail(tmp_path: Path) -> None:
    store = FileLog(tmp_path)
    await store.load()
    await store.append(entries(1, 3))
    path = only_log(tmp_path)
    good = path.stat().st_size
    await store.append([entry(4, b"\xaa" * 5 * SECTOR)])
    await store.aclose()
    whole = path.read_bytes()
    for sector in range(good // SECTOR, len(whole) // SECTOR + 1):
        start, stop = max(good, sector * SECTOR), min(len(whole), (sector + 1) * SECTOR)
        path.write_bytes(whole[:start] + bytes(stop - start) + whole[stop:])
        stored = await opened(FileLog(tmp_path))
        assert stored.entries == entries(1, 3)
        assert stored.torn_bytes == len(whole) - good
    path.write_bytes(whole[:good] + bytes(3 * SECTOR))
    assert (await opened(FileLog(tmp_path))).torn_bytes == 3 * SECTOR


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_flipped_bit_is_never_accepted_and_never_taken_for_a_torn_tail(
    data: st.DataObject,
) -> None:
    batches = [
        Batch(entries(1, 2), None),
        Batch(entries(3, 3), b"hard"),
        Batch(entries(4, 9), None),
    ]
    whole = encode_segment_header(7, 1) + b"".join(encode_record(batch) for batch in batches)
    assert decode_segment(whole, "x", last=True).batches == batches
    bad = bytearray(whole)
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptData) as caught:
        decode_segment(bytes(bad), "the-file", last=True)
    assert caught.value.code == "log_corrupt"
    assert "the-file" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("spoilt", range(12))
def test_a_spoilt_record_header_is_no_torn_tail_because_of_zeros_further_on(spoilt: int) -> None:
    before = encode_segment_header(0, 1) + encode_record(Batch(entries(1, 3), None))
    zeros = Batch([entry(5, bytes(4 * SECTOR))], None)  # acknowledged, and full of zeros
    whole = before + encode_record(Batch([entry(4)], None)) + encode_record(zeros)
    assert decode_segment(whole, "x", last=True).good == len(whole)
    bad = bytearray(whole)
    bad[len(before) + spoilt] ^= 0x10
    with pytest.raises(CorruptData):
        decode_segment(bytes(bad), "x", last=True)


def test_torn_tail_in_a_segment_that_is_not_the_last_is_damage() -> None:
    whole = encode_segment_header(0, 1) + encode_record(Batch(entries(1, 2), None))
    assert decode_segment(whole[:-1], "x", last=True).good == SEGMENT_HEADER_BYTES
    with pytest.raises(CorruptData):
        decode_segment(whole[:-1], "x", last=False)


@given(data=st.binary(max_size=200))
def test_garbage_files(data: bytes) -> None:
    with pytest.raises(CorruptData):
        decode_segment(data, "x", last=True)


async def test_damage_stops_the_node_and_names_the_file(tmp_path: Path) -> None:
    store = FileLog(tmp_path)
    await store.load()
    await store.append(entries(1, 3))
    await store.compact(Snapshot(2, 1, b"state"), entries(3, 3))
    await store.append(entries(4, 5))
    await store.aclose()
    segment, snapshot = sorted(files(tmp_path), key=lambda path: path.suffix)
    for path in (segment, snapshot):
        content = path.read_bytes()
        for bad in (b"", content[:10], content[:40] + b"\xff" + content[41:]):
            path.write_bytes(bad)
            with pytest.raises(CorruptData) as caught:
                await opened(FileLog(tmp_path))
            assert str(path) in str(caught.value)
            assert path.read_bytes() == bad
        path.write_bytes(content)
    snapshot.unlink()
    with pytest.raises(CorruptData, match="snapshot"):
        await opened(FileLog(tmp_path))


async def test_missing_entries_are_damage(tmp_path: Path) -> None:
    path = tmp_path / f"{1:020d}.log"
    path.write_bytes(encode_segment_header(0, 1) + encode_record(Batch(entries(2, 3), None)))
    with pytest.raises(CorruptData, match="entry 1 is missing"):
        await opened(FileLog(tmp_path))


async def test_full_disk_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileLog(tmp_path)
    await store.load()
    await store.append(entries(1, 3))
    write = os.write
    room = 20

    def full(fd: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[:room])
        room -= written
        return written

    monkeypatch.setattr(directory_module.os, "write", full)
    with pytest.raises(Unavailable) as caught:
        await store.append([entry(4, b"x" * 100)])
    assert caught.value.code == "disk_full"
    room = 10**9
    await store.append(entries(4, 5))
    await store.aclose()
    assert await opened(FileLog(tmp_path)) == StoredLog(None, entries(1, 5), None)


async def test_after_a_failed_sync_nothing_is_taken_until_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileLog(tmp_path)
    await store.load()
    await store.append(entries(1, 1))

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(directory_module, "sync_file", fail)
        with pytest.raises(Unavailable) as first:
            await store.append(entries(2, 2))
    assert first.value.code == "disk_failed"
    for work in (store.append(entries(2, 2)), store.compact(Snapshot(1, 1, b""), ())):
        with pytest.raises(Unavailable) as later:
            await work
        assert later.value.code == "log_failed"
    await store.aclose()
    await store.aclose()
    stored = await opened(FileLog(tmp_path))
    assert stored.last_index in (1, 2)


async def test_append_is_synced_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileLog(tmp_path)
    await store.load()
    sizes: list[int] = []
    sync = directory_module.sync_file

    def note(fd: int) -> None:
        sync(fd)
        sizes.append(os.fstat(fd).st_size)

    monkeypatch.setattr(directory_module, "sync_file", note)
    await store.append(entries(1, 3))
    await store.aclose()
    assert sizes[-1] == only_log(tmp_path).stat().st_size


def test_a_record_has_a_limit() -> None:
    with pytest.raises(LimitExceeded) as caught:
        encode_record(Batch([entry(1, bytes(MAX_RECORD))], None))
    assert caught.value.code == "record_too_large"


async def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        await FileLog(tmp_path / "file" / "log").load()
