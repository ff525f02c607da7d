"""Recorded answers, guessed again over links and ranks that exist in arithmetic only.

What decides at a head runs as it is (``Speculation``, ``Attempt``, the controller, the suffix
drafter); the ranks are three queues, each of which computes a step of w tokens for a third of
``pass_seconds + token_seconds * w`` seconds, and the links take half of a round trip.  So a machine
with other things to do measures the same as a quiet one, in a few milliseconds an answer, and
every fixed setting can be tried.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, cast

import msgspec
import numpy as np

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.drafting.controller import Controller
from pyagent_node.inference.drafting.port import Draft, Drafter
from pyagent_node.inference.drafting.suffix import SuffixDrafter
from pyagent_node.inference.generation import SpeculationUsage
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.flights import Route
from pyagent_node.inference.pipeline.frames import CancelSteps, Result, Step, unpack_tail
from pyagent_node.inference.pipeline.speculation import Ask, Speculation
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import Sampled, SamplingParams

RANKS: Final = 3
HOP_SECONDS: Final = 0.0004
NOISE: Final = 0.03
"""How much the time of a step varies, either way."""
MODEL: Final = Digest("0" * 64)
PLACEMENT: Final = Placement(
    MODEL,
    1,
    tuple(Rank(r, Slice(r, r + 1, r == RANKS - 1), PeerId(f"rank-{r}")) for r in range(RANKS)),
    n_ctx=1 << 16,
    n_seq=1,
)


class Record(msgspec.Struct, frozen=True):
    """An answer, and what a drafting model would have said at each of its places, how surely."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    guesses: tuple[tuple[int, float], ...] = ()


class Costs(msgspec.Struct, frozen=True):
    """What a step of w tokens takes on all ranks together, a guess, and a round trip; seconds."""

    pass_seconds: float
    token_seconds: float
    draft_seconds: float = 0.0
    rtt: float = 0.0


class RecordedDrafter:
    """Guesses what a model said; after a token that the answer does not have it knows nothing."""

    name = "recorded"

    def __init__(self, record: Record) -> None:
        self._record = record
        self._full = [*record.prompt, *record.answer]
        self._history: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first."""
        self._history += tokens

    def draft(self, ask: Ask) -> Draft:
        """Return the guesses."""
        text = [*self._history, *ask.ahead]
        tokens: list[int] = []
        confidence: list[float] = []
        together = 1.0
        while len(tokens) < ask.limit:
            place = len(text) - len(self._record.prompt)
            known = text == self._full[: len(text)] and place < len(self._record.guesses)
            token, chance = self._record.guesses[place] if known else (0, 0.5)
            together *= chance
            if tokens and together < ask.floor:
                break
            tokens.append(token)
            confidence.append(chance)
            text.append(token)
        return Draft(tuple(tokens), tuple(confidence), self.name)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Do what :meth:`draft` does."""
        return self.draft(Ask(0, tuple(ahead), limit, floor))

    async def aclose(self) -> None:
        """Nothing to release."""


class Replay:
    """One answer, given again; run :meth:`run` once."""

    def __init__(
        self,
        record: Record,
        costs: Costs,
        controller: Controller | None,
        *,
        model_drafts: bool = False,
        seed: int = 0,
    ) -> None:
        """Without ``controller`` nobody guesses."""
        self._record = record
        self._costs = costs
        self._full = [*record.prompt, *record.answer]
        self._luck = random.Random(seed)  # noqa: S311 - the same on every run
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._queues: list[deque[int]] = [deque() for _ in range(RANKS)]
        self._busy = [False] * RANKS
        self._cancelled: list[set[int]] = [set() for _ in range(RANKS)]
        self._steps: dict[int, tuple[Step, list[int]]] = {}
        self._void: set[int] = set()
        self._answer: list[Sampled] = []
        self._first: float | None = None
        n = len(record.prompt)
        self._attempt = Attempt(
            Route(SessionId("replay"), PeerId("head"), PLACEMENT, SamplingParams()),
            cast("Tokens", np.array(record.prompt, np.int32)),
            self._answer,
            n + len(record.answer),
            None,
            0.0,
        )
        self._recorded = RecordedDrafter(record) if model_drafts else None
        self._spec: Speculation | None = None
        if controller is not None:
            drafter: Drafter = self._recorded or SuffixDrafter()
            vocabulary = max(self._full) + 1
            self._spec = Speculation(
                drafter, controller, n_vocab=vocabulary, clock=lambda: self._now
            )
            self._spec.prepared = True
            self._spec.tell(record.prompt)

    def run(self) -> tuple[float, SpeculationUsage | None]:
        """Return the tokens a second after the first, and what guessing came to."""
        self._feed()
        while len(self._answer) < len(self._record.answer):
            self._now, _, event = heapq.heappop(self._events)
            event()
        assert self._first is not None, "an answer has a first token"
        tokens = tuple(one.token for one in self._answer)
        assert tokens[: len(self._record.answer)] == self._record.answer, "guesses change nothing"
        rate = (len(tokens) - 1) / (self._now - self._first)
        return rate, None if self._spec is None else self._spec.usage

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._order), event))

    # ---- the head ----------------------------------------------------------------------------

    def _feed(self) -> None:
        while (chunk := self._attempt.next_chunk()) is not None:
            self._send([self._attempt.send_chunk(chunk, None, self._now)])

    def _send(self, out: Sequence[Outgoing]) -> None:
        half = self._costs.rtt / 2
        for each in out:
            if isinstance(each.message, Step):
                number = each.message.step
                tokens, _ = unpack_tail(each.tail, each.message.n, 0)
                self._steps[number] = each.message, tokens.tolist()
                self._at(HOP_SECONDS, partial(self._arrive, 0, number))
            elif isinstance(each.message, CancelSteps):
                steps = range(each.message.first, each.message.stop)
                rank = each.message.rank
                self._at(half * (rank > 0), partial(self._cancelled[rank].update, steps))

    def _land(self, result: Result) -> None:
        landed = self._attempt.on_result(PLACEMENT.ranks[-1].peer_id, result, self._now)
        if landed is None:
            self._feed()
            return
        spec = self._spec
        self._first = self._now if self._first is None else self._first
        if spec is not None:
            spec.landed(landed, result.spent, self._now)
        self._answer += landed.sampled
        if len(self._answer) >= len(self._record.answer):
            return
        if spec is None:
            self._send([self._attempt.send_token(self._answer[-1].token, self._now)])
            return
        spec.heard(landed.sampled, self._attempt.tokens_known)
        if landed.void:
            self._send(self._attempt.cancel(landed.void))
        self._speculate(spec)

    def _speculate(self, spec: Speculation) -> None:
        if self._recorded is None:
            self._send(spec.moves(self._attempt, self._answer, self._now))
            return
        while not spec.busy and len(self._answer) < len(self._record.answer):
            move = spec.next_move(self._attempt, self._answer, self._now)
            if isinstance(move, Ask):
                draft = self._recorded.draft(move)
                took = self._costs.draft_seconds * max(1, len(draft.tokens))
                spec.busy = True
                self._at(took, partial(self._drafted, spec, move, draft, took))
            elif move is None:
                return
            else:
                self._send([move])

    def _drafted(self, spec: Speculation, ask: Ask, draft: Draft, took: float) -> None:
        spec.busy = False
        out = spec.take(self._attempt, self._answer, ask, draft, took, self._now)
        if out is not None:
            self._send([out])
        self._speculate(spec)

    # ---- the ranks ---------------------------------------------------------------------------

    def _arrive(self, rank: int, number: int) -> None:
        self._queues[rank].append(number)
        self._begin(rank)

    def _begin(self, rank: int) -> None:
        if self._busy[rank] or not self._queues[rank]:
            return
        number = self._queues[rank].popleft()
        step, tokens = self._steps[number]
        computes = number not in self._cancelled[rank]
        computing = self._costs.pass_seconds + self._costs.token_seconds * step.n
        result: Result | None = None
        if rank == RANKS - 1:
            sampled = self._sample(step, tokens)
            computes = bool(sampled) or not step.sample
            result = Result(SessionId("replay"), MODEL, 1, rank, number, computing, sampled)
        noise = 1.0 + self._luck.uniform(-NOISE, NOISE)
        self._busy[rank] = True

        def done() -> None:
            self._busy[rank] = False
            away = self._costs.rtt / 2 + HOP_SECONDS
            if result is None:
                self._at(away, partial(self._arrive, rank + 1, number))
            elif computes:
                self._at(away, partial(self._land, result))
            self._begin(rank)

        self._at(computing / RANKS * noise if computes else 0.0, done)

    def _sample(self, step: Step, tokens: list[int]) -> tuple[Sampled, ...]:
        """Return what the last rank would have said: nothing for a step that is void."""
        if not step.sample:
            return ()
        if step.parent is not None and (
            step.parent in self._void or self._said(step.position).token != tokens[0]
        ):
            self._void.add(step.step)
            return ()
        known = step.n - step.drafts
        place = step.position + known
        sampled: list[Sampled] = []
        for guess in tokens[known:]:
            if self._said(place).token != guess:
                self._void.add(step.step)
                break
            sampled.append(Sampled(guess))
            place += 1
        return (*sampled, self._said(place))

    def _said(self, place: int) -> Sampled:
        return Sampled(self._full[place] if place < len(self._full) else 0)
