"""Pulling models over https: resuming, redirects, refusals, damage."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import httpx
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
    Refused,
    Unavailable,
)
from pyagent_node.inference.models import downloads, store_layout
from pyagent_node.inference.models import pull as pull_module
from pyagent_node.inference.models import store_reading as reading
from pyagent_node.inference.models.pull import pull
from pyagent_node.inference.models.sources import CATALOGUE, DEFAULT_MODEL
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import StoredModel

URL = "https://models.example/dir/Tiny.gguf"


class Body(httpx.AsyncByteStream):
    """A response body that may break off after some bytes."""

    def __init__(self, data: bytes, breaks: bool) -> None:
        self.data = data
        self.breaks = breaks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), 50_000):
            yield self.data[start : start + 50_000]
        if self.breaks:
            raise httpx.ReadError("connection lost")


class Server(httpx.AsyncBaseTransport):
    """A web server with one file; ``break_after`` lists how many bytes each answer gives."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.etag = '"v1"'
        self.ranges = True
        self.break_after: list[int] = []
        self.statuses: list[int] = []
        self.requests: list[httpx.Request] = []
        self.redirects: dict[str, str] = {}
        self.lengths = True

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        if str(request.url) in self.redirects:
            location = self.redirects[str(request.url)]
            return httpx.Response(302, headers={"location": location})
        if self.statuses:
            return httpx.Response(self.statuses.pop(0))
        start = 0
        status = 200
        headers = {"etag": self.etag}
        asked = request.headers.get("range")
        if asked and self.ranges and request.headers.get("if-range") == self.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers["content-range"] = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
        body = self.data[start:]
        if self.lengths:
            headers["content-length"] = str(len(body))
        keep = self.break_after.pop(0) if self.break_after else None
        stream = Body(body if keep is None else body[:keep], keep is not None)
        return httpx.Response(status, headers=headers, stream=stream)

    @property
    def ranges_asked(self) -> list[str | None]:
        return [request.headers.get("range") for request in self.requests]


@pytest.fixture
def data(tiny_source: Path) -> bytes:
    return tiny_source.read_bytes()


@pytest.fixture
def server(data: bytes) -> Server:
    return Server(data)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(pull_module, "POLL_SECONDS", 0.001)
    return ModelStore(tmp_path / "models")


def leftovers(store: ModelStore) -> list[str]:
    return sorted(p.name[-8:] for p in store.layout.downloads().iterdir() if p.suffix != ".lock")


async def get(
    store: ModelStore, server: Server, source: str = URL, **options: object
) -> StoredModel:
    return await pull(store, source, transport=server, environment={}, **options)  # type: ignore[arg-type]


async def test_a_download(store: ModelStore, server: Server, data: bytes) -> None:
    seen: list[tuple[int, int | None]] = []
    model = await get(store, server, progress=lambda *step: seen.append(step))
    assert model.path is not None
    assert model.path.read_bytes() == data
    assert model.name == "tiny"
    assert model.about.source == URL
    assert model.about.sha256 == hashlib.sha256(data).hexdigest()
    assert seen[-1] == (len(data), len(data))
    assert leftovers(store) == []
    assert await get(store, server) == model
    assert (await get(store, server, name="again")).name == "again"
    assert len(server.requests) == 1


async def test_it_goes_on_where_the_connection_broke(
    store: ModelStore, server: Server, data: bytes
) -> None:
    server.break_after = [100_000, 200_000, 0]
    model = await get(store, server)
    assert model.size == len(data)
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=300000-", "bytes=300000-"]


async def test_it_goes_on_in_a_new_process(store: ModelStore, server: Server, data: bytes) -> None:
    server.break_after = [100_000]
    with trio.CancelScope() as scope:
        await get(store, server, progress=lambda done, total: done >= 100_000 and scope.cancel())
    assert scope.cancelled_caught
    assert len(leftovers(store)) == 2
    assert (await get(ModelStore(store.root), server)).size == len(data)
    assert server.ranges_asked == [None, "bytes=100000-"]


@pytest.mark.parametrize("change", ["etag", "no ranges", "weak", "other size"])
async def test_it_begins_anew_when_the_file_changed(
    store: ModelStore, server: Server, data: bytes, change: str
) -> None:
    server.break_after = [100_000]
    if change == "weak":
        server.etag = 'W/"v1"'
    with trio.CancelScope() as scope:
        await get(store, server, progress=lambda done, total: done >= 100_000 and scope.cancel())
    if change == "etag":
        server.etag = '"v2"'
    if change == "no ranges":
        server.ranges = False
    if change == "other size":
        server.etag = '"v2"'
        server.data = data + bytes(1000)
    model = await get(store, server)
    assert model.size == len(server.data)


async def test_a_server_without_lengths(store: ModelStore, server: Server, data: bytes) -> None:
    server.lengths = False
    seen: list[tuple[int, int | None]] = []
    model = await get(store, server, progress=lambda *step: seen.append(step))
    assert model.size == len(data)
    assert seen[-1] == (len(data), None)


async def test_passing_faults_are_tried_again(store: ModelStore, server: Server) -> None:
    server.statuses = [503, 429, 500, 408]
    await get(store, server)
    assert len(server.requests) == 5


async def test_it_gives_up_when_nothing_moves(store: ModelStore, server: Server) -> None:
    server.statuses = [503] * 100
    with pytest.raises(Unavailable) as caught:
        await get(store, server)
    assert caught.value.code == "download_failed"
    assert len(server.requests) == downloads.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, NotFound, "source_not_found"),
        (410, NotFound, "source_not_found"),
        (401, Refused, "source_refused"),
        (403, Refused, "source_refused"),
        (418, Unavailable, "download_failed"),
        (206, Unavailable, "download_failed"),
    ],
)
async def test_statuses(
    store: ModelStore, server: Server, status: int, kind: type[PyAgentError], code: str
) -> None:
    server.statuses = [status]
    with pytest.raises(kind) as caught:
        await get(store, server)
    assert caught.value.code == code
    assert len(server.requests) == 1


async def test_a_wrong_range_is_refused(store: ModelStore, server: Server) -> None:
    server.break_after = [100_000]

    class Shifted(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await server.handle_async_request(request)
            if response.status_code == 206:
                response.headers["content-range"] = "bytes 5-10/11"
            return response

    with pytest.raises(CorruptData) as caught:
        await pull(store, URL, transport=Shifted(), environment={})
    assert caught.value.code == "download_corrupt"


async def test_redirects_are_followed_and_the_token_stays(
    store: ModelStore, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.redirects = {
        "https://hub.example/o/r/resolve/main/m.gguf": "/o/r/step",
        "https://hub.example/o/r/step": "https://cdn.example/blob",
    }
    server.break_after = [100_000]
    environment = {"HF_ENDPOINT": "https://hub.example", "HF_TOKEN": "hf_secret"}
    with caplog.at_level(logging.DEBUG):
        model = await pull(store, "hf:o/r/m.gguf", transport=server, environment=environment)
    assert model.name == "m"
    tokens = {str(r.url): r.headers.get("authorization") for r in server.requests}
    assert tokens == {
        "https://hub.example/o/r/resolve/main/m.gguf": "Bearer hf_secret",
        "https://hub.example/o/r/step": "Bearer hf_secret",
        "https://cdn.example/blob": None,
    }
    assert "hf_secret" not in caplog.text
    assert "hf_secret" not in repr(model)


async def test_the_token_goes_to_the_hub_only(store: ModelStore, server: Server) -> None:
    environment = {"HUGGING_FACE_HUB_TOKEN": "hf_secret"}
    await pull(store, URL, transport=server, environment=environment)
    assert "authorization" not in server.requests[0].headers
    other = ModelStore(store.root.parent / "other")
    await pull(other, "hf:o/r/m.gguf", transport=server, environment=environment)
    assert server.requests[1].headers["authorization"] == "Bearer hf_secret"


@pytest.mark.parametrize("target", ["http://models.example/x", "ftp://h/x", URL])
async def test_bad_redirects(store: ModelStore, server: Server, target: str) -> None:
    server.redirects = {URL: target}
    with pytest.raises(Refused) as caught:
        await get(store, server)
    assert caught.value.code == "source_refused"


async def test_a_pinned_digest(store: ModelStore, server: Server, data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        await get(store, server, sha256="0" * 64)
    assert caught.value.code == "sha256_mismatch"
    assert caught.value.facts["found"] == hashlib.sha256(data).hexdigest()
    assert store.list() == []
    assert leftovers(store) == []
    model = await get(store, server, sha256=hashlib.sha256(data).hexdigest().upper())
    assert model.size == len(data)
    for sha256 in ("", "0" * 63, "g" * 64):
        with pytest.raises(InvalidRequest) as bad:
            await get(store, server, sha256=sha256)
        assert bad.value.code == "bad_sha256"


async def test_what_is_no_model_is_thrown_away(store: ModelStore, server: Server) -> None:
    server.data = b"<html>Sign in</html>" * 1000
    with pytest.raises(CorruptData) as caught:
        await get(store, server)
    assert caught.value.code == "gguf_malformed"
    assert leftovers(store) == []


async def test_a_truncated_model(store: ModelStore, server: Server) -> None:
    server.data = server.data[:-1000]
    with pytest.raises(CorruptData) as caught:
        await get(store, server)
    assert caught.value.code == "gguf_truncated"
    assert leftovers(store) == []


async def test_too_large(
    store: ModelStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_MODEL_BYTES", 1000)
    for lengths in (True, False):
        server.lengths = lengths
        with pytest.raises(LimitExceeded) as caught:
            await get(store, server)
        assert caught.value.code == "model_too_large"


async def test_no_room(store: ModelStore, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_layout.shutil, "disk_usage", lambda path: type("U", (), {"free": 9}))
    with pytest.raises(Unavailable) as caught:
        await get(store, server)
    assert caught.value.code == "disk_full"
    assert store.list() == []


async def test_two_pulls_at_once_download_once(store: ModelStore, server: Server) -> None:
    models: list[StoredModel] = []

    async def one() -> None:
        models.append(await get(store, server))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one)
    assert len(models) == 3
    assert models[0] == models[1] == models[2]
    assert len(server.requests) == 1


async def test_two_processes_at_once_download_once(store: ModelStore, server: Server) -> None:
    """Two stores over one folder stand for two processes."""
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(get, ModelStore(store.root), server)
    assert len(server.requests) == 1


async def test_file_sources(store: ModelStore, tiny_source: Path, tmp_path: Path) -> None:
    model = await pull(store, f"file:{tiny_source}")
    assert model.name == "tiny"
    assert os.path.exists(tiny_source)  # noqa: ASYNC240
    with pytest.raises(NotFound):
        await pull(store, f"file:{tmp_path / 'missing.gguf'}")
    with pytest.raises(PyAgentError):
        await pull(store, f"file:{tmp_path}")
    with pytest.raises(CorruptData) as caught:
        await pull(ModelStore(tmp_path / "x"), f"file:{tiny_source}", sha256="0" * 64)
    assert caught.value.code == "sha256_mismatch"
    assert os.path.exists(tiny_source)  # noqa: ASYNC240
    with pytest.raises(InvalidRequest) as bad:
        await pull(store, f"file:{tiny_source}", name="a/b")
    assert bad.value.code == "bad_name"


async def test_two_files_of_one_name(store: ModelStore, tiny: ModuleType, tmp_path: Path) -> None:
    paths = [tmp_path / str(seed) / "model.gguf" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        tiny.tiny_model(path, seed=seed)
    first, second = [await pull(store, f"file:{path}") for path in paths]
    assert first.name == "model"
    assert second.name == f"model-{second.digest[:8]}"
    assert store.find("model").digest == first.digest
    assert [(await pull(store, f"file:{path}")).name for path in paths] == [
        first.name,
        second.name,
    ]
    with pytest.raises(Conflict) as caught:
        await pull(store, f"file:{paths[1]}", name="model")
    assert caught.value.code == "name_taken"
    assert (await pull(store, f"file:{paths[1]}", name="other")).digest == second.digest
    assert store.find("other").digest == second.digest


async def test_a_name_that_is_taken_is_refused_before_the_download(
    store: ModelStore, server: Server, tiny_source: Path
) -> None:
    await pull(store, f"file:{tiny_source}", name="wanted")
    with pytest.raises(Conflict) as caught:
        await get(store, server, name="wanted")
    assert caught.value.code == "name_taken"
    assert server.requests == []


async def test_a_file_that_is_here_keeps_the_name_it_is_known_by(
    store: ModelStore, tiny_source: Path, tmp_path: Path
) -> None:
    mine = await pull(store, f"file:{tiny_source}", name="mine")
    (copy := tmp_path / "other.gguf").write_bytes(tiny_source.read_bytes())  # noqa: ASYNC240
    assert await pull(store, f"file:{copy}") == mine


async def test_a_name_of_the_catalogue_finds_its_file_under_any_name(
    store: ModelStore, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = await pull(store, f"file:{tiny_source}", name="mine")
    entry = msgspec.structs.replace(CATALOGUE[DEFAULT_MODEL], sha256=mine.about.sha256)
    for module in (pull_module, reading):
        monkeypatch.setattr(module, "CATALOGUE", {DEFAULT_MODEL: entry})
    assert await pull(store, DEFAULT_MODEL) == mine
    assert store.find(DEFAULT_MODEL) == store.find("mine") == mine
