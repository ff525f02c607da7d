"""A served API on a free port, with a deterministic engine behind it."""

from collections.abc import AsyncIterator

import pytest

from pyagent_node.simulations.api import SimulatedApi, simulated_api


@pytest.fixture
async def api() -> AsyncIterator[SimulatedApi]:
    async with simulated_api() as running:
        yield running
