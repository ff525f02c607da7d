"""From a bare wire to an encrypted one whose peer is proven: Noise, then yamux agreed on.

Only ``/noise`` is spoken: a dialler that proposes plaintext, TLS or anything else is refused.
Foreign exceptions end here; what leaves is of ``base.errors``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pyagent_node.base.errors import PyAgentError, Refused, Unavailable
from pyagent_node.base.limits import KIB
from pyagent_node.base.types import PeerId
from pyagent_node.node.identity import public_key_of
from pyagent_node.node.mesh import negotiation, yamux
from pyagent_node.node.mesh.libp2p_light import (
    ID,
    NOISE,
    ConnectionType,
    EncryptedMsgReadWriter,
    InvalidSignature,
    IOException,
    IRawConnection,
    NoiseTransport,
    PeerIDMismatchesPubkey,
    SecureSession,
    create_new_key_pair,
    create_new_noise_key_pair,
)
from pyagent_node.node.mesh.negotiation import EndOfBytes, NotMultistream, NotSpoken
from pyagent_node.node.mesh.wire import Wire, WireClosed

MAX_HANDSHAKE: Final = 256 * KIB
"""Raw bytes that a peer may make us read before it is secured."""
MAX_PACKET: Final = 65535 - 16
"""Plain bytes in one Noise message."""


class Identity:
    """This node's keys in libp2p's form; the Noise key is new in every process."""

    def __init__(self, seed: bytes) -> None:
        keys = create_new_key_pair(seed)
        self.peer_id = PeerId(ID.from_pubkey(keys.public_key).to_base58())
        self.noise = NoiseTransport(keys, create_new_noise_key_pair().private_key)


@dataclass(frozen=True, slots=True)
class Secured:
    """A secured connection: who is at the other end, and how to talk to it.

    ``encrypt`` takes up to :data:`MAX_PACKET` bytes; ``rest`` are encrypted bytes that were
    received already, ``plain`` decrypted ones.
    """

    peer: PeerId
    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]
    rest: bytes
    plain: bytes


class _Raw(IRawConnection):
    """A :class:`Wire` as libp2p's Noise and our negotiation want to see it."""

    def __init__(self, wire: Wire, *, initiator: bool) -> None:
        self.is_initiator = initiator
        self.wire = wire
        self.buffer = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        if not self.buffer:
            if self.wire.received > MAX_HANDSHAKE:
                raise EndOfBytes("it sent too much before it was secured")
            try:
                data = await self.wire.receive()
            except WireClosed as error:
                raise EndOfBytes(str(error)) from None
            if not data:
                raise EndOfBytes("it closed the connection")
            self.buffer += data
        size = len(self.buffer) if n is None else min(n, len(self.buffer))
        result = bytes(self.buffer[:size])
        del self.buffer[:size]
        return result

    async def read_exactly(self, size: int) -> bytes:
        result = b""
        while len(result) < size:
            result += await self.read(size - len(result))
        return result

    async def write(self, data: bytes) -> None:
        try:
            self.wire.send(data)
            await self.wire.drained()
        except WireClosed as error:
            raise EndOfBytes(str(error)) from None

    async def close(self) -> None:
        self.wire.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.wire.remote()

    def get_transport_addresses(self) -> list[object]:  # pyright: ignore  # multiaddr is untyped
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class _Encrypted:
    """The inside of the encryption, to negotiate the muxer on."""

    def __init__(self, raw: _Raw, messages: EncryptedMsgReadWriter) -> None:
        self.raw = raw
        self.messages = messages
        self.plain = bytearray()

    async def read_exactly(self, size: int) -> bytes:
        while len(self.plain) < size:
            length = int.from_bytes(await self.raw.read_exactly(2), "big")
            sealed = await self.raw.read_exactly(length)
            try:
                self.plain += self.messages.decrypt(sealed)
            except Exception as error:
                raise EndOfBytes(f"a message is not authentic ({type(error).__name__})") from None
        result = bytes(self.plain[:size])
        del self.plain[:size]
        return result

    async def write(self, data: bytes) -> None:
        sealed = self.messages.encrypt(data)
        await self.raw.write(len(sealed).to_bytes(2, "big") + sealed)


async def _only(protocol: str, proposal: str) -> bool:
    return proposal == protocol


async def secure(
    wire: Wire, identity: Identity, *, expected: PeerId | None, private: bool
) -> Secured:
    """Run the handshake; the dialler says whom it expects, the listener ``None``.

    ``private`` says whether the wire is under a PSK.  Raises :class:`Refused` (``wrong_psk``,
    ``peer_id_mismatch``, ``forged_identity``, ``insecure_peer``, ``unsupported_muxer``) or
    :class:`Unavailable` (``handshake_failed``); the caller sets the deadline and closes the wire.
    """
    initiator = expected is not None
    raw = _Raw(wire, initiator=initiator)
    try:
        await _agree_on_noise(raw, wire, initiator=initiator, private=private)
        session = await _noise(raw, identity, expected)
        peer = _peer_of(session)
        messages = session.conn
        inside = _Encrypted(raw, messages)
        await _agree(inside, yamux.PROTOCOL, initiator=initiator)
    except (EndOfBytes, IOException) as error:
        raise Unavailable(
            f"The connection ended during the handshake: {str(error)[:200]}.",
            code="handshake_failed",
        ) from None
    except (NotSpoken, NotMultistream):
        raise Refused(
            "The peer does not speak the yamux muxer.", code="unsupported_muxer"
        ) from None
    return Secured(peer, messages.encrypt, messages.decrypt, bytes(raw.buffer), bytes(inside.plain))


async def _agree(io: negotiation.ByteIO, protocol: str, *, initiator: bool) -> None:
    if initiator:
        await negotiation.propose(io, protocol)
    else:
        await negotiation.respond(io, lambda proposal: _only(protocol, proposal))


async def _agree_on_noise(raw: _Raw, wire: Wire, *, initiator: bool, private: bool) -> None:
    try:
        await _agree(raw, NOISE, initiator=initiator)
    except NotSpoken:
        raise Refused(
            "The peer offers no connection that is encrypted with Noise.",
            code="insecure_peer",
            remedy="Plaintext, TLS and SECIO are refused on purpose.",
        ) from None
    except NotMultistream as error:
        raise _stranger(error.start + raw.buffer, private=private) from None
    except EndOfBytes as error:
        if private and wire.received:
            raise _wrong_psk() from None
        raise Unavailable(
            f"The connection ended before it was secured: {error}.", code="handshake_failed"
        ) from None


def _wrong_psk() -> Refused:
    return Refused(
        "The handshake failed: what the peer sends does not make sense under this mesh's"
        " pre-shared key, so the keys of the two nodes most likely differ.",
        code="wrong_psk",
        remedy="Check that both nodes belong to the same mesh, or join again with a new ticket.",
    )


def _stranger(start: bytes, *, private: bool) -> PyAgentError:
    """Name a peer whose first bytes are not libp2p's: text is another server's, noise a key's."""
    text = start.decode("ascii", "replace").translate({9: " ", 10: " ", 13: " "})
    if private or not (text.isascii() and text.isprintable()):
        return _wrong_psk()
    return Unavailable(
        "The server at that address is not a libp2p node.",
        code="handshake_failed",
        remedy="Check the address and the port.",
    )


async def _noise(raw: _Raw, identity: Identity, expected: PeerId | None) -> SecureSession:
    try:
        if expected is None:
            session = await identity.noise.secure_inbound(raw)
        else:
            session = await identity.noise.secure_outbound(raw, ID.from_base58(expected))
    except (EndOfBytes, IOException):
        raise
    except PeerIDMismatchesPubkey:
        raise Refused(
            f"The node at that address is not {expected}: it holds another key.",
            code="peer_id_mismatch",
            remedy="Ask for its address again; the peer id at the end must be its own.",
        ) from None
    except InvalidSignature:
        raise Refused(
            "The peer claims an identity whose key it does not hold.", code="forged_identity"
        ) from None
    except Exception as error:  # a hostile handshake fails in a dozen ways in three libraries
        raise Refused(
            f"The Noise handshake failed ({type(error).__name__}).", code="forged_identity"
        ) from None
    if not isinstance(session, SecureSession):
        raise Unavailable("libp2p made an unknown kind of session.", code="handshake_failed")
    return session


def _peer_of(session: SecureSession) -> PeerId:
    peer = session.get_remote_peer().to_base58()
    try:
        public_key_of(peer)
    except PyAgentError:
        raise Refused(
            "The peer's identity is not an Ed25519 key.", code="unsupported_identity"
        ) from None
    return PeerId(peer)
