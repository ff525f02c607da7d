"""What a stranger and the node that admits say to each other on ``/pyagent/join/1``.

Both know each other's peer id already (the secure channel has proven them).  The joiner shows a
ticket's public facts, gets a challenge, and answers with a proof over both peer ids and the
challenge: a node that only pretends to be the mesh's learns nothing it could use.  The joiner
trusts the answer because the certificate in it is signed by the authority that its ticket names.
"""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import CorruptData, ErrorInfo, Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Codec, Frame

PROTOCOL = "/pyagent/join/1"
NONCE_BYTES = 32


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """From the joiner: I hold the ticket ``id`` and would like to be called ``name``."""

    id: bytes
    role: str
    expires: int
    name: str


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """From a member: please renew this certificate of mine."""

    certificate: bytes


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """From the admitting node, to :class:`Ask`: prove it."""

    nonce: bytes


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """From the joiner, to :class:`Challenge`."""

    proof: bytes


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """From the admitting node, last: the certificate."""

    certificate: bytes


class NotAdmitted(msgspec.Struct, frozen=True, tag="not_admitted"):
    """From the admitting node, last: why not."""

    error: ErrorInfo


JoinMessage = Ask | Renew | Challenge | Proof | Admitted | NotAdmitted

JOIN_MESSAGES: Codec[JoinMessage] = Codec(
    "join protocol", Ask, Renew, Challenge, Proof, Admitted, NotAdmitted
)


async def send(stream: FrameStream, message: JoinMessage) -> None:
    """Send one message."""
    await stream.send(Frame(JOIN_MESSAGES.encode(message)))


async def receive(stream: FrameStream) -> JoinMessage:
    """Return the next message.

    Raises :class:`Unavailable` (``stream_closed``) at the end of the stream and what
    :meth:`Codec.decode` raises.
    """
    frame = await stream.receive()
    if frame is None:
        raise Unavailable(
            "The other node ended the conversation.",
            code="stream_closed",
            remedy="Try again; its log says why.",
        )
    return JOIN_MESSAGES.decode(frame.header)


def unexpected(message: JoinMessage) -> CorruptData:
    """Return the error for a message that is out of turn."""
    return CorruptData(f"A {type(message).__name__} message is out of turn.", code="protocol_error")
