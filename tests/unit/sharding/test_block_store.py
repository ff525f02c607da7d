"""The block store on a real directory, and what it makes of bad input and bad disks."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import Conflict, InvalidRequest
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_disk import open_real_disk
from pyagent_node.sharding.block_ledger import OVERHEAD
from pyagent_node.sharding.block_records import (
    RECORD_BYTES,
    SEGMENT_HEADER_BYTES,
    encode_record,
    encode_segment_header,
)
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.block_trouble import RETRY_SECONDS
from pyagent_node.sharding.kv_keys import BlockKey
from tests.unit.sharding.blocks import MODEL, OTHER, chain_of, payload_of, put_chain

SIZE = 1000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    folder: Path | None, *, memory: int = MIB, disk: int = 4 * MIB, clock: Clock | None = None
) -> BlockStore:
    tier = open_real_disk(folder, disk, reserve=0) if folder is not None else None
    store = BlockStore(memory_bytes=memory, disk=tier, clock=clock or Clock())
    store.open()
    return store


def flush(store: BlockStore) -> None:
    while store.write_back():
        pass


def all_right(store: BlockStore, keys: list[BlockKey]) -> int:
    found = store.read(keys)
    for key, payload in zip(keys, found, strict=True):
        assert payload is None or payload == payload_of(key, len(payload))
    return sum(payload is not None for payload in found)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_memory_alone() -> None:
    store = make(None)
    chain = chain_of(1, 4)
    keys = put_chain(store, chain)
    assert store.leading(MODEL, chain, range(2), "f16") == 4
    assert store.leading(MODEL, chain_of(2, 4), range(2), "f16") == 2
    assert store.counts(MODEL, chain, range(3), "f16") == [4, 4, 0]
    assert store.get(keys[0]) == payload_of(keys[0])
    assert store.get(BlockKey(OTHER, 0, chain[0], "f16")) is None
    assert store.write_back() == 0
    assert all_right(store, keys) == 8
    stats = store.stats()
    assert (stats.disk, stats.puts, stats.hits_memory, stats.misses) == ("off", 8, 9, 1)
    assert {link.chain for link in store.held()} == set(chain)
    assert store.drop_model(OTHER) == 0
    assert store.clear() == 8
    assert store.stats().memory_bytes == 0
    store.close()


def test_a_chain_that_does_not_fit_keeps_its_beginning() -> None:
    store = make(None, memory=5 * (SIZE + OVERHEAD))
    chain = chain_of(1, 10)
    assert len(put_chain(store, chain, range(1), size=SIZE)) == 5
    assert store.leading(MODEL, chain, range(1), "f16") == 5
    # Another one takes the ends of the first, and keeps its own.
    other = chain_of(9, 3)
    assert len(put_chain(store, other, range(1), size=SIZE)) == 3
    assert store.leading(MODEL, other, range(1), "f16") == 3
    assert store.leading(MODEL, chain, range(1), "f16") == 2
    stats = store.stats()
    assert (stats.refused, stats.evicted_memory, stats.lost) == (5, 3, 0)


def test_running_sessions_keep_theirs() -> None:
    store = make(None, memory=4 * (SIZE + OVERHEAD))
    mine = chain_of(1, 3)
    put_chain(store, mine, range(1), size=SIZE)
    store.pin("s", MODEL, "f16", mine)
    assert len(put_chain(store, chain_of(9, 3), range(1), size=SIZE)) == 1
    store.pin("s", MODEL, "f16", mine[:2])  # replaces
    assert len(put_chain(store, chain_of(17, 3), range(1), size=SIZE)) == 2
    assert store.leading(MODEL, mine, range(1), "f16") == 2
    for length in (1, 2, 3, 3, 1):  # as a session grows, and is trimmed
        store.pin("s", MODEL, "f16", mine[:length])
    store.unpin("s")
    store.unpin("s")
    assert len(put_chain(store, chain_of(25, 4), range(1), size=SIZE)) == 4


@pytest.mark.parametrize(
    ("key", "payload", "cost", "parent", "number"),
    [
        (BlockKey(Digest("x"), 0, bytes(32), "f16"), b"x", 1.0, b"", 0),
        (BlockKey(MODEL, -1, bytes(32), "f16"), b"x", 1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(3), "f16"), b"x", 1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(32), ""), b"x", 1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"", 1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), bytes(64 * MIB + 1), 1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", -1.0, b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", float("nan"), b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", float("inf"), b"", 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", 1.0, bytes(31), 0),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", 1.0, b"", -1),
        (BlockKey(MODEL, 0, bytes(32), "f16"), b"x", 1.0, b"", 1 << 32),
    ],
)
def test_what_is_no_block_is_refused(
    key: BlockKey, payload: bytes, cost: float, parent: bytes, number: int
) -> None:
    store = make(None)
    with pytest.raises(InvalidRequest) as caught:
        store.put(key, payload, cost, parent=parent, number=number)
    assert caught.value.code in ("bad_block", "bad_block_key")
    assert store.held() == []


def test_a_block_larger_than_memory_and_no_memory_at_all() -> None:
    key = BlockKey(MODEL, 0, bytes(32), "f16")
    assert not make(None, memory=1000).put(key, bytes(1000), 1.0)
    assert not make(None, memory=0).put(key, b"x", 1.0)


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    store = make(tmp_path)
    chain = chain_of(1, 5)
    keys = put_chain(store, chain, range(3))
    keys += put_chain(store, chain_of(1, 2, OTHER), range(3), model=OTHER)
    flush(store)
    assert store.stats().pending == 0
    store.close()
    store.close()
    again = make(tmp_path)
    assert again.leading(MODEL, chain, range(3), "f16") == 5
    assert again.leading(MODEL, chain, range(3), "f16", memory_only=True) == 0
    assert again.get(keys[0]) is None
    assert again.stats().misses == 0
    assert all_right(again, keys) == len(keys)
    assert again.get(keys[0]) == payload_of(keys[0])
    assert put_chain(again, chain, range(3)) == keys[:15]
    assert again.stats().pending == 0
    again.close()


def test_uses_are_remembered_over_a_restart(tmp_path: Path) -> None:
    store = make(tmp_path)
    size = 40_000
    units = [put_chain(store, chain_of(8 * text, 1), range(2), size=size) for text in range(8)]
    flush(store)
    for _ in range(5):
        all_right(store, units[3])
    store.close()
    limit = 300_000  # lowered: there is no room for all of them, nor for two copies of a segment
    again = make(tmp_path, disk=limit)
    stats = again.stats()
    assert stats.disk_bytes <= limit
    assert 0 < stats.disk_blocks < 8
    assert stats.corrupt == 0
    assert all_right(again, units[3]) == 2
    again.close()


@pytest.mark.parametrize("damage", ["gone", "noise", "empty", "other", "version", "row", "table"])
def test_a_bad_index_is_made_again(tmp_path: Path, damage: str) -> None:
    store = make(tmp_path)
    keys = put_chain(store, chain_of(1, 5))
    flush(store)
    store.close()
    index = tmp_path / "index.sqlite"
    match damage:
        case "gone":
            index.unlink()
        case "noise":
            index.write_bytes(random.Random(1).randbytes(8192))
        case "empty":
            index.write_bytes(b"")
        case "other":
            index.write_bytes(b"SQLite format 3\0" + bytes(500))
        case _:
            db = sqlite3.connect(index)
            if damage == "version":
                db.execute("PRAGMA user_version = 99")
            elif damage == "row":
                db.execute("UPDATE blocks SET cost = 'much' WHERE layer = 1")
            else:
                db.execute("DROP TABLE segments")
            db.commit()
            db.close()
    again = make(tmp_path)
    assert again.stats().disk == "on"
    assert all_right(again, keys) == len(keys)
    again.close()


def test_rows_that_point_elsewhere_are_forgotten_when_they_are_used(tmp_path: Path) -> None:
    store = make(tmp_path)
    keys = put_chain(store, chain_of(1, 5), size=SIZE)
    flush(store)
    store.close()
    db = sqlite3.connect(tmp_path / "index.sqlite")
    db.execute("UPDATE blocks SET offset = (SELECT min(offset) FROM blocks)")
    db.commit()
    db.close()
    again = make(tmp_path)
    assert all_right(again, keys) == 1
    assert again.stats().corrupt == len(keys) - 1
    assert again.stats().disk_blocks == 1
    assert len(put_chain(again, chain_of(1, 5), size=SIZE)) == 10
    flush(again)
    assert all_right(again, keys) == 10
    again.close()


def test_a_torn_tail_is_cut_off_and_appended_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(tmp_path)
    keys = put_chain(store, chain_of(1, 4))
    flush(store)
    store.close()
    (segment,) = segments(tmp_path)
    whole = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"KVB1" + bytes(100))
    again = make(tmp_path)
    assert "unfinished write" in caplog.text
    assert segment.stat().st_size == whole
    assert all_right(again, keys) == len(keys)
    more = put_chain(again, chain_of(9, 2))
    flush(again)
    assert segments(tmp_path) == [segment]
    again.close()
    with segment.open("r+b") as file:
        file.truncate(whole - 3)  # the disk has lost more than was written last
    third = make(tmp_path)
    assert all_right(third, keys) == len(keys) - 1
    assert all_right(third, more) == 0
    third.close()


def test_mislabelled_and_foreign_records_are_not_believed(tmp_path: Path) -> None:
    chain = chain_of(1, 3)
    asked = BlockKey(MODEL, 0, chain[0], "f16")
    _, good = encode_record(asked, b"", 0, 1.0, payload_of(asked))
    _, swapped = encode_record(BlockKey(MODEL, 0, chain[1], "f16"), chain[0], 1, 1.0, b"other")
    lies = [
        swapped[:RECORD_BYTES] + b"OTHER",  # another payload under a good label
        b"\0" * len(good),
        good[:20] + b"\xff" + good[21:],
    ]
    for number, lie in enumerate(lies):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "000000000001.kv").write_bytes(encode_segment_header(MODEL) + good + lie)
        (folder / "000000000002.kv").write_bytes(b"not ours")
        (folder / "notes.txt").write_text("a stranger")
        store = make(folder)
        assert [link.chain for link in store.held()] == [chain[0]]
        assert all_right(store, [asked]) == 1
        assert store.read([BlockKey(MODEL, 0, chain[1], "f16")]) == [None]
        assert not (folder / "000000000002.kv").exists()
        assert (folder / "notes.txt").exists()
        store.close()


def test_of_several_copies_one_counts(tmp_path: Path) -> None:
    """As a crash leaves them that came between the copying of a segment and its removal."""
    key = BlockKey(MODEL, 0, bytes(32), "f16")
    _, record = encode_record(key, b"", 0, 1.0, payload_of(key, SIZE))
    for number in range(1, 5):
        (tmp_path / f"{number:012}.kv").write_bytes(encode_segment_header(MODEL) + record)
    store = make(tmp_path, disk=4000)
    stats = store.stats()
    assert (stats.disk_blocks, stats.disk) == (1, "on")
    assert stats.disk_bytes <= 3000
    assert all_right(store, [key]) == 1
    store.close()


def test_a_segment_of_another_model_holds_nothing_of_this_one(tmp_path: Path) -> None:
    key = BlockKey(MODEL, 0, bytes(32), "f16")
    _, record = encode_record(key, b"", 0, 1.0, b"secret")
    (tmp_path / "000000000001.kv").write_bytes(encode_segment_header(OTHER) + record)
    store = make(tmp_path)
    assert store.read([key]) == [None]
    store.close()


def test_a_segment_that_shrinks_under_us_costs_its_blocks_only(tmp_path: Path) -> None:
    store = make(tmp_path, memory=3 * (SIZE + OVERHEAD))
    keys = []
    for number in range(8):
        keys += put_chain(store, chain_of(8 * number, 1), range(1), size=SIZE)
        flush(store)
    assert all_right(store, keys) == 8
    (segment,) = segments(tmp_path)
    os.truncate(segment, SEGMENT_HEADER_BYTES + 3 * (SIZE + RECORD_BYTES))
    assert all_right(store, list(reversed(keys))) in range(3, 7)
    assert store.stats().corrupt >= 2
    store.close()


def test_one_process_at_a_time_has_the_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(tmp_path)
    clock = Clock()
    second = make(tmp_path, clock=clock)
    assert second.stats().disk == "in_use"
    assert "another process has it" in caplog.text
    keys = put_chain(second, chain_of(1, 2))
    assert second.write_back() == 0
    assert all_right(second, keys) == 4
    first_keys = put_chain(first, chain_of(9, 2))
    flush(first)
    with pytest.raises(Conflict):
        open_real_disk(tmp_path, MIB).open()
    first.close()
    clock.now = RETRY_SECONDS
    assert second.write_back() == 4
    assert second.stats().disk == "on"
    assert all_right(second, keys + first_keys) == 8
    second.close()


def test_a_directory_that_cannot_be_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kv").write_text("a file is in the way")
    clock = Clock()
    store = make(tmp_path / "kv", clock=clock)
    assert store.stats().disk == "disk_failed"
    keys = put_chain(store, chain_of(1, 2))
    for _ in range(3):
        clock.now += RETRY_SECONDS
        assert store.write_back() == 0
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    (tmp_path / "kv").unlink()
    clock.now += RETRY_SECONDS
    assert store.write_back() == 4
    assert all_right(store, keys) == 4
    store.close()


@pytest.mark.skipif(os.name == "nt", reason="there, open files cannot be removed")
def test_a_directory_that_is_removed_under_us_is_begun_anew(tmp_path: Path) -> None:
    clock = Clock()
    store = make(tmp_path / "kv", clock=clock)
    old = put_chain(store, chain_of(1, 2))
    flush(store)
    shutil.rmtree(tmp_path / "kv")
    keys = put_chain(store, chain_of(9, 2))
    assert store.write_back() == 0
    assert store.stats().disk == "file_not_found"
    clock.now += RETRY_SECONDS
    flush(store)
    assert store.stats().disk == "on"
    store.close()
    again = make(tmp_path / "kv")
    assert all_right(again, old + keys) == 8
    again.close()


def test_dropping_a_model_removes_its_files(tmp_path: Path) -> None:
    store = make(tmp_path)
    put_chain(store, chain_of(1, 3))
    others = put_chain(store, chain_of(1, 3, OTHER), model=OTHER)
    flush(store)
    assert len(segments(tmp_path)) == 2
    assert store.drop_model(MODEL) == 6
    assert len(segments(tmp_path)) == 1
    assert all_right(store, others) == 6
    assert store.clear() == 6
    assert segments(tmp_path) == []
    assert store.stats().disk_bytes == 0
    put_chain(store, chain_of(1, 3))
    assert store.write_back() == 6
    store.close()


def test_what_others_need_of_the_disk_is_left_to_them(tmp_path: Path) -> None:
    tier = open_real_disk(tmp_path, MIB, reserve=1 << 60)
    store = BlockStore(memory_bytes=MIB, disk=tier)
    store.open()
    put_chain(store, chain_of(1, 2))
    assert store.write_back() == 0
    assert store.stats().disk == "disk_full"
    assert segments(tmp_path) == []
    store.close()


@pytest.mark.slow
def test_threads_at_once(tmp_path: Path) -> None:
    """One writes to the disk, others put, read and drop; nothing wrong is ever read."""
    store = make(tmp_path, memory=200_000, disk=600_000)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(120):
                chain = chain_of(rng.randrange(30), 4)
                keys = put_chain(store, chain, size=3000)
                all_right(store, keys)
                store.leading(MODEL, chain, range(2), "f16")
                if rng.random() < 0.02:
                    store.drop_model(MODEL)
        except BaseException as error:
            wrong.append(error)

    def write() -> None:
        try:
            while not stop.is_set():
                store.write_back()
                assert store.stats().disk_bytes <= 600_000
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    writer = threading.Thread(target=write)
    for thread in (writer, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    writer.join()
    assert wrong == []
    assert store.stats().corrupt == 0
    store.close()


async def test_from_trio(tmp_path: Path) -> None:
    """The immediate half in the event loop, the blocking half in worker threads."""
    store = make(tmp_path)
    chain = chain_of(1, 4)
    async with trio.open_nursery() as nursery:
        keys = put_chain(store, chain)
        nursery.start_soon(trio.to_thread.run_sync, store.write_back)
        assert store.leading(MODEL, chain, range(2), "f16") == 4
    found = await trio.to_thread.run_sync(store.read, keys)
    assert found == [payload_of(key) for key in keys]
    await trio.to_thread.run_sync(store.close)
