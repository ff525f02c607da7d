"""What slices on this node were measured to do, kept over restarts; the planner is told of it.

The first slice of a model that is loaded with a backend and a number of threads is measured by a
short run, and so is the first with the output head.  Real sessions then correct that: once they
have computed enough, the median of what they took is what counts.  A record is kept by (model,
backend, threads, slice) in one small file of the home; a damaged one is left aside, since all of it
can be measured again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.call_times import CallTimes
from pyagent_node.inference.machine import MeasuredSpeed
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.pipeline.plan_types import (
    Work,
)
from pyagent_node.inference.slice_speed import Measurable, SliceTimes, measure_slice
from pyagent_node.node.planning import planner_shape
from pyagent_node.node.speed_records import MAX_RECORDS, SpeedFile, SpeedRecord, read_speeds

logger = logging.getLogger("pyagent_node.placements")

MAX_PUBLISHED: Final = 8
"""Speeds that are told of one model."""
SAVE_SECONDS: Final = 60.0
"""What sessions show is written so often at most."""
CLOSE_SECONDS: Final = 2.0
"""Longest time to write when a slice is closed."""


class Measured(Measurable, Protocol):
    """A runner that tells how long its computations take."""

    @property
    def times(self) -> CallTimes:
        """The latest of them."""
        ...


class _Live(NamedTuple):
    """A loaded slice: its record before its sessions began, and what they take since."""

    record: SpeedRecord
    work: Work
    times: CallTimes


class SpeedBook:
    """The records of this node; without a ``path`` they are forgotten when it ends."""

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._records = read_speeds(path) if path is not None else {}
        self._live: list[_Live] = []
        self._dirty = False
        self._saved = clock()

    # ---- what is told --------------------------------------------------------------------------

    def speeds(self, model: Digest, threads: int) -> tuple[MeasuredSpeed, ...]:
        """Return what was measured of a model with so many threads, else of other models."""
        self._refresh()
        fitting = [each for each in self._records.values() if each.threads == threads]
        fitting.sort(key=lambda each: (-each.at, each.key))
        own = [each for each in fitting if each.model == model]
        backends = {each.backend for each in own}
        others = [each for each in fitting if each.backend not in backends]
        return tuple(
            MeasuredSpeed(
                backend=each.backend,
                threads=each.threads,
                decode=each.decode,
                prefill=each.prefill,
                head=each.head,
                source=each.source if each.model == model else "others",
                slice=each.slice,
            )
            for each in (*own[:MAX_PUBLISHED], *others[:MAX_PUBLISHED])
        )

    # ---- what is noted -------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def following(
        self, model: Digest, part: Slice, path: Path, runner: Measured
    ) -> AsyncIterator[None]:
        """Measure a fresh slice of a file unless that was done before, and follow its sessions.

        Raises what the runner raises when it fails.
        """
        try:
            shape = planner_shape(await trio.to_thread.run_sync(read_header, path), "")
        except PyAgentError as error:
            logger.info("the speed of layers %s is not measured: %s", part, error)
            yield
            return
        # a slice's own file has its layers only, counted from 0
        own = shape.n_layers <= part.last - part.first
        work = shape.work(Slice(0, shape.n_layers, part.head) if own else part)
        async with self.followed(model, part, work, runner):
            yield

    @contextlib.asynccontextmanager
    async def followed(
        self, model: Digest, part: Slice, work: Work, runner: Measured
    ) -> AsyncIterator[None]:
        """Do so for a slice of which a token takes so much ``work``."""
        live = await self._known(model, part, work, runner)
        self._live.append(live)
        try:
            yield
        finally:
            self._refresh()
            self._live.remove(live)
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await self.save()

    async def _known(self, model: Digest, part: Slice, work: Work, runner: Measured) -> _Live:
        info = runner.info
        record = SpeedRecord(
            model, info.backend, info.version, info.threads, part, 0.0, 0.0, 0.0, "loading", 0.0
        )
        known = self._records.get(record.key) or self._sibling(record)
        if known is None or known.version != info.version:
            times = await measure_slice(runner)
            runner.times.clear()
            known = msgspec.structs.replace(
                record,
                decode=work.bytes / times.layers,
                head=_head_speed(work, times),
                prefill=work.flops / times.prompt if times.prompt else 0.0,
                at=self._clock(),
            )
            self._note(known)
            await self.save()
        return _Live(msgspec.structs.replace(known, slice=part), work, runner.times)

    def _sibling(self, record: SpeedRecord) -> SpeedRecord | None:
        """Return what another slice of the model showed: nobody shall wait for the same twice."""
        found = [
            each
            for each in self._records.values()
            if (each.model, each.backend, each.version, each.threads)
            == (record.model, record.backend, record.version, record.threads)
            and (each.head > 0 or not record.slice.head)
        ]
        return max(found, key=lambda each: (each.at, each.key), default=None)

    def _note(self, record: SpeedRecord) -> None:
        self._records[record.key] = record
        self._dirty = True
        while len(self._records) > MAX_RECORDS:
            oldest = min(self._records.values(), key=lambda each: (each.at, each.key))
            del self._records[oldest.key]

    def _refresh(self) -> None:
        """Take over what sessions have shown since."""
        for live in self._live:
            token, prompt = live.times.token_seconds, live.times.prompt_seconds
            if token is None:
                continue
            base, work = live.record, live.work
            expected = work.bytes / base.decode + (work.head_bytes / base.head if base.head else 0)
            slower = token / expected
            now = msgspec.structs.replace(
                base,
                decode=base.decode / slower,
                head=base.head / slower,
                prefill=work.flops / prompt if prompt else base.prefill,
                source="sessions",
                at=self._clock(),
            )
            if not _same(self._records.get(base.key), now):
                self._note(now)

    # ---- the file --------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Write what is new, if that is some time ago."""
        if self._clock() - self._saved >= SAVE_SECONDS:
            await self.save()

    async def save(self) -> None:
        """Write what is new; a disk that refuses costs a later measurement only."""
        if not self._dirty or self._path is None:
            return
        records = sorted(self._records.values(), key=lambda each: each.key)
        data = msgspec.json.format(msgspec.json.encode(SpeedFile(1, records)), indent=1)
        self._dirty, self._saved = False, self._clock()
        try:
            await trio.to_thread.run_sync(write_atomic, self._path, data + b"\n")
        except (OSError, PyAgentError) as error:
            logger.warning("what slices were measured to do was not kept: %s", error)


def _same(one: SpeedRecord | None, other: SpeedRecord) -> bool:
    return one is not None and msgspec.structs.replace(one, at=other.at) == other


def _head_speed(work: Work, times: SliceTimes) -> float:
    """Return the bytes a second of the output head, 0 where that did not show."""
    seconds = times.token - times.layers
    return work.head_bytes / seconds if work.head_bytes and seconds > 0 else 0.0
