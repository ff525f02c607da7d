"""The deterministic core of an engine: entries in, state and results out.  Pure.

Besides the state, a replica keeps what every node derives from the same entries: a hash chain over
the log, by which two nodes notice that their logs are not the same, and the ids of recent
proposals with what became of them, by which a repeated proposal is recognised and not applied
twice.  A proposal may be repeated for as long as its first appearance is sure to be remembered: it
carries the index that its proposer had seen when it was new (``Record.since``), and is refused
once the log has grown by more than :data:`REMEMBERED_REQUESTS` entries since then.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from pyagent_node.base.errors import (
    CorruptData,
    ErrorInfo,
    PyAgentError,
    Unavailable,
    Unsupported,
    error_from_info,
)
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
_MAX_FAILURE = 300
NO_CHAIN = bytes(32)
"""The chain of an empty log."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """The content of an entry: an idempotency id, who proposed, the encoded command.

    ``since`` is the last index that the proposer had applied when the proposal was new, ``None``
    under an engine whose proposals cannot come twice.
    """

    request: bytes
    proposer: PeerId
    command: bytes
    since: int | None = None


class Outcome(NamedTuple):
    """What :meth:`Replica.apply_once` made of an entry; ``repeated``: it had been applied before.

    ``applied.index`` of a repeated one is that of its first appearance.
    """

    record: Record
    applied: Applied
    repeated: bool


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """Version 1 had no ``failures``."""

    version: Literal[1, 2]
    chain: bytes
    requests: list[tuple[bytes, int]]
    state: bytes
    failures: list[tuple[bytes, ErrorInfo]] = []


class Replica:
    """State, hash chain and recent requests after the same number of entries.

    ``requests`` says at which index each recent one was applied, ``failures`` which of them the
    state machine refused.
    """

    __slots__ = ("chain", "failures", "requests", "state")

    def __init__(self) -> None:
        self.state = State()
        self.chain = NO_CHAIN
        self.requests: dict[bytes, int] = {}
        self.failures: dict[bytes, ErrorInfo] = {}

    def copy(self) -> Replica:
        """Return a replica to try entries on, independent of this one."""
        other = Replica()
        other.state, other.chain = self.state, self.chain
        other.requests, other.failures = dict(self.requests), dict(self.failures)
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
        """Apply the next entry of the log, whose data is an encoded :class:`Record`.

        Raises :class:`CorruptData` (``log_gap``, ``bad_entry``, ``malformed_message``) and
        :class:`Unsupported` (``unknown_command``) for a command of a later version; the replica is
        then unchanged.
        """
        self._check_next(entry)
        record, command = _read(entry.index, entry.data)
        state, error = apply(self.state, command)
        self._advance(entry, record, state)
        return record, Applied(entry.index, command, error)

    def apply_once(self, entry: LogEntry, data: bytes) -> Outcome:
        """Apply the next entry, whose record is ``data``, unless its request was applied before.

        Raises what :meth:`apply` raises; the replica is then unchanged (see :meth:`skip`).
        """
        self._check_next(entry)
        record, command = _read(entry.index, data)
        first = self.requests.get(record.request)
        if first is not None:
            self.skip(entry)
            applied = Applied(first, command, self.failures.get(record.request))
            return Outcome(record, applied, repeated=True)
        if record.since is not None and too_old(record.since, entry.index):
            self.skip(entry)
            error = proposal_too_old().to_info()
            return Outcome(record, Applied(entry.index, command, error), repeated=False)
        state, refusal = apply(self.state, command)
        self._advance(entry, record, state)
        if refusal is not None:
            self.failures[record.request] = _brief(refusal)
        return Outcome(record, Applied(entry.index, command, refusal), repeated=False)

    def skip(self, entry: LogEntry) -> None:
        """Pass over the next entry, which changes nothing; raises ``log_gap`` as :meth:`apply`."""
        self._check_next(entry)
        self._link(entry, msgspec.structs.replace(self.state, index=entry.index))

    def jump(self, index: int) -> None:
        """Count what is applied as entry ``index``, further on, of a log that begins anew there.

        Proposals on their way are then too old to be taken (see :attr:`Record.since`).
        """
        self.chain = blake3(self.chain + b"recovered" + index.to_bytes(8, "big"))
        self.state = msgspec.structs.replace(self.state, index=index)

    def _check_next(self, entry: LogEntry) -> None:
        if entry.index != self.state.index + 1:
            raise CorruptData(
                f"Entry {entry.index} of the log came where {self.state.index + 1} was next.",
                code="log_gap",
            )

    def _advance(self, entry: LogEntry, record: Record, state: State) -> None:
        self._link(entry, state)
        self.requests[record.request] = entry.index
        if len(self.requests) > REMEMBERED_REQUESTS:
            oldest = next(iter(self.requests))
            del self.requests[oldest]
            self.failures.pop(oldest, None)

    def _link(self, entry: LogEntry, state: State) -> None:
        place = entry.index.to_bytes(8, "big") + entry.term.to_bytes(8, "big")
        self.chain = blake3(self.chain + place + entry.data)
        self.state = state

    def encode(self) -> bytes:
        """Return the replica as a snapshot."""
        return msgspec.msgpack.encode(
            _Stored(
                2,
                self.chain,
                list(self.requests.items()),
                encode_snapshot(self.state),
                list(self.failures.items()),
            )
        )


def too_old(since: int, index: int) -> bool:
    """Say whether a proposal made at index ``since`` may not come at ``index`` any more."""
    return index - since > REMEMBERED_REQUESTS


def proposal_too_old() -> Unavailable:
    """Return the error of a proposal that came too late to be recognised as repeated."""
    return Unavailable(
        "The change took so long to reach the log that it may have been made before.",
        code="proposal_too_old",
        remedy="Look whether the change happened before repeating it.",
    )


def _read(index: int, data: bytes) -> tuple[Record, Command]:
    try:
        record = msgspec.msgpack.decode(data, type=Record)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(f"Entry {index} of the log is malformed.", code="bad_entry") from None
    try:
        return record, decode_command(record.command)
    except Unsupported as unknown:
        raise Unsupported(
            f"Entry {index} of the log: {unknown.message}",
            code="unknown_command",
            remedy="Upgrade pyagent-node on this machine.",
            index=index,
        ) from None


def _brief(error: ErrorInfo) -> ErrorInfo:
    """Return what is worth keeping of an error for as long as its request is remembered."""
    return ErrorInfo(error.kind, error.code, error.message[:_MAX_FAILURE], None, {})


def decode_replica(data: bytes) -> Replica:
    """Return the replica in a snapshot; raises what :func:`decode_snapshot` raises."""
    try:
        stored = msgspec.msgpack.decode(data, type=_Stored)
        if (
            len(stored.chain) != len(NO_CHAIN)
            or max(len(stored.requests), len(stored.failures)) > REMEMBERED_REQUESTS
        ):
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
    replica.failures = dict(stored.failures)
    return replica
