"""Who can guess for this node's sessions, and how a request chooses among them."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.inference.backend import MAX_DRAFTS
from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.port import Drafter, DrafterFactory, Plan
from pyagent_node.inference.generation import (
    AUTO_SPECULATION,
    NO_SPECULATION,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.speculation import MAX_DEPTH, Speculation

MAX_COSTS: Final = 16
"""Placements whose costs are remembered from session to session."""


class Speculators:
    """The drafters by name; ``auto`` takes the first one that can guess for the model.

    ``default`` is for requests that do not say; ``clock`` returns seconds, for what a guess takes.
    """

    def __init__(
        self,
        factories: Iterable[DrafterFactory] = (),
        *,
        default: str = NO_SPECULATION,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.default = default
        self._factories = {factory.name: factory for factory in factories}
        self._clock = clock
        self._costs: OrderedDict[tuple[Digest, int], CostModel] = OrderedDict()

    @contextmanager
    def offering(self, *factories: DrafterFactory) -> Iterator[None]:
        """Have more drafters, which ``auto`` likes better, while the context lasts."""
        self._factories = {f.name: f for f in factories} | self._factories
        try:
            yield
        finally:
            for factory in factories:
                del self._factories[factory.name]

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may ask for."""
        return (NO_SPECULATION, AUTO_SPECULATION, *self._factories)

    def choice(self, request: GenerationRequest) -> str:
        """Return what a request asks for, in so many words or by saying nothing."""
        return self.default if request.speculation is None else request.speculation

    def check(self, request: GenerationRequest) -> None:
        """Check what a request asks for; raises :class:`InvalidRequest` (``bad_parameter``)."""
        choice = self.choice(request)
        if choice not in self.names:
            raise InvalidRequest(
                f"There is no drafter {choice[:64]!r};"
                f" speculation is one of {', '.join(self.names)}.",
                code="bad_parameter",
                parameter="speculation",
            )
        for name, value, low, high in (
            ("draft_length", request.draft_length, 0, MAX_DRAFTS),
            ("draft_depth", request.draft_depth, 1, MAX_DEPTH),
        ):
            if value is not None and not low <= value <= high:
                raise InvalidRequest(
                    f"{name} is {value}; it must lie between {low} and {high}.",
                    code="bad_parameter",
                    parameter=name,
                )

    def open(self, request: GenerationRequest, model: HeadModel) -> Speculation | None:
        """Return the guesses of a checked request's session; ``None`` for none.

        Raises what a drafter raises that was asked for by its name; ``auto`` does without.
        """
        drafter = self._drafter(request, model)
        if drafter is None:
            return None
        vocabulary = model.vocabulary
        return Speculation(
            drafter,
            self._controller(request, model),
            n_vocab=len(vocabulary.pieces),
            end_tokens=frozenset() if request.ignore_eos else vocabulary.end_tokens,
            clock=self._clock,
        )

    def reopen(self, journal: SessionJournal, model: HeadModel) -> Speculation | None:
        """Return the guesses of a session that another head began, if it can have them here."""
        request = GenerationRequest(
            journal.model,
            ignore_eos=journal.ignore_eos,
            sampling=journal.sampling,
            speculation=journal.speculation,
            draft_length=journal.draft_length,
            draft_depth=journal.draft_depth,
        )
        with contextlib.suppress(PyAgentError):
            self.check(request)
            return self.open(request, model)
        return None

    def _drafter(self, request: GenerationRequest, model: HeadModel) -> Drafter | None:
        choice, pieces = self.choice(request), model.vocabulary.pieces
        if choice == NO_SPECULATION:
            return None
        if choice != AUTO_SPECULATION:
            self.check(request)  # a drafter may have gone while the prompt was read
            return self._factories[choice].for_model(pieces, request.sampling)
        for factory in self._factories.values():
            with contextlib.suppress(PyAgentError):
                return factory.for_model(pieces, request.sampling)
        return None

    def _controller(self, request: GenerationRequest, model: HeadModel) -> Controller:
        placement = model.placement
        key = placement.model, placement.epoch
        costs = self._costs.setdefault(key, CostModel())
        self._costs.move_to_end(key)
        while len(self._costs) > MAX_COSTS:
            self._costs.popitem(last=False)
        ranks = len(placement.ranks)
        if request.draft_length is None:
            depth = request.draft_depth
            if depth is not None:
                return Controller(ranks=ranks, max_depth=depth, costs=costs)
            return Controller(ranks=ranks, costs=costs)
        plan = Plan(request.draft_length, request.draft_depth or 1)
        return FixedController(plan, ranks=ranks, costs=costs)
