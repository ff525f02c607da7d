"""One session's guesses at its head: what to ask the drafter, what to send, what came of it.

The rules of steps with guesses and parents are in ``frames``.  Everything here is decided between
two results; a *quick* drafter is asked there and then, any other by the session's driver (see
``proposals``), which comes back with the draft to whatever is true by then.  A drafter that fails,
stalls or makes no sense costs its session the guesses and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, runtime_checkable

from pyagent_node.inference.backend import MAX_DECODE_ROWS, MAX_DRAFTS
from pyagent_node.inference.drafting.controller import Controller
from pyagent_node.inference.drafting.port import (
    Draft,
    Drafter,
    Pass,
    Plan,
    TreeDrafter,
    usable,
)
from pyagent_node.inference.drafting.tree import after, stem, usable_tree
from pyagent_node.inference.generation import SpeculationUsage
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.flights import Landed
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import Sampled

logger = logging.getLogger("pyagent_node.pipeline")

QUICK_SECONDS: Final = 1e-6
"""A draft takes that long at least, whatever the clock says."""
MAX_DEPTH: Final = 8
"""Steps of one session that may be in flight at once."""


@runtime_checkable
class QuickDrafter(Protocol):
    """A drafter that never waits, and takes microseconds."""

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Do what ``Drafter.propose`` does."""
        ...


@runtime_checkable
class QuickTreeDrafter(Protocol):
    """A quick drafter whose guesses can form a tree."""

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Do what ``TreeDrafter.propose_tree`` does."""
        ...


class Ask(NamedTuple):
    """A question to the drafter, asked when the answer had ``known`` tokens."""

    known: int
    ahead: tuple[int, ...]
    limit: int
    floor: float
    tree: bool = False


Move = Outgoing | Ask | None
"""What comes next: a step to send, a question for the drafter, or nothing before a result."""


class Speculation:
    """The guesses of one session; it lives as long as the session, over all its attempts.

    ``end_tokens`` are never guessed: nothing comes after them.  ``clock`` returns seconds.
    """

    def __init__(
        self,
        drafter: Drafter,
        controller: Controller,
        *,
        n_vocab: int,
        end_tokens: frozenset[int] = frozenset(),
        clock: Callable[[], float],
    ) -> None:
        self.drafter = drafter
        self.controller = controller
        self.failed = False
        """Whether the drafter is of no more use."""
        self.ask: Ask | None = None
        """A question that the driver is to ask."""
        self.prepared = False
        """Whether the drafter has read the prompt and may be asked."""
        self.busy = False
        """Whether the driver is asking one."""
        self._look = drafter.look if isinstance(drafter, QuickDrafter) else None
        self._look_tree = drafter.look_tree if isinstance(drafter, QuickTreeDrafter) else None
        self._trees = isinstance(drafter, TreeDrafter)
        self._n_vocab = n_vocab
        self._end_tokens = end_tokens
        self._clock = clock
        self._passes = 0
        self._drafted = 0
        self._accepted = 0
        self._cancelled = 0
        self._reused = 0
        self.told = 0
        """The tokens of the session that the drafter has been told."""
        self._plan = Plan()
        self._dry: tuple[int, int] | None = None
        self._last_result: float | None = None
        self._voided_at: float | None = None

    @property
    def usage(self) -> SpeculationUsage:
        """What it has come to so far."""
        forecast = self.controller.forecast()
        return SpeculationUsage(
            drafter=self.drafter.name,
            passes=self._passes,
            drafted=self._drafted,
            accepted=self._accepted,
            cancelled=self._cancelled,
            failed=self.failed,
            length=forecast.plan.length,
            depth=forecast.plan.depth,
            predicted_tokens_per_second=forecast.tokens_per_second,
            predicted_plain_tokens_per_second=forecast.plain_tokens_per_second,
            reused=self._reused,
        )

    # ---- what the drafter knows ------------------------------------------------------------

    def tell(self, tokens: Sequence[int]) -> None:
        """Tell the drafter tokens that it has not seen, the prompt first."""
        self.told += len(tokens)
        try:
            self.drafter.extend(tokens)
        except Exception as error:  # whatever it is, the answer goes on
            self.give_up(error)
            return
        self.controller.accepted(tokens)

    @property
    def asked(self) -> bool:
        """Whether the drafter is asked for what comes after the last token."""
        return self.prepared and not self.failed

    def ready(self, total: int) -> bool:
        """Whether the drafter knows all ``total`` tokens of the session and can be asked."""
        return self.asked and self.told == total

    def give_up(self, error: BaseException | str) -> None:
        """Ask the drafter no more."""
        self.failed = True
        logger.warning(
            "drafter %s failed, the session goes on without: %s", self.drafter.name, error
        )

    # ---- what to do next -------------------------------------------------------------------

    def moves(self, attempt: Attempt, answer: Sequence[Sampled], now: float) -> list[Outgoing]:
        """Return the steps to send now; leaves a question to the driver where it must wait."""
        out: list[Outgoing] = []
        self.ask = None
        while True:
            move = self.next_move(attempt, answer, now)
            if isinstance(move, Ask):
                if (self._look_tree if move.tree else self._look) is None:
                    self.ask = move
                    return out
                began = self._clock()
                draft = self._quick(move)
                took = max(QUICK_SECONDS, self._clock() - began)
                move = self.take(attempt, answer, move, draft, took, now)
                if move is None:
                    continue
            if move is None:
                return out
            out.append(move)

    def next_move(self, attempt: Attempt, answer: Sequence[Sampled], now: float) -> Move:
        """Say what comes next, when all of the journal was sent but its last token."""
        flying = attempt.guesses_in_flight
        if not flying and not attempt.at_last_token:
            return None
        if attempt.carried >= MAX_DECODE_ROWS:
            return attempt.send_carried(now)
        known = len(answer)
        if not self.ready(attempt.tokens_known):
            return None if flying else attempt.send_token(answer[-1].token, now)
        if flying and (
            flying >= min(self._plan.depth, MAX_DEPTH) or self._dry == (known, attempt.position)
        ):
            return None
        self._plan = plan = self.controller.plan(flying)
        if flying >= min(plan.depth, MAX_DEPTH):
            return None
        ahead = attempt.ahead
        limit = min(plan.length + (flying > 0), MAX_DRAFTS, attempt.room - len(ahead))
        if plan.length < 1 or limit < 1:
            return None if flying else attempt.send_token(answer[-1].token, now)
        return Ask(known, ahead, limit, plan.floor, plan.tree and self._trees)

    def _quick(self, ask: Ask) -> Draft | None:
        look = self._look_tree if ask.tree else self._look
        assert look is not None, "only quick drafters are asked between results"
        try:
            return look(ask.ahead, ask.limit, floor=ask.floor)
        except Exception as error:  # whatever it is, the answer goes on
            self.give_up(error)
            return None

    def take(  # noqa: PLR0917 - private to the head
        self,
        attempt: Attempt,
        answer: Sequence[Sampled],
        ask: Ask,
        draft: Draft | None,
        seconds: float,
        now: float,
    ) -> Outgoing | None:
        """Make a step of a draft that took ``seconds``, if it still belongs to what is true now.

        What was accepted, or sent, since the question is cut off its front.
        """
        flying = attempt.guesses_in_flight
        if not flying and not attempt.at_last_token:
            return None
        if attempt.carried >= MAX_DECODE_ROWS:
            return attempt.send_carried(now)
        ahead = attempt.ahead
        guesses = self._rest(answer, ahead, ask, draft) if draft is not None else None
        if draft is None or guesses is None:  # of no use; the next question is another
            return None
        late = bool(draft.tokens) and not guesses.tokens
        # that a drafter has nothing to say is told, that it was overtaken is not
        count = 0 if late else self.controller.choose(guesses, ahead, flying)
        room = attempt.room - len(ahead)
        guesses = guesses.cut(min(count, MAX_DRAFTS))
        guesses = usable_tree(guesses, deepest=room) if guesses.parents else guesses.cut(room)
        if not flying:
            token, tokens = answer[-1].token, guesses.tokens
            return attempt.send_guesses(token, tokens, guesses.parents, seconds, now)
        if not guesses.tokens:
            self._dry = len(answer), attempt.position
            return None
        first, guesses = stem(guesses)
        return attempt.send_guesses(first, guesses.tokens, guesses.parents, seconds, now)

    def _rest(
        self, answer: Sequence[Sampled], ahead: tuple[int, ...], ask: Ask, draft: Draft
    ) -> Draft | None:
        try:
            if draft.parents:
                draft = usable_tree(
                    draft, n_vocab=self._n_vocab, limit=MAX_DRAFTS, ends=self._end_tokens
                )
            else:
                draft = usable(draft, n_vocab=self._n_vocab, limit=MAX_DRAFTS)
        except Exception as error:  # a draft may be anything
            self.give_up(error)
            return None
        for index, token in enumerate(draft.tokens):
            if token in self._end_tokens:  # none are left in a tree
                draft = draft.cut(index)
                break
        since = (*(sampled.token for sampled in answer[ask.known :]), *ahead)
        n = len(ask.ahead)
        return after(draft, since[n:]) if since[:n] == ask.ahead else None

    # ---- what came of it -------------------------------------------------------------------

    def landed(
        self,
        landed: Landed,
        spent: float,
        now: float,
    ) -> None:
        """Note the result of a step."""
        flight, sampled = landed.flight, landed.sampled
        if flight.kind == "feed":
            return
        self._passes += 1
        self._drafted += flight.drafts
        self._accepted += len(sampled) - 1
        self._reused += flight.kind == "child"
        last = self._last_result
        self._last_result = now
        crowded = self._voided_at is not None and flight.sent_at >= self._voided_at
        if crowded:
            self._voided_at = None
        if landed.void:
            self._voided_at = now
        self.controller.passed(
            Pass(
                width=flight.n,
                seconds=now - flight.sent_at,
                drafts=flight.drafts,
                accepted=len(sampled) - 1,
                gained=len(sampled),
                compute_seconds=spent,
                draft_seconds=flight.draft_seconds,
                in_flight=flight.in_flight,
                elapsed=0.0 if last is None else now - last,
                crowded=crowded,
            )
        )
        for lost in landed.void:
            self._cancelled += 1
            self._drafted += lost.drafts
            self.controller.passed(
                Pass(
                    width=lost.n,
                    seconds=now - lost.sent_at,
                    drafts=lost.drafts,
                    gained=0,
                    draft_seconds=lost.draft_seconds,
                    in_flight=lost.in_flight,
                )
            )

    def heard(self, sampled: Sequence[Sampled], total: int) -> None:
        """Take in new tokens of the answer, by which the session has ``total``."""
        if not self.failed and self.told == total - len(sampled):
            self.tell([one.token for one in sampled])

    def begun(self) -> None:
        """Note that a new attempt begins: nothing is in flight."""
        self.ask = None
        self._dry = None
        self._last_result = None
        self._voided_at = None
