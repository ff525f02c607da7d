"""The file of what slices on this node were measured to do (see ``speeds``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final, Literal

import msgspec

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.files import read_limited
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.machine import SpeedSource

logger = logging.getLogger("pyagent_node.placements")

MAX_RECORDS: Final = 128
_MAX_FILE: Final = 1 << 18


class SpeedRecord(msgspec.Struct, frozen=True):
    """A measured slice; ``at`` is in Unix seconds, the speeds are those of ``MeasuredSpeed``."""

    model: Digest
    backend: str
    version: str
    threads: int
    slice: Slice
    decode: float
    head: float
    prefill: float
    source: SpeedSource
    at: float

    @property
    def usable(self) -> bool:
        """Whether the figures make sense."""
        speeds = (self.decode, self.head, self.prefill)
        return self.decode > 0 and all(0 <= x < 1e18 for x in speeds)

    @property
    def key(self) -> tuple[str, ...]:
        """What it is a record of."""
        return (self.model, self.backend, str(self.threads), str(self.slice))


class SpeedFile(msgspec.Struct, frozen=True):
    """The file as it is written."""

    version: Literal[1]
    records: list[SpeedRecord]


def read_speeds(path: Path) -> dict[tuple[str, ...], SpeedRecord]:
    """Return the records of a file; none where there is none, or it is damaged."""
    try:
        file = msgspec.json.decode(read_limited(path, _MAX_FILE), type=SpeedFile)
    except (PyAgentError, OSError, msgspec.DecodeError) as error:
        if path.exists():
            logger.warning("%s is left aside: %s", path, error)
        return {}
    return {each.key: each for each in file.records[:MAX_RECORDS] if each.usable}
