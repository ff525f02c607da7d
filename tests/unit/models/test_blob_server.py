"""The serving side of the chunk protocol: what it answers and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models import blob_client, blob_server
from pyagent_node.inference.models.blob_client import open_blob_client
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    BlobReply,
    GetChunk,
    ManifestReply,
)
from pyagent_node.inference.models.blob_server import Allowance, BlobServer

CHUNK = 4096
PART = Slice(1, 3, False)

Swarming = Callable[..., Any]


def reply(message: BlobReply, tail: bytes = b"") -> Frame:
    return Frame(REPLIES.encode(message), tail)


async def test_the_server_answers_only_for_models_of_its_store(swarming: Swarming) -> None:
    async with swarming() as swarm:
        peer = (await swarm.honest()).peer_id
        (swarm.seed_store.root / "secret").write_text("secret")
        async with open_blob_client(swarm.mesh, peer) as client:
            for name in ("../secret", "secret", "0" * 64, "", "/etc/passwd", "A" * 64, "é" * 64):
                with pytest.raises((NotFound, InvalidRequest)) as caught:
                    await client.manifest(Digest(name))
                assert caught.value.code in ("model_not_found", "bad_digest")
            for index in (-1, 2**31, 10**6):
                await client.ask_chunk(swarm.model.digest, index)
                assert await client.next_chunk(swarm.model.digest) == (index, None)
            assert await client.manifest(swarm.model.digest)


async def test_a_frame_that_is_no_request_ends_the_stream(swarming: Swarming) -> None:
    async with swarming() as swarm:
        peer = (await swarm.honest()).peer_id
        for header in (b"", b"\xc1", reply(ManifestReply(swarm.model.digest)).header):
            stream = await swarm.mesh.open(peer, PROTOCOL)
            await stream.send(Frame(header))
            with pytest.raises((CorruptData, Unsupported)):
                await blob_client.BlobClient(stream)._receive()
            with pytest.raises(Unavailable):
                await blob_client.BlobClient(stream).manifest(swarm.model.digest)


async def test_streams_per_peer_are_limited(swarming: Swarming) -> None:
    async with swarming() as swarm:
        server = BlobServer(swarm.seed_store)
        mesh = swarm.join()
        server.attach(mesh)
        await swarm.network.connect_all()
        streams = []
        for _ in range(blob_server.STREAMS_PER_PEER):
            streams.append(await swarm.mesh.open(mesh.peer_id, PROTOCOL))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LimitExceeded) as caught:
            async with open_blob_client(swarm.mesh, mesh.peer_id) as client:
                await client.manifest(swarm.model.digest)
        assert caught.value.code == "too_many_streams"
        for stream in streams:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert not server._streams.open
        async with open_blob_client(swarm.mesh, mesh.peer_id) as client:
            assert await client.manifest(swarm.model.digest)


async def test_manifests_are_not_given_without_end(swarming: Swarming) -> None:
    async with swarming() as swarm:
        peer = (await swarm.honest()).peer_id
        async with open_blob_client(swarm.mesh, peer) as client:
            for _ in range(blob_server.ASKS_PER_PEER):
                await client.manifest(swarm.model.digest)
            with pytest.raises(LimitExceeded) as caught:
                await client.manifest(swarm.model.digest)
            assert caught.value.code == "too_many_requests"


async def test_a_peer_that_takes_nothing_is_let_go(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_server, "SEND_SECONDS", 0.05)
    async with swarming() as swarm:
        server = BlobServer(swarm.seed_store)
        mesh = swarm.join()
        server.attach(mesh)
        await swarm.network.connect_all()
        stream = await swarm.mesh.open(mesh.peer_id, PROTOCOL)

        async def ask_for_ever() -> None:
            for index in itertools.cycle(range(50)):
                await stream.send(Frame(REQUESTS.encode(GetChunk(swarm.model.digest, index))))

        with trio.fail_after(5), pytest.raises(Unavailable) as caught:
            await ask_for_ever()
        assert caught.value.code == "stream_closed"
        assert not server._streams.open


async def test_an_idle_stream_is_closed(
    swarming: Swarming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_server, "IDLE_SECONDS", 0.05)
    async with swarming() as swarm:
        peer = (await swarm.honest()).peer_id
        stream = await swarm.mesh.open(peer, PROTOCOL)
        with trio.fail_after(5):
            assert await stream.receive() is None


async def test_what_was_sent_is_counted(swarming: Swarming) -> None:
    async with swarming() as swarm:
        sent: dict[PeerId, int] = {}
        mesh = swarm.join()
        BlobServer(
            swarm.seed_store, lambda peer, n: sent.__setitem__(peer, sent.get(peer, 0) + n)
        ).attach(mesh)
        await swarm.network.connect_all()
        await swarm.fetch()
        assert sent == {swarm.mesh.peer_id: swarm.needed()}


def test_allowance() -> None:
    allowance = Allowance(2, 0.5, now=10.0)
    assert allowance.full(10.0)
    assert [allowance.take(10.0) for _ in range(3)] == [True, True, False]
    assert not allowance.take(11.0)
    assert not allowance.full(11.0)
    assert allowance.take(12.5)
    assert allowance.full(100.0)
    assert [allowance.take(100.0) for _ in range(3)] == [True, True, False]
