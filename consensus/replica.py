"""The deterministic core of an engine: entries in, state and results out.  Pure.

Besides the state, a replica keeps what every node derives from the same entries: a hash chain over
the log, by which two nodes notice that their logs are not the same, and the ids of recent
proposals, by which a repeated proposal is recognised and not applied twice.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.errors import CorruptData, PyAgentError, Unsupported, error_from_info
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.checks import decode_command
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.consensus.state import State, apply, decode_snapshot, encode_snapshot
from pyagent_node.native import blake3

REQUEST_BYTES = 16
REMEMBERED_REQUESTS = 4096
"""Proposals that are recognised when they come again."""
NO_CHAIN = bytes(32)
"""The chain of an empty log."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """The content of an entry: an idempotency id, who proposed, the encoded command."""

    request: bytes
    proposer: PeerId
    command: bytes


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    chain: bytes
    requests: list[tuple[bytes, int]]
    state: bytes


class Replica:
    """State, hash chain and recent requests after the same number of entries."""

    __slots__ = ("chain", "requests", "state")

    def __init__(self) -> None:
        self.state = State()
        self.chain = NO_CHAIN
        self.requests: dict[bytes, int] = {}

    def copy(self) -> Replica:
        """Return a replica to try entries on, independent of this one."""
        other = Replica()
        other.state, other.chain, other.requests = self.state, self.chain, dict(self.requests)
        return other

    def propose(
        self, record: Record, command: Command, term: int
    ) -> tuple[LogEntry, Applied] | PyAgentError:
        """Append ``record`` if the state machine takes its command, else return the refusal.

        A refused command leaves the replica unchanged and needs no entry.
        """
        state, error = apply(self.state, command)
        if error is not None:
            return error_from_info(error)
        entry = LogEntry(state.index, term, msgspec.msgpack.encode(record))
        self._advance(entry, record, state)
        return entry, Applied(entry.index, command)

    def apply(self, entry: LogEntry) -> tuple[Record, Applied]:
        """Apply the next entry of the log.

        Raises :class:`CorruptData` (``log_gap``, ``bad_entry``, ``malformed_message``) and
        :class:`Unsupported` (``unknown_command``) for a command of a later version; the replica is
        then unchanged.
        """
        if entry.index != self.state.index + 1:
            raise CorruptData(
                f"Entry {entry.index} of the log came where {self.state.index + 1} was next.",
                code="log_gap",
            )
        try:
            record = msgspec.msgpack.decode(entry.data, type=Record)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise CorruptData(
                f"Entry {entry.index} of the log is malformed.", code="bad_entry"
            ) from None
        try:
            command = decode_command(record.command)
        except Unsupported as unknown:
            raise Unsupported(
                f"Entry {entry.index} of the log: {unknown.message}",
                code="unknown_command",
                remedy="Upgrade pyagent-node on this machine.",
                index=entry.index,
            ) from None
        state, error = apply(self.state, command)
        self._advance(entry, record, state)
        return record, Applied(entry.index, command, error)

    def _advance(self, entry: LogEntry, record: Record, state: State) -> None:
        place = entry.index.to_bytes(8, "big") + entry.term.to_bytes(8, "big")
        self.chain = blake3(self.chain + place + entry.data)
        self.state = state
        self.requests[record.request] = entry.index
        if len(self.requests) > REMEMBERED_REQUESTS:
            del self.requests[next(iter(self.requests))]

    def encode(self) -> bytes:
        """Return the replica as a snapshot."""
        return msgspec.msgpack.encode(
            _Stored(1, self.chain, list(self.requests.items()), encode_snapshot(self.state))
        )


def decode_replica(data: bytes) -> Replica:
    """Return the replica in a snapshot; raises what :func:`decode_snapshot` raises."""
    try:
        stored = msgspec.msgpack.decode(data, type=_Stored)
        if len(stored.chain) != len(NO_CHAIN) or len(stored.requests) > REMEMBERED_REQUESTS:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "A snapshot of the log is damaged.",
            code="bad_snapshot",
            remedy="Remove it on a node that follows; restore it from a backup on the writer.",
        ) from None
    replica = Replica()
    replica.state = decode_snapshot(stored.state)
    replica.chain = stored.chain
    replica.requests = dict(stored.requests)
    return replica
