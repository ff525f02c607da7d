"""What the cores of the engine ``"pysyncobj"`` say to each other, and what their log holds.  Pure.

PySyncObj sends pickled dictionaries and logs pickled calls; here every message and every entry has
a schema.  What PySyncObj leaves out and safety needs is added: the term in an acknowledgement, a
``round`` by which a leader learns that it still leads, the question before an election, reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from pyagent_node.base.errors import CorruptData, Unsupported
from pyagent_node.base.wire import Codec
from pyagent_node.native import RaftEntry

MAX_NODES = 256
MAX_CONTEXT = 64

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
NodeId = Annotated[int, msgspec.Meta(ge=1)]
Context = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_CONTEXT)]
Ids = Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=MAX_NODES)]

REGULAR, NO_OP, MEMBERSHIP = b"\x00", b"\x01", b"\x02"
"""The first byte of an entry, as in PySyncObj; its fourth kind, VERSION, is not used."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """An entry as it travels: ``content`` begins with its kind."""

    index: Count
    term: Count
    content: bytes


class Membership(msgspec.Struct, frozen=True, array_like=True):
    """Who votes and who only follows, from this entry of the log on.

    One voter may come or go at a time, so the entry also says where the change is to end
    (``target_...``); whoever leads then takes the next step.  ``context`` is the proposer's.
    """

    voters: Ids = ()
    learners: Ids = ()
    target_voters: Ids = ()
    target_learners: Ids = ()
    context: bytes = b""

    @property
    def complete(self) -> bool:
        """Whether the change ends here."""
        return self.voters == self.target_voters and self.learners == self.target_learners


class RequestVote(msgspec.Struct, frozen=True, tag="request_vote"):
    """I stand for ``term``; my log ends there.  ``ask``: I only would, and have not begun it."""

    term: Count
    last_index: Count
    last_term: Count
    ask: bool


class Vote(msgspec.Struct, frozen=True, tag="vote"):
    """You have my vote in ``term``; ``ask``: you would have it."""

    term: Count
    ask: bool


class Append(msgspec.Struct, frozen=True, tag="append"):
    """From the leader: ``entries`` follow on ``prev_index``; with none it is a heartbeat."""

    term: Count
    prev_index: Count
    prev_term: Count
    commit: Count
    round: Count
    entries: list[Entry] = []


class InstallSnapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """From the leader: the state after entry ``index``."""

    term: Count
    index: Count
    snapshot_term: Count
    round: Count
    voters: Ids
    learners: Ids
    data: bytes


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


class AskIndex(msgspec.Struct, frozen=True, tag="ask_index"):
    """To the leader: what is committed now?"""

    term: Count
    context: Context


class ToldIndex(msgspec.Struct, frozen=True, tag="told_index"):
    """From the leader: ``index`` was committed when you asked, and I still lead."""

    term: Count
    index: Count
    context: Context


Message = (
    RequestVote | Vote | Append | InstallSnapshot | NextIndex | TimeoutNow | AskIndex | ToldIndex
)

MESSAGES: Codec[Message] = Codec(
    "pysyncobj protocol",
    RequestVote,
    Vote,
    Append,
    InstallSnapshot,
    NextIndex,
    TimeoutNow,
    AskIndex,
    ToldIndex,
)

_membership_decoder = msgspec.msgpack.Decoder(Membership)


def encode_membership(membership: Membership) -> bytes:
    """Return the content of the entry that brings ``membership`` into force."""
    return MEMBERSHIP + msgspec.msgpack.encode(membership)


def decode_membership(content: bytes) -> Membership:
    """Return the membership in an entry; raises :class:`CorruptData` (``bad_entry``)."""
    try:
        membership = _membership_decoder.decode(content[1:])
        for voters, learners in (
            (membership.voters, membership.learners),
            (membership.target_voters, membership.target_learners),
        ):
            check_members(voters, learners)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData("A membership in the log is malformed.", code="bad_entry") from None
    return membership


def check_members(voters: Sequence[int], learners: Sequence[int]) -> None:
    """Raise ``ValueError`` unless these can be voters and learners, sorted."""
    nodes = {*voters, *learners}
    good = len(nodes) == len(voters) + len(learners) <= MAX_NODES
    if not voters or not good or list(voters) != sorted(voters):
        raise ValueError("there must be a voter, nobody twice, and not too many")
    if list(learners) != sorted(learners) or min(nodes) < 1 or max(nodes) >= 1 << 64:
        raise ValueError("ids must be sorted and have 64 bits")


def content_of(entry: RaftEntry) -> bytes:
    """Return the content of an entry of the store; raises :class:`CorruptData` (``bad_entry``)."""
    if entry.kind == 0:
        return REGULAR + entry.data if entry.data else NO_OP
    content = MEMBERSHIP + entry.data
    decode_membership(content)
    return content


def to_raft_entry(index: int, term: int, content: bytes) -> RaftEntry:
    """Return an entry as the store and the state machine take it."""
    if content[:1] == MEMBERSHIP:
        return RaftEntry(index, term, 1, content[1:], decode_membership(content).context)
    return RaftEntry(index, term, 0, content[1:])


def check_content(content: bytes) -> None:
    """Refuse an entry of a peer that is not one of the three kinds.

    Raises :class:`CorruptData` (``bad_entry``), :class:`Unsupported` (``unknown_entry``).
    """
    match content[:1]:
        case b"\x00" if len(content) > 1:
            return
        case b"\x01" if len(content) == 1:
            return
        case b"\x02":
            decode_membership(content)
        case b"\x00" | b"\x01" | b"":
            raise CorruptData("An entry of the log is malformed.", code="bad_entry")
        case kind:
            raise Unsupported(
                f"An entry of the log is of kind {kind[0]}.",
                code="unknown_entry",
                remedy="Upgrade pyagent-node on this machine.",
            )
