"""A world with several steps in flight, on ranks of which one is the slowest.

As in ``world``, what is right is settled beforehand.  A step that is sent while others are in
flight begins with a guess of the token that the one before it ends with.
"""

from __future__ import annotations

import random

import msgspec

from pyagent_node.inference.drafting.controller import Controller
from pyagent_node.inference.drafting.port import Draft, Pass, Plan

from .world import RIGHT, WRONG

RANKS = 3


class Flight(msgspec.Struct, frozen=True):
    """A step under way: its first guess, its guesses, and its times."""

    start: int
    guesses: int
    width: int
    sent_at: float
    due_at: float
    drafting: float
    in_flight: int
    crowded: bool = False


class PipedWorld(msgspec.Struct, frozen=True):
    """A step of w tokens keeps each of three ranks busy for (a + b * w) / 3 seconds.

    ``claim`` is what the drafter says of its guesses, where that is not the truth.
    """

    a: float
    b: float
    d: float
    rtt: float
    chance: float
    tokens: int = 400
    seed: int = 0
    claim: float | None = None

    def run(self, controller: Controller) -> float:
        """Generate; return tokens a second."""
        luck = random.Random(self.seed)
        right = [luck.random() < self.chance for _ in range(self.tokens + 400)]
        now, free, last, made = 0.0, 0.0, 0.0, 0
        flights: list[Flight] = []
        crowded = False
        controller.accepted([0] * 5)
        while made < self.tokens:
            plan = Plan()
            while not flights or len(flights) < plan.depth:
                plan = controller.plan(len(flights))
                start = flights[-1].start + flights[-1].guesses if flights else made
                limit = plan.length + bool(flights) if plan.length else 0
                if flights and (not limit or len(flights) >= plan.depth):
                    break
                sent = self._choose(
                    controller, right[made : start + limit], start - made, limit, len(flights)
                )
                now += self.d * limit
                if flights and not sent:
                    break
                width = sent + (not flights)
                computing = self.a + self.b * width
                begun = max(now + self.rtt / 2, free)
                free = begun + computing / RANKS
                due = begun + computing + self.rtt / 2
                flights.append(
                    Flight(start, sent, width, now, due, self.d * limit, len(flights) + 1, crowded)
                )
                crowded = False
            flight = flights.pop(0)
            now = max(now, flight.due_at)
            guesses = right[flight.start : flight.start + flight.guesses]
            hits = [*guesses, False].index(False)
            whole = hits == flight.guesses
            gained = hits + 1 - (flight.width == flight.guesses)
            controller.passed(self._pass(flight, now, gained, now - last))
            controller.accepted([RIGHT] * gained)
            made, last = made + gained, now
            if flights and not (whole and right[flights[0].start]):
                for lost in flights:
                    controller.passed(self._pass(lost, now, 0, 0.0))
                flights.clear()
                crowded = True
        return made / now

    def _choose(
        self, controller: Controller, right: list[bool], ahead: int, limit: int, flying: int
    ) -> int:
        if not limit:
            return 0
        tokens = tuple(RIGHT if ok else WRONG for ok in right)
        draft = Draft(
            tokens[ahead:], (self.chance if self.claim is None else self.claim,) * limit, "world"
        )
        return controller.choose(draft, tokens[:ahead], flying)

    def _pass(self, flight: Flight, now: float, gained: int, elapsed: float) -> Pass:
        return Pass(
            width=flight.width,
            seconds=now - flight.sent_at,
            drafts=flight.width - 1,
            accepted=max(0, gained - 1),
            gained=gained,
            compute_seconds=self.a + self.b * flight.width,
            draft_seconds=flight.drafting,
            in_flight=flight.in_flight,
            elapsed=elapsed,
            crowded=flight.crowded,
        )
