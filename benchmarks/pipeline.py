"""The pipeline benchmark: a model split over real daemons against a plain loop in one process.

Both arms answer the same prompt greedily and take turns in every round, so that a change of the
machine's speed hits both.  A token's time splits into what the ranks computed (with the pipe to
their runner processes), what lay between (network, queues, frames: the overhead of the hops), and
what the head did between two steps (sampling's result, text, the next embedding, the reply to the
client).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import msgspec
import psutil

from pyagent_node.base.errors import CorruptData
from pyagent_node.benchmarks.single import Job, SingleAnswer, SingleProcess
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.client import Client

Say = Callable[[str], None]


UNSTEADY = 1.25
"""A spread of the baseline above which ratios are not to be trusted."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured; one round is one answer of each arm.

    ``baseline_threads`` 0 means llama-cpp-python's own default.
    """

    path: str
    prompt: str
    tokens: int
    rounds: int
    n_ctx: int
    baseline_threads: int = 0


class Quantiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p99: float
    mean: float


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One number of ranks.  ``ratio`` is the median of pipeline over baseline in one round.

    All times are of one token: ``step_ms`` from the head's sending to its having the result,
    ``compute_ms`` the sum over ranks, ``hop_ms`` the rest of the step divided by the ranks,
    ``head_ms`` what passes between steps (a mean).
    """

    ranks: int
    layers: tuple[tuple[int, int], ...]
    tokens_per_second: float
    baseline_tokens_per_second: float
    ratio: float
    ttft_seconds: float
    identical: bool
    step_ms: Quantiles
    compute_ms: Quantiles
    hop_ms: Quantiles
    head_ms: float
    runs: tuple[float, ...]
    baseline_runs: tuple[float, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark, as it is printed and stored."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    tokens: int
    rounds: int
    baseline_threads: int
    idle_daemon_bytes: int
    arms: tuple[Arm, ...]

    @property
    def baseline_spread(self) -> float:
        """The fastest run of the single process over its slowest; near 1 on a quiet machine."""
        runs = [run for arm in self.arms for run in arm.baseline_runs]
        return max(runs) / max(min(runs), 1e-9)


class _Run(msgspec.Struct, frozen=True):
    answer: Answer
    steps: tuple[float, ...]
    computes: tuple[float, ...]


def resident_bytes(node: LocalNode) -> int:
    """Return the resident memory of a daemon with its child processes."""
    process = psutil.Process(node.pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def measure(
    plan: Plan, ranks: int, client: Client, model: str, single: SingleProcess, *, say: Say
) -> Arm:
    """Measure one placement that is loaded now against the single process."""
    pipeline: list[_Run] = []
    baseline: list[SingleAnswer] = []
    for turn in range(plan.rounds + 1):
        alone = single.generate(
            Job(
                path=plan.path,
                prompt=plan.prompt,
                max_tokens=plan.tokens,
                seed=0,
                temperature=0.0,
                n_ctx=plan.n_ctx,
                threads=plan.baseline_threads,
                ignore_eos=True,
            )
        )
        split = _ask(plan, client, model)
        say(
            f"  {ranks} ranks, {'warm-up' if turn == 0 else f'round {turn}'}:"
            f" {split.answer.tokens_per_second:.1f} tokens/s,"
            f" one process {alone.tokens_per_second:.1f}"
        )
        if turn > 0:  # the first warms caches and clocks
            baseline.append(alone)
            pipeline.append(split)
    return summarise(ranks, pipeline, baseline)


def _ask(plan: Plan, client: Client, model: str) -> _Run:
    from pyagent_node.inference.generation import (  # noqa: PLC0415
        NO_SPECULATION,
        ChatMessage,
    )

    ask = Ask(
        model=model,
        messages=(ChatMessage("user", plan.prompt),),
        max_tokens=plan.tokens,
        temperature=0.0,
        seed=0,
        ignore_eos=True,
        speculation=NO_SPECULATION,
    )
    steps: list[float] = []
    computes: list[float] = []
    answer: Answer | None = None
    for item in client.generate(ask):
        if isinstance(item, Answer):
            answer = item
        else:
            steps += item.step_seconds
            computes += item.compute_seconds
    if answer is None or len(steps) != answer.completion_tokens:
        raise CorruptData("The daemon did not tell the time of every token.", code="bad_answer")
    return _Run(answer, tuple(steps[1:]), tuple(computes[1:]))  # the first took the prompt's time


def summarise(ranks: int, pipeline: Sequence[_Run], baseline: Sequence[SingleAnswer]) -> Arm:
    """Reduce the rounds of one arm to its figures."""
    steps = [s for run in pipeline for s in run.steps]
    computes = [c for run in pipeline for c in run.computes]
    hops = [(s - c) / ranks for s, c in zip(steps, computes, strict=True)]
    tokens = sum(run.answer.completion_tokens - 1 for run in pipeline)
    decoding = sum(run.answer.seconds - run.answer.ttft_seconds for run in pipeline)
    runs = [run.answer.tokens_per_second for run in pipeline]
    alone = [run.tokens_per_second for run in baseline]
    return Arm(
        ranks=ranks,
        layers=tuple(
            (rank.slice.first, rank.slice.last) for rank in pipeline[0].answer.placement.ranks
        ),
        tokens_per_second=_rounded(statistics.median(runs)),
        baseline_tokens_per_second=_rounded(statistics.median(alone)),
        ratio=_rounded(statistics.median(a / b for a, b in zip(runs, alone, strict=True))),
        ttft_seconds=_rounded(statistics.median(run.answer.ttft_seconds for run in pipeline)),
        identical=all(
            run.answer.token_ids == one.token_ids
            for run, one in zip(pipeline, baseline, strict=True)
        ),
        step_ms=quantiles(steps),
        compute_ms=quantiles(computes),
        hop_ms=quantiles(hops),
        head_ms=_rounded(1000 * (decoding - sum(steps)) / max(1, tokens)),
        runs=tuple(map(_rounded, runs)),
        baseline_runs=tuple(map(_rounded, alone)),
    )


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Return nearest-rank quantiles of times, in milliseconds; zeros for no times at all."""
    if not seconds:
        return Quantiles(0.0, 0.0, 0.0)
    ordered = sorted(seconds)

    def at(part: float) -> float:
        return _rounded(1000 * ordered[max(0, math.ceil(part * len(ordered)) - 1)])

    return Quantiles(at(0.5), at(0.99), _rounded(1000 * statistics.fmean(ordered)))


def _rounded(value: float) -> float:
    return round(value, 4)
