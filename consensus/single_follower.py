"""A node of the engine ``"single"`` that does not write the log: it follows, and forwards."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from typing import Literal

import trio

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import DIAL_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.journal import Journal
from pyagent_node.consensus.port import Applied, ConsensusStatus
from pyagent_node.consensus.replica import REQUEST_BYTES, Record
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.consensus.single_messages import (
    LOG_MESSAGES,
    PROTOCOL,
    Acknowledge,
    Answer,
    Barrier,
    Entries,
    Follow,
    InstallSnapshot,
    Propose,
    Stop,
    Welcome,
    decode_entries,
    frame,
)
from pyagent_node.consensus.single_node import SingleNode

log = logging.getLogger("pyagent_node.consensus.single")

MAX_PENDING = 256
"""Proposals and barriers of this node that wait for an answer."""
NO_LEADER_SECONDS = 5.0
"""Longest wait for a connection to the writer before a proposal is given up."""
RETRY_FIRST = 0.2
RETRY_MOST = 5.0


_ROLES: dict[str, Literal["follower", "learner", "client"]] = {
    "voter": "follower",
    "learner": "learner",
}


class _Pending:
    """A proposal or barrier on its way; it is sent again after each reconnection."""

    __slots__ = ("command", "done", "index", "message", "outcome", "sent_on")

    def __init__(self, message: Propose | Barrier, command: Command | None) -> None:
        self.message = message
        self.command = command
        self.index: int | None = None
        self.sent_on: FrameStream | None = None
        self.outcome: Applied | PyAgentError | None = None
        self.done = trio.Event()

    def settle(self, outcome: Applied | PyAgentError | None) -> None:
        self.outcome = outcome
        self.done.set()


class Follower(SingleNode):
    """Implements ``Consensus`` on every node but the writer."""

    def __init__(
        self,
        mesh: Mesh,
        journal: Journal,
        *,
        leader: PeerId,
        role: str,
        propose_seconds: float,
        new_request: Callable[[], bytes] = lambda: os.urandom(REQUEST_BYTES),
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(journal)
        self._mesh = mesh
        self._leader = leader
        self._role = role
        self._seconds = propose_seconds
        self._new_request = new_request
        self._rng = rng or random.SystemRandom()
        self._stream: FrameStream | None = None
        self._connected = trio.Event()
        self._leader_came = trio.Event()
        self._pending: dict[bytes, _Pending] = {}
        self._problem: ErrorInfo | None = None

    @property
    def leads(self) -> bool:
        """See ``Consensus.leads``."""
        return False

    def status(self) -> ConsensusStatus:
        """See ``Consensus.status``."""
        return ConsensusStatus(
            engine="single",
            role=_ROLES.get(self._role, "client"),
            leader=self._leader if self._stream is not None else None,
            index=self._journal.index,
            problem=self._problem,
        )

    async def propose(self, command: Command) -> Applied:
        """See ``Consensus.propose``."""
        message = Propose(self._new_request(), encode_command(command))
        outcome = await self._ask(_Pending(message, command))
        assert outcome is not None
        return outcome

    async def read_barrier(self) -> None:
        """See ``Consensus.read_barrier``."""
        await self._ask(_Pending(Barrier(self._new_request()), None))

    async def _ask(self, pending: _Pending) -> Applied | None:
        if len(self._pending) >= MAX_PENDING:
            raise LimitExceeded(
                f"{MAX_PENDING} changes of this node wait for the log already.",
                code="too_many_proposals",
                limit=MAX_PENDING,
            )
        request = pending.message.request
        deadline = trio.current_time() + self._seconds
        self._pending[request] = pending
        try:
            await self._wait_connected(min(deadline, trio.current_time() + NO_LEADER_SECONDS))
            with trio.CancelScope(deadline=deadline):
                await self._send_pending(pending)
                await pending.done.wait()
        finally:
            del self._pending[request]
        if not pending.done.is_set():
            raise self._too_late()
        if isinstance(pending.outcome, PyAgentError):
            raise pending.outcome
        return pending.outcome

    async def _wait_connected(self, deadline: float) -> None:
        with trio.CancelScope(deadline=deadline):
            while self._stream is None:
                await self._connected.wait()
        if self._stream is None:
            raise self._no_leader()

    async def _send_pending(self, pending: _Pending) -> None:
        stream = self._stream
        if stream is not None and pending.sent_on is not stream:
            pending.sent_on = stream
            try:
                await stream.send(frame(pending.message))
            except PyAgentError as error:
                log.debug("a proposal will be sent again: %s", error)

    def _no_leader(self) -> Unavailable:
        why = f" ({self._problem.message})" if self._problem else ""
        return Unavailable(
            f"The node that writes this mesh's log cannot be reached{why}",
            code="no_leader",
            remedy=f"Start or reconnect {self._leader}; what runs goes on without it.",
            leader=self._leader,
        )

    def _too_late(self) -> PyAgentError:
        if self._stream is None:
            return self._no_leader()
        return DeadlineExceeded(
            f"The node that writes the log gave no answer within {self._seconds:g} s.",
            code="propose_timeout",
            remedy="Look whether the change happened before repeating it.",
            leader=self._leader,
        )

    def close(self) -> None:
        """Fail what still waits for an answer."""
        for pending in list(self._pending.values()):
            if not pending.done.is_set():
                pending.settle(Unavailable("The node is stopping.", code="stopping"))

    async def watch(self) -> None:
        """Note when the writer becomes reachable, so that nobody waits out a back-off."""
        async with self._mesh.events() as events:
            async for event in events:
                if event.peer_id == self._leader and event.change == "up":
                    self._leader_came.set()

    async def follow(self) -> None:
        """Keep a stream to the writer, for ever, with jittered back-off between attempts."""
        wait = RETRY_FIRST
        while True:
            self._leader_came = trio.Event()
            begun = trio.current_time()
            try:
                await self._connect()
            except PyAgentError as error:
                self._note(error)
            if trio.current_time() - begun > RETRY_MOST:  # it was a session, not an attempt
                wait = RETRY_FIRST
            with trio.move_on_after(wait * self._rng.uniform(0.5, 1.0)):
                await self._leader_came.wait()
                wait = RETRY_FIRST
            wait = min(RETRY_MOST, wait * 2)

    def _note(self, error: PyAgentError) -> None:
        info = error.to_info()
        if self._problem is None or self._problem.code != info.code:
            serious = not isinstance(error, Unavailable)
            log.log(
                logging.WARNING if serious else logging.INFO, "the log is not followed: %s", error
            )
        self._problem = info

    async def _connect(self) -> None:
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self._mesh.open(self._leader, PROTOCOL)
                await stream.send(frame(Follow(self._journal.index, self._journal.replica.chain)))
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"{self._leader} did not answer within {DIAL_SECONDS:g} s.", code="peer_unreachable"
            ) from None
        try:
            await self._session(stream)
        finally:
            self._stream = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()

    async def _session(self, stream: FrameStream) -> None:
        async with trio.open_nursery() as nursery:
            failure = await self._read(stream, nursery)
            nursery.cancel_scope.cancel()
        raise failure

    def _welcomed(self, stream: FrameStream, nursery: trio.Nursery) -> None:
        self.counted.sessions += 1
        self._problem = None
        self._stream = stream
        self._connected.set()
        self._connected = trio.Event()
        nursery.start_soon(self._resend)
        nursery.start_soon(self._acknowledge, stream)

    async def _resend(self) -> None:
        for pending in list(self._pending.values()):
            if pending.index is None and not pending.done.is_set():
                await self._send_pending(pending)

    async def _acknowledge(self, stream: FrameStream) -> None:
        """Tell the writer what is durable here, the latest only; the reader never sends."""
        told = -1
        try:
            while True:
                await self._journal.wait_for(told + 1)
                told = self._journal.index
                await stream.send(frame(Acknowledge(told)))
        except PyAgentError as error:
            log.debug("an acknowledgement was lost: %s", error)

    async def _read(self, stream: FrameStream, nursery: trio.Nursery) -> PyAgentError:
        """Take what the writer sends until the stream ends; returns why it did."""
        try:
            while (received := await stream.receive()) is not None:
                message = LOG_MESSAGES.decode(received.header)
                match message:
                    case Welcome() if self._stream is None:
                        self._welcomed(stream, nursery)
                    case Entries():
                        await self._take(decode_entries(message, received.tail))
                    case InstallSnapshot():
                        await self._journal.install(message.index, bytes(received.tail))
                    case Answer():
                        self._answered(message)
                    case Stop():
                        return error_from_info(message.error)
                    case _:
                        raise CorruptData(
                            f"A {type(message).__name__} message makes no sense here.",
                            code="protocol_error",
                        )
                self._settle_reached()
        except Unavailable as error:
            return error
        except PyAgentError as error:
            self.counted.refused_messages += 1
            return error
        return Unavailable("The writer ended the stream.", code="stream_closed")

    async def _take(self, entries: list[LogEntry]) -> None:
        results = await self._journal.commit(entries)
        self.counted.entries += len(results)
        for record, applied in results:
            self._finish(record, applied)

    def _finish(self, record: Record, applied: Applied) -> None:
        pending = self._pending.get(record.request)
        ours = record.proposer == self._mesh.peer_id
        if ours and pending is not None and not pending.done.is_set():
            refused = applied.error
            pending.settle(applied if refused is None else error_from_info(refused))

    def _answered(self, answer: Answer) -> None:
        pending = self._pending.get(answer.request)
        if pending is None or pending.done.is_set():
            return
        if answer.error is not None:
            pending.settle(error_from_info(answer.error))
        else:
            pending.index = answer.index

    def _settle_reached(self) -> None:
        """Finish what waited for an entry that is applied here by now."""
        for pending in list(self._pending.values()):
            reached = pending.index
            if reached is not None and reached <= self._journal.index and not pending.done.is_set():
                command = pending.command
                pending.settle(None if command is None else Applied(reached, command))
