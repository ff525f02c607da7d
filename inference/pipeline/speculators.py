"""Who can guess for this node's sessions, and how a request chooses among them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Unavailable
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest
from pyagent_node.inference.backend import MAX_DRAFTS
from pyagent_node.inference.drafting.controller import Controller, FixedController
from pyagent_node.inference.drafting.lessons import Archive
from pyagent_node.inference.drafting.port import Drafter, DrafterFactory, Plan, TreeDrafter
from pyagent_node.inference.generation import (
    AUTO_SPECULATION,
    NO_SPECULATION,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.pipeline.placed_drafters import (
    PlacedDrafters,
    by_placement,
    suffix_of,
)
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.speculation import MAX_DEPTH, Speculation

logger = logging.getLogger("pyagent_node.pipeline")


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
        self._placed = PlacedDrafters(suffix_of(self._factories.values()))
        self._archive = Archive()

    @contextmanager
    def offering(self, *factories: DrafterFactory) -> Iterator[None]:
        """Have more drafters, which ``auto`` likes better, while the context lasts."""
        self._factories = {f.name: f for f in factories} | self._factories
        try:
            yield
        finally:
            for factory in factories:
                del self._factories[factory.name]

    def connect(self, mesh: Mesh, current: Callable[[Digest], HeadModel | None]) -> None:
        """Reach drafter ranks over ``mesh``; ``current`` returns what is offered of a model now."""
        self._placed.connect(mesh, current)

    @property
    def names(self) -> tuple[str, ...]:
        """What a request for any model may ask for."""
        return (NO_SPECULATION, AUTO_SPECULATION, *self._factories)

    def resolve(self, request: GenerationRequest, model: HeadModel) -> GenerationRequest:
        """Return a request with what it asks for in so many words, checked.

        What it does not say is said by how the model was loaded, else by this node.  A drafter
        that the loading named and this node lacks is replaced by ``auto``.  Raises
        :class:`InvalidRequest` (``bad_parameter``).
        """
        factories = self._for_model(model)
        if request.speculation is None:
            request = by_placement(request, model.placement.drafting, factories, self.default)
        self._check(request, (NO_SPECULATION, AUTO_SPECULATION, *factories))
        return request

    def _for_model(self, model: HeadModel) -> dict[str, DrafterFactory]:
        """Return who can guess for a model, the likeliest to be of use first."""
        return {f.name: f for f in self._placed.factories(model)} | self._factories

    def _choice(self, request: GenerationRequest) -> str:
        return self.default if request.speculation is None else request.speculation

    def _check(self, request: GenerationRequest, names: Sequence[str]) -> None:
        choice = self._choice(request)
        if choice not in names:
            raise InvalidRequest(
                f"There is no drafter {choice[:64]!r}; speculation is one of {', '.join(names)}.",
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
        """Return the guesses of a resolved request's session; ``None`` for none.

        Raises what a drafter of this node raises that was asked for by its name; ``auto`` does
        without, and so does a session whose drafter rank is away.
        """
        drafter = self._drafter(request, model)
        if drafter is None:
            return None
        if request.draft_tree and isinstance(drafter, TreeDrafter):
            drafter.expect_trees()
        vocabulary = model.vocabulary
        return Speculation(
            drafter,
            self._controller(request, model, drafter.name),
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
            draft_tree=journal.draft_tree,
        )
        with contextlib.suppress(PyAgentError):
            return self.open(self.resolve(request, model), model)
        return None

    def _drafter(self, request: GenerationRequest, model: HeadModel) -> Drafter | None:
        choice, pieces = self._choice(request), model.vocabulary.pieces
        if choice == NO_SPECULATION:
            return None
        factories = self._for_model(model)
        if choice != AUTO_SPECULATION:
            # a drafter may have gone while the prompt was read
            self._check(request, (NO_SPECULATION, AUTO_SPECULATION, *factories))
            try:
                return factories[choice].for_model(pieces, request.sampling)
            except Unavailable as error:
                logger.info("an answer is given without guesses: %s", error)
                return None
        for factory in factories.values():
            with contextlib.suppress(PyAgentError):
                return factory.for_model(pieces, request.sampling)
        return None

    def _controller(self, request: GenerationRequest, model: HeadModel, drafter: str) -> Controller:
        placement = model.placement
        ranks = len(placement.ranks)
        if request.draft_length is not None:
            plan = Plan(
                request.draft_length, request.draft_depth or 1, tree=request.draft_tree or False
            )
            return FixedController(plan, ranks=ranks)
        return Controller(
            ranks=ranks,
            max_depth=request.draft_depth,
            lessons=self._archive.get(placement.model, placement.epoch, drafter),
        )
