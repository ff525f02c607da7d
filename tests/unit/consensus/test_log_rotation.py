"""Segments: when a new one begins, what each of them must say, and logs of the first layout."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.consensus import directory as directory_module
from pyagent_node.consensus.log import FileLog, StoredLog
from pyagent_node.consensus.segments import (
    Batch,
    LogEntry,
    Snapshot,
    encode_record,
    encode_segment_header,
    encode_snapshot_file,
)


def entry(index: int, term: int = 1) -> LogEntry:
    return LogEntry(index, term, f"entry {index}".encode() * 10)


def entries(first: int, last: int, term: int = 1) -> list[LogEntry]:
    return [entry(i, term) for i in range(first, last + 1)]


def small(directory: Path) -> FileLog:
    return FileLog(directory, segment_bytes=512)


async def reread(directory: Path) -> StoredLog:
    store = small(directory)
    stored = await store.load()
    await store.aclose()
    return stored


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


def snapshots(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.snap*"))


async def fill(store: FileLog, first: int) -> int:
    """Append until that fails; return the last index that was taken."""
    index = first
    with pytest.raises(Unavailable):  # noqa: PT012
        while index < 100:
            await store.append([entry(index)])
            index += 1
    return index - 1


async def filled(directory: Path, last: int) -> FileLog:
    store = small(directory)
    await store.load()
    await store.append([], b"hard")
    for index in range(1, last + 1):
        await store.append([entry(index)])
    return store


async def test_a_long_log_has_many_segments(tmp_path: Path) -> None:
    store = await filled(tmp_path, 30)
    await store.append([], b"harder")
    await store.append(entries(31, 40))
    await store.aclose()
    assert len(segments(tmp_path)) > 5
    assert all(path.stat().st_size < 512 for path in segments(tmp_path)[:-1])
    assert await reread(tmp_path) == StoredLog(None, entries(1, 40), b"harder")


async def test_a_suffix_that_began_segments_ago_can_be_replaced(tmp_path: Path) -> None:
    store = await filled(tmp_path, 30)
    await store.append([entry(3, term=2)])
    await store.append([entry(4, term=2)])
    await store.aclose()
    assert (await reread(tmp_path)).entries == [*entries(1, 2), *entries(3, 4, term=2)]


async def test_compaction_removes_every_older_segment(tmp_path: Path) -> None:
    store = await filled(tmp_path, 30)
    await store.compact(Snapshot(20, 1, b"state"), entries(1, 30))
    assert len(segments(tmp_path)) == 1
    for index in range(31, 60):
        await store.append([entry(index)])
    await store.aclose()
    assert len(segments(tmp_path)) > 3
    expected = StoredLog(Snapshot(20, 1, b"state"), entries(21, 59), b"hard")
    assert await reread(tmp_path) == expected
    assert await reread(tmp_path) == expected


async def test_a_snapshot_of_the_same_entry_replaces_what_followed(tmp_path: Path) -> None:
    store = await filled(tmp_path, 10)
    await store.compact(Snapshot(5, 1, b"one"), entries(6, 10))
    await store.compact(Snapshot(5, 1, b"two"), ())
    await store.aclose()
    assert await reread(tmp_path) == StoredLog(Snapshot(5, 1, b"two"), [], b"hard")


async def test_a_lost_segment_is_damage(tmp_path: Path) -> None:
    await (await filled(tmp_path, 30)).aclose()
    lost = segments(tmp_path)[2]
    lost.unlink()
    with pytest.raises(CorruptData, match="missing") as caught:
        await reread(tmp_path)
    assert str(lost) in str(caught.value)
    assert caught.value.remedy


async def test_segments_of_two_generations_do_not_mix(tmp_path: Path) -> None:
    await (await filled(tmp_path, 30)).aclose()
    segments(tmp_path)[1].write_bytes(encode_segment_header(7, 1))
    with pytest.raises(CorruptData, match="another snapshot"):
        await reread(tmp_path)


async def test_a_snapshot_that_is_not_the_one_named_is_damage(tmp_path: Path) -> None:
    store = await filled(tmp_path, 10)
    await store.compact(Snapshot(5, 1, b"one"), ())
    await store.aclose()
    (path,) = snapshots(tmp_path)
    path.write_bytes(encode_snapshot_file(Snapshot(6, 1, b"one")))
    with pytest.raises(CorruptData, match="of entry 6"):
        await reread(tmp_path)
    for segment in segments(tmp_path):
        segment.unlink()
    with pytest.raises(CorruptData, match="no segment"):
        await reread(tmp_path)


async def test_a_torn_tail_before_the_last_segment_is_damage(tmp_path: Path) -> None:
    await (await filled(tmp_path, 30)).aclose()
    path = segments(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptData) as caught:
        await reread(tmp_path)
    assert str(path) in str(caught.value)


async def test_a_rotation_that_fails_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await filled(tmp_path, 2)
    with monkeypatch.context() as patch:

        def full(path: Path, data: bytes) -> None:
            raise Unavailable("No space.", code="disk_full")

        patch.setattr(directory_module, "write_atomic", full)
        done = await fill(store, 3)
    await store.append([entry(done + 1)])
    await store.aclose()
    assert await reread(tmp_path) == StoredLog(None, entries(1, done + 1), b"hard")


async def test_a_new_segment_that_may_not_be_durable_ends_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await filled(tmp_path, 2)
    with monkeypatch.context() as patch:

        def half(path: Path, data: bytes) -> None:
            path.write_bytes(data)
            raise Unavailable("The directory could not be synced.", code="disk_failed")

        patch.setattr(directory_module, "write_atomic", half)
        await fill(store, 3)
    with pytest.raises(Unavailable) as caught:
        await store.append([entry(3)])
    assert caught.value.code == "log_failed"
    await store.aclose()


async def test_compaction_keeps_more_than_one_record(tmp_path: Path) -> None:
    big = [LogEntry(i, 1, bytes([i]) * 700_000) for i in range(1, 8)]
    store = small(tmp_path)
    await store.load()
    for one in big:
        await store.append([one])
    await store.compact(Snapshot(1, 1, b""), big)
    await store.aclose()
    assert (await reread(tmp_path)).entries == big[1:]


def header_v1(base: int) -> bytes:
    head = struct.pack(">8sQ", b"PYALOG1\n", base)
    return head + struct.pack(">I", zlib.crc32(head))


@pytest.mark.parametrize("base", [0, 8])
async def test_a_log_of_the_first_layout_is_taken_over(tmp_path: Path, base: int) -> None:
    kept = entries(base + 1, base + 5)
    content = header_v1(base) + encode_record(Batch(kept, b"hard"))
    (tmp_path / f"{3:020d}.log").write_bytes(content + encode_record(Batch([], None))[:-1])
    snapshot = Snapshot(base, 1, b"state") if base else None
    if snapshot is not None:
        (tmp_path / f"{base:020d}.snap").write_bytes(encode_snapshot_file(snapshot))
        (tmp_path / f"{1:020d}.log").write_bytes(header_v1(0))
    store = small(tmp_path)
    stored = await store.load()
    assert (stored.snapshot, stored.entries, stored.hard_state) == (snapshot, kept, b"hard")
    assert stored.torn_bytes > 0
    for index in range(base + 6, base + 40):
        await store.append([entry(index)])
    await store.aclose()
    expected = StoredLog(snapshot, entries(base + 1, base + 39), b"hard")
    assert await reread(tmp_path) == expected
    assert [path.suffix for path in snapshots(tmp_path)] == [".snapshot"] * bool(base)


@pytest.mark.parametrize("cut", [0, 5, 19])
async def test_a_short_header_of_either_layout(tmp_path: Path, cut: int) -> None:
    for whole in (header_v1(0), encode_segment_header(0, 1)):
        (tmp_path / f"{1:020d}.log").write_bytes(whole[:cut])
        with pytest.raises(CorruptData, match="header"):
            await reread(tmp_path)
