"""What the nodes of the engine ``"single"`` say to each other on ``/pyagent/log/1``."""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import CorruptData, ErrorInfo
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.consensus.segments import LogEntry

PROTOCOL = "/pyagent/log/1"
MAX_ENTRIES_PER_FRAME = 1024


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """To the leader, first: send what follows on ``after``; up to it my log hashes to ``chain``."""

    after: int
    chain: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """From the leader, first: the logs agree; mine ends at ``index``."""

    index: int


class Acknowledge(msgspec.Struct, frozen=True, tag="acknowledge"):
    """To the leader: everything up to ``index`` is durable here."""

    index: int


class Propose(msgspec.Struct, frozen=True, tag="propose"):
    """To the leader: append this command, unless a proposal with this ``request`` id was."""

    request: bytes
    command: bytes


class Barrier(msgspec.Struct, frozen=True, tag="barrier"):
    """To the leader: which index is committed now?"""

    request: bytes


class Entries(msgspec.Struct, frozen=True, tag="entries"):
    """From the leader: the next entries, encoded in the tail."""

    count: int


class InstallSnapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """From the leader: the replica after entry ``index``, in the tail; entries follow on it."""

    index: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """From the leader to a proposal or barrier: its index in the log, or why not."""

    request: bytes
    index: int = 0
    error: ErrorInfo | None = None


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """From the leader, last: this stream cannot go on."""

    error: ErrorInfo


LogMessage = (
    Follow | Welcome | Acknowledge | Propose | Barrier | Entries | InstallSnapshot | Answer | Stop
)

LOG_MESSAGES: Codec[LogMessage] = Codec(
    "log protocol",
    Follow,
    Welcome,
    Acknowledge,
    Propose,
    Barrier,
    Entries,
    InstallSnapshot,
    Answer,
    Stop,
)

_entries_decoder = msgspec.msgpack.Decoder(list[LogEntry])


def frame(message: LogMessage, tail: bytes = b"") -> Frame:
    """Return ``message`` as a frame."""
    return Frame(LOG_MESSAGES.encode(message), tail)


def entries_frame(entries: list[LogEntry]) -> Frame:
    """Return the frame that carries ``entries``."""
    return frame(Entries(len(entries)), msgspec.msgpack.encode(entries))


def decode_entries(message: Entries, tail: bytes | bytearray | memoryview) -> list[LogEntry]:
    """Return the entries of a frame; raises :class:`CorruptData` (``malformed_message``)."""
    try:
        entries = _entries_decoder.decode(tail)
        if len(entries) != message.count or not entries:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "A frame of log entries is malformed.", code="malformed_message"
        ) from None
    return entries
