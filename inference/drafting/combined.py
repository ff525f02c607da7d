"""The suffix drafter where it is sure of itself, a model elsewhere.

Both are judged by what came true, so that their confidences can be compared.  A look at the text
costs nothing: the model is asked only when it usually promises more than the text does now.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.drafting.calibration import Calibration, Judge
from pyagent_node.inference.drafting.growth import merged
from pyagent_node.inference.drafting.port import Draft, Drafter, DrafterFactory, PreparedDrafter
from pyagent_node.inference.drafting.suffix import SuffixDrafter, SuffixDrafters, expected
from pyagent_node.inference.sampling import SamplingParams

logger = logging.getLogger("pyagent_node.drafter")

ENOUGH: Final = 0.8
"""A draft that is had for nothing may promise so much less than one of the model."""
SHARE: Final = 0.15
FEW: Final = 3


class CombinedDrafter:
    """Guesses with whichever of two drafters promises more."""

    def __init__(self, name: str, suffix: SuffixDrafter, model: Drafter) -> None:
        self._name = name
        self._suffix = suffix
        self._model = model
        self._judge = Judge()
        self._calibration = Calibration()
        self._model_works = True
        self._promise = 0.0
        self._asked = 0

    @property
    def name(self) -> str:
        """The name it was chosen by."""
        return self._name

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first."""
        self._suffix.extend(tokens)
        self._model.extend(tokens)
        for outcome in self._judge.accepted(tokens):
            self._calibration.add(outcome.source, outcome.index, outcome.claim, hit=outcome.hit)

    async def prepare(self) -> None:
        """Let the model read the session's tokens so far, if it takes time for that."""
        if isinstance(self._model, PreparedDrafter):
            try:
                await self._model.prepare()
            except PyAgentError as error:
                self._give_up(error)

    def _give_up(self, error: PyAgentError) -> None:
        """Go on with the text alone."""
        self._model_works = False
        logger.warning("%s fails, the session's own text is left to guess: %s", self._name, error)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return the draft that promises more; see the port.

        Its confidences are calibrated.  A model that fails is not asked again.
        """
        seen = self._calibrated(self._suffix.look(ahead, limit, floor=floor), ahead)
        if not self._model_works:
            return seen
        if self._asked >= FEW and expected(seen) >= ENOUGH * self._promise and seen.tokens:
            return seen
        thought = await self._think(ahead, limit, floor)
        if thought is None:
            return seen
        self._asked += 1
        share = max(SHARE, 1.0 / self._asked)
        self._promise += (expected(thought) - self._promise) * share
        return seen if expected(seen) > expected(thought) else thought

    def expect_trees(self) -> None:
        """Do nothing: it makes trees of chains."""

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return the best guesses of both drafters' chains, a branch each."""
        seen = self._calibrated(self._suffix.look(ahead, limit, floor=floor), ahead)
        thought = await self._think(ahead, limit, floor) if self._model_works else None
        return merged((seen, thought) if thought is not None else (seen,), limit, self._name)

    async def _think(self, ahead: Sequence[int], limit: int, floor: float) -> Draft | None:
        """Return the model's draft; ``None`` when it has failed."""
        try:
            made = await self._model.propose(ahead, limit, floor=floor)
        except PyAgentError as error:
            self._give_up(error)
            return None
        return self._calibrated(made, ahead)

    def _calibrated(self, draft: Draft, ahead: Sequence[int]) -> Draft:
        self._judge.wait_for(draft, ahead)
        odds = self._calibration.probabilities(draft, len(ahead))
        return Draft(draft.tokens, tuple(odds), draft.source)

    async def aclose(self) -> None:
        """Release both; idempotent."""
        await self._suffix.aclose()
        await self._model.aclose()


class CombinedDrafters:
    """Makes combined drafters, chosen by ``name``."""

    def __init__(self, name: str, suffix: SuffixDrafters, model: DrafterFactory) -> None:
        self._name = name
        self._suffix = suffix
        self._model = model

    @property
    def name(self) -> str:
        """The name that requests choose it by."""
        return self._name

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> CombinedDrafter:
        """Return a drafter for a session; what the model refuses is refused."""
        model = self._model.for_model(pieces, sampling, tenant=tenant)
        return CombinedDrafter(
            self._name, self._suffix.for_model(pieces, sampling, tenant=tenant), model
        )
