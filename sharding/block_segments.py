"""One segment of the disk tier: where its records lie, and how they are found without an index."""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_files import BlockFile
from pyagent_node.sharding.block_records import (
    RECORD_BYTES,
    SEGMENT_HEADER_BYTES,
    Label,
    decode_label,
    decode_segment_header,
)
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.sharding.disk")

DIGITS: Final = 12
SUFFIX: Final = ".kv"


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:0{DIGITS}d}{SUFFIX}"


def segment_number(name: str) -> int | None:
    """Return the number of a segment from its file name, ``None`` for another file."""
    stem = name.removesuffix(SUFFIX)
    good = name.endswith(SUFFIX) and len(stem) == DIGITS and stem.isascii() and stem.isdigit()
    return int(stem) if good else None


class Spot(NamedTuple):
    """Where a record lies in its segment: ``size`` bytes from ``offset`` on."""

    offset: int
    size: int


class Segment:
    """An open segment: ``spots`` of the blocks that count, ``end`` of what may be appended to.

    A ``sealed`` one is appended to no more.
    """

    def __init__(self, number: int, model: Digest, file: BlockFile, end: int) -> None:
        self.number = number
        self.model = model
        self.file = file
        self.end = end
        self.live = 0
        self.spots: dict[BlockKey, Spot] = {}
        self.sealed = False

    def place(self, key: BlockKey, spot: Spot) -> None:
        """Count a record."""
        self.spots[key] = spot
        self.live += spot.size

    def drop(self, key: BlockKey) -> None:
        """Count a record no more."""
        self.live -= self.spots.pop(key).size

    def read(self, key: BlockKey, spot: Spot) -> tuple[Label, bytes] | None:
        """Return label and payload; ``None`` unless they are whole and those of ``key``."""
        data = self.file.read(spot.offset, spot.size)
        label = decode_label(self.model, data)
        if label is None or label.key != key or label.size != spot.size:
            return None
        payload = data[RECORD_BYTES:]
        return (label, payload) if label.fits(payload) else None

    def scan(self, start: int) -> list[tuple[Label, Spot]]:
        """Return the good records from ``start`` to the end, and cut a torn tail off.

        Records whose labels are good and whose payloads are not stay as dead bytes.
        """
        found: list[tuple[Label, Spot]] = []
        size = self.file.size()
        at = start
        while at < size:
            label = decode_label(self.model, self.file.read(at, RECORD_BYTES))
            if label is None or at + label.size > size:
                log.warning(
                    "segment %d of KV blocks ended in %d bytes of an unfinished write;"
                    " they were cut off",
                    self.number,
                    size - at,
                )
                self.file.truncate(at)
                break
            if label.fits(self.file.read(at + RECORD_BYTES, label.length)):
                found.append((label, Spot(at, label.size)))
            at += label.size
        self.end = at
        return found


def open_segment(number: int, file: BlockFile) -> Segment | None:
    """Return a segment as its header says, without records; ``None`` if it has no good header."""
    model = decode_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
    if model is None:
        return None
    return Segment(number, model, file, SEGMENT_HEADER_BYTES)
