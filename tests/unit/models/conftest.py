"""Fixtures of the model tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def llama() -> ModuleType:
    """The module ``llama_slices`` beside this file (tests are not a package)."""
    spec = importlib.util.spec_from_file_location(
        "llama_slices", Path(__file__).with_name("llama_slices.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_slices"] = module
    spec.loader.exec_module(module)
    return module
