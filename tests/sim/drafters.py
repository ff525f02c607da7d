"""Drafters for tests: they know the answer, and are as wrong, slow or broken as they are told."""

from __future__ import annotations

import random

from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.simulations.drafters import KINDS, OracleFactory


def oracles(wrong: float = 0.2) -> tuple[Speculators, dict[str, OracleFactory]]:
    """Return one factory of each kind."""

    def complain(what: str) -> None:
        raise AssertionError(what)

    factories = {
        name: OracleFactory(name, lambda: wrong, random.Random(name), complain) for name in KINDS
    }
    return Speculators(factories.values(), clock=lambda: 0.0), factories
