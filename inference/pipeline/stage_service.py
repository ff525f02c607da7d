"""The shell around the stages of this node: routes frames to cores, feeds runners, keeps time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import Conflict, PyAgentError, RunnerFailed, Unavailable
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.inference.backend import ResetSequences
from pyagent_node.inference.kv.port import KvShelf, NullShelf
from pyagent_node.inference.pipeline.frames import (
    CloseSession,
    OpenSession,
    PipeMessage,
    StageError,
    Step,
    Tail,
)
from pyagent_node.inference.pipeline.links import PipeLinks
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_blocks import Parting
from pyagent_node.inference.pipeline.stage_errors import PRUNED, not_joined, not_pruned
from pyagent_node.inference.pipeline.stage_pruning import PruneTurn
from pyagent_node.inference.pipeline.stage_queue import Batch
from pyagent_node.inference.pipeline.stage_shelf import ShelfWork
from pyagent_node.inference.pipeline.stage_types import (
    Outgoing,
    StageLimits,
    StageSession,
    StageSpec,
    StageView,
)

logger = logging.getLogger("pyagent_node.pipeline")

EXPIRE_SECONDS: Final = 5.0
"""How often stages look for idle sessions."""
WIPE_SECONDS: Final = 2.0
"""How long the end of a stage may take to empty its runner."""

HAND_OVER_SECONDS: Final = 1.0
"""How long the end of a stage may take to hand over what its sessions have computed."""

Send = Callable[[Iterable[Outgoing]], None]


class _Stage:
    __slots__ = ("core", "partings", "runner", "scope", "shelf", "wake")

    def __init__(self, core: StageCore, runner: StageRunner, shelf: KvShelf, send: Send) -> None:
        self.core = core
        self.runner = runner
        self.partings: list[Parting] = []
        """What it has to hand over at its end."""
        self.scope = trio.CancelScope()
        self.wake = trio.Event()
        self.shelf = ShelfWork(core, runner, shelf, send, self.rouse)

    def rouse(self) -> None:
        """Wake the task that feeds the runner."""
        self.wake.set()

    def look(self) -> None:
        """See what has come of a frame or an event."""
        self.shelf.look()
        if self.core.has_work:
            self.rouse()


class StageService:
    """Serves the stages that this node holds.

    The owner calls :meth:`serve` once for each stage it has a runner for, and forwards frames and
    peer events.  ``links`` carries what the stages answer; ``shelf`` keeps their KV blocks.
    """

    def __init__(
        self,
        peer_id: PeerId,
        limits: StageLimits | None = None,
        shelf: KvShelf | None = None,
    ) -> None:
        self.refused: Counter[str] = Counter()
        """Frames of peers for stages that are not here, by the answer's code."""
        self._peer_id = peer_id
        self._limits = limits
        self._shelf = shelf
        self._stages: dict[tuple[Digest, int], _Stage] = {}
        self._wiping: dict[int, trio.Event] = {}
        """By the identity of runners: set when nothing is left in them."""
        self._leaving: set[_Stage] = set()
        """Stages that have stopped and not yet handed over what they hold."""
        self._left = trio.Event()
        """Set, and made anew, with every stage that is gone."""
        self._links: PipeLinks | None = None

    def attach(self, links: PipeLinks) -> None:
        """Say where to send; called once, before any frame comes in."""
        self._links = links

    async def serve(self, spec: StageSpec, runner: StageRunner) -> RunnerFailed:
        """Serve one stage until cancelled, or until its runner dies: then return why.

        The stage takes frames from the moment of the call.  However it ends, every session of it
        has been told.  A runner may serve one stage after the other: what an earlier one left in
        it is dropped first.  A stage that is still served for an earlier epoch of the rank, or
        with this runner, ends with this call.

        Raises :class:`Conflict` (``stale_epoch``) when the rank is served, or the runner used, at
        this epoch or a later one, and when a later call ended this one.
        """
        key = (spec.model, spec.rank)
        known = self._stages.get(key)
        before = [s for s in self._stages.values() if s is known or s.runner is runner]
        for other in before:
            epoch = other.core.spec.epoch
            if epoch >= spec.epoch:
                raise Conflict(
                    f"Rank {other.core.spec.rank} is served at epoch {epoch} already.",
                    code="stale_epoch",
                    epoch=epoch,
                    frame_epoch=spec.epoch,
                )
        for other in before:
            self._supersede(other)
        info = runner.info
        cells = info.kv_codec if self._shelf is not None else ""
        core = StageCore(
            spec,
            self._limits,
            info.joint_shapes,
            cells,
            info.prefill_cut,
            kv_shape=info.kv_shape,
            exactness=info.exactness,
            prunes=info.prunes,
            cell_bytes=info.kv_bytes_per_token,
            trained=info.n_ctx_train,
        )
        stage = _Stage(core, runner, self._shelf or NullShelf(), self._send)
        self._stages[key] = stage
        failure: RunnerFailed | None = None

        def fail(error: RunnerFailed) -> None:
            nonlocal failure
            failure = failure or error
            stage.scope.cancel()

        try:
            with stage.scope:
                async with trio.open_nursery() as nursery:
                    stage.shelf.start(nursery)
                    nursery.start_soon(self._watch, runner, fail)
                    nursery.start_soon(self._expire, stage)
                    nursery.start_soon(self._feed, stage, fail)
            if failure is None:
                raise _ended(spec)
            return failure
        finally:
            if self._stages.get(key) is stage:
                del self._stages[key]
            stage.shelf.stop()
            self._leave(stage, failure or _ended(spec))
            await self._hand_over(stage)
            if not any(other.runner is runner for other in self._stages.values()):
                await self._wipe(runner)

    async def _wipe(self, runner: StageRunner) -> None:
        """Drop what a runner holds that serves no stage any more, and may go on as a standby.

        Nothing else uses it meanwhile (see :meth:`_feed`).  Where that takes too long, as in a
        runner that hangs, it is dropped when the runner serves again.
        """
        if runner.failed.is_set() or id(runner) in self._wiping:
            return
        done = self._wiping[id(runner)] = trio.Event()
        try:
            with trio.move_on_after(WIPE_SECONDS, shield=True):
                await runner.apply([ResetSequences()])
        except PyAgentError as error:
            logger.debug("a runner was not wiped, it is going: %s", error)
        finally:
            del self._wiping[id(runner)]
            done.set()

    def _supersede(self, stage: _Stage) -> None:
        """End a stage before anything else can use its runner.

        Stopped, its core gives out no more work; a decode in progress is answered to nobody.
        """
        self._leave(stage, _ended(stage.core.spec))
        stage.scope.cancel()

    def _leave(self, stage: _Stage, why: PyAgentError) -> None:
        """Stop a stage; unless its runner is gone, its sessions' last cells are handed over."""
        if not stage.core.stopped and not isinstance(why, RunnerFailed):
            stage.partings = stage.core.partings()
        self._leaving.add(stage)
        self._send(stage.core.stop(why))
        stage.look()

    async def _hand_over(self, stage: _Stage) -> None:
        """Hand over what the next ranks need, before anything else is done with the runner."""
        try:
            if stage.partings and not stage.runner.failed.is_set():
                with trio.move_on_after(HAND_OVER_SECONDS, shield=True):
                    await stage.shelf.hand_over(stage.partings)
        finally:
            self._leaving.discard(stage)
            self._left.set()
            self._left = trio.Event()

    async def moved_on(self, model: Digest, epoch: int) -> None:
        """Wait until no stage of an epoch before ``epoch`` has anything to hand over here."""
        while any(
            stage.core.spec.model == model and stage.core.spec.epoch < epoch
            for stage in (*self._stages.values(), *self._leaving)
        ):
            await self._left.wait()

    # ---- frames and events -----------------------------------------------------------------

    def receive(self, sender: PeerId, message: PipeMessage, tail: Tail) -> None:
        """Take a frame that is addressed to one of our stages."""
        if isinstance(message, StageError):
            self._relay(sender, message)
            return
        stage = self._stages.get((message.model, message.rank))
        if stage is None:
            self._no_stage(sender, message)
            return
        core = stage.core
        out = core.receive(sender, message, tail, trio.current_time())
        if isinstance(message, CloseSession) and core.spec.downstream and self._links:
            self._links.forget(core.spec.downstream, message.session)
        if out:
            self._send(out)
        stage.look()

    def peer_down(self, peer: PeerId) -> None:
        """End the sessions that relied on ``peer``."""
        for stage in list(self._stages.values()):
            self._send(stage.core.peer_down(peer))
            stage.look()

    def link_lost(self, peer: PeerId, *, control: bool) -> None:
        """End the sessions whose frames to ``peer`` may be lost."""
        for stage in list(self._stages.values()):
            self._send(stage.core.link_lost(peer, control=control))
            stage.look()

    def _relay(self, sender: PeerId, message: StageError) -> None:
        for stage in list(self._stages.values()):
            if stage.core.spec.model == message.model and stage.core.holds(message.session):
                self._send(stage.core.receive(sender, message, b"", trio.current_time()))
                stage.look()

    def _no_stage(self, sender: PeerId, message: PipeMessage) -> None:
        if not isinstance(message, OpenSession | Step):
            return
        error = Unavailable(
            f"Rank {message.rank} is not loaded on this node now.",
            code="stage_not_ready",
            remedy="It may be starting; ask again in a moment.",
            rank=message.rank,
            peer_id=self._peer_id,
        )
        self.refused[error.code] += 1
        to = message.head if isinstance(message, OpenSession) else sender
        refusal = StageError(
            message.session,
            message.model,
            message.epoch,
            message.rank,
            self._peer_id,
            error.to_info(),
        )
        self._send([Outgoing(to, refusal)])

    # ---- views -----------------------------------------------------------------------------

    def views(self) -> list[StageView]:
        """Return the load of every stage."""
        return [
            msgspec.structs.replace(stage.core.view(), kept=stage.shelf.kept)
            for stage in self._stages.values()
        ]

    def sessions(self) -> list[StageSession]:
        """Return the sessions of every stage."""
        return [s for stage in self._stages.values() for s in stage.core.sessions()]

    # ---- tasks -----------------------------------------------------------------------------

    async def _feed(self, stage: _Stage, fail: Callable[[RunnerFailed], None]) -> None:
        core, runner = stage.core, stage.runner
        try:
            while any(other.runner is runner for other in self._leaving):
                await self._left.wait()
            while (wiping := self._wiping.get(id(runner))) is not None:
                await wiping.wait()
            await runner.apply([ResetSequences()])
            while True:
                await self._prune(core, runner)
                batch = core.next_batch()
                if batch is None and not stage.shelf.due:
                    stage.wake = trio.Event()
                    await stage.wake.wait()
                    continue
                began = trio.current_time()
                if batch is not None and batch.ops:
                    batch = await self._apply(core, runner, batch)
                if batch is not None and batch.cells and not core.stopped:
                    batch = await self._fill(core, runner, batch)
                if batch is not None and batch.inputs and not core.stopped:
                    await self._compute(core, runner, batch)
                    stage.look()
                if stage.shelf.due:
                    seconds = trio.current_time() - began
                    await stage.shelf.turn(seconds, idle=not core.has_work)
        except RunnerFailed as error:
            fail(error)
        except PyAgentError as error:
            logger.error("rank %d: the runner refused an operation: %s", core.spec.rank, error)
            fail(RunnerFailed(str(error), code="runner_protocol", reason=error.code))

    async def _prune(self, core: StageCore, runner: StageRunner) -> None:
        """Give up cells of the sessions whose turn that is."""
        while not core.stopped and (turn := core.pruning.next_turn()) is not None:
            await self._prune_one(core, runner, turn)

    async def _prune_one(self, core: StageCore, runner: StageRunner, turn: PruneTurn) -> None:
        try:
            found = await runner.attention(turn.seq)
        except RunnerFailed:
            raise
        except PyAgentError as error:
            logger.warning("rank %d: a session was not pruned: %s", core.spec.rank, error)
            core.pruning.refused(turn)
            return
        # what becomes of the session meanwhile is done to its slot behind this
        ops = core.pruning.plan(turn, found)
        if not ops:
            return
        try:
            await runner.apply(ops)
        except RunnerFailed:
            raise
        except PyAgentError as error:  # nobody knows which of its cells are there
            logger.warning("rank %d: pruning failed, no more of it: %s", core.spec.rank, error)
            core.pruning.failed()
            self._send(core.lost(turn.session, not_pruned(error)))

    async def _apply(self, core: StageCore, runner: StageRunner, batch: Batch) -> Batch | None:
        """Carry out the operations of a batch; returns what is left of the batch after that."""
        try:
            await runner.apply(batch.ops)
        except Conflict as error:
            if error.code != PRUNED:
                raise
            # operations on the slots of others come first and were carried out
            logger.warning("rank %d: a step goes back too far: %s", core.spec.rank, error)
            self._send(core.abandoned(batch, error))
            return None
        return batch

    async def _fill(self, core: StageCore, runner: StageRunner, batch: Batch) -> Batch:
        """Put cells of pieces into their slots; returns what is left of the batch after that."""
        for seq, kv, tokens in batch.cells:
            try:
                await runner.import_kv(seq, kv, tokens)
            except RunnerFailed:
                raise
            except PyAgentError as error:
                logger.warning("rank %d: cells of a piece were refused: %s", core.spec.rank, error)
                gone = batch.only(seq)
                batch = batch.without(seq)
                self._send(core.abandoned(gone, not_joined(error)))
        return batch

    async def _compute(self, core: StageCore, runner: StageRunner, batch: Batch) -> None:
        start = trio.current_time()
        try:
            outputs = await runner.decode(batch.inputs)
        except RunnerFailed:
            raise
        except PyAgentError as error:
            if len(batch.work) > 1:  # one session's fault is not the others'
                for part in batch.apart():
                    if not core.stopped:
                        await self._compute(core, runner, part)
                return
            logger.warning("rank %d: the runner refused a batch: %s", core.spec.rank, error)
            # cells of a piece come beside the step, so there may be room for the step alone
            self._send(core.abandoned(batch, not_joined(error) if batch.cells else error))
            return
        now = trio.current_time()
        self._send(core.completed(batch, outputs, now - start, now))

    async def _watch(self, runner: StageRunner, fail: Callable[[RunnerFailed], None]) -> None:
        await runner.failed.wait()
        fail(runner.failure or RunnerFailed("The runner has died.", reason="unknown"))

    async def _expire(self, stage: _Stage) -> None:
        while True:
            await trio.sleep(EXPIRE_SECONDS)
            self._send(stage.core.expire(trio.current_time()))
            stage.look()

    def _send(self, out: Iterable[Outgoing]) -> None:
        links = self._links
        if links is not None:
            for peer, message, tail in out:
                links.send(peer, message, tail)


def _ended(spec: StageSpec) -> Conflict:
    return Conflict(
        f"The placement of epoch {spec.epoch} has ended.",
        code="stale_epoch",
        remedy="The model was unloaded or placed anew; ask again.",
        frame_epoch=spec.epoch,
    )
