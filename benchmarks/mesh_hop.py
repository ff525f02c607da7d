"""What one hop between two processes on this machine costs: our mesh, and a stock py-libp2p host.

For each of them a server process echoes frames and swallows bulk data over loopback TCP:

    python benchmarks/mesh_hop.py [--rounds 3000] [--mebibytes 300] [--json]

``echo_us`` are microseconds there and back for a frame with a tail of so many bytes (2304 is one
token's activations of the bundled model); half of it is one hop.  ``rss_mb`` is the client's
resident memory at the end.
"""

# ruff: noqa: PLC0415 - each process loads only what it measures, so that its memory tells
from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import trio

KINDS = ("ours", "ours-psk", "stock")
SIZES = (64, 2304, 9216)
MIB = 1024 * 1024

Echo = Callable[[int], Awaitable[None]]
Push = Callable[[int], Awaitable[None]]


def percentile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# Ours ---------------------------------------------------------------------------------------------


def our_config(kind: str, *, listen: bool) -> Any:
    """Return the settings of a node that admits everyone."""
    from pyagent_node.base.types import PeerId
    from pyagent_node.node.identity import NodeKey
    from pyagent_node.node.mesh import MeshConfig
    from pyagent_node.node.mesh.authoriser import PeerAdmission

    class Anyone:
        def credentials(self) -> bytes:
            return b""

        def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
            return PeerAdmission("bench", "voter")

    return MeshConfig(
        NodeKey.generate(),
        Anyone(),
        psk=b"k" * 32 if kind == "ours-psk" else None,
        listen=("/ip4/127.0.0.1/tcp/0",) if listen else (),
    )


async def serve_ours(kind: str) -> None:
    """Echo and swallow until killed."""
    from pyagent_node.base.mesh import FrameStream
    from pyagent_node.base.wire import Frame
    from pyagent_node.node.mesh import open_mesh

    async def echo(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            await stream.send(frame)

    async def sink(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            if frame.header == b"end":
                await stream.send(Frame(b"done"))

    async with open_mesh(our_config(kind, listen=True)) as mesh:
        mesh.handle("/bench/echo/1", echo)
        mesh.handle("/bench/sink/1", sink)
        print(mesh.addresses[0], flush=True)
        await trio.sleep_forever()


@asynccontextmanager
async def ask_ours(kind: str, address: str) -> AsyncIterator[tuple[Echo, Push]]:
    """Connect and yield the two things to time."""
    from pyagent_node.base.wire import Frame
    from pyagent_node.node.mesh import open_mesh

    async with open_mesh(our_config(kind, listen=False)) as mesh:
        peer = await mesh.connect(address)
        echoes = await mesh.open(peer, "/bench/echo/1")
        bulk = await mesh.open(peer, "/bench/sink/1")

        async def echo(size: int) -> None:
            await echoes.send(Frame(b"h" * 60, bytes(size)))
            await echoes.receive()

        async def push(mebibytes: int) -> None:
            tail = bytes(MIB)
            for _ in range(mebibytes):
                await bulk.send(Frame(b"data", tail))
            await bulk.send(Frame(b"end"))
            await bulk.receive()

        yield echo, push


# A stock host -------------------------------------------------------------------------------------


def stock_host() -> Any:
    """Return a py-libp2p host, Noise and yamux only."""
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
    from libp2p.custom_types import TProtocol
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from libp2p.stream_muxer.yamux import yamux

    keys = create_new_key_pair()
    return new_host(
        key_pair=keys,
        sec_opt={PROTOCOL_ID: Transport(keys, create_noise_key_pair().private_key)},
        muxer_opt={TProtocol(yamux.PROTOCOL_ID): yamux.Yamux},
        connection_config=ConnectionConfig(
            low_watermark=0, min_connections=0, max_connections_per_peer=1
        ),
    )


async def read_exactly(stream: Any, size: int) -> bytes:
    """Read ``size`` bytes of a libp2p stream."""
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data


async def serve_stock() -> None:
    """Echo and swallow until killed."""
    from multiaddr import Multiaddr  # type: ignore[import-untyped]  # it has no stubs

    async def echo(stream: Any) -> None:
        while True:
            head = await read_exactly(stream, 4)
            await stream.write(head + await read_exactly(stream, struct.unpack(">I", head)[0]))

    async def sink(stream: Any) -> None:
        (left,) = struct.unpack(">Q", await read_exactly(stream, 8))
        while left:
            left -= len(await stream.read(min(left, 65_536)))
        await stream.write(b"done")

    host = stock_host()
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        host.set_stream_handler("/bench/echo/1", echo)
        host.set_stream_handler("/bench/sink/1", sink)
        print(str(host.get_addrs()[0]), flush=True)
        await trio.sleep_forever()


@asynccontextmanager
async def ask_stock(address: str) -> AsyncIterator[tuple[Echo, Push]]:
    """Connect and yield the two things to time."""
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = stock_host()
    async with host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(address))
        await host.connect(info)
        echoes = await host.new_stream(info.peer_id, ["/bench/echo/1"])
        bulk = await host.new_stream(info.peer_id, ["/bench/sink/1"])

        async def echo(size: int) -> None:
            await echoes.write(struct.pack(">I", size + 60) + bytes(size + 60))
            await read_exactly(echoes, size + 64)

        async def push(mebibytes: int) -> None:
            await bulk.write(struct.pack(">Q", mebibytes * MIB))
            tail = bytes(MIB)
            for _ in range(mebibytes):
                await bulk.write(tail)
            await read_exactly(bulk, 4)

        yield echo, push


# Measuring ----------------------------------------------------------------------------------------


async def measure(kind: str, address: str, rounds: int, mebibytes: int) -> dict[str, Any]:
    """Time one kind against its server."""
    started = time.perf_counter()
    asking = ask_stock(address) if kind == "stock" else ask_ours(kind, address)
    async with asking as (echo, push):
        result: dict[str, Any] = {"connect_ms": (time.perf_counter() - started) * 1e3}
        echoes: dict[str, dict[str, float]] = {}
        for size in SIZES:
            taken: list[float] = []
            for _ in range(rounds):
                started = time.perf_counter()
                await echo(size)
                taken.append((time.perf_counter() - started) * 1e6)
            steady = taken[rounds // 10 :]
            echoes[str(size)] = {"p50": percentile(steady, 0.5), "p99": percentile(steady, 0.99)}
        result["echo_us"] = echoes
        started = time.perf_counter()
        await push(mebibytes)
        result["mib_per_second"] = mebibytes / (time.perf_counter() - started)
        result["rss_mb"] = psutil.Process().memory_info().rss / 1e6
    return result


def in_processes(kind: str, rounds: int, mebibytes: int) -> dict[str, Any]:
    """Start a server and a client of one kind and return what the client measured."""
    base = [sys.executable, __file__, "--kind", kind]
    with subprocess.Popen([*base, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            numbers = ["--rounds", str(rounds), "--mebibytes", str(mebibytes)]
            done = subprocess.run(
                [*base, "--connect", address, *numbers],
                check=True,
                capture_output=True,
                text=True,
                timeout=280,
            )
        finally:
            server.kill()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--mebibytes", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--connect", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        if options.kind == "stock":
            trio.run(serve_stock)
        else:
            trio.run(serve_ours, options.kind)
        return
    if options.connect:
        print(
            json.dumps(
                trio.run(measure, options.kind, options.connect, options.rounds, options.mebibytes)
            )
        )
        return
    results = {kind: in_processes(kind, options.rounds, options.mebibytes) for kind in KINDS}
    if options.json:
        print(json.dumps(results))
        return
    for kind, result in results.items():
        echoes = ", ".join(
            f"{s} B {e['p50']:.0f}/{e['p99']:.0f}" for s, e in result["echo_us"].items()
        )
        print(
            f"{kind:9} echo us (p50/p99): {echoes}; {result['mib_per_second']:.0f} MiB/s;"
            f" {result['rss_mb']:.0f} MB"
        )


if __name__ == "__main__":
    main()
