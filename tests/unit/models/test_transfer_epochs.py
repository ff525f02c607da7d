"""Transfers are made for a placement: whoever knows a later one gives nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyagent_node.base.errors import Conflict
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import Digest, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.models.blob_client import open_blob_client
from pyagent_node.inference.models.blob_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    BlobError,
    GetChunk,
    GetHave,
)
from pyagent_node.inference.models.blob_server import BlobServer
from pyagent_node.inference.models.transfer import ensure_head_assets, ensure_model, ensure_slice

PART = Slice(1, 3, False)
Swarming = Callable[..., Any]


class Epochs:
    """What one serving node knows of placements."""

    def __init__(self) -> None:
        self.epoch = 0
        self.asked: set[Digest] = set()

    def of(self, model: Digest) -> int:
        self.asked.add(model)
        return self.epoch


async def serve(swarm: Any, epochs: Epochs) -> Any:
    mesh = swarm.join()
    BlobServer(swarm.seed_store, epoch_of=epochs.of).attach(mesh)
    await swarm.network.connect_all()
    return mesh


@pytest.mark.parametrize("epoch", [0, 5, 6])
async def test_the_current_a_later_and_no_epoch_are_served(swarming: Swarming, epoch: int) -> None:
    async with swarming() as swarm:
        epochs = Epochs()
        epochs.epoch = 5
        await serve(swarm, epochs)
        path = await ensure_slice(
            swarm.mesh, swarm.store, swarm.model, PART, swarm.peers(), epoch=epoch
        )
        assert path.read_bytes() == swarm.expected()
        assert epochs.asked == {swarm.model.digest}


@pytest.mark.parametrize("ensure", [ensure_head_assets, ensure_model])
async def test_a_stale_epoch_is_refused_with_the_current_one(
    swarming: Swarming, ensure: Callable[..., Any]
) -> None:
    async with swarming() as swarm:
        epochs = Epochs()
        epochs.epoch = 5
        await serve(swarm, epochs)
        with pytest.raises(Conflict) as caught:
            await ensure(swarm.mesh, swarm.store, swarm.model, swarm.peers(), epoch=4)
        assert caught.value.code == "stale_epoch"
        assert caught.value.facts["epoch"] == 5
        assert caught.value.remedy


async def test_an_epoch_that_ends_in_the_middle_of_a_transfer(swarming: Swarming) -> None:
    async with swarming() as swarm:
        epochs = Epochs()
        epochs.epoch = 4
        server = await serve(swarm, epochs)
        async with open_blob_client(swarm.mesh, server.peer_id, 4) as client:
            await client.ask_chunk(swarm.model.digest, 0)
            index, data = await client.next_chunk(swarm.model.digest)
            assert (index, data is None) == (0, False)
            epochs.epoch = 5
            await client.ask_chunk(swarm.model.digest, 1)
            with pytest.raises(Conflict) as caught:
                await client.next_chunk(swarm.model.digest)
            assert caught.value.facts["epoch"] == 5
        taken = []

        def progress(done: int, total: int | None) -> None:
            taken.append(done)
            if total is not None and done < total:
                epochs.epoch = 6

        with pytest.raises(Conflict) as ended:
            await ensure_slice(
                swarm.mesh,
                swarm.store,
                swarm.model,
                PART,
                swarm.peers(),
                epoch=5,
                progress=progress,
            )
        assert ended.value.facts["epoch"] == 6
        before = max(taken)
        path = await ensure_slice(
            swarm.mesh, swarm.store, swarm.model, PART, swarm.peers(), epoch=6, progress=progress
        )
        assert path.read_bytes() == swarm.expected()
        assert taken[-1] > before


async def test_one_member_that_cries_stale_stops_nobody(swarming: Swarming) -> None:
    async with swarming() as swarm:
        await swarm.honest()
        liar = swarm.join()
        error = BlobError(Conflict("No.", code="stale_epoch", epoch=10**9).to_info())

        async def handle(stream: FrameStream) -> None:
            while await stream.receive() is not None:
                await stream.send(Frame(REPLIES.encode(error)))

        liar.handle(PROTOCOL, handle)
        await swarm.network.connect_all()
        path = await ensure_slice(
            swarm.mesh,
            swarm.store,
            swarm.model,
            PART,
            [liar.peer_id, *swarm.peers()],
            epoch=3,
        )
        assert path.read_bytes() == swarm.expected()


def test_a_request_of_an_earlier_version_names_no_epoch() -> None:
    header = REQUESTS.encode(GetHave(Digest("0" * 64), 3))
    assert REQUESTS.decode(header.replace(b"\xa5epoch\x03", b"\xa5other\x03")) == GetHave(
        Digest("0" * 64)
    )
    assert GetChunk(Digest("0" * 64), 1).epoch == 0
