"""Our mesh and go-libp2p in one private network, each dialling the other.

The other side is ``go_libp2p/main.go``, built here.  The protocols used are the one that our mesh
serves before a peer is authorised (go-libp2p has no certificate of ours) and go-libp2p's own ping.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from pyagent_node.base.errors import PyAgentError, Refused
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.addresses import peer_of, without_peer
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh import sockets
from pyagent_node.node.mesh.authoriser import PeerAdmission
from pyagent_node.node.mesh.channels import Channel, Link
from pyagent_node.node.mesh.handshake import Identity, secure
from pyagent_node.node.mesh.negotiation import NotSpoken, propose
from pyagent_node.node.mesh.psk import PskCipher
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig
from pyagent_node.node.swarm_key import format_swarm_key, new_psk

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.timeout(900)]

SOURCE = Path(__file__).with_name("go_libp2p")
BEFORE_AUTHORISATION = "/pyagent/join/1"
GO_PING = "/ipfs/ping/1.0.0"
SECONDS = 30.0


class Report(msgspec.Struct):
    """What the Go program says."""

    address: str = ""
    peer: str = ""
    echoed: int = 0
    error: str = ""


class Strangers:
    """Authorises nobody and shows nothing."""

    def credentials(self) -> bytes:
        return b""

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        raise Refused("Nobody is a member.", code="no_certificate")


@pytest.fixture(scope="module")
def go_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built Go program; quick when Go's own cache has it."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed: no interoperability test with go-libp2p")
    modules = subprocess.run(
        [go, "mod", "download"], cwd=SOURCE, capture_output=True, text=True, check=False
    )
    if modules.returncode != 0 and "CI" not in os.environ:
        pytest.skip(f"The Go modules cannot be downloaded: {modules.stderr.strip()[-300:]}")
    assert modules.returncode == 0, modules.stderr
    binary = tmp_path_factory.mktemp("go") / "go_libp2p"
    built = subprocess.run(
        [go, "build", "-mod=readonly", "-trimpath", "-o", str(binary), "."],
        cwd=SOURCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return binary


@pytest.fixture
def psk() -> bytes:
    return new_psk()


def key_file(tmp_path: Path, psk: bytes | None) -> list[str]:
    """The arguments that put the Go program into the private network of ``psk``."""
    if psk is None:
        return []
    path = tmp_path / f"swarm-{len(list(tmp_path.iterdir()))}.key"
    path.write_bytes(format_swarm_key(psk))
    return ["-key", str(path)]


@asynccontextmanager
async def our_mesh(psk: bytes | None) -> AsyncIterator[Libp2pMesh]:
    """A mesh of ours on the loopback interface that sends every frame back."""

    async def echo(stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            await stream.send(frame)

    config = MeshConfig(
        key=NodeKey.generate(),
        membership=Strangers(),
        psk=psk,
        listen=("/ip4/127.0.0.1/tcp/0",),
    )
    with trio.fail_after(2 * SECONDS):
        async with open_mesh(config) as mesh:
            mesh.handle(BEFORE_AUTHORISATION, echo)
            yield mesh


@asynccontextmanager
async def our_channel(address: str, psk: bytes | None, protocol: str) -> AsyncIterator[Channel]:
    """A single stream of ours to ``address``, made of the parts that the mesh is made of."""
    cipher = None if psk is None else PskCipher(psk)
    identity = Identity(os.urandom(32))
    peer = peer_of(address)
    assert peer is not None
    with trio.fail_after(SECONDS):
        wire = await sockets.dial(without_peer(address), cipher)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.run_writer)
            try:
                private = psk is not None
                secured = await secure(wire, identity, expected=peer, private=private)
                link = Link(wire, secured, initiator=True, on_accept=Channel.reset)
                nursery.start_soon(link.run)
                channel = link.open()
                await propose(channel, protocol)
                yield channel
                link.close()
            finally:
                wire.close()


@asynccontextmanager
async def go_listener(program: Path, arguments: list[str]) -> AsyncIterator[str]:
    """The Go program as a listener; its address."""
    process = await trio.lowlevel.open_process(
        [str(program), *arguments, "listen"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        line = bytearray()
        with trio.fail_after(SECONDS):
            while not line.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, f"the Go program ended: {bytes(line)!r}"
                line += data
        report = msgspec.convert(json.loads(line), Report)
        assert not report.error, report.error
        yield report.address
        await process.stdin.aclose()
        with trio.fail_after(SECONDS):
            assert await process.wait() == 0
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


async def go_dials(program: Path, arguments: list[str], address: str) -> Report:
    """Let the Go program dial ``address``; what it says of that."""
    done = await trio.run_process(
        [str(program), *arguments, "dial", address], capture_stdout=True, check=False
    )
    return msgspec.convert(json.loads(done.stdout), Report)


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
async def test_go_dials_us(go_peer: Path, tmp_path: Path, psk: bytes, private: bool) -> None:
    key = psk if private else None
    async with our_mesh(key) as mesh:
        report = await go_dials(go_peer, key_file(tmp_path, key), mesh.addresses[0])
        assert report == Report(peer=mesh.peer_id, echoed=9000)
        assert mesh.metrics.frames_in == mesh.metrics.frames_out == 1


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
async def test_we_dial_go(go_peer: Path, tmp_path: Path, psk: bytes, private: bool) -> None:
    key = psk if private else None
    async with (
        go_listener(go_peer, key_file(tmp_path, key)) as address,
        our_mesh(key) as mesh,
    ):
        stream = await mesh.open_join(address)
        assert address.endswith(stream.peer)
        for number in range(100):
            frame = Frame(f"{number}".encode().ljust(number * 100, b"."))
            await stream.send(frame)
            assert await stream.receive() == frame
        await stream.aclose()


async def test_much_goes_both_ways_at_once(go_peer: Path, tmp_path: Path, psk: bytes) -> None:
    # Many times what a window of yamux or a packet of Noise holds.
    data = os.urandom(5_000_000)
    async with (
        go_listener(go_peer, key_file(tmp_path, psk)) as address,
        our_channel(address, psk, BEFORE_AUTHORISATION) as channel,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            await channel.write(data)
            channel.finish()

        nursery.start_soon(send)
        answer = await channel.read_exactly(len(data))
        assert answer == data
        assert await channel.read() == b""  # Go closed its side in order


async def test_go_answers_its_own_ping(go_peer: Path, tmp_path: Path, psk: bytes) -> None:
    async with (
        go_listener(go_peer, key_file(tmp_path, psk)) as address,
        our_channel(address, psk, GO_PING) as channel,
    ):
        for _ in range(3):
            payload = os.urandom(32)
            await channel.write(payload)
            assert await channel.read_exactly(32) == payload


async def test_go_says_which_protocols_it_does_not_serve(go_peer: Path) -> None:
    async with go_listener(go_peer, []) as address:
        with pytest.RaisesGroup(NotSpoken, allow_unwrapped=True, flatten_subgroups=True):
            async with our_channel(address, None, "/pyagent/nothing/1"):
                pass


async def test_go_is_refused_what_needs_authorisation(go_peer: Path, psk: bytes) -> None:
    async with go_listener(go_peer, []) as address, our_mesh(None) as mesh:
        # Go does not serve the authorisation, so it can never become a peer.
        with pytest.raises(PyAgentError) as caught:
            await mesh.connect(address)
        assert caught.value.code == "protocol_unsupported"
        assert mesh.peers() == []


OTHER_KEYS = ["another key", "no key"]


def other(kind: str) -> bytes | None:
    return None if kind == "no key" else new_psk()


@pytest.mark.parametrize("kind", OTHER_KEYS)
async def test_go_with_another_key_is_refused(
    go_peer: Path, tmp_path: Path, psk: bytes, kind: str
) -> None:
    async with our_mesh(psk) as mesh:
        report = await go_dials(go_peer, key_file(tmp_path, other(kind)), mesh.addresses[0])
        assert report.error.startswith("connect: ")
        while not mesh.metrics.refused:
            await trio.testing.wait_all_tasks_blocked()
        assert set(mesh.metrics.refused) == {"wrong_psk"}


@pytest.mark.parametrize("kind", OTHER_KEYS)
async def test_we_with_another_key_are_refused(
    go_peer: Path, tmp_path: Path, psk: bytes, kind: str
) -> None:
    async with (
        go_listener(go_peer, key_file(tmp_path, psk)) as address,
        our_mesh(other(kind)) as mesh,
    ):
        with pytest.raises(PyAgentError) as caught:
            await mesh.open_join(address)
        # Without a key of our own, what a private network sends is just not libp2p.
        codes = {"wrong_psk"} if kind == "another key" else {"wrong_psk", "handshake_failed"}
        assert caught.value.code in codes


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
async def test_a_plaintext_dialler_is_refused(
    go_peer: Path, tmp_path: Path, psk: bytes, private: bool
) -> None:
    key = psk if private else None
    async with our_mesh(key) as mesh:
        arguments = [*key_file(tmp_path, key), "-plaintext"]
        report = await go_dials(go_peer, arguments, mesh.addresses[0])
        assert report.error.startswith("connect: ")
        assert "plaintext" in report.error or "protocol" in report.error
        assert mesh.peers() == []
