"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest

from pyagent_node.inference.models import fetching
from pyagent_node.simulations.mesh import open_network
from tests.unit.models import llama_slices, swarm, tiny_models


@pytest.fixture(scope="session")
def llama() -> ModuleType:
    """The module ``llama_slices``: llama.cpp, as plainly as it can be used."""
    return llama_slices


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module ``tiny_models``: makes small random models."""
    return tiny_models


@pytest.fixture(scope="session")
def swarm_module() -> ModuleType:
    """The module ``swarm``: a simulated swarm with a small model."""
    return swarm


@pytest.fixture(scope="session")
def tiny_source(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole model."""
    path: Path = tiny.tiny_model(tmp_path_factory.mktemp("source") / "tiny.gguf", tokens=True)
    return path


@pytest.fixture(scope="session")
def tiny_data(tiny_source: Path) -> bytes:
    """The bytes of ``tiny_source``."""
    return tiny_source.read_bytes()


@pytest.fixture
def swarming(
    swarm_module: ModuleType,
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., object]:
    """Open a swarm: ``async with swarming(latency=0.001) as swarm``."""
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.001)

    @asynccontextmanager
    async def make(latency: float = 0.0) -> AsyncIterator[object]:
        async with open_network(latency=latency) as network:
            yield swarm_module.Swarm(network, tiny_source, tmp_path)

    return make
