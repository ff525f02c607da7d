"""The writer of the engine ``"single"``: orders proposals, makes them durable, feeds followers."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable

import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    DeadlineExceeded,
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.checks import decode_command, encode_command
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.journal import TERM, Journal
from pyagent_node.consensus.policy import check_proposal
from pyagent_node.consensus.port import Applied, ConsensusStatus
from pyagent_node.consensus.replica import REQUEST_BYTES, Record
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.consensus.single_messages import (
    LOG_MESSAGES,
    MAX_ENTRIES_PER_FRAME,
    Acknowledge,
    Answer,
    Barrier,
    Follow,
    InstallSnapshot,
    LogMessage,
    Propose,
    Stop,
    Welcome,
    entries_frame,
    frame,
)
from pyagent_node.consensus.single_node import SingleNode

log = logging.getLogger("pyagent_node.consensus.single")

MAX_BATCH = 64
"""Proposals that share one ``fsync``."""
MAX_WAITING = 256
"""Proposals waiting for the writer; more wait in their senders."""
MAX_WAITING_PER_PEER = 32
SEND_SECONDS = 30.0
"""Longest wait for a follower to take a frame before its stream is given up."""


class _Proposal:
    __slots__ = ("command", "done", "outcome", "record")

    def __init__(self, record: Record, command: Command) -> None:
        self.record = record
        self.command = command
        self.done = trio.Event()
        self.outcome: Applied | PyAgentError | None = None

    def settle(self, outcome: Applied | PyAgentError) -> None:
        self.outcome = outcome
        self.done.set()


class Leader(SingleNode):
    """Implements ``Consensus`` on the node that writes the log."""

    def __init__(
        self,
        mesh: Mesh,
        journal: Journal,
        *,
        propose_seconds: float,
        new_request: Callable[[], bytes] = lambda: os.urandom(REQUEST_BYTES),
    ) -> None:
        super().__init__(journal)
        self.followers: dict[PeerId, int] = {}
        """Index that each connected follower has made durable."""
        self._mesh = mesh
        self._seconds = propose_seconds
        self._new_request = new_request
        self._send, self._receive = trio.open_memory_channel[_Proposal](MAX_WAITING)
        self._waiting: set[_Proposal] = set()
        self._scopes: set[trio.CancelScope] = set()
        self._closed = False

    @property
    def leads(self) -> bool:
        """See ``Consensus.leads``."""
        return True

    def status(self) -> ConsensusStatus:
        """See ``Consensus.status``."""
        me = self._mesh.peer_id
        return ConsensusStatus("single", "leader", me, self._journal.index)

    async def propose(self, command: Command) -> Applied:
        """See ``Consensus.propose``."""
        me = self._mesh.peer_id
        check_proposal(command, proposer=me, role="voter", authority=me)
        record = Record(self._new_request(), me, encode_command(command))
        try:
            with trio.fail_after(self._seconds):
                return await self._submit(_Proposal(record, command))
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"The log did not take the change within {self._seconds:g} s.",
                code="propose_timeout",
                remedy="The disk may be slow or full; look whether the change happened.",
            ) from None

    async def read_barrier(self) -> None:
        """Return at once: what is committed is applied here."""
        await trio.lowlevel.checkpoint()

    async def _submit(self, proposal: _Proposal) -> Applied:
        if self._closed:
            raise _closing()
        self._waiting.add(proposal)
        try:
            await self._send.send(proposal)
            await proposal.done.wait()
        finally:
            self._waiting.discard(proposal)
        outcome = proposal.outcome
        if isinstance(outcome, PyAgentError):
            raise outcome
        assert outcome is not None
        return outcome

    async def write(self) -> None:
        """Take proposals for ever, many to an ``fsync``.  The one task that commits."""
        while True:
            batch = [await self._receive.receive()]
            while len(batch) < MAX_BATCH:
                try:
                    batch.append(self._receive.receive_nowait())
                except trio.WouldBlock:
                    break
            await self._commit(batch)

    async def _commit(self, batch: list[_Proposal]) -> None:
        draft = self._journal.replica.copy()
        entries: list[LogEntry] = []
        outcomes: list[Applied | PyAgentError] = []
        for proposal in batch:
            known = draft.requests.get(proposal.record.request)
            if known is not None:
                outcomes.append(Applied(known, proposal.command))
                continue
            result = draft.propose(proposal.record, proposal.command, TERM)
            if isinstance(result, PyAgentError):
                self.counted.refused_proposals += 1
                outcomes.append(result)
            else:
                entries.append(result[0])
                outcomes.append(result[1])
        try:
            if entries:
                await self._journal.commit(entries)
                self.counted.entries += len(entries)
        except PyAgentError as error:
            log.error("the log could not be written: %s", error)
            outcomes = [error] * len(batch)
        for proposal, outcome in zip(batch, outcomes, strict=True):
            if not proposal.done.is_set():
                proposal.settle(outcome)

    def close(self) -> None:
        """End every follower's stream, refuse what waits and what comes."""
        self._closed = True
        for proposal in list(self._waiting):
            proposal.settle(_closing())
        for scope in list(self._scopes):
            scope.cancel()

    async def serve(self, stream: FrameStream) -> None:
        """Serve one follower; the handler of ``/pyagent/log/1``."""
        if self._closed:
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            self.counted.sessions += 1
            try:
                await self._serve(stream)
            except (CorruptData, LimitExceeded, Refused, Conflict, Unsupported) as error:
                self.counted.refused_messages += 1
                log.warning("the log stream of %s was ended: %s", stream.peer, error)
                await self._stop(stream, error.to_info())
            except Unavailable as error:
                log.debug("the log stream of %s ended: %s", stream.peer, error)
            finally:
                self._scopes.discard(scope)
                self.followers.pop(stream.peer, None)

    async def _stop(self, stream: FrameStream, error: ErrorInfo) -> None:
        try:
            await _send(stream, frame(Stop(error)))
        except PyAgentError as trouble:
            log.debug("%s did not hear why: %s", stream.peer, trouble)

    async def _serve(self, stream: FrameStream) -> None:
        first = await stream.receive()
        if first is None:
            return
        message = LOG_MESSAGES.decode(first.header)
        if not isinstance(message, Follow) or message.after < 0:
            raise CorruptData("A log stream begins with 'follow'.", code="protocol_error")
        self._check_not_revoked(stream.peer)
        self._check_same_log(message)
        await _send(stream, frame(Welcome(self._journal.index)))
        failures: list[PyAgentError] = []
        async with trio.open_nursery() as nursery:

            async def guard(work: Awaitable[None]) -> None:
                """Run one of the stream's tasks; the first to end ends them all."""
                try:
                    await work
                except PyAgentError as error:
                    failures.append(error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(guard, self._feed(stream, message.after))
            nursery.start_soon(guard, self._listen(stream, nursery))
        if failures:
            raise failures[0]

    def _check_not_revoked(self, peer: PeerId) -> None:
        member = self.state.members.get(peer)
        if member is not None and member.revoked is not None:
            raise Refused(f"The membership of {peer} was revoked.", code="revoked")

    def _check_same_log(self, message: Follow) -> None:
        ours = self._journal.chain_at(message.after)
        if message.after > self._journal.index or (ours is not None and ours != message.chain):
            raise Conflict(
                f"The follower's log (to entry {message.after}) is not a copy of the writer's"
                f" (to entry {self._journal.index}).",
                code="log_diverged",
                remedy=(
                    "If the writer was restored from an old backup, give it the follower's newer"
                    " log directory; else move the follower's log directory away and restart it."
                ),
                after=message.after,
                index=self._journal.index,
            )

    async def _feed(self, stream: FrameStream, after: int) -> None:
        """Send what the follower has not got, for ever."""
        while True:
            entries = self._journal.entries_after(after, MAX_ENTRIES_PER_FRAME, MIB)
            if entries is None:
                after, data = self._journal.index, self._journal.replica.encode()
                await _send(stream, frame(InstallSnapshot(after), data))
            elif entries:
                after = entries[-1].index
                await _send(stream, entries_frame(entries))
            else:
                await self._journal.wait_for(after + 1)
                self._check_not_revoked(stream.peer)

    async def _listen(self, stream: FrameStream, nursery: trio.Nursery) -> None:
        """Read what the follower says until it ends the stream."""
        room = trio.Semaphore(MAX_WAITING_PER_PEER)
        while (received := await stream.receive()) is not None:
            message = LOG_MESSAGES.decode(received.header)
            match message:
                case Acknowledge():
                    self._acknowledge(stream.peer, message.index)
                case Propose() | Barrier():
                    if len(message.request) != REQUEST_BYTES:
                        raise CorruptData(
                            f"A request id has {REQUEST_BYTES} bytes.", code="malformed_message"
                        )
                    await room.acquire()
                    nursery.start_soon(self._answer, stream, message, room)
                case _:
                    raise _unexpected(message)

    def _acknowledge(self, peer: PeerId, index: int) -> None:
        if not 0 <= index <= self._journal.index:
            raise CorruptData(f"Entry {index} does not exist.", code="protocol_error")
        self.followers[peer] = max(index, self.followers.get(peer, 0))

    async def _answer(
        self, stream: FrameStream, message: Propose | Barrier, room: trio.Semaphore
    ) -> None:
        try:
            if isinstance(message, Barrier):
                answer = Answer(message.request, self._journal.index)
            else:
                answer = await self._propose_for(stream.peer, message)
            await _send(stream, frame(answer))
        except PyAgentError as error:
            log.debug("an answer to %s was lost: %s", stream.peer, error)
        finally:
            room.release()

    async def _propose_for(self, peer: PeerId, message: Propose) -> Answer:
        try:
            command = decode_command(message.command)
            self._check_not_revoked(peer)
            role = next((p.role for p in self._mesh.peers() if p.peer_id == peer), None)
            check_proposal(command, proposer=peer, role=role, authority=self._mesh.peer_id)
            record = Record(message.request, peer, encode_command(command))
            applied = await self._submit(_Proposal(record, command))
        except PyAgentError as error:
            if not isinstance(error, Unavailable):
                log.info("a proposal of %s was refused: %s", peer, error)
            return Answer(message.request, error=error.to_info())
        return Answer(message.request, applied.index)


async def _send(stream: FrameStream, message: Frame) -> None:
    try:
        with trio.fail_after(SEND_SECONDS):
            await stream.send(message)
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"{stream.peer} took no frame for {SEND_SECONDS:g} s.", code="peer_stalled"
        ) from None


def _unexpected(message: LogMessage) -> CorruptData:
    return CorruptData(
        f"A {type(message).__name__} message makes no sense here.", code="protocol_error"
    )


def _closing() -> Unavailable:
    return Unavailable("The node is stopping.", code="stopping")
