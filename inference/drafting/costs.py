"""What a pass takes, learnt from passes: pure.

The time from sending a step to its result is taken for a straight line over the width of the step,
a + b * width, fitted as passes come in; where kernels have steps of their own, what was measured at
a width corrects the line there.
"""

from __future__ import annotations

from typing import Final

MEAN_MEMORY: Final = 0.93
"""What is left of an observation's weight in the level after the next: about 14 count."""
SLOPE_MEMORY: Final = 0.985
PRIOR_SPREAD: Final = 3.0
"""The slope that is expected beforehand weighs as much as this much variance of widths."""
OUTLIER: Final = 3.0
"""A pass that took longer than this many times the expected counts as so many times."""
NEVER: Final = 1e-9
PACE_WEIGHT: Final = 3.0
"""What ranks say of their computing weighs as much as this many steps that followed another."""
WASTE: Final = 0.5
WASTE_WEIGHT: Final = 4.0
LEAST_WASTE: Final = 0.05
"""Void steps are never thought to be had for nothing: ranks may have other sessions to serve."""
TOKEN_SHARE: Final = 0.3
"""Expected beforehand: a further token costs this part of a pass's computing (CPUs: 0.15-0.5)."""
BLIND_SHARE: Final = 0.1
"""The same, of all the time of a pass, where it is not known what of it was computing."""


class LineFit:
    """A line through (width, seconds), recent points counting for more."""

    def __init__(self) -> None:
        self.count = 0
        self.slope = 0.0
        """Seconds a token; never negative."""
        self._mean_width = 1.0
        self._mean = 0.0
        self._weight = 0.0
        self._spread = 0.0
        self._product = 0.0
        self._residuals: dict[int, tuple[float, float]] = {}
        self._expected_slope = 0.0

    def expect(self, slope: float) -> None:
        """Take in what the slope should be, where widths have not told it yet."""
        self._expected_slope = slope
        self._refit()

    def likely_slope(self, share: float) -> float:
        """Return the slope if a token takes ``share`` of what a pass of width 1 takes."""
        return share * self._mean / (1.0 + share * (self._mean_width - 1.0))

    def _refit(self) -> None:
        product = self._product + PRIOR_SPREAD * self._expected_slope
        self.slope = max(0.0, product / (self._spread + PRIOR_SPREAD))

    @property
    def intercept(self) -> float:
        """Seconds a pass, whatever its width; never negative."""
        return max(0.0, self._mean - self.slope * self._mean_width)

    def seen(self, width: int) -> float:
        """Return how many passes of ``width`` there were of late, older ones counting for less."""
        return self._residuals.get(width, (0.0, 0.0))[0]

    def seconds(self, width: int) -> float:
        """Return what a pass of ``width`` tokens takes."""
        line = max(self._mean - self.slope * (self._mean_width - width), 0.0)
        weight, residual = self._residuals.get(width, (0.0, 0.0))
        return max(NEVER, line + residual * weight / (weight + 2.0))

    def add(self, width: int, seconds: float) -> None:
        """Take in a pass."""
        if self.count >= 3:
            seconds = min(seconds, OUTLIER * self.seconds(width))
        self.count += 1
        self._weight = self._weight * MEAN_MEMORY + 1.0
        off_width, off = width - self._mean_width, seconds - self._mean
        if self.count == 1:
            off_width, off = 0.0, 0.0
            self._mean_width, self._mean = float(width), seconds
        self._mean_width += off_width / self._weight
        self._mean += off / self._weight
        self._spread = self._spread * SLOPE_MEMORY + off_width * (width - self._mean_width)
        self._product = self._product * SLOPE_MEMORY + off_width * (seconds - self._mean)
        self._refit()
        for other, (weight, residual) in list(self._residuals.items()):
            self._residuals[other] = weight * SLOPE_MEMORY, residual
        weight, residual = self._residuals.get(width, (0.0, 0.0))
        weight = weight + 1.0
        line = self._mean - self.slope * (self._mean_width - width)
        self._residuals[width] = weight, residual + (seconds - line - residual) / min(weight, 6.0)


class _Mean:
    """The mean of recent values; beforehand ``value``, as :data:`WASTE_WEIGHT` of them."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._weight = WASTE_WEIGHT

    def add(self, value: float) -> None:
        self._weight = self._weight * MEAN_MEMORY + 1.0
        self.value += (value - self.value) / self._weight


class CostModel:
    """What passes, their computing and guesses take.

    Sessions of one model on one node may share one: it holds no text.
    """

    def __init__(self) -> None:
        self._passes = LineFit()
        self._computing = LineFit()
        self._pace = LineFit()
        self._waste = _Mean(WASTE)
        self._drafted = 0.0
        self._draft_seconds = 0.0

    def of_another_drafter(self) -> CostModel:
        """Return a model of the same passes, shared from now on, whose guesses cost otherwise."""
        other = CostModel()
        other._passes, other._computing = self._passes, self._computing
        other._pace, other._waste = self._pace, self._waste
        return other

    @property
    def known(self) -> bool:
        """Whether any pass has been seen."""
        return self._passes.count > 0

    @property
    def pass_seconds(self) -> float:
        """What a pass takes, whatever its width (a)."""
        return self._passes.intercept

    @property
    def token_seconds(self) -> float:
        """What each token of a pass adds (b)."""
        return self._passes.slope

    @property
    def plain_seen(self) -> float:
        """How many plain passes there were of late."""
        return self._passes.seen(1)

    @property
    def draft_known(self) -> bool:
        """Whether any guess has been timed."""
        return self._drafted > 0

    @property
    def draft_seconds(self) -> float:
        """What a guess takes (d)."""
        return self._draft_seconds / self._drafted if self._drafted > 0 else 0.0

    def seconds(self, width: int) -> float:
        """Return the time from sending a step of ``width`` tokens to its result."""
        return self._passes.seconds(width)

    @property
    def computing_known(self) -> bool:
        """Whether ranks have told how long they computed."""
        return self._computing.count > 0

    def busy_seconds(self, width: int, ranks: int) -> float:
        """Return for how long such a step keeps one rank from taking the next; 0 if unknown."""
        return self._computing.seconds(width) / ranks if self._computing.count else 0.0

    def pace_seconds(self, width: int, ranks: int) -> float:
        """Return how long after the result before it that of such a step comes.

        The step was sent while that one was in flight.  As far as that was not seen yet, it is the
        time that one of the ranks needs.
        """
        busy, seen = self.busy_seconds(width, ranks), self._pace.count
        if not seen:
            return busy
        return (PACE_WEIGHT * busy + seen * self._pace.seconds(width)) / (PACE_WEIGHT + seen)

    @property
    def waste(self) -> float:
        """By which part of a rank's time for it a void step holds up what comes instead."""
        return max(LEAST_WASTE, self._waste.value)

    def add_waste(self, late: float, void: float) -> None:
        """Take in that a step was ``late``, behind void ones that take a rank ``void`` seconds."""
        if void > NEVER:
            self._waste.add(min(1.0, max(-1.0, late / void)))

    def add_pace(self, width: int, seconds: float, ranks: int) -> None:
        """Take in how long after the result before it that of a step came."""
        self._pace.add(width, seconds)
        self._pace.expect(self._computing.slope / ranks)

    def add_pass(self, width: int, seconds: float, compute_seconds: float) -> None:
        """Take in a step that was alone in flight."""
        self._passes.add(width, seconds)
        if compute_seconds > 0:
            self._computing.add(width, compute_seconds)
            self._computing.expect(self._computing.likely_slope(TOKEN_SHARE))
            self._passes.expect(self._computing.slope)
        elif not self._computing.count:
            self._passes.expect(self._passes.likely_slope(BLIND_SHARE))

    def add_draft(self, guesses: int, seconds: float) -> None:
        """Take in that ``guesses`` were made in ``seconds``."""
        self._drafted = self._drafted * MEAN_MEMORY + guesses
        self._draft_seconds = self._draft_seconds * MEAN_MEMORY + seconds
