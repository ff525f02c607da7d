"""What a node's sessions with one drafter have taught, for those that begin later: pure.

It holds no text: what passes and guesses take, and how often guesses turned out right.  A session
goes by it from its first step on, and by what it sees itself as soon as that says more.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from pyagent_node.base.types import Digest
from pyagent_node.inference.drafting.calibration import Calibration
from pyagent_node.inference.drafting.costs import CostModel
from pyagent_node.inference.drafting.profile import Profile

MAX_LESSONS: Final = 32
"""Pairs of a placement and a drafter that are remembered; those not used for longest go."""
CALIBRATION_MEMORY: Final = 0.99
"""What is left of an outcome's weight in the calibration of all sessions after the next."""
WORTH_SHARE: Final = 0.1
PROFILE_SHARE: Final = 0.05
"""How much of the average over all sessions the newest draft makes up."""


class Lessons:
    """What sessions of one placement with one drafter have taught; they share it.

    ``costs`` may share what passes take with the lessons of other drafters of the placement.
    """

    def __init__(self, costs: CostModel | None = None) -> None:
        self.costs = costs or CostModel()
        self.calibration = Calibration(memory=CALIBRATION_MEMORY)
        self.following = Calibration(memory=CALIBRATION_MEMORY)
        """How often steps counted that were sent before the one they follow was answered."""
        self.profile = Profile(share=PROFILE_SHARE)
        self.worth: float | None = None
        """Tokens that asking the drafter gained over plain decoding, a draft, of late."""

    def note_worth(self, worth: float) -> None:
        """Take in what asking the drafter gained."""
        known = self.worth if self.worth is not None else worth
        self.worth = known + (worth - known) * WORTH_SHARE


class Archive:
    """The lessons of a node, by placement and drafter, as many as :data:`MAX_LESSONS`."""

    def __init__(self) -> None:
        self._lessons: OrderedDict[tuple[Digest, int, str], Lessons] = OrderedDict()

    def get(self, model: Digest, epoch: int, drafter: str) -> Lessons:
        """Return the lessons for sessions of a placement with a drafter.

        A new placement of a model takes other times, but its guesses are right as often.
        """
        key = model, epoch, drafter
        known = self._lessons.get(key)
        if known is None:
            known = self._lessons[key] = self._fresh(model, epoch, drafter)
        self._lessons.move_to_end(key)
        while len(self._lessons) > MAX_LESSONS:
            self._lessons.popitem(last=False)
        return known

    def _fresh(self, model: Digest, epoch: int, drafter: str) -> Lessons:
        lessons = Lessons()
        for (other_model, other_epoch, name), other in self._lessons.items():
            if other_model != model:
                continue
            if other_epoch == epoch:
                lessons.costs = other.costs.of_another_drafter()
            if name == drafter:
                lessons.calibration, lessons.profile = other.calibration, other.profile
                lessons.following = other.following
        return lessons
