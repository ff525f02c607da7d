"""A stock py-libp2p host and our mesh: Noise, yamux and multistream-select between the two.

Ours negotiates, frames and multiplexes with code of its own, so each direction is tried.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from multiaddr import Multiaddr

from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame, FrameDecoder, frame_prefix
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh import MeshConfig, open_mesh
from pyagent_node.node.mesh.authoriser import PeerAdmission

pytestmark = pytest.mark.daemons

JOIN = "/pyagent/join/1"
SIZES = (0, 1, 2304, 16_000)
"""Bytes in a header; a frame of the join protocol is short and has no tail."""


class Anyone:
    def credentials(self) -> bytes:
        return b""

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        return PeerAdmission("x", "voter")


@asynccontextmanager
async def stock_host() -> AsyncIterator[Any]:
    """Run py-libp2p as its documentation says, Noise and yamux only."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from libp2p.stream_muxer.yamux import yamux

    keys = create_new_key_pair()
    host = new_host(
        key_pair=keys,
        sec_opt={PROTOCOL_ID: Transport(keys, create_noise_key_pair().private_key)},
        muxer_opt={yamux.PROTOCOL_ID: yamux.Yamux},
        connection_config=ConnectionConfig(
            low_watermark=0, min_connections=0, max_connections_per_peer=1
        ),
    )
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host


async def echo_frames(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def test_we_dial_a_stock_host() -> None:
    async with stock_host() as host, open_mesh(MeshConfig(NodeKey.generate(), Anyone())) as mesh:

        async def echo_bytes(stream: Any) -> None:
            try:
                while data := await stream.read(65_536):
                    await stream.write(data)
            except Exception:
                await stream.close()

        host.set_stream_handler(JOIN, echo_bytes)
        (address,) = [str(a) for a in host.get_addrs() if "127.0.0.1" in str(a)][:1]
        with trio.fail_after(60):
            stream = await mesh.open_join(address)
            for size in SIZES:
                header = bytes([size % 251]) * size
                await stream.send(Frame(header))
                assert await stream.receive() == Frame(header, b"")
            await stream.aclose()


async def test_a_stock_host_dials_us() -> None:
    from libp2p.peer.peerinfo import info_from_p2p_addr

    config = MeshConfig(NodeKey.generate(), Anyone(), listen=("/ip4/127.0.0.1/tcp/0",))
    async with stock_host() as host, open_mesh(config) as mesh:
        mesh.handle(JOIN, echo_frames)
        with trio.fail_after(60):
            info = info_from_p2p_addr(Multiaddr(mesh.addresses[0]))
            await host.connect(info)
            stream = await host.new_stream(info.peer_id, [JOIN])
            decoder = FrameDecoder()
            for size in SIZES:
                frame = Frame(bytes([size % 251]) * size)
                await stream.write(frame_prefix(frame) + frame.header)
                found: list[Frame] = []
                while not found:
                    found += decoder.feed(await stream.read(65_536))
                assert found == [frame]
            await stream.close()
