"""What a stage does for its blocks between two batches: the shell around ``stage_blocks``.

The runner is used by one task alone, the stage's; so that task asks :meth:`ShelfWork.turn` after
each batch, and imports and exports are done there, a little at a time.  Loads, which wait for disks
and peers, have tasks of their own and never keep the runner waiting.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError, RunnerFailed
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.chunks import moved_to
from pyagent_node.inference.kv.port import KvShelf, SettledBlock
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.inference.pipeline.landmark_work import LandmarkWork
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_blocks import Harvest, Import, Load, Parting
from pyagent_node.inference.pipeline.stage_joins import JoinLoad
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

logger = logging.getLogger("pyagent_node.pipeline")

LOAD_SECONDS: Final = 15.0
"""How long the blocks of one session may be loaded before it begins without them."""
REST_SECONDS: Final = 1.0
"""How long a rank waits for what the ranks of before hand over."""
PIECES_AT_ONCE: Final = 4
"""Pieces of one session that are loaded at the same time."""
TURN_BLOCKS: Final = 8
"""Blocks that are exported between two batches at most."""
TURN_SHARE: Final = 0.1
"""While steps wait, exports take so much of a batch's time, but never less than a block."""
_SMOOTHING: Final = 0.2


class _Job:
    __slots__ = ("done", "good", "what")

    def __init__(self, what: Import) -> None:
        self.what = what
        self.good = False
        self.done = trio.Event()


class ShelfWork:
    """The blocks of one stage: loads, imports and exports.

    ``send`` sends what the core answers; ``wake`` wakes the task that calls :meth:`turn`.
    """

    def __init__(
        self,
        core: StageCore,
        runner: StageRunner,
        shelf: KvShelf,
        send: Callable[[Iterable[Outgoing]], None],
        wake: Callable[[], None],
    ) -> None:
        self.kept = 0
        """Blocks that were given to the shelf."""
        self._core = core
        self._runner = runner
        self._shelf = shelf
        self._send = send
        self._wake = wake
        self._landmarks = LandmarkWork(core, runner, shelf)
        self._nursery: trio.Nursery | None = None
        self._jobs: deque[_Job] = deque()
        self._pace = 0.0

    def start(self, nursery: trio.Nursery) -> None:
        """Run loads in ``nursery`` from now on."""
        self._nursery = nursery

    def stop(self) -> None:
        """Begin no more loads."""
        self._nursery = None

    def look(self) -> None:
        """Begin the loads that are due, and tell the shelf of sessions that ended."""
        blocks = self._core.blocks
        for session in (*blocks.take_ended(), *self._core.landmarks.take_ended()):
            self._shelf.ended(session)
        if self._nursery is None:
            return
        if blocks.restoring:
            for load in blocks.take_loads():
                self._nursery.start_soon(self._load, load)
        if self._core.joins.waiting:
            for join in self._core.joins.take_loads():
                self._nursery.start_soon(self._join, join)

    @property
    def due(self) -> bool:
        """Whether :meth:`turn` has something to do."""
        core = self._core
        makes = core.blocks.has_harvest or core.landmarks.has_turn
        return not core.stopped and (bool(self._jobs) or makes)

    async def turn(self, seconds: float, *, idle: bool) -> None:
        """Do some of what is due, after a batch of ``seconds``; ``idle``: no step waits."""
        await trio.lowlevel.checkpoint()
        if self._jobs:
            await self._import(self._jobs.popleft())
            return
        spare = int(seconds * TURN_SHARE / self._pace) if self._pace else TURN_BLOCKS
        most = TURN_BLOCKS if idle else min(max(1, spare), TURN_BLOCKS)
        harvest = self._core.blocks.next_harvest(most)
        if harvest is not None:
            await self._export(harvest)
            return
        turn = self._core.landmarks.next_turn()
        if turn is not None:
            await self._landmarks.make(turn)
            self._send(self._core.blocks.kept(turn.session))

    # ---- restore ---------------------------------------------------------------------------

    async def _load(self, load: Load) -> None:
        try:
            await self._restore(load)
        except Exception:  # a shelf's fault costs the blocks, nothing else
            logger.exception("the blocks of a session were not loaded")
        self._send(self._core.blocks.loaded(load))

    async def _restore(self, load: Load) -> None:
        """Load and import blocks, and what the ranks of before hand over behind them."""
        rest: list[KvRange] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._find_rest, load, rest)
            await self._restore_blocks(load)
        if rest and not load.whole:  # a block that was made last may have come since
            await self._restore_blocks(load)
        if rest and load.active and load.whole:
            found = self._core.blocks.rest_import(load, rest[0])
            if found is not None:
                await self._imported(found)

    async def _find_rest(self, load: Load, found: list[KvRange]) -> None:
        wanted = self._core.blocks.wanted_rest(load)
        if wanted is None:
            return
        try:
            with trio.move_on_after(REST_SECONDS):
                kv = await self._shelf.load_rest(wanted, load.held)
                if kv is not None:
                    found.append(kv)
        except Exception:  # a shelf's fault costs the rest, nothing else
            logger.exception("the rest of a session was not loaded")

    async def _restore_blocks(self, load: Load) -> None:
        blocks = self._core.blocks
        deadline = trio.current_time() + LOAD_SECONDS
        while load.active:
            wanted = blocks.wanted(load)
            if wanted.skip >= len(wanted.chain):
                return
            found: list[KvRange] = []
            with trio.move_on_at(deadline):
                found = await self._shelf.load(wanted)
            for what in blocks.imports(load, found):
                if not await self._imported(what):
                    return
            if load.blocks < wanted.skip + wanted.limit:
                return

    async def _imported(self, what: Import) -> bool:
        """Have cells imported between two batches; returns whether they are in their slot."""
        job = _Job(what)
        self._jobs.append(job)
        self._wake()
        await job.done.wait()
        return job.good

    async def _import(self, job: _Job) -> None:
        core, what = self._core, job.what
        try:
            if what.load.active and not core.stopped:
                ops = core.take_ops()  # its slot may not be open yet
                if ops:
                    await self._runner.apply(ops)
                await self._runner.import_kv(what.load.seq, what.kv, what.tokens)
                core.blocks.imported(what)
                job.good = True
        except RunnerFailed:
            raise
        except PyAgentError as error:
            logger.warning("rank %d: blocks were refused: %s", core.spec.rank, error)
            core.not_imported(what)
        finally:
            job.done.set()

    # ---- the end of an epoch ---------------------------------------------------------------

    async def hand_over(self, partings: Sequence[Parting]) -> None:
        """Give the shelf what the ranks of the next epoch need of the sessions that were here.

        Nobody else uses the runner meanwhile.  What fails costs the cells, nothing else.
        """
        for seq, rest in partings:
            try:
                kv = await self._runner.export_kv(seq, rest.start, rest.start + len(rest.links))
            except RunnerFailed as error:
                logger.warning("the rests of sessions were not handed over: %s", error)
                return
            except PyAgentError as error:
                logger.warning("the rest of a session was not handed over: %s", error)
                continue
            self._shelf.hand_over(rest, kv)

    # ---- join ------------------------------------------------------------------------------

    async def _join(self, load: JoinLoad) -> None:
        limiter = trio.CapacityLimiter(PIECES_AT_ONCE)
        with trio.move_on_after(LOAD_SECONDS):
            async with trio.open_nursery() as nursery:
                for index in self._core.joins.fitting(load):
                    nursery.start_soon(self._piece, load, index, limiter)
        self._send(self._core.joins.loaded(load))

    async def _piece(self, load: JoinLoad, index: int, limiter: trio.CapacityLimiter) -> None:
        joins = self._core.joins
        async with limiter:
            try:
                whole = joins.wanted(load, index, 0, self._core.blocks.prefill_seconds)
                if await self._landmarks.take(load, index, whole):
                    return
                kv = joins.taken(load, index, await self._blocks(load, index))
                if kv is None or joins.shape is None:
                    return
                layers: list[LayerKv] = []
                for layer in moved_to(kv, load.gap(index).start, joins.shape):
                    layers.append(layer)
                    await trio.lowlevel.checkpoint()
                joins.moved(load, index, tuple(layers))
            except Exception:  # a shelf's fault costs the piece, nothing else
                joins.refused += 1
                logger.exception("the blocks of a piece were not loaded")

    async def _blocks(self, load: JoinLoad, index: int) -> list[KvRange]:
        """Return the leading blocks of a piece that can be had."""
        joins, pace = self._core.joins, self._core.blocks.prefill_seconds
        found: list[KvRange] = []
        while load.active:
            wanted = joins.wanted(load, index, len(found), pace)
            if len(found) >= len(wanted.chain):
                break
            more = await self._shelf.load(wanted)
            if not more:
                break
            found += more
        return found

    # ---- harvest ---------------------------------------------------------------------------

    async def _export(self, harvest: Harvest) -> None:
        await self._show(harvest)
        self._send(self._core.blocks.exported(harvest))

    async def _show(self, harvest: Harvest) -> None:
        wanted = [self._shelf.wants(block) for block in harvest.blocks]
        entries = zip(harvest.blocks, harvest.seconds, wanted, strict=True)
        run: list[tuple[SettledBlock, float]] = []
        for block, seconds, wants in entries:
            if wants:
                run.append((block, seconds))
            elif run:
                await self._keep(harvest, run)
                run = []
        if run:
            await self._keep(harvest, run)

    async def _keep(self, harvest: Harvest, run: list[tuple[SettledBlock, float]]) -> None:
        """Export blocks that follow on each other, and give them to the shelf."""
        began = trio.current_time()
        start = run[0][0].index * BLOCK_TOKENS
        stop = (run[-1][0].index + 1) * BLOCK_TOKENS
        session = harvest.session
        if session.closed or self._core.stopped:
            return
        try:
            kv = await self._runner.export_kv(harvest.seq, start, stop)
        except RunnerFailed:
            raise
        except PyAgentError as error:
            logger.warning("rank %d: blocks were not exported: %s", self._core.spec.rank, error)
            return
        each = (trio.current_time() - began) / len(run)
        self._pace += _SMOOTHING * (each - self._pace) if self._pace else each
        if not self._core.holds(session.id):
            return
        for block, seconds in run:
            at = block.index * BLOCK_TOKENS
            self._shelf.keep(block, part_of(kv, at, at + BLOCK_TOKENS), seconds)
            self.kept += 1
