"""The words of an attempt: where it goes, what is due, what is under way and what has landed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from pyagent_node.base.types import PeerId, Placement, SessionId
from pyagent_node.inference.generation import FetchWhen
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.pipeline.restoring import bad_result
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.inference.trees import follow, principal


class Route(msgspec.Struct, frozen=True):
    """Where an attempt goes: ``session`` is its id on the wire, used for no other attempt."""

    session: SessionId
    head: PeerId
    placement: Placement
    sampling: SamplingParams
    root: bytes = b""
    fetch: FetchWhen = "auto"
    pruning: Pruning | None = None


class Chunk(NamedTuple):
    """The tokens at positions ``[start, stop)`` that are due to be sent."""

    start: int
    stop: int


class Flight(msgspec.Struct, frozen=True, gc=False):
    """A step under way: ``n`` tokens, ``drafts`` of them ``guesses``.

    Its principal path ends at position ``stop``; for ``parents`` see ``trees``.

    ``kind``: it feeds the journal, or continues the answer with the token known last, or does so as
    a child of the step before it, by a guess of that token (the ``first`` of its own).
    """

    step: int
    stop: int
    n: int
    sample: bool
    sent_at: float
    kind: Literal["feed", "token", "child"] = "feed"
    first: int = -1
    guesses: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    draft_seconds: float = 0.0
    in_flight: int = 1

    @property
    def straight(self) -> int:
        """How many guesses its principal path has."""
        return principal(self.parents, self.n - self.drafts, self.drafts)

    @property
    def drafts(self) -> int:
        """How many of its tokens are guesses."""
        return len(self.guesses)


class Landed(msgspec.Struct, frozen=True, gc=False):
    """A result with tokens of the answer, and the steps that are void by it."""

    flight: Flight
    sampled: tuple[Sampled, ...]
    void: tuple[Flight, ...] = ()


def came_true(sender: PeerId, flight: Flight, came: Sequence[int]) -> int:
    """Return how many of the guesses that came true are on the principal path."""
    straight = 0
    if flight.parents:
        tokens = (*[-1] * (flight.n - flight.drafts), *flight.guesses)
        path = follow(flight.parents, tokens, flight.drafts, came)
        straight = sum(place == guess for place, guess in enumerate(path))
        right = len(path) == len(came)
    else:
        right = tuple(came) == flight.guesses[: len(came)]
        straight = len(came)
    if not right:
        raise bad_result(sender, "its tokens are not the guesses that it was sent")
    return straight
