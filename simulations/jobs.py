"""One seed as a job for a process of its own, and what that process answers."""

from __future__ import annotations

from typing import Final

import msgspec

from pyagent_node.simulations.faults import Schedule
from pyagent_node.simulations.run import Found, Outcome, Run
from pyagent_node.simulations.story import tell

UNFINISHED: Final = "the run ends"
"""What is broken when a worker died, hung or answered nonsense: said by whoever waited for it."""


class Job(msgspec.Struct, frozen=True):
    """Run ``seed`` under ``schedule``; ``trace`` asks for every event of it."""

    seed: int
    schedule: Schedule
    trace: bool = False


class Verdict(msgspec.Struct, frozen=True):
    """What became of a job: the outcome, the story of a failure, the trace if it was wanted."""

    outcome: Outcome
    story: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether anything was broken."""
        return bool(self.outcome.violations)

    @property
    def broken(self) -> frozenset[str]:
        """The names of the broken invariants."""
        return frozenset(found.invariant for found in self.outcome.violations)


def do(job: Job) -> Verdict:
    """Run a job in this process."""
    run = Run(job.seed, job.schedule)
    outcome = run.play()
    return Verdict(
        outcome,
        tuple(tell(run.story)),
        tuple(str(event) for event in run.story) if job.trace else (),
    )


def unfinished(job: Job, why: str, wall_seconds: float, said: str = "") -> Verdict:
    """Return the verdict on a job whose worker gave none; ``said`` is what it wrote last."""
    outcome = Outcome(
        seed=job.seed,
        nodes=job.schedule.nodes,
        virtual_seconds=0.0,
        wall_seconds=round(wall_seconds, 3),
        events=0,
        requests=0,
        faults=len(job.schedule.faults),
        violations=(Found(0.0, UNFINISHED, why),),
        trace_digest="",
    )
    lines = [line for line in said.splitlines() if line.strip()]
    return Verdict(outcome, ("The worker wrote last:", *lines[-20:]) if lines else ())
