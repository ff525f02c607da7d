"""The pure core of a stage: what it makes of each frame, and whom it answers.

A stage is one rank of one placement on this node.  The shell hands :class:`StageCore` every frame
for it, sends what it answers, and keeps one task that asks for the next batch, runs it, and
reports the outputs.  Time is passed in; nothing here waits, draws or talks.

Rules.

* Fence: a frame of another epoch is answered with ``stale_epoch`` and causes no work.
* Admission: a session waits for a slot in order of arrival.  Rank 0 fixes that order for all ranks
  (see ``frames``), so two ranks can never each hold a slot that the other's session waits for.
* Nobody else may act for a session: it is opened through the rank before, stepped by the same,
  and closed by its head.
* A session that ends here for whatever reason but its head's own wish is reported to its head.
* What arrives for a session after its end is dropped, even if its opening is yet to come.

What is computed when is ``stage_queue``'s; a session is ``stage_session``'s; what becomes of KV
blocks is ``stage_blocks``'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import PREFILL_CHUNK, SequenceOp, StepOutput
from pyagent_node.inference.pipeline.activations import check_fits, crossed
from pyagent_node.inference.pipeline.frames import (
    CancelSteps,
    CloseSession,
    Join,
    Keep,
    OpenSession,
    PipeMessage,
    Restore,
    Result,
    StageError,
    Step,
    Tail,
    onward,
    pack_tail,
)
from pyagent_node.inference.pipeline.origins import roots
from pyagent_node.inference.pipeline.stage_blocks import Import, Parting, StageBlocks
from pyagent_node.inference.pipeline.stage_checks import check_opening, check_room, check_step
from pyagent_node.inference.pipeline.stage_errors import (
    runner_protocol,
    stage_error,
    stale_epoch,
)
from pyagent_node.inference.pipeline.stage_joins import StageJoins
from pyagent_node.inference.pipeline.stage_landmarks import StageLandmarks, check_marks
from pyagent_node.inference.pipeline.stage_pruning import StagePruning
from pyagent_node.inference.pipeline.stage_queue import Batch, StageQueue
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.pipeline.stage_types import (
    Outgoing,
    StageLimits,
    StageSession,
    StageSpec,
    StageView,
    peer_lost,
)
from pyagent_node.sharding.kv_codec import KvShape

PARKED_SECONDS: Final = 5.0
"""For how long a session whose head says that the epoch ends keeps its cells."""


class StageCore:
    """State of one stage; see the module's rules."""

    def __init__(
        self,
        spec: StageSpec,
        limits: StageLimits | None = None,
        joint_shapes: Sequence[tuple[int, int]] = (),
        cells: str = "",
        cut: int = PREFILL_CHUNK,
        *,
        kv_shape: KvShape | None = None,
        exactness: str = "",
        prunes: bool = False,
        cell_bytes: int = 0,
        trained: int = 0,
    ) -> None:
        """Make a stage whose runner says these shapes and ``exactness`` of itself.

        See ``BackendInfo``; for ``cells`` and ``cut`` see ``stage_blocks``.
        """
        self.spec = spec
        self.blocks = StageBlocks(spec, cells, cut, kv_shape)
        self.joins = StageJoins(spec, cells, kv_shape)
        self.pruning = StagePruning(
            able=prunes, cell_bytes=cell_bytes, n_ctx=spec.n_ctx, trained=trained
        )
        self.landmarks = StageLandmarks(spec, cells, self.joins.shape, able=prunes)
        self._limits = limits or StageLimits()
        self._exactness = exactness
        self._sessions: dict[SessionId, ServedSession] = {}
        self._queue = StageQueue(
            slots=spec.n_seq,
            width=max([spec.max_width, *(n for n, rows in joint_shapes if rows == 1)]),
            sampling=spec.is_tail,
            guess_rows=max([0, *(n * rows for n, rows in joint_shapes if rows > 1)]),
        )
        self._parked: dict[ServedSession, float] = {}
        """Sessions that wait for the end of the epoch with their cells, and until when."""
        self._tombs: OrderedDict[SessionId, PeerId] = OrderedDict()
        self._stopped: PyAgentError | None = None
        self._batches = 0
        self._tokens = 0
        self._busy = 0.0
        self._refused = 0

    # ---- frames in -------------------------------------------------------------------------

    def receive(
        self, sender: PeerId, message: PipeMessage, tail: Tail, now: float
    ) -> list[Outgoing]:
        """Take one frame from ``sender`` and return what to send for it."""
        if message.epoch != self.spec.epoch:
            return self._stale(sender, message)
        if isinstance(message, Step):
            return self._step(sender, message, tail, now)
        if isinstance(message, OpenSession):
            return self._open(sender, message, now)
        if isinstance(message, Restore | Join | Keep):
            return self._restore(sender, message, tail)
        if isinstance(message, CloseSession):
            self._close(sender, message, now)
            return []
        if isinstance(message, CancelSteps):
            self._cancel(sender, message)
            return []
        if isinstance(message, StageError):
            return self._relay(sender, message)
        return []

    def _stale(self, sender: PeerId, message: PipeMessage) -> list[Outgoing]:
        self._refused += 1
        if not isinstance(message, OpenSession | Step):
            return []
        error = stale_epoch(self.spec, message.epoch)
        to = message.head if isinstance(message, OpenSession) else sender
        return [Outgoing(to, stage_error(self.spec, message.session, error, epoch=message.epoch))]

    def _open(self, sender: PeerId, message: OpenSession, now: float) -> list[Outgoing]:
        if self._tombs.get(message.session) == message.head:
            return []
        if self._stopped is not None:
            self._refused += 1
            return [Outgoing(message.head, stage_error(self.spec, message.session, self._stopped))]
        spec, limits = self.spec, self._limits
        try:
            if sender != (spec.upstream or message.head):
                raise Refused(
                    f"Rank {spec.rank} takes sessions from the rank before it only.",
                    code="wrong_sender",
                )
            if message.session in self._sessions:
                raise Conflict("The session is open already.", code="session_exists")
            self.pruning.check_opening(message)
            check_opening(spec, message)
            check_marks(message)
            held = sum(1 for s in self._sessions.values() if s.head == message.head)
            check_room(spec.rank, limits, held=held, sessions=len(self._sessions))
        except PyAgentError as error:
            self._refused += 1
            if not isinstance(error, Refused | Conflict):
                self._bury(message.session, message.head)
            to = sender if isinstance(error, Refused) else message.head
            return [Outgoing(to, stage_error(self.spec, message.session, error))]
        session = ServedSession(message, now)
        self._sessions[session.id] = session
        self._queue.admit(session)
        self.pruning.opened(session, message.pruning)
        came = message.classes
        if not spec.is_whole:
            came = crossed(came, spec.activations, spec.slice.first)
        found = roots(
            message.root,
            came,
            message.trail,
            message.former,
            session=message.session,
            part=spec.slice,
            own=self._exactness,
        )
        session.classes = found.classes
        cut = self.blocks.opened(
            session, found.origin.root, message.cut, message.prompt_tokens, found.source
        )
        self.landmarks.opened(session, message.landmarks)
        session.cut = cut
        session.trail = (*message.trail, msgspec.structs.replace(found.origin, cut=cut))
        if spec.downstream is None:
            return []
        onward = msgspec.structs.replace(
            message,
            rank=spec.rank + 1,
            cut=cut,
            classes=session.classes,
            trail=session.trail,
        )
        return [Outgoing(spec.downstream, onward)]

    def _known(
        self, sender: PeerId, message: Step | Restore | Join | Keep
    ) -> tuple[ServedSession | None, list[Outgoing]]:
        """Return the session of a frame from the rank before, or what to answer instead."""
        session = self._sessions.get(message.session)
        if session is None:
            if message.session in self._tombs:
                return None, []
            self._refused += 1
            unknown = NotFound("The session is not open here.", code="session_unknown")
            return None, [Outgoing(sender, stage_error(self.spec, message.session, unknown))]
        if sender != (self.spec.upstream or session.head):
            self._refused += 1
            refused = Refused("Not the sender of this session.", code="wrong_sender")
            return None, [Outgoing(sender, stage_error(self.spec, message.session, refused))]
        return session, []

    def _restore(
        self, sender: PeerId, message: Restore | Join | Keep, tail: Tail
    ) -> list[Outgoing]:
        session, answer = self._known(sender, message)
        if session is None:
            return answer
        try:
            if isinstance(message, Join):
                return self.joins.join(session, message, tail)
            if isinstance(message, Keep):
                return self.blocks.keep(session, message)
            return self.blocks.restore(session, message, tail)
        except PyAgentError as error:
            self._refused += 1
            return self._give_up(session, error)

    def _step(self, sender: PeerId, message: Step, tail: Tail, now: float) -> list[Outgoing]:
        spec = self.spec
        session, answer = self._known(sender, message)
        if session is None:
            return answer
        try:
            queued = check_step(
                message, tail, spec=spec, limits=self._limits, queue=self._queue, session=session
            )
        except PyAgentError as error:
            self._refused += 1
            return self._give_up(session, error)
        session.last_seen = now
        self.blocks.stepped(session)
        self.joins.stepped(session)
        session.came(message, keeps=not spec.is_tail)
        self._queue.push(session, queued)
        return []

    def _close(self, sender: PeerId, message: CloseSession, now: float) -> None:
        session = self._sessions.get(message.session)
        if session is None:
            self._bury(message.session, sender)
        elif session.head == sender and message.parts and self.blocks.parting(session):
            del self._sessions[session.id]
            self._bury(session.id, session.head)
            self._queue.park(session)
            self._parked[session] = now + PARKED_SECONDS
        elif session.head == sender:
            self._free(session)
        else:
            self._refused += 1

    def _cancel(self, sender: PeerId, message: CancelSteps) -> None:
        session = self._sessions.get(message.session)
        if session is not None and session.head == sender:
            self._queue.cancel(session, message.first, message.stop)
        elif session is not None:
            self._refused += 1

    def _relay(self, sender: PeerId, message: StageError) -> list[Outgoing]:
        session = self._sessions.get(message.session)
        if session is None or sender != self.spec.downstream:
            return []
        self._free(session)
        return [Outgoing(session.head, message)]

    # ---- events ----------------------------------------------------------------------------

    def peer_down(self, peer: PeerId) -> list[Outgoing]:
        """Free the sessions of a head that is gone, or of a pipeline that lost its next rank."""
        out: list[Outgoing] = []
        for session in list(self._sessions.values()):
            if session.head == peer:
                self._free(session)
        for neighbour, rank in (
            (self.spec.upstream, self.spec.rank - 1),
            (self.spec.downstream, self.spec.rank + 1),
        ):
            if neighbour == peer:
                error = peer_lost(rank, peer)
                for session in list(self._sessions.values()):
                    out += self._give_up(session, error, rank=rank, peer=peer)
        return out

    def link_lost(self, peer: PeerId, *, control: bool) -> list[Outgoing]:
        """End the sessions whose frames to ``peer`` may be lost, on one lane (see ``frames``).

        A head that this rank cannot reach is told through the ranks before.
        """
        out: list[Outgoing] = []
        for session in list(self._sessions.values()):
            if control and session.head == peer:
                error = Unavailable(
                    f"Rank {self.spec.rank} lost its stream to the head.", code="stream_closed"
                )
                self._free(session)
                out.append(
                    Outgoing(self.spec.upstream or peer, stage_error(self.spec, session.id, error))
                )
            elif not control and self.spec.downstream == peer:
                rank = self.spec.rank + 1
                out += self._give_up(session, peer_lost(rank, peer), rank=rank, peer=peer)
        return out

    def partings(self) -> list[Parting]:
        """Return what the next ranks need of the sessions here; call it before :meth:`stop`."""
        found = (
            self.blocks.parting(session) for session in (*self._sessions.values(), *self._parked)
        )
        return [parting for parting in found if parting is not None]

    def stop(self, error: PyAgentError) -> list[Outgoing]:
        """End every session with ``error`` and answer new ones with it (the runner is gone)."""
        self._stopped = error
        out: list[Outgoing] = []
        for session in [*self._parked]:
            self._unpark(session)
        for session in list(self._sessions.values()):
            out += self._give_up(session, error)
        self._queue.clear_ops()
        return out

    def expire(self, now: float) -> list[Outgoing]:
        """Free sessions that nothing was heard of for the idle deadline."""
        out: list[Outgoing] = []
        idle = self._limits.idle_seconds
        for session in [session for session, until in self._parked.items() if until <= now]:
            self._unpark(session)
        for session in list(self._sessions.values()):
            if session.queue or session.in_flight or now - session.last_seen < idle:
                continue
            error = DeadlineExceeded(
                f"Rank {self.spec.rank} heard nothing of the session for {idle:.0f} s.",
                code="session_idle",
                remedy="Read the answer faster, or ask again.",
            )
            out += self._give_up(session, error)
        return out

    # ---- work ------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called; the runner may serve somebody else by now."""
        return self._stopped is not None

    @property
    def has_work(self) -> bool:
        """Whether :meth:`next_batch` would return something."""
        return self._queue.has_work or self.pruning.has_turn

    def next_batch(self) -> Batch | None:
        """Take the work that is due now; the caller runs it and calls :meth:`completed`."""
        return self._queue.take()

    def completed(
        self, batch: Batch, outputs: Sequence[StepOutput], seconds: float, now: float
    ) -> list[Outgoing]:
        """Take the runner's ``outputs`` for ``batch``, which took ``seconds``."""
        spec = self.spec
        self._batches += 1
        self._busy += seconds
        out: list[Outgoing] = []
        each = seconds / max(1, sum(queued.message.n for _, queued in batch.work))
        for (session, queued), output in zip(batch.work, outputs, strict=True):
            message = queued.message
            self._tokens += message.n
            if session.closed:
                continue
            self.blocks.computed(session, queued, each * message.n)
            self.landmarks.computed(session)
            session.last_seen = now
            first = message.sample and session.first_sample is None
            if first:
                session.first_sample = now
            if spec.downstream is None:
                if not message.sample <= len(output.sampled) <= message.drafts + 1:
                    wrong = runner_protocol(f"{len(output.sampled)} tokens")
                    out += self._give_up(session, wrong)
                    continue
                session.computed(queued, output.sampled)
                self._queue.finished(session, message, len(output.sampled))
                self.pruning.computed(session, message)
                result = Result(
                    message.session,
                    message.model,
                    message.epoch,
                    message.rank,
                    message.step,
                    message.spent + seconds,
                    output.sampled,
                    session.classes if first else (),
                    session.trail,
                    self.pruning.evicted(session, message.evicted),
                )
                session.trail = ()
                out.append(Outgoing(session.head, result))
            else:
                session.computed(queued, ())
                void = message.parent is not None and session.is_void(message, -1, tail=False)
                if void:
                    session.void = message.step
                self._queue.finished(session, message, 0)
                self.pruning.computed(session, message)
                if void:
                    continue
                rows = output.activations
                if rows is None or rows.shape != (message.n, spec.n_embd):
                    out += self._give_up(session, runner_protocol("no activations"))
                    continue
                try:
                    check_fits(rows, spec.activations)
                except PyAgentError as error:
                    out += self._give_up(session, error)
                    continue
                tail = pack_tail(queued.tokens, rows, spec.activations)
                evicted = self.pruning.evicted(session, message.evicted)
                on = onward(message, seconds, evicted)
                out.append(Outgoing(spec.downstream, on, tail))
        return out

    def take_ops(self) -> tuple[SequenceOp, ...]:
        """Take the sequence operations that are due, without any work."""
        return self._queue.take_ops()

    def not_imported(self, job: Import) -> None:
        """Note that the runner refused cells; what it took of them is dropped."""
        self.blocks.not_imported(job)
        if not job.load.session.closed:
            self._queue.empty(job.load.session)

    def abandoned(self, batch: Batch, error: PyAgentError) -> list[Outgoing]:
        """Give up the sessions of ``batch``: the runner refused it but goes on living."""
        return [one for session, _ in batch.work for one in self.lost(session, error)]

    def lost(self, session: ServedSession, error: PyAgentError) -> list[Outgoing]:
        """Give up a session whose cells are not what they should be."""
        return [] if session.closed else self._give_up(session, error)

    # ---- views -----------------------------------------------------------------------------

    def view(self) -> StageView:
        """Return counters and loads."""
        spec = self.spec
        return StageView(
            model=spec.model,
            epoch=spec.epoch,
            rank=spec.rank,
            slice=spec.slice,
            sessions=len(self._sessions),
            waiting=self._queue.waiting,
            queued=self._queue.steps,
            batches=self._batches,
            tokens=self._tokens,
            busy_seconds=self._busy,
            refused=self._refused,
            dropped=self._queue.dropped,
            restored=self.blocks.restored + self.joins.joined,
            unfit=self.blocks.refused + self.joins.refused,
            evicted=self.pruning.cells,
            marked=self.landmarks.made,
            joined_landmarks=self.landmarks.joined,
            evicted_bytes=self.pruning.cells * self.pruning.cell_bytes,
        )

    def sessions(self) -> Iterable[StageSession]:
        """Return the sessions served now."""
        for s in self._sessions.values():
            yield StageSession(
                s.id,
                self.spec.model,
                s.epoch,
                s.head,
                s.prompt_tokens,
                s.generated,
                s.first_sample,
                s.last_seen,
            )

    def holds(self, session: SessionId) -> bool:
        """Whether ``session`` is open here."""
        return session in self._sessions

    # ---- inside ----------------------------------------------------------------------------

    def _free(self, session: ServedSession) -> None:
        del self._sessions[session.id]
        self._bury(session.id, session.head)
        self._queue.remove(session)
        self.blocks.freed(session)
        self.joins.freed(session)

    def _unpark(self, session: ServedSession) -> None:
        del self._parked[session]
        self._queue.free(session)
        self.blocks.freed(session)

    def _bury(self, session: SessionId, head: PeerId) -> None:
        self._tombs[session] = head
        self._tombs.move_to_end(session)
        while len(self._tombs) > self._limits.tombstones:
            self._tombs.popitem(last=False)

    def _give_up(
        self,
        session: ServedSession,
        error: PyAgentError,
        *,
        rank: int | None = None,
        peer: PeerId | None = None,
    ) -> list[Outgoing]:
        self._free(session)
        return [
            Outgoing(session.head, stage_error(self.spec, session.id, error, rank=rank, peer=peer))
        ]
