"""One run of the simulator: a seed and a schedule in, an outcome out."""

from __future__ import annotations

import contextlib
import logging
import random
import time
import traceback
from collections.abc import Iterator
from pathlib import PurePath
from typing import Final

import msgspec
import trio

from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.faults import Schedule
from pyagent_node.simulations.injector import Injector
from pyagent_node.simulations.invariants import Invariant, all_invariants
from pyagent_node.simulations.invariants.secrets import NoSecrets
from pyagent_node.simulations.librarian import Librarian
from pyagent_node.simulations.observer import Observer
from pyagent_node.simulations.swarm import HEAL_SECONDS, Swarm, open_swarm
from pyagent_node.simulations.trace import Event, Trace
from pyagent_node.simulations.workload import Clerk, ask_last

LOOK_SECONDS: Final = 0.05
"""Virtual time between two looks at the invariants."""
ASK_SECONDS: Final = 3.0
"""Virtual time between two requests, on average."""
CALM_SECONDS: Final = 2.0
"""Time after everything was answered, in which what is left of it goes away."""

NO_ERROR_ESCAPES: Final = "no error escapes"
CRASH_FRAMES: Final = 6
"""Frames that are told of an error that escaped."""
MAX_DETAIL: Final = 300


class Found(msgspec.Struct, frozen=True):
    """A broken invariant: when (virtual seconds), which one, how."""

    time: float
    invariant: str
    detail: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run; equal ``trace_digest``, equal run."""

    seed: int
    nodes: int
    virtual_seconds: float
    wall_seconds: float
    events: int
    requests: int
    faults: int
    violations: tuple[Found, ...]
    trace_digest: str


class Run:
    """Runs once; :attr:`story` holds what happened last."""

    def __init__(self, seed: int, schedule: Schedule) -> None:
        self.seed = seed
        self.schedule = schedule
        self._invariants = all_invariants()
        self._start = self._virtual = 0.0
        self._trace = Trace(self._clock)
        self._observer = Observer(self._trace)
        self._found: list[Found] = []
        self._requests = 0

    @property
    def story(self) -> list[Event]:
        """The events of the run, the last :data:`~simulations.trace.KEPT` of them."""
        return list(self._trace.events)

    def play(self) -> Outcome:
        """Run to the end, or to the first broken invariant; an error that escapes breaks one."""
        began = time.perf_counter()
        try:
            with self._listening():
                run_deterministic(self._main, self.seed)
        except Exception as error:
            self._crashed(error)
        return Outcome(
            seed=self.seed,
            nodes=self.schedule.nodes,
            virtual_seconds=round(self._virtual, 3),
            wall_seconds=round(time.perf_counter() - began, 3),
            events=self._trace.count,
            requests=self._requests,
            faults=len(self.schedule.faults),
            violations=tuple(self._found),
            trace_digest=self._trace.digest,
        )

    def _clock(self) -> float:
        """Return virtual seconds since the beginning; the last known ones after the end."""
        with contextlib.suppress(RuntimeError):
            self._virtual = trio.current_time() - self._start
        return self._virtual

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Let the invariants and the observer hear what nodes log, and nobody else."""
        logger = logging.getLogger("pyagent_node")
        listeners: list[logging.Handler] = [self._observer.lines]
        listeners += [i.listener for i in self._invariants if isinstance(i, NoSecrets)]
        level, propagate = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        for listener in listeners:
            logger.addHandler(listener)
        try:
            yield
        finally:
            for listener in listeners:
                logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagate

    def _crashed(self, error: Exception) -> None:
        """Report an error that no node may let out."""
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        frames = traceback.extract_tb(first.__traceback__)[-CRASH_FRAMES:]
        for frame in frames:
            where = f"{PurePath(frame.filename).name}:{frame.lineno} in {frame.name}"
            self._trace.add(None, "crashed", f"{where}: {frame.line}")
        detail = f"{type(first).__name__}: {str(first)[:MAX_DETAIL]}"
        self._trace.add(None, "VIOLATION", f"{NO_ERROR_ESCAPES}: {detail}")
        self._found.append(Found(round(self._virtual, 3), NO_ERROR_ESCAPES, detail))

    async def _main(self) -> None:
        self._start = trio.current_time()
        async with open_swarm(self.seed, self._trace) as swarm:
            swarm.network.meter = self._observer.frames
            with trio.CancelScope() as scope:
                swarm.nursery.start_soon(self._watch, swarm, scope)
                await self._phases(swarm)
            self._clock()
            if swarm.violations:
                self._observer.tell_states(swarm)
            self._found = [
                Found(round(v.time - self._start, 3), v.invariant, v.detail)
                for v in swarm.violations
            ]
            self._requests = len(swarm.people)

    async def _watch(self, swarm: Swarm, scope: trio.CancelScope) -> None:
        """Look at everything for ever; a broken invariant ends the run."""
        while True:
            self._observer.look(swarm, self._clock())
            for invariant in self._invariants:
                for detail in invariant.check(swarm):
                    swarm.violation(invariant.name, detail)
            if swarm.violations:
                scope.cancel()
                return
            await trio.sleep(LOOK_SECONDS)

    async def _phases(self, swarm: Swarm) -> None:
        await self._form(swarm)
        swarm.trace.add(None, "phase", "faults begin")
        injector = Injector(swarm)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(injector.keep_running)
            nursery.start_soon(self._ask, swarm)
            if swarm.librarian is not None:
                nursery.start_soon(swarm.librarian.run)
            await injector.run(self.schedule)
            nursery.cancel_scope.cancel()
        swarm.trace.add(None, "phase", "everything is mended")
        await injector.mend()
        await self._heal(swarm)

    async def _form(self, swarm: Swarm) -> None:
        """Bring the swarm to where faults begin."""
        await swarm.form(self.schedule.nodes)
        clerk = Clerk(swarm, random.Random(swarm.rng.random()))  # noqa: S311 - must repeat itself
        swarm.nursery.start_soon(clerk.run)
        if self.schedule.contexts:
            books = random.Random(f"librarian {self.seed}")  # noqa: S311 - must repeat itself
            swarm.librarian = Librarian(swarm, books)
            await swarm.librarian.open()

    async def _ask(self, swarm: Swarm) -> None:
        while True:
            swarm.ask()
            await trio.sleep(swarm.rng.expovariate(1 / ASK_SECONDS))

    async def _heal(self, swarm: Swarm) -> None:
        """Wait until nothing is wrong any more; what still is in the end is a violation."""
        with trio.move_on_after(HEAL_SECONDS):
            waited = ""
            while wrong := _wrong(self._invariants, swarm):
                waited = ", which waited last for {}: {}".format(*wrong[0])
                await trio.sleep(1.0)
            # the last question has only what is left of the time: the story must say who took it
            swarm.trace.add(None, "phase", f"everything is whole{waited}")
            await ask_last(swarm)
            if swarm.librarian is not None:
                await swarm.librarian.ask_last()
            await trio.sleep(CALM_SECONDS)
        for name, detail in list(_wrong(self._invariants, swarm)):
            swarm.violation(name, detail)


def _wrong(invariants: list[Invariant], swarm: Swarm) -> list[tuple[str, str]]:
    return [(i.name, detail) for i in invariants for detail in i.check_healed(swarm)]
