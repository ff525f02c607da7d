"""Whom a node does not let in, each refused by name; what members do is in ``test_mesh_floods``."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from pyagent_node.base.errors import (
    ConfigError,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh import auth
from pyagent_node.node.mesh.authoriser import MAX_CREDENTIALS, PeerAdmission
from pyagent_node.node.mesh.handshake import Identity
from pyagent_node.node.mesh.libp2p_light import ID, NoiseTransport, create_new_noise_key_pair
from pyagent_node.node.mesh.negotiation import BANNER, EndOfBytes, encode_line, propose
from pyagent_node.node.mesh.service import open_mesh
from pyagent_node.node.mesh.settings import MeshConfig, MeshLimits

from .mesh_kit import (
    LOOPBACK,
    PSK,
    Guard,
    Nodes,
    attacker,
    down,
    drain,
    echo,
    frames,
    nodes_of,
    raw,
    serves,
)
from .waiting import eventually

pytestmark = pytest.mark.daemons

QUICK = MeshLimits(handshake_seconds=0.3, join_seconds=0.6, dial_seconds=5.0)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with nodes_of("libp2p") as nodes:
        yield nodes


# Before the connection is secured -----------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["/plaintext/2.0.0", "/tls/1.0.0", "/secio/1.0.0"])
async def test_only_noise_is_spoken(nodes: Nodes, protocol: str) -> None:
    mesh = await nodes.real()
    stream = await raw(mesh.addresses[0])
    await stream.send_all(encode_line(BANNER) + encode_line(protocol) + encode_line("/noise"))
    answer = encode_line(BANNER) + encode_line("na") + encode_line("/noise")
    got = b""
    while len(got) < len(answer):
        got += await stream.receive_some()
    assert got == answer
    await stream.aclose()
    await serves(mesh, nodes)


async def test_a_server_of_another_kind_is_named(nodes: Nodes) -> None:
    mesh = await nodes.real()

    async def ssh(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.6\r\n")
        await drain(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, ssh, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(Unavailable) as caught:
            await mesh.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NodeKey.generate().peer_id}")
        nursery.cancel_scope.cancel()
    assert caught.value.code == "handshake_failed"
    assert "not a libp2p node" in caught.value.message


async def test_a_plaintext_dialler_of_libp2p_is_refused(nodes: Nodes) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.security.insecure.transport import (
        PLAINTEXT_PROTOCOL_ID,
        InsecureTransport,
    )
    from libp2p.transport.exceptions import SecurityUpgradeFailure
    from libp2p.transport.upgrader import TransportUpgrader

    from pyagent_node.node.mesh.handshake import _Raw
    from pyagent_node.node.mesh.sockets import wire_of

    mesh = await nodes.real()
    upgrader = TransportUpgrader(
        {PLAINTEXT_PROTOCOL_ID: InsecureTransport(create_new_key_pair())}, {}
    )
    wire = wire_of(await raw(mesh.addresses[0]), None)
    with pytest.raises(SecurityUpgradeFailure):
        await upgrader.upgrade_security(
            _Raw(wire, initiator=True), True, ID.from_base58(mesh.peer_id)
        )
    wire.close()
    await eventually(lambda: mesh.metrics.refused.total() == 1)
    assert not mesh.peers()
    await serves(mesh, nodes)


async def test_we_do_not_talk_to_a_plaintext_listener(nodes: Nodes) -> None:
    mesh = await nodes.real()

    async def plaintext_only(stream: trio.SocketStream) -> None:
        await stream.send_all(encode_line(BANNER))
        await stream.receive_some()
        await stream.send_all(encode_line("na"))
        await drain(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, plaintext_only, [listener])
        port = listener.socket.getsockname()[1]
        with pytest.raises(Refused) as caught:
            await mesh.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NodeKey.generate().peer_id}")
        nursery.cancel_scope.cancel()
    assert caught.value.code == "insecure_peer"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00" * 64,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x13/multistream/1.0.0\n\xff\xff\xff\xff\xff",
        b"\x13/multistream/1.0.0\n" + encode_line("/noise") + b"\xff\xff" + b"z" * 70_000,
        b"\x13/multistream/1.0.0\n"
        + encode_line("/noise")
        + b"\x00\x20"
        + b"e" * 32
        + b"\x00\x05no",
        b"\x13/multistream/1.0.0\n" + 2_000 * encode_line("/none"),
        struct.pack(">I", 0xFFFFFFFF) * 1000,
    ],
)
async def test_garbage_on_the_socket_is_dropped(nodes: Nodes, garbage: bytes) -> None:
    mesh = await nodes.real()
    stream = await raw(mesh.addresses[0])
    try:
        await stream.send_all(garbage)
        await stream.send_eof()
    except trio.BrokenResourceError:
        pass
    await drain(stream)
    await eventually(lambda: mesh.metrics.refused.total() == 1)
    await stream.aclose()
    await serves(mesh, nodes)


async def test_random_garbage_after_noise_is_dropped(nodes: Nodes) -> None:
    mesh = await nodes.real()
    for start in (b"", b"\x00\x00", b"\x00\x10", b"\xff\xff"):
        async with attacker(mesh.addresses[0]) as link:
            link.wire.send(start + os.urandom(70_000))
            with trio.fail_after(20):
                await link.ended.wait()
    await serves(mesh, nodes)


async def test_a_connection_that_says_nothing_is_closed(nodes: Nodes) -> None:
    mesh = await nodes.real(limits=QUICK)
    silent = await raw(mesh.addresses[0])
    assert await drain(silent) == encode_line(BANNER)
    assert mesh.metrics.refused["handshake_timeout"] == 1
    await silent.aclose()


async def test_connections_that_are_not_authorised_are_bounded(nodes: Nodes) -> None:
    mesh = await nodes.real(limits=MeshLimits(max_unauthorised=3))
    crowd = [await raw(mesh.addresses[0]) for _ in range(3)]
    for stream in crowd:
        assert await stream.receive_some() == encode_line(BANNER)
    late = await raw(mesh.addresses[0])
    assert await drain(late) == b""
    assert mesh.metrics.refused["too_many_connections"] == 1
    for stream in (*crowd, late):
        await stream.aclose()
    await serves(mesh, nodes)


# Who is who ---------------------------------------------------------------------------------------


async def test_an_address_with_another_id_is_refused(nodes: Nodes) -> None:
    a, b = await nodes.real(), await nodes.real()
    wrong = NodeKey.generate().peer_id
    address = a.addresses[0].replace(a.peer_id, wrong)
    with pytest.raises(Refused) as caught:
        await b.connect(address)
    assert caught.value.code == "peer_id_mismatch"
    assert wrong in caught.value.message
    assert not b.peers()
    assert not a.peers()


def forged(victim: PeerId) -> Identity:
    """Return an identity whose handshake names the victim's key but is signed by another."""
    identity = Identity(NodeKey.generate().seed)
    victim_key = ID.from_base58(victim).extract_public_key()
    assert victim_key is not None
    ours = identity.noise.libp2p_privkey

    class Liar:
        def get_public_key(self) -> object:
            return victim_key

        def sign(self, data: bytes) -> bytes:
            return ours.sign(data)

        def get_type(self) -> object:
            return ours.get_type()

    pair = SimpleNamespace(private_key=Liar(), public_key=victim_key)
    identity.noise = NoiseTransport(pair, create_new_noise_key_pair().private_key)  # type: ignore[arg-type]
    return identity


async def test_a_dialler_that_claims_anothers_id_is_refused(nodes: Nodes) -> None:
    mesh, victim = await nodes.real(), await nodes.real()
    with pytest.raises(Unavailable):
        async with attacker(mesh.addresses[0], identity=forged(victim.peer_id)):
            pass
    await eventually(lambda: mesh.metrics.refused["forged_identity"] == 1)
    assert not mesh.peers()


async def test_a_listener_that_claims_anothers_id_is_refused(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar, mesh, victim = await nodes.real(), await nodes.real(), await nodes.real()
    monkeypatch.setattr(liar, "_identity", forged(victim.peer_id))
    with pytest.raises(Refused) as caught:
        await mesh.connect(f"{liar.addresses[0].partition('/p2p/')[0]}/p2p/{victim.peer_id}")
    assert caught.value.code == "forged_identity"
    assert not mesh.peers()


async def test_a_node_does_not_connect_to_itself_under_another_address(nodes: Nodes) -> None:
    key = NodeKey.generate()
    mesh = await nodes.real(key=key)
    async with attacker(mesh.addresses[0], identity=Identity(key.seed)) as link:
        with trio.fail_after(20):
            await link.ended.wait()
    await eventually(lambda: mesh.metrics.refused["self_connection"] == 1)


# Authorisation ------------------------------------------------------------------------------------


async def test_nothing_is_served_before_authorisation(nodes: Nodes) -> None:
    mesh = await nodes.real()
    mesh.handle("/test/echo/1", echo)
    async with attacker(mesh.addresses[0]) as link:
        for protocol in ("/test/echo/1", "/pyagent/ping/1", "/pyagent/peers/1", "/ipfs/id/1.0.0"):
            channel = link.open()
            with pytest.raises(Exception, match="/"):
                await propose(channel, protocol)
            channel.reset()
    assert mesh.metrics.refused["unauthorised"] == 4
    assert not mesh.peers()


async def test_who_does_not_authorise_itself_is_sent_away(nodes: Nodes) -> None:
    mesh = await nodes.real(limits=QUICK)
    async with attacker(mesh.addresses[0]) as link:
        with trio.fail_after(20):
            await link.ended.wait()
    await eventually(lambda: mesh.metrics.refused["handshake_timeout"] == 1)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (auth.Credentials(b"x" * (MAX_CREDENTIALS + 1)), "credentials_too_long"),
        (auth.Credentials(b""), "no_certificate"),
        (auth.Verdict(), "no_credentials"),
        (b"\xc1garbage", "malformed_message"),
        (b"\x81\xa4type\xa5other", "unknown_message"),
        (b"x" * (auth.MAX_HEADER + 1), "frame_too_large"),
    ],
)
async def test_bad_credentials_are_refused_by_name(
    nodes: Nodes, message: auth.Credentials | auth.Verdict | bytes, code: str
) -> None:
    mesh = await nodes.real()
    async with attacker(mesh.addresses[0]) as link:
        stream = await frames(link, auth.PROTOCOL, mesh)
        header = message if isinstance(message, bytes) else auth.AUTH.encode(message)
        await stream.send(Frame(header))
        with trio.fail_after(20):
            try:
                while (frame := await stream.receive()) is not None:
                    answer = auth.AUTH.decode(frame.header)
                    if isinstance(answer, auth.Verdict):
                        assert answer.error is not None
                        assert answer.error.code == code
            except Unavailable:
                pass
            link.wire.finish()
            await link.ended.wait()
    await eventually(lambda: mesh.metrics.refused[code] >= 1)
    assert not mesh.peers()
    await serves(mesh, nodes)


async def test_a_refusal_of_a_hostile_peer_is_made_safe_to_show(nodes: Nodes) -> None:
    class Rude(Guard):
        def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
            raise Refused("\x1b[2J" + "A" * 1900, code="Not A Code\n", remedy="\x07")

    rude, mesh = await nodes.real(Rude()), await nodes.real()
    with pytest.raises(Refused) as caught:
        await mesh.connect(rude.addresses[0])
    assert caught.value.code == "refused"
    assert str(caught.value).isprintable()
    assert len(caught.value.message) < 600


async def test_a_defect_in_judging_lets_nobody_in(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Guard):
        def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
            raise ZeroDivisionError

    broken, mesh = await nodes.real(Broken()), await nodes.real()
    with pytest.raises(PyAgentError):
        await mesh.connect(broken.addresses[0])
    assert not mesh.peers()
    assert not broken.peers()
    assert "judging" in caplog.text


async def test_a_node_takes_no_more_peers_than_its_limit(nodes: Nodes) -> None:
    mesh = await nodes.real(limits=MeshLimits(max_peers=2))
    others = [await nodes.start() for _ in range(3)]
    for other in others[:2]:
        await other.connect(mesh.addresses[0])
    with pytest.raises(LimitExceeded) as caught:
        await others[2].connect(mesh.addresses[0])
    assert caught.value.code == "too_many_peers"
    assert len(mesh.peers()) == 2


async def test_a_revoked_peer_is_parted_from(nodes: Nodes) -> None:
    guard = Guard()
    mesh, peer = await nodes.real(guard), await nodes.real()
    await peer.connect(mesh.addresses[0])
    mesh.recheck()
    assert len(mesh.peers()) == 1
    guard.takes, guard.code = (), "revoked"
    mesh.recheck()
    await down(mesh, peer.peer_id)
    with pytest.raises(Refused) as caught:  # noqa: PT012 - its own redial may come first
        while True:
            await peer.connect(mesh.addresses[0])
            await trio.testing.wait_all_tasks_blocked(0.005)
    assert caught.value.code == "revoked"


async def test_joining_takes_only_so_long(nodes: Nodes) -> None:
    mesh = await nodes.real(limits=QUICK)
    mesh.handle("/pyagent/join/1", echo)
    stranger = await nodes.real(Guard(shows=b""))
    stream = await stranger.open_join(mesh.addresses[0])
    with pytest.raises(Unavailable), trio.fail_after(20):
        await stream.receive()


# The private network ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PSK, b"q" * 32), (PSK, None), (None, PSK)], ids=["other", "none", "ours"]
)
async def test_another_psk_is_named(nodes: Nodes, ours: bytes | None, theirs: bytes | None) -> None:
    here, there = await nodes.real(psk=ours), await nodes.real(psk=theirs)
    with trio.fail_after(5), pytest.raises(Refused) as caught:
        await here.connect(there.addresses[0])
    assert caught.value.code == "wrong_psk"
    assert "key" in caught.value.message
    assert not here.peers()
    assert not there.peers()


async def test_a_psk_of_the_wrong_length_is_a_mistake_of_the_user() -> None:
    config = MeshConfig(NodeKey.generate(), Guard(), psk=b"short")
    with pytest.raises(ConfigError) as caught:
        async with open_mesh(config):
            pass
    assert caught.value.code == "bad_psk"
    assert "short" not in repr(config)


# Ourselves ----------------------------------------------------------------------------------------


async def test_a_listening_address_must_be_free_and_ours(nodes: Nodes) -> None:
    mesh = await nodes.real()
    taken_address = mesh.addresses[0].partition("/p2p/")[0]
    for address, code in (
        (taken_address, "cannot_listen"),
        ("/ip4/192.0.2.1/tcp/0", "cannot_listen"),
        ("/dns4/localhost/tcp/0", "bad_address"),
        ("nonsense", "bad_address"),
    ):
        config = MeshConfig(NodeKey.generate(), Guard(), listen=(LOOPBACK, address))
        with pytest.raises(PyAgentError) as caught:
            async with open_mesh(config):
                pass
        assert caught.value.code == code


async def test_a_node_listens_nowhere_unless_told() -> None:
    async with open_mesh(MeshConfig(NodeKey.generate(), Guard())) as mesh:
        assert mesh.addresses == ()


async def test_an_error_of_the_user_leaves_the_block_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_mesh(MeshConfig(NodeKey.generate(), Guard(), listen=(LOOPBACK,))):
            raise ZeroDivisionError


async def test_end_of_bytes_is_not_an_error_of_ours() -> None:
    assert not issubclass(EndOfBytes, PyAgentError)
