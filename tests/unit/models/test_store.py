"""The model store: whole and partial files, slices, names; twice, at once, half-written."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.models import manifest as manifest_module
from pyagent_node.inference.models import store_layout
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.manifest import (
    ModelManifest,
    build_manifest,
    check_digest,
    check_name,
    decode_manifest,
)
from pyagent_node.inference.models.partial import PartialModel
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.native import blake3

CHUNK = 4096
PART = Slice(1, 3, False)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def add(store: ModelStore, path: Path, name: str = "tiny") -> Digest:
    return store.add_file(path, about=About(name), chunk_bytes=CHUNK).digest


def manifest_of(path: Path) -> ModelManifest:
    return build_manifest(path, header_bytes=read_header(path).length, chunk_bytes=CHUNK)


def chunk(path: Path, manifest: ModelManifest, index: int) -> bytes:
    return path.read_bytes()[slice(*manifest.range(index))]


# Manifests


def test_manifest_describes_the_file(tiny_source: Path) -> None:
    manifest = manifest_of(tiny_source)
    data = tiny_source.read_bytes()
    assert manifest.digest == blake3(data).hex()
    assert manifest.size == len(data)
    assert manifest.count == -(-len(data) // CHUNK)
    for index in (0, manifest.count - 1):
        manifest.check_chunk(index, chunk(tiny_source, manifest, index))
    again = decode_manifest(manifest.encode(), manifest.manifest_digest)
    assert again == manifest
    assert again.manifest_digest == blake3(manifest.encode()).hex()
    for wrong in (b"", chunk(tiny_source, manifest, 1), chunk(tiny_source, manifest, 0)[:-1]):
        with pytest.raises(CorruptData) as caught:
            manifest.check_chunk(0, wrong)
        assert caught.value.code == "chunk_corrupt"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 2}, "manifest_version"),
        ({"digest": "x"}, "manifest_corrupt"),
        ({"digest": "A" * 64}, "manifest_corrupt"),
        ({"size": 0}, "manifest_corrupt"),
        ({"size": -5}, "manifest_corrupt"),
        ({"size": 10**15}, "manifest_corrupt"),
        ({"header_bytes": 0}, "manifest_corrupt"),
        ({"header_bytes": 10**9}, "manifest_corrupt"),
        ({"chunk_bytes": 0}, "manifest_corrupt"),
        ({"chunk_bytes": 4097}, "manifest_corrupt"),
        ({"chunk_bytes": 2**40}, "manifest_corrupt"),
        ({"chunks": b""}, "manifest_corrupt"),
    ],
)
def test_manifests_that_make_no_sense(
    tiny_source: Path, change: dict[str, object], code: str
) -> None:
    data = msgspec.structs.replace(manifest_of(tiny_source), **change).encode()
    with pytest.raises((CorruptData, Unsupported)) as caught:
        decode_manifest(data)
    assert caught.value.code == code


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 5000, b"\x80", b"\x97\x01\x02"])
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        decode_manifest(data)
    assert caught.value.code == "manifest_corrupt"


def test_another_manifest_than_expected(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = manifest_of(tiny_source).encode()
    with pytest.raises(CorruptData) as caught:
        decode_manifest(data, Digest("0" * 64))
    assert caught.value.code == "manifest_mismatch"
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(LimitExceeded) as too_large:
        decode_manifest(data)
    assert too_large.value.code == "manifest_too_large"


def test_names_and_digests() -> None:
    assert check_name("Qwen2.5-Coder:1.5b+x_y") == "Qwen2.5-Coder:1.5b+x_y"
    assert check_digest("0" * 64) == "0" * 64
    for name in ("", "-x", "a b", "../a", "a/b", "x" * 129, "0" * 64, "naïve", "a\n"):
        with pytest.raises(InvalidRequest):
            check_name(name)
    for digest in ("", "0" * 63, "0" * 65, "A" * 64, "../" + "0" * 61, "0" * 63 + "\n"):
        with pytest.raises(InvalidRequest):
            check_digest(digest)


# Whole files


@pytest.mark.parametrize("move", [True, False])
def test_add_list_find_remove(
    store: ModelStore, tiny: ModuleType, tmp_path: Path, move: bool
) -> None:
    path = tiny.tiny_model(tmp_path / "m.gguf")
    data = path.read_bytes()
    model = store.add_file(path, about=About("tiny", "file:m", "ab" * 32), move=move)
    assert path.exists() != move
    assert model.path is not None
    assert model.path.read_bytes() == data
    assert model.digest == blake3(data).hex()
    assert model.bytes_held == model.size == len(data)
    assert store.list() == [model]
    for name in ("tiny", model.digest, model.digest[:8]):
        assert store.find(name) == model
    assert store.find_sha256("ab" * 32) == model
    assert store.find_sha256("cd" * 32) is None
    store.rename(model.digest, "other")
    assert store.find("other").about == About("other", "file:m", "ab" * 32)
    store.remove(model.digest)
    assert store.list() == []
    for call in (
        lambda: store.get(model.digest),
        lambda: store.find("tiny"),
        lambda: store.find(model.digest[:7]),
        lambda: store.remove(model.digest),
        lambda: store.model_file(model.digest),
        lambda: store.read_chunk(model.digest, 0),
        lambda: store.have(model.digest),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.code == "model_not_found"
    assert [p.name for p in store.root.iterdir() if not p.name.startswith(".")] == []


def test_add_twice_keeps_one(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source, "a")
    path = store.get(digest).path
    assert path is not None
    inode = path.stat().st_ino
    assert add(store, tiny_source, "b") == digest
    assert path.stat().st_ino == inode
    assert [m.name for m in store.list()] == ["b"]
    assert not list((store.root / ".downloads").iterdir())


def test_one_name_for_two_models(store: ModelStore, tiny: ModuleType, tmp_path: Path) -> None:
    for seed in (1, 2):
        add(store, tiny.tiny_model(tmp_path / f"{seed}.gguf", seed=seed))
    with pytest.raises(Conflict) as caught:
        store.find("tiny")
    assert caught.value.code == "ambiguous_model"


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_a_truncated_file_is_not_taken(
    store: ModelStore, tiny_source: Path, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_source.read_bytes()[:cut])
    with pytest.raises(CorruptData) as caught:
        add(store, path)
    assert caught.value.code == "gguf_truncated"
    assert store.list() == []


def test_what_is_not_a_model_is_not_taken(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time, " * 100)
    with pytest.raises(CorruptData):
        add(store, tmp_path / "text")
    with pytest.raises(NotFound):
        add(store, tmp_path / "missing")
    with pytest.raises(PyAgentError):
        add(store, tmp_path)
    with pytest.raises(InvalidRequest):
        add(store, tmp_path / "text", "bad name")


def test_no_room(store: ModelStore, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_layout.shutil, "disk_usage", lambda path: type("U", (), {"free": 9}))
    with pytest.raises(Unavailable) as caught:
        add(store, tiny_source)
    assert caught.value.code == "disk_full"
    assert store.list() == []


def test_a_full_disk_while_copying_leaves_nothing(
    store: ModelStore, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_layout.shutil, "copyfile", full)
    with pytest.raises(Unavailable) as caught:
        add(store, tiny_source)
    assert caught.value.code == "disk_full"
    assert not list((store.root / ".downloads").iterdir())


def test_a_damaged_manifest_names_the_file(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    path = store.root / digest / "manifest"
    path.write_bytes(path.read_bytes()[:-3])
    fresh = ModelStore(store.root)
    assert fresh.list() == []
    with pytest.raises(CorruptData, match="manifest") as caught:
        fresh.get(digest)
    assert caught.value.code == "manifest_corrupt"
    assert str(store.root / digest) in (caught.value.remedy or "")
    assert add(fresh, tiny_source) == digest
    assert fresh.get(digest).path is not None


def test_a_manifest_of_another_model(store: ModelStore, tiny: ModuleType, tmp_path: Path) -> None:
    one, two = (add(store, tiny.tiny_model(tmp_path / f"{s}", seed=s), f"m{s}") for s in (1, 2))
    (store.root / one / "manifest").write_bytes((store.root / two / "manifest").read_bytes())
    with pytest.raises(CorruptData):
        ModelStore(store.root).manifest(one)


def test_strange_things_in_the_folder_are_left_alone(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    (store.root / "notes.txt").write_text("mine")
    (store.root / ("f" * 64)).mkdir()
    (store.root / digest / "about").write_text("{broken")
    assert [m.name for m in store.list()] == [digest[:16]]


def test_removed_by_another_process(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    store.model_file(digest)
    ModelStore(store.root).remove(digest)
    with pytest.raises(NotFound):
        store.read_chunk(digest, 0)
    with pytest.raises(NotFound):
        store.partial(digest)
    assert store.list() == []
    assert add(store, tiny_source) == digest


def test_an_interrupted_removal_is_finished(store: ModelStore) -> None:
    trash = store.root / ".trash-x" / "y"
    trash.mkdir(parents=True)
    ModelStore(store.root)
    assert not trash.parent.exists()


def test_what_crashes_left_is_removed_a_day_later(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    store.make_slice(digest, PART)
    old = [
        store.layout.downloads() / "copy.abc",
        store.layout.folder(digest) / "slices" / ".x.gguf.abc.tmp",
        store.layout.folder(digest) / ".manifest.abc.tmp",
    ]
    young = store.layout.downloads() / "copy.def"
    kept = store.layout.downloads() / "download.part"
    for path in (*old, young, kept):
        path.write_bytes(b"x")
        if path is not young:
            os.utime(path, (1, 1))
    folder = store.layout.downloads() / "wheel.abc"
    folder.mkdir()
    os.utime(folder, (1, 1))
    ModelStore(store.root)
    assert not any(path.exists() for path in (*old, folder))
    assert young.exists()
    assert kept.exists()
    assert store.get(digest).slices == ("1-3",)


# Slices


def test_slices_are_made_once(store: ModelStore, tiny_source: Path, tmp_path: Path) -> None:
    digest = add(store, tiny_source)
    assert store.cached_slice(digest, PART) is None
    path = store.make_slice(digest, PART)
    assert path.name == f"{digest}.1-3.v1.gguf"
    write_slice(tiny_source, PART, tmp_path / "expected")
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    before = path.stat().st_mtime_ns
    assert store.make_slice(digest, PART) == store.cached_slice(digest, PART) == path
    assert path.stat().st_mtime_ns == before
    vocabulary = store.make_vocabulary(digest)
    assert store.make_vocabulary(digest) == vocabulary
    assert store.get(digest).slices == ("1-3", "vocabulary")
    tail = store.make_slice(digest, Slice(3, 4, True))
    assert store.get(digest).slices == ("1-3", "3-4+head", "vocabulary")
    store.drop_slices(digest, keep=[Slice(3, 4, True)])
    assert tail.exists()
    assert store.get(digest).slices == ("3-4+head", "vocabulary")
    with pytest.raises(InvalidRequest):
        store.make_slice(digest, Slice(3, 5, True))


def test_the_whole_model_is_its_own_slice(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    whole = Slice(0, 4, True)
    assert store.make_slice(digest, whole) == store.cached_slice(digest, whole)
    assert store.make_slice(digest, whole) == store.get(digest).path
    assert store.get(digest).slices == ()


def test_slices_made_at_once_by_many(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    found: list[bytes] = []

    def make() -> None:
        found.append(store.make_slice(digest, PART).read_bytes())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [p.suffix for p in (store.root / digest / "slices").iterdir()] == [".gguf"]


# Partial files


def test_a_partial_model_grows_to_a_whole_one(store: ModelStore, tiny_source: Path) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source), "grown")
    digest = manifest.digest
    model = store.get(digest)
    assert (model.name, model.path, model.bytes_held) == ("grown", None, 0)
    with pytest.raises(NotFound) as caught:
        store.model_file(digest)
    assert caught.value.code == "header_missing"
    partial = store.partial(digest)
    for index in reversed(range(manifest.count)):
        assert partial.write_chunk(index, chunk(tiny_source, manifest, index))
        assert not partial.write_chunk(index, chunk(tiny_source, manifest, index))
        if index == 1:
            with pytest.raises(Unavailable) as missing:
                store.complete(digest)
            assert missing.value.code == "bytes_missing"
            with pytest.raises(NotFound) as lacking:
                store.read_chunk(digest, 0)
            assert lacking.value.code == "chunk_not_held"
    assert store.get(digest).bytes_held == manifest.size
    assert store.read_chunk(digest, 0) == chunk(tiny_source, manifest, 0)
    path = store.complete(digest)
    assert store.complete(digest) == path == store.get(digest).path
    assert path.read_bytes() == tiny_source.read_bytes()
    assert store.have(digest).complete
    assert store.read_chunk(digest, 1) == chunk(tiny_source, manifest, 1)
    assert not list((store.root / digest).glob("partial*"))
    with pytest.raises(NotFound):
        partial.write_chunk(0, chunk(tiny_source, manifest, 0))


def test_a_wrong_chunk_is_not_kept(store: ModelStore, tiny_source: Path) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    with pytest.raises(CorruptData) as caught:
        partial.write_chunk(0, bytes(CHUNK))
    assert caught.value.code == "chunk_corrupt"
    assert len(partial.have) == 0


def test_the_bitmap_survives_and_is_never_ahead_of_the_data(
    store: ModelStore, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    order: list[str] = []
    real_fsync, real_write = os.fsync, PartialModel.write_chunk
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), real_fsync(fd)))
    for index in range(3):
        real_write(partial, index, chunk(tiny_source, manifest, index))
    assert order == []
    assert len(ModelStore(store.root).have(manifest.digest)) == 0  # not promised yet
    partial.sync()
    assert order[0] == "sync"
    assert list(ModelStore(store.root).have(manifest.digest)) == [0, 1, 2]
    order.clear()
    partial.sync()
    assert order == []


@pytest.mark.parametrize("damage", [b"", b"torn", bytes(100)])
def test_a_damaged_bitmap_counts_as_empty(
    store: ModelStore, tiny_source: Path, damage: bytes
) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    partial.write_chunk(0, chunk(tiny_source, manifest, 0))
    partial.sync()
    (store.root / manifest.digest / "partial.chunks").write_bytes(damage)
    assert len(ModelStore(store.root).have(manifest.digest)) == 0


def test_a_partial_file_of_the_wrong_size_is_begun_anew(
    store: ModelStore, tiny_source: Path
) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    partial.write_chunk(0, chunk(tiny_source, manifest, 0))
    partial.sync()
    os.truncate(partial.path, 100)
    fresh = ModelStore(store.root).partial(manifest.digest)
    assert len(fresh.have) == 0
    assert fresh.path.stat().st_size == manifest.size


def test_rot_in_a_partial_file_is_found_when_read(store: ModelStore, tiny_source: Path) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    for index in (0, 1):
        partial.write_chunk(index, chunk(tiny_source, manifest, index))
    with partial.path.open("r+b") as file:
        file.write(b"rot")
    with pytest.raises(NotFound) as caught:
        store.read_chunk(manifest.digest, 0)
    assert caught.value.code == "chunk_not_held"
    assert list(store.have(manifest.digest)) == [1]
    assert list(ModelStore(store.root).have(manifest.digest)) == [1]


def test_another_manifest_throws_the_old_parts_away(store: ModelStore, tiny_source: Path) -> None:
    first = store.add_manifest(manifest_of(tiny_source))
    for index in range(first.count):
        store.partial(first.digest).write_chunk(index, chunk(tiny_source, first, index))
    store.make_vocabulary(first.digest)
    assert store.add_manifest(first) == first
    assert store.get(first.digest).slices
    second = msgspec.structs.replace(first, header_bytes=first.header_bytes + 1)
    assert store.add_manifest(second) == second
    model = store.get(first.digest)
    assert (model.bytes_held, model.slices) == (0, ())
    assert model.manifest == second.manifest_digest


def test_a_whole_file_outweighs_another_manifest(store: ModelStore, tiny_source: Path) -> None:
    digest = add(store, tiny_source)
    mine = store.manifest(digest)
    other = msgspec.structs.replace(mine, header_bytes=mine.header_bytes + 1)
    assert store.add_manifest(other) == mine


def test_a_whole_file_replaces_the_parts(store: ModelStore, tiny_source: Path) -> None:
    manifest = store.add_manifest(manifest_of(tiny_source))
    partial = store.partial(manifest.digest)
    partial.write_chunk(0, chunk(tiny_source, manifest, 0))
    assert add(store, tiny_source) == manifest.digest
    assert store.have(manifest.digest).complete
    assert not list((store.root / manifest.digest).glob("partial*"))


async def test_one_at_a_time_for_each_key(store: ModelStore) -> None:
    inside: set[str] = set()

    async def work(key: str) -> None:
        async with store.busy(key):
            assert key not in inside
            inside.add(key)
            await trio.testing.wait_all_tasks_blocked()
            inside.remove(key)

    async with trio.open_nursery() as nursery:
        for key in ("a", "a", "b", "a"):
            nursery.start_soon(work, key)


@pytest.mark.model
def test_the_bundled_model(store: ModelStore, bundled_model: Path) -> None:
    model = store.add_file(bundled_model, about=About("smollm2-135m"))
    assert model.size == 98362432
    assert store.manifest(model.digest).count == 94
