"""What the controller is told of a step that may have waited for void ones."""

from __future__ import annotations

from collections.abc import Sequence

from pyagent_node.inference.drafting.controller import FixedController
from pyagent_node.inference.drafting.port import Draft, Pass, Plan
from pyagent_node.inference.pipeline.flights import Flight, Landed
from pyagent_node.inference.pipeline.speculation import Speculation
from pyagent_node.inference.sampling import Sampled


class Silent:
    """A drafter without a guess."""

    name = "silent"

    def extend(self, tokens: Sequence[int]) -> None:
        """Do nothing."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess nothing."""
        return Draft()

    async def aclose(self) -> None:
        """Do nothing."""


class Listening(FixedController):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Plan(1, 2))
        self.told: list[Pass] = []

    def passed(self, done: Pass) -> None:
        """Take in what a step took."""
        self.told.append(done)


def step(number: int, sent_at: float, *, guesses: tuple[int, ...] = ()) -> Flight:
    return Flight(number, number + 1, 1 + len(guesses), True, sent_at, "token", 1, guesses)


def test_only_the_first_step_sent_after_void_ones_may_have_waited_for_them() -> None:
    controller = Listening()
    spec = Speculation(Silent(), controller, n_vocab=10, clock=lambda: 0.0)
    wrong = (Sampled(3),)

    def came(flight: Flight, now: float, *void: Flight) -> bool:
        spec.landed(Landed(flight, wrong, void), 0.1, now)
        return controller.told[-1 - len(void)].crowded

    assert not came(step(0, 0.0, guesses=(2,)), 1.0, step(1, 0.5, guesses=(4,)))
    assert came(step(2, 1.0), 2.0)
    assert not came(step(3, 2.0, guesses=(2,)), 3.0, step(4, 2.0))
    spec.begun()  # other ranks: nothing is under way there
    assert not came(step(0, 3.0), 4.0)
