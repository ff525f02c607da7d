"""Fixtures of the model tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest

from pyagent_node.inference.models import fetching
from pyagent_node.simulations.mesh import open_network


def _beside(name: str) -> ModuleType:
    """Import a module that lies beside this file (tests are not a package)."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def llama() -> ModuleType:
    """The module ``llama_slices``: llama.cpp, as plainly as it can be used."""
    return _beside("llama_slices")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module ``tiny_models``: makes small random models."""
    return _beside("tiny_models")


@pytest.fixture(scope="session")
def swarm_module() -> ModuleType:
    """The module ``swarm``: a simulated swarm with a small model."""
    return _beside("swarm")


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
