"""The edge-cloud benchmark: one strong node computes, its clients are a slow path away.

A row is a number of clients that ask at once.  Its arms take turns, with the same texts and seeds:

* ``server``: the strong node is the head and streams its own tokens; the clients read them over
  the slow path, which a token pays once and not each.  The honest baseline.
* ``edge``: the clients' own node is the head, nobody guesses: every token costs a trip.
* a drafter's name: the clients' own node is the head and guesses; the strong node verifies the
  guesses of all its clients, several sessions in one call.

What the server does for the prompts is measured by itself, as an arm that asks for one token, and
taken off; pauses count from when every client has its first token.  So the figures are those of
decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Final

import msgspec
import psutil
import trio

from pyagent_node.base.errors import CorruptData
from pyagent_node.benchmarks.pipeline import quantiles
from pyagent_node.benchmarks.relay import delaying_relay
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.benchmarks.texts import TEXTS, Kind
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.client import Client

SERVER: Final = "server"
EDGE: Final = "edge"
PROMPTS: Final = "prompts"
"""The arm that takes the prompts' time; not in the report."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: every client one answer of ``tokens`` tokens, in each of ``rounds`` rounds."""

    model: str
    drafters: tuple[str, ...]
    kinds: tuple[Kind, ...]
    tokens: int
    rounds: int
    temperature: float

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms of a row, in the order of the first round."""
        return (PROMPTS, SERVER, EDGE, *self.drafters)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """An arm with so many clients; medians over the rounds.

    ``tokens_per_second`` is of all clients together: their number over the mean pause.
    ``server_busy_ms_per_token`` is how long the strong node's runner computed for a token of an
    answer, ``server_cpu_ms_per_token`` what its processes, the daemon too, took of the processor;
    ``rows_per_token`` is how many tokens, known or guessed, it was sent for one, and
    ``tokens_per_batch`` how many of those it computed at once.  The inter-token figures are pauses
    between tokens as the client saw them: 0 for one that came with another.  ``identical``: every
    answer has the tokens that the server alone gave.
    """

    clients: int
    arm: str
    tokens_per_second: float
    server_busy_ms_per_token: float
    server_cpu_ms_per_token: float
    inter_token_ms_p50: float
    inter_token_ms_p99: float
    inter_token_ms_mean: float
    tokens_per_pass: float
    acceptance: float
    rows_per_token: float
    tokens_per_batch: float
    identical: bool


class EdgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark, as it is printed and stored; ``edges`` daemons share the clients."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    drafter_model: str | None
    rtt_ms: float
    edges: int
    tokens: int
    rounds: int
    temperature: float
    runs: tuple[Run, ...]


class Counters(msgspec.Struct, frozen=True):
    """What a stage has counted, and its node's processes used of the processor, since the start."""

    busy_seconds: float
    tokens: float
    batches: float
    cpu_seconds: float = 0.0

    def since(self, before: Counters) -> Counters:
        """Return what was counted since."""
        return Counters(
            self.busy_seconds - before.busy_seconds,
            self.tokens - before.tokens,
            self.batches - before.batches,
            self.cpu_seconds - before.cpu_seconds,
        )


class Heard(msgspec.Struct, frozen=True):
    """One answer and when each of its tokens came, in seconds on the client's clock."""

    answer: Answer
    stamps: tuple[float, ...]


class Turn(msgspec.Struct, frozen=True):
    """What one arm came to in one round."""

    heard: tuple[Heard, ...]
    counted: Counters


def stage_counters(metrics: str) -> Counters:
    """Read a node's only stage in the text of its metrics.

    Raises :class:`CorruptData` (``bad_metrics``) when it is not there.
    """
    found: list[float] = []
    for name in ("busy_seconds", "tokens", "batches"):
        start = f"pyagent_stage_{name}_total{{"
        values = [line.split()[-1] for line in metrics.splitlines() if line.startswith(start)]
        if len(values) != 1:
            raise CorruptData(f"The node has {len(values)} stages, not one.", code="bad_metrics")
        found.append(float(values[0]))
    return Counters(*found)


async def measure(  # noqa: PLR0917 - one caller
    plan: Plan,
    clients: int,
    server: LocalNode,
    edges: Sequence[LocalNode],
    rtt_ms: float,
    tick: Callable[[], None],
) -> list[Run]:
    """Measure one number of clients; ``tick`` is called after each answer."""
    assert server.state is not None
    turns: dict[str, list[Turn]] = {arm: [] for arm in plan.arms}
    port = int(server.state.api_url.rsplit(":", 1)[1])
    token = server.home.api_token()
    async with delaying_relay(port, rtt_ms / 2000) as relayed:
        far = f"http://127.0.0.1:{relayed}"
        with ExitStack() as stack:
            remote = [stack.enter_context(closing(Client(far, token))) for _ in range(clients)]
            local = [
                stack.enter_context(closing(Client.from_home(edges[i % len(edges)].home)))
                for i in range(clients)
            ]
            for turn in range(plan.rounds):
                for arm in plan.arms if turn % 2 == 0 else reversed(plan.arms):
                    askers = remote if arm in (PROMPTS, SERVER) else local
                    turns[arm].append(await _turn(plan, arm, askers, server, tick))
    return [summarise(clients, arm, turns) for arm in plan.arms if arm != PROMPTS]


async def _turn(
    plan: Plan, arm: str, askers: Sequence[Client], server: LocalNode, tick: Callable[[], None]
) -> Turn:
    """Let every client ask at once and wait for all answers."""
    heard: list[Heard | None] = [None] * len(askers)
    limiter = trio.CapacityLimiter(len(askers))

    async def ask(index: int) -> None:
        heard[index] = await trio.to_thread.run_sync(
            _listen, askers[index], _ask(plan, arm, index), limiter=limiter
        )
        tick()

    before = await trio.to_thread.run_sync(_count, server)
    async with trio.open_nursery() as nursery:
        for index in range(len(askers)):
            nursery.start_soon(ask, index)
    counted = (await trio.to_thread.run_sync(_count, server)).since(before)
    return Turn(tuple([each for each in heard if each is not None]), counted)


def _count(server: LocalNode) -> Counters:
    process = psutil.Process(server.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    cpu_seconds = sum(spent.user + spent.system for spent in times)
    counters = stage_counters(server.client.metrics())
    return msgspec.structs.replace(counters, cpu_seconds=cpu_seconds)


def _ask(plan: Plan, arm: str, index: int) -> Ask:
    kind = plan.kinds[index % len(plan.kinds)]
    texts = TEXTS[kind]
    return Ask(
        model=plan.model,
        prompt=texts[index // len(plan.kinds) % len(texts)],
        max_tokens=1 if arm == PROMPTS else plan.tokens,
        temperature=plan.temperature,
        seed=index,
        ignore_eos=True,
        speculation=arm if arm in plan.drafters else NO_SPECULATION,
    )


def _listen(client: Client, ask: Ask) -> Heard:
    stamps: list[float] = []
    with closing(client.generate(ask)) as pieces:
        for piece in pieces:
            if isinstance(piece, Answer):
                return Heard(piece, tuple(stamps))
            stamps += [time.perf_counter()] * len(piece.token_ids)
    raise AssertionError("the client raises unless an answer came")


def summarise(clients: int, arm: str, turns: dict[str, list[Turn]]) -> Run:
    """Return an arm's figures; ``turns`` has those of all arms, as many of each."""
    mine = turns[arm]
    prompts = turns[PROMPTS]
    pauses = [pause for turn in mine for pause in _pauses(turn)]
    used = [
        heard.answer.speculation
        for turn in mine
        for heard in turn.heard
        if heard.answer.speculation is not None
    ]
    passes, accepted = sum(u.passes for u in used), sum(u.accepted for u in used)
    drafted = sum(u.drafted for u in used)
    decoded = clients * (mine[0].heard[0].answer.completion_tokens - 1)
    prompt_busy = statistics.median(turn.counted.busy_seconds for turn in prompts)
    prompt_tokens = prompts[0].counted.tokens
    prompt_batches = prompts[0].counted.batches
    busy = statistics.median(turn.counted.busy_seconds for turn in mine) - prompt_busy
    cpu = statistics.median(turn.counted.cpu_seconds for turn in mine)
    cpu -= statistics.median(turn.counted.cpu_seconds for turn in prompts)
    rows = statistics.median(turn.counted.tokens for turn in mine) - prompt_tokens
    batches = statistics.median(turn.counted.batches for turn in mine) - prompt_batches
    expected = [heard.answer.token_ids for heard in turns[SERVER][0].heard]
    pause = quantiles(pauses)
    return Run(
        clients=clients,
        arm=arm,
        tokens_per_second=_rounded(clients / max(statistics.fmean(pauses), 1e-9)),
        server_busy_ms_per_token=_rounded(1000 * busy / decoded),
        server_cpu_ms_per_token=_rounded(1000 * cpu / decoded),
        inter_token_ms_p50=pause.p50,
        inter_token_ms_p99=pause.p99,
        inter_token_ms_mean=pause.mean,
        tokens_per_pass=_rounded((passes + accepted) / passes if passes else 1.0),
        acceptance=_rounded(accepted / drafted if drafted else 0.0),
        rows_per_token=_rounded(rows / decoded),
        tokens_per_batch=_rounded(rows / max(batches, 1)),
        identical=all(
            [heard.answer.token_ids for heard in turn.heard] == expected for turn in mine
        ),
    )


def _pauses(turn: Turn) -> list[float]:
    """Return the pauses between tokens, from when every client had its first one.

    Before, they wait for each other's prompts.
    """
    all_begun = max(heard.stamps[0] for heard in turn.heard)
    pauses = [
        (before, after - before)
        for heard in turn.heard
        for before, after in zip(heard.stamps, heard.stamps[1:], strict=False)
    ]
    return [p for at, p in pauses if at >= all_begun] or [p for _, p in pauses]


def _rounded(value: float) -> float:
    return round(value, 4)
