"""Fixtures of the model tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


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
