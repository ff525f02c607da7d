"""The speculation benchmark: guessed answers against plain ones, over links of several lengths.

All arms of a row take turns on the same texts: plain, guessing, plain, guessing ...  Each answer
has the same number of tokens, so that a row's speed is that of its texts taken together: for each
text the median over the rounds, then all tokens over all time.  What the head's cost model expected
of the same answers stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from pyagent_node.benchmarks.shaped import answer, await_answers
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.benchmarks.texts import TEXTS, Kind
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.node.answers import Answer, Ask

LENGTHS: Final = (2, 4, 8, 16)
DEPTHS: Final = (1, 2, 4)
"""The fixed settings that the controller is compared with."""
PIPED_LENGTH: Final = 4
WARM_TOKENS: Final = 16


class Arm(msgspec.Struct, frozen=True):
    """Who guesses, and how much: by the controller, or always the same."""

    drafter: str = NO_SPECULATION
    length: int | None = None
    depth: int | None = None


PLAIN: Final = Arm()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked; ``rounds`` at short trips are more, since they cost nothing.

    ``texts`` of each kind are gone on with for ``tokens`` tokens.
    """

    model: str
    drafters: tuple[str, ...]
    drafter_model: str | None = None
    """The model that drafts, by its name in the swarm; nothing is measured before it does."""
    kinds: tuple[Kind, ...]
    tokens: int
    texts: int
    rounds: int
    temperature: float
    pipelining: bool = False
    grid: bool = False

    def rounds_at(self, rtt_ms: float) -> int:
        """Return how many rounds a row has."""
        return self.rounds * max(1, round(100 / (rtt_ms + 20)))

    def arms(self, drafter: str) -> list[Arm]:
        """Return the arms of a row besides plain decoding, the controller's first."""
        arms = [Arm(drafter)]
        if drafter == NO_SPECULATION:
            return arms
        if self.pipelining:
            arms += [Arm(drafter, PIPED_LENGTH, depth) for depth in DEPTHS]
        if self.grid:
            arms += [Arm(drafter, length, depth) for length in LENGTHS for depth in DEPTHS]
        return list(dict.fromkeys(arms))

    def answers(self, rtt_ms: float) -> int:
        """Return how many answers a round trip's rows take."""
        arms = sum(1 + len(self.arms(drafter)) for drafter in self.drafters)
        return arms * len(self.kinds) * self.texts * self.rounds_at(rtt_ms)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table: a controller's guesses against none.

    ``identical``: whether every answer has the tokens of the plain one.  ``acceptance`` is the
    share of guesses that were right; ``cancelled`` the share of steps that were sent for nothing.
    The predictions are the head's, of the same answers.
    """

    rtt_ms: float
    prompts: Kind
    drafter: str
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    tokens_per_pass: float
    acceptance: float
    cancelled: float
    identical: bool
    predicted_tokens_per_second: float
    predicted_plain_tokens_per_second: float
    predicted_speedup: float


class Piped(msgspec.Struct, frozen=True, kw_only=True):
    """Several steps in flight against one, by the same drafter and with as many guesses each.

    ``gain`` is the speed over that of depth 1; ``reused`` the share of the steps sent that went out
    before the one they follow was answered, and counted; ``wasted`` the share sent for nothing.
    """

    rtt_ms: float
    prompts: Kind
    drafter: str
    length: int
    depth: int
    tokens_per_second: float
    gain: float
    reused: float
    wasted: float
    identical: bool


class Fixed(msgspec.Struct, frozen=True, kw_only=True):
    """A fixed setting's speed."""

    length: int
    depth: int
    tokens_per_second: float


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The controller against the best of the fixed settings, found afterwards, and none at all.

    ``share`` is its speed over that of the best of them.
    """

    rtt_ms: float
    prompts: Kind
    drafter: str
    tokens_per_second: float
    best_length: int
    best_depth: int
    best_tokens_per_second: float
    share: float
    identical: bool
    settings: tuple[Fixed, ...]


class SpeculationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark, as it is printed and stored."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    drafter_model: str | None
    ranks: int
    tokens: int
    texts: int
    rounds: int
    temperature: float
    runs: tuple[Run, ...]
    pipelining: tuple[Piped, ...] = ()
    grid: tuple[Choice, ...] = ()


class Row(msgspec.Struct, frozen=True):
    """The answers of a row: by arm, then by text, then by round."""

    rtt_ms: float
    kind: Kind
    drafter: str
    answers: dict[Arm, list[list[Answer]]]

    def rate(self, arm: Arm) -> float:
        """Return the tokens a second of an arm."""
        tokens = sum(one[0].completion_tokens - 1 for one in self.answers[arm])
        seconds = sum(statistics.median(map(_decoding, one)) for one in self.answers[arm])
        return tokens / max(seconds, 1e-9)

    def identical(self, arm: Arm) -> bool:
        """Whether all answers of an arm are the plain ones."""
        return all(
            each.token_ids == plain[0].token_ids
            for plain, one in zip(self.answers[PLAIN], self.answers[arm], strict=True)
            for each in (*plain, *one)
        )


def _decoding(answer: Answer) -> float:
    return answer.seconds - answer.ttft_seconds


def measure(plan: Plan, rtt_ms: float, node: LocalNode, tick: Callable[[], None]) -> Iterator[Row]:
    """Measure all rows of one round trip on links that have it; ``tick`` is called each answer."""
    for drafter in plan.drafters:
        _warm_up(plan, drafter, node)
        for kind in plan.kinds:
            yield _row(plan, rtt_ms, node, kind, drafter, tick)


def _warm_up(plan: Plan, drafter: str, node: LocalNode) -> None:
    """Wait until the drafter is loaded, and let caches and cost models come to know the swarm."""
    text = TEXTS["copy"][-1]
    # ``auto`` does without a drafter that is not loaded yet, and would not say so
    model = [Arm(plan.drafter_model)] if plan.drafter_model is not None else []
    for arm in (PLAIN, *model, Arm(drafter)):
        await_answers(node, _ask(plan, arm, text, WARM_TOKENS))


def _row(  # noqa: PLR0917 - private
    plan: Plan,
    rtt_ms: float,
    node: LocalNode,
    kind: Kind,
    drafter: str,
    tick: Callable[[], None],
) -> Row:
    texts = TEXTS[kind][: plan.texts]
    arms = plan.arms(drafter)
    if drafter == NO_SPECULATION:
        arms = [Arm(drafter, 0)]  # plain once more: how much chance there is in the figures
    answers: dict[Arm, list[list[Answer]]] = {arm: [[] for _ in texts] for arm in (PLAIN, *arms)}
    for turn in range(plan.rounds_at(rtt_ms)):
        for index, text in enumerate(texts):
            order = [PLAIN, *arms]
            for arm in order if turn % 2 == 0 else reversed(order):
                answers[arm][index].append(answer(node, _ask(plan, arm, text, plan.tokens)))
                tick()
    return Row(rtt_ms, kind, drafter, answers)


def _ask(plan: Plan, arm: Arm, text: str, tokens: int) -> Ask:
    guessing = arm.drafter != NO_SPECULATION
    return Ask(
        model=plan.model,
        prompt=text,
        max_tokens=tokens,
        temperature=plan.temperature,
        seed=11,
        ignore_eos=True,
        speculation=arm.drafter,
        draft_length=arm.length if guessing else None,
        draft_depth=arm.depth if guessing else None,
    )


def summarise(row: Row) -> Run:
    """Return the row's figures for the controller."""
    arm = next(arm for arm in row.answers if arm is not PLAIN)
    rate, plain = row.rate(arm), row.rate(PLAIN)
    used = [a.speculation for one in row.answers[arm] for a in one if a.speculation is not None]
    passes = sum(usage.passes for usage in used)
    drafted = sum(usage.drafted for usage in used)
    accepted = sum(usage.accepted for usage in used)
    cancelled = sum(usage.cancelled for usage in used)
    predicted = _together([usage.predicted_tokens_per_second for usage in used])
    expected = _together([usage.predicted_plain_tokens_per_second for usage in used])
    return Run(
        rtt_ms=row.rtt_ms,
        prompts=row.kind,
        drafter=row.drafter,
        tokens_per_second=_rounded(rate),
        plain_tokens_per_second=_rounded(plain),
        speedup=_rounded(rate / plain),
        tokens_per_pass=_rounded((passes + accepted) / passes if passes else 1.0),
        acceptance=_rounded(accepted / drafted if drafted else 0.0),
        cancelled=_rounded(cancelled / (passes + cancelled) if passes else 0.0),
        identical=row.identical(arm),
        predicted_tokens_per_second=_rounded(predicted),
        predicted_plain_tokens_per_second=_rounded(expected),
        predicted_speedup=_rounded(predicted / expected if expected else 1.0),
    )


def _together(rates: Sequence[float]) -> float:
    """Return the rate of answers of equal length that come one after the other."""
    return len(rates) / sum(1 / max(rate, 1e-9) for rate in rates) if rates else 0.0


def pipelining(row: Row) -> list[Piped]:
    """Return what several steps in flight came to; nothing for a row without."""
    arms = [Arm(row.drafter, PIPED_LENGTH, depth) for depth in DEPTHS]
    if not all(arm in row.answers for arm in arms):
        return []
    alone = row.rate(arms[0])
    found = []
    for arm in arms:
        used = [a.speculation for one in row.answers[arm] for a in one if a.speculation is not None]
        sent = max(1, sum(usage.passes + usage.cancelled for usage in used))
        found.append(
            Piped(
                rtt_ms=row.rtt_ms,
                prompts=row.kind,
                drafter=row.drafter,
                length=PIPED_LENGTH,
                depth=arm.depth or 1,
                tokens_per_second=_rounded(row.rate(arm)),
                gain=_rounded(row.rate(arm) / alone),
                reused=_rounded(sum(usage.reused for usage in used) / sent),
                wasted=_rounded(sum(usage.cancelled for usage in used) / sent),
                identical=row.identical(arm),
            )
        )
    return found


def choice(row: Row) -> Choice | None:
    """Return how the controller did against fixed settings; ``None`` for a row without."""
    arms = [Arm(row.drafter, length, depth) for length in LENGTHS for depth in DEPTHS]
    if not all(arm in row.answers for arm in arms):
        return None
    settings = [
        Fixed(
            length=arm.length or 0,
            depth=arm.depth or 1,
            tokens_per_second=_rounded(row.rate(arm)),
        )
        for arm in (PLAIN, *arms)
    ]
    best = max(settings, key=lambda setting: setting.tokens_per_second)
    rate = row.rate(Arm(row.drafter))
    return Choice(
        rtt_ms=row.rtt_ms,
        prompts=row.kind,
        drafter=row.drafter,
        tokens_per_second=_rounded(rate),
        best_length=best.length,
        best_depth=best.depth,
        best_tokens_per_second=best.tokens_per_second,
        share=_rounded(rate / best.tokens_per_second),
        identical=all(map(row.identical, row.answers)),
        settings=tuple(settings),
    )


def _rounded(value: float) -> float:
    return round(value, 4)
