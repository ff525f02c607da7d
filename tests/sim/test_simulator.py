"""The gate: whole swarms under faults, the same seeds every time and fresh ones besides.

A failure prints its story and the command that replays it.  The fresh seeds are printed in any case
(``pytest -rP`` shows them), so that none is lost.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from pyagent_node.simulations.draws import MIXES
from pyagent_node.simulations.fault_kinds import Pause
from pyagent_node.simulations.faults import Schedule, draw_schedule
from pyagent_node.simulations.jobs import Job, Verdict
from pyagent_node.simulations.pool import play_all

NODES, SECONDS = 7, 30.0
WORKERS = 2
FIXED = dict.fromkeys(MIXES, (1,)) | {"standard": tuple(range(8)), "contexts": (1, 110)}
"""Always these, of each mix."""
FRESH = dict.fromkeys(MIXES, 1) | {"standard": 6}
"""So many more, new in each run."""


def _job(seed: int, mix: str) -> Job:
    return Job(seed, draw_schedule(seed, nodes=NODES, duration=SECONDS, mix=mix))


def _told(job: Job, mix: str, verdict: Verdict) -> str:
    """Return all that is needed to see a failure again."""
    broken = "\n".join(f"  {v.invariant}: {v.detail}" for v in verdict.outcome.violations)
    story = "\n".join(f"  {line}" for line in verdict.story)
    command = f"pyagent-node simulate --seed {job.seed} --faults {mix}"
    return f"\nseed {job.seed}, mix {mix}:\n{broken}\n{story}\nreplay: {command}\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fixed_and_fresh_seeds_break_nothing() -> None:
    fixed = [(seed, mix) for mix, some in FIXED.items() for seed in some]
    fresh = [(secrets.randbits(32), mix) for mix, count in FRESH.items() for _ in range(count)]
    print("fresh seeds:", ", ".join(f"{seed} ({mix})" for seed, mix in fresh))
    work = [(_job(seed, mix), mix) for seed, mix in (*fixed, *fresh)]
    verdicts: list[tuple[Job, Verdict]] = []
    play_all(
        [job for job, _ in work],
        workers=WORKERS,
        done=lambda job, verdict: verdicts.append((job, verdict)),
    )
    assert len(verdicts) == len(work)
    mixes = {(job.seed, job.schedule): mix for job, mix in work}
    failed = [
        _told(job, mixes[job.seed, job.schedule], verdict)
        for job, verdict in verdicts
        if verdict.failed
    ]
    if failed:
        pytest.fail(f"{len(failed)} of {len(work)} seeds failed\n{''.join(failed)}", pytrace=False)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Everything that is started meanwhile runs on one core."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no process to a core")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def _traces(jobs: list[Job]) -> list[tuple[str, tuple[str, ...]]]:
    verdicts: list[Verdict] = []
    play_all(jobs, workers=len(jobs), done=lambda _, verdict: verdicts.append(verdict))
    return [(verdict.outcome.trace_digest, verdict.trace) for verdict in verdicts]


@pytest.mark.slow
def test_a_seed_is_the_same_run_alone_crowded_on_one_core_and_under_another_hash_seed(
    one_core: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(3, draw_schedule(3, nodes=NODES, duration=12.0), trace=True)
    [(digest, trace)] = _traces([job])
    assert len(digest) == 64
    assert len(trace) > 100
    monkeypatch.setenv("PYTHONHASHSEED", "4711")
    for other, events in _traces([job] * 3):
        different = [pair for pair in zip(trace, events, strict=False) if pair[0] != pair[1]]
        assert not different, f"they part here: {different[0]}"
        assert (other, len(events)) == (digest, len(trace))


@pytest.mark.slow
def test_what_differs_in_a_run_shows_in_its_digest() -> None:
    schedule = Schedule(3, 2.0, (Pause(1.0, 0.3, 1),))
    later = Schedule(3, 2.0, (Pause(1.0, 0.301, 1),))
    digests = {
        digest
        for job in (Job(1, schedule), Job(1, later), Job(2, schedule))
        for digest, _ in _traces([job])
    }
    assert len(digests) == 3
