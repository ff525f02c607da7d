"""What faults there are, in words: for people who choose a mix or write a schedule.  Pure."""

from __future__ import annotations

import inspect
import random
from typing import get_args

from msgspec.inspect import StructType, type_info

from pyagent_node.simulations.draws import MIXES
from pyagent_node.simulations.fault_kinds import Fault

SAMPLE_NODES = 7


def mixes() -> dict[str, list[str]]:
    """Return the names of the faults in each mix."""
    rng = random.Random(0)  # noqa: S311 - any will do
    return {
        name: sorted({_tag(type(draw(rng, 0.0, SAMPLE_NODES))) for draw in draws})
        for name, draws in MIXES.items()
    }


def kinds() -> dict[str, str]:
    """Return the first line of what is known about each kind of fault."""
    found = {}
    for kind in get_args(Fault):
        text = inspect.getdoc(kind) or ""
        found[_tag(kind)] = text.splitlines()[0]
    return found


def _tag(kind: type) -> str:
    info = type_info(kind)
    assert isinstance(info, StructType), "faults are structs"
    return str(info.tag)
