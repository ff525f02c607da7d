"""What a node finds out about its machine: speeds, memories, power.  Pure values."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from pyagent_node.base.types import Slice

SpeedSource = Literal["sessions", "loading", "others", "estimate"]
"""Where a speed comes from: real sessions, a short run at loading, other models on the same node
and backend, or two benchmarks of the processor."""


class MeasuredSpeed(msgspec.Struct, frozen=True):
    """How fast a backend computed a slice of the model in question (of others: ``others``).

    ``decode`` are bytes of the layers' weights a second in steps of one token, ``head`` those of
    the output head (one large product, which is faster), ``prefill`` floating-point operations of
    layers a second in pieces of prompts; the latter two are 0 where they were not measured.
    """

    backend: str
    threads: int
    decode: float
    prefill: float
    source: SpeedSource
    slice: Slice | None = None
    head: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether the figures make sense."""
        others = (figure for figure in (self.prefill, self.head) if figure)
        return all(map(sensible, (self.decode, *others)))


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory that weights can lie in; ``unified`` is shared by processor and GPU."""

    kind: Literal["ram", "vram", "unified"]
    total_bytes: int
    free_bytes: int


class Power(msgspec.Struct, frozen=True):
    """What a machine runs on; ``charge`` is in percent.

    ``saver`` says that it was told to save power, ``throttled`` that heat slows it down.
    """

    supply: Literal["mains", "battery", "unknown"] = "unknown"
    charge: float | None = None
    saver: bool = False
    throttled: bool = False


def sensible(figure: float) -> bool:
    """Whether a figure is one that a machine can have."""
    return math.isfinite(figure) and 0 < figure < 1e18
