"""What the nodes of the engine ``"pysyncobj"`` say to each other, and what its log holds.

PySyncObj sends pickled dictionaries and logs pickled calls; here every message, entry, membership
and snapshot is a struct with a schema.  What PySyncObj leaves out and safety needs is added: the
term in an acknowledgement, and a ``round`` by which a leader learns that it still leads.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from pyagent_node.base.errors import CorruptData, ErrorInfo
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.consensus.segments import LogEntry

PROTOCOL = "/pyagent/pysyncobj/1"
MAX_MEMBERS = 512
INCARNATION_BYTES = 16

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Incarnation = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Request = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Peer = Annotated[PeerId, msgspec.Meta(min_length=1, max_length=128)]


class Member(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A node in one incarnation: with its disk lost it comes back as another member.

    So a vote that was forgotten can never be given twice.
    """

    peer: Peer
    incarnation: Incarnation

    @property
    def id(self) -> str:
        """The node id that PySyncObj knows it by."""
        return f"{self.peer}/{self.incarnation.hex()}"


Members_ = Annotated[tuple[Member, ...], msgspec.Meta(max_length=MAX_MEMBERS)]


class Members(msgspec.Struct, frozen=True, array_like=True):
    """Who votes and who only follows, from one entry of the log on."""

    voters: Members_ = ()
    learners: Members_ = ()

    @property
    def all(self) -> tuple[Member, ...]:
        """Voters, then learners."""
        return self.voters + self.learners


REGULAR, NO_OP, MEMBERSHIP = b"\x00", b"\x01", b"\x02"
"""The first byte of an entry, as in PySyncObj; its fourth kind, VERSION, is not used."""


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """What a node must never forget, beside the log.

    ``boots`` counts how often the log was opened; connection epochs begin with it.  ``vote`` is the
    id of the member that got this node's vote in ``term``.
    """

    version: Literal[1]
    incarnation: Incarnation
    boots: Count
    term: Count
    vote: str | None
    commit: Count


class StoredReplica(msgspec.Struct, frozen=True, array_like=True):
    """The content of a snapshot: who the members were, and the replica."""

    version: Literal[1]
    members: Members
    replica: bytes


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First on a stream: who opened it, and its place in the order of this opener's streams."""

    incarnation: Incarnation
    epoch: Count
    last_index: Count


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer, and the only frame that travels against the stream's direction."""

    incarnation: Incarnation
    last_index: Count


class RequestVote(msgspec.Struct, frozen=True, tag="request_vote"):
    """I stand for ``term``; my log ends there."""

    term: Count
    last_index: Count
    last_term: Count


class Vote(msgspec.Struct, frozen=True, tag="vote"):
    """You have my vote in ``term``."""

    term: Count


class Append(msgspec.Struct, frozen=True, tag="append"):
    """From the leader: ``count`` entries in the tail follow on ``prev_index``."""

    term: Count
    prev_index: Count
    prev_term: Count
    commit: Count
    round: Count
    count: Count = 0


class InstallSnapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """From the leader: a :class:`StoredReplica` after entry ``index`` is in the tail."""

    term: Count
    index: Count
    snapshot_term: Count
    round: Count


class NextIndex(msgspec.Struct, frozen=True, tag="next_index"):
    """To the leader: all below ``next_index`` is durable here (``success``), or try there."""

    term: Count
    next_index: Count
    reset: bool
    success: bool
    round: Count


class TimeoutNow(msgspec.Struct, frozen=True, tag="timeout_now"):
    """From the leader: stand for election at once."""

    term: Count


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """To the leader: append this command, unless a proposal with this ``request`` id was."""

    request: Request
    command: bytes


class Barrier(msgspec.Struct, frozen=True, tag="barrier"):
    """To the leader: which index is committed now?"""

    request: Request


class Transfer(msgspec.Struct, frozen=True, tag="transfer"):
    """To the leader: hand over to ``to``."""

    request: Request
    to: Peer


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """To the leader, from a voter: I am to be a voter no more."""

    request: Request
    learn: bool


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """From the leader: the index that the request led to, or why not."""

    request: Request
    index: Count = 0
    error: ErrorInfo | None = None


RaftMessage = RequestVote | Vote | Append | InstallSnapshot | NextIndex | TimeoutNow
RequestMessage = Propose | Barrier | Transfer | Leave
EngineMessage = RaftMessage | RequestMessage | Answer | Hello | Welcome

MESSAGES: Codec[EngineMessage] = Codec(
    "pysyncobj protocol",
    Hello,
    Welcome,
    RequestVote,
    Vote,
    Append,
    InstallSnapshot,
    NextIndex,
    TimeoutNow,
    Propose,
    Barrier,
    Transfer,
    Leave,
    Answer,
)

_entries_decoder = msgspec.msgpack.Decoder(list[LogEntry])
_members_decoder = msgspec.msgpack.Decoder(Members)
_hard_decoder = msgspec.msgpack.Decoder(HardState)
_stored_decoder = msgspec.msgpack.Decoder(StoredReplica)


def frame(message: EngineMessage, tail: bytes = b"") -> Frame:
    """Return ``message`` as a frame."""
    return Frame(MESSAGES.encode(message), tail)


def encode_entries(entries: Sequence[LogEntry]) -> bytes:
    """Return the tail of an :class:`Append`."""
    return msgspec.msgpack.encode(list(entries)) if entries else b""


def decode_entries(message: Append, tail: bytes | bytearray | memoryview) -> list[LogEntry]:
    """Return the entries of a frame; raises :class:`CorruptData` (``malformed_message``)."""
    if message.count == 0:
        return []
    try:
        entries = _entries_decoder.decode(tail)
        if len(entries) != message.count:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "A frame of log entries is malformed.", code="malformed_message"
        ) from None
    return entries


def encode_members(members: Members) -> bytes:
    """Return the content of the log entry that brings ``members`` into force."""
    return MEMBERSHIP + msgspec.msgpack.encode(members)


def decode_members(data: bytes) -> Members:
    """Return the members in a log entry; raises :class:`CorruptData` (``bad_entry``)."""
    try:
        if data[:1] != MEMBERSHIP:
            raise ValueError
        members = _members_decoder.decode(data[1:])
        peers = [member.peer for member in members.all]
        if not members.voters or len(set(peers)) != len(peers):
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData("A membership in the log is malformed.", code="bad_entry") from None
    return members


def decode_hard_state(data: bytes) -> HardState:
    """Return a stored hard state; raises :class:`CorruptData` (``bad_hard_state``)."""
    try:
        return _hard_decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "The log belongs to another engine, or its hard state is damaged.",
            code="bad_hard_state",
            remedy="Move the log directory away; the node then fetches the log anew.",
        ) from None


def decode_stored_replica(data: bytes | bytearray | memoryview) -> StoredReplica:
    """Return the content of a snapshot; raises :class:`CorruptData` (``bad_snapshot``)."""
    try:
        stored = _stored_decoder.decode(data)
        if not stored.members.voters:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "A snapshot of the log is damaged, or of another engine.",
            code="bad_snapshot",
            remedy="Move the log directory away; the node then fetches the log anew.",
        ) from None
    return stored
