"""What the nodes of the engine ``"raft-rs"`` say to each other on ``/pyagent/raft/1``.

Each node keeps one stream to every other one and only sends on it: first a :class:`Hello`, then
the rest in order.  The other end answers on a stream of its own; on this one it may only say
:class:`Stop`.  The bytes of a Raft message go in the tails of one or more :class:`Piece` frames.
"""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Codec, Frame

PROTOCOL = "/pyagent/raft/1"
PIECE_BYTES = MIB
"""Bytes of a Raft message in one frame; only snapshots need more than one."""
MAX_MESSAGE = 256 * MIB
"""Largest Raft message, a snapshot, that is taken together."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who sends: its Raft id, which follows from its peer id and ``incarnation``.

    ``voter`` says whether it believes to vote, ``leader`` whom it follows (Raft id and peer).  It
    comes again whenever one of them changes.
    """

    raft_id: int
    incarnation: bytes
    voter: bool
    last_index: int
    leader: int = 0
    leader_peer: PeerId | None = None


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """Part of a Raft message to the node ``to``, in the tail; the ``last`` one completes it."""

    to: int
    last: bool


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """To the leader: append this command, unless a proposal with this ``request`` id was.

    ``since`` is the index that the sender had applied when it had never sent this before.
    """

    request: bytes
    command: bytes
    since: int


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """From the leader: it did not append the proposal ``request``, nor will it."""

    request: bytes
    error: ErrorInfo


class Transfer(msgspec.Struct, frozen=True, tag="transfer"):
    """To the leader: hand the leadership to ``to``."""

    to: PeerId


class NotTransferred(msgspec.Struct, frozen=True, tag="not_transferred"):
    """From the leader: it does not hand the leadership to ``to``."""

    to: PeerId
    error: ErrorInfo


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """From the receiving end, last: why it reads no further."""

    error: ErrorInfo


RaftMessage = Hello | Piece | Propose | Refusal | Transfer | NotTransferred | Stop

RAFT_MESSAGES: Codec[RaftMessage] = Codec(
    "raft protocol", Hello, Piece, Propose, Refusal, Transfer, NotTransferred, Stop
)


def frame(message: RaftMessage) -> Frame:
    """Return ``message`` as a frame."""
    return Frame(RAFT_MESSAGES.encode(message))


def pieces(to: int, message: bytes) -> list[Frame]:
    """Return the frames that carry a Raft message."""
    view = memoryview(message)
    starts = range(0, max(1, len(message)), PIECE_BYTES)
    return [
        Frame(
            RAFT_MESSAGES.encode(Piece(to, at + PIECE_BYTES >= len(message))),
            view[at : at + PIECE_BYTES],
        )
        for at in starts
    ]
