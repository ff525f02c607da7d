"""Every test of the suite runs once for each engine."""

from __future__ import annotations

import pytest

from .cluster import Opener
from .engines import ENGINES


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest) -> Opener:
    """An engine under test."""
    return ENGINES[request.param]
