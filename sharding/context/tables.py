"""The sketches of many documents as one table, in which a question is looked for.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.sharding.context.records import ChunkId, DocumentRecord
from pyagent_node.sharding.context.shares import Part
from pyagent_node.sharding.context.sketches import Sketches, SketchModel

GROUP_UNKNOWN: Final = 255
"""In a table: the group of a window whose record is not bare."""


class Table(NamedTuple):
    """The sketches of all windows of some documents, and whose they are.

    Row ``w`` is a window of chunk ``ordinals[w]`` of ``records[documents[w]]``, and the
    ``places[w]``-th of that chunk; it is in group ``groups[w]`` (:data:`GROUP_UNKNOWN`: of a record
    that is not bare).
    """

    records: tuple[DocumentRecord, ...]
    sketches: Sketches
    documents: NDArray[np.uint32]
    ordinals: NDArray[np.uint32]
    places: NDArray[np.uint32]
    groups: NDArray[np.uint8]


def table_of(
    records: Iterable[DocumentRecord], model: SketchModel, parts: Mapping[ChunkId, Part]
) -> Table:
    """Return the table of some documents; of bare ones it has those of ``parts``."""
    width = model.bits // 8
    kept: list[DocumentRecord] = []
    packed = [np.zeros((0, width), np.uint8)]
    weights = [np.zeros(0, np.float16)]
    groups = [np.zeros(0, np.uint8)]
    documents, ordinals, places = _empty(), _empty(), _empty()
    for record in records:
        if not record.windows:
            continue
        if record.whole:
            own = [
                (at, parts[chunk])
                for at, row in enumerate(record.chunks)
                if row.windows and (chunk := record.id_of(at)) in parts
            ]
            own = [(at, part) for at, part in own if len(part) and part.width == width]
            for at, part in own:
                packed.append(part.rows())
                weights.append(part.scales())
                documents.append(np.full(len(part), len(kept), np.uint32))
                ordinals.append(np.full(len(part), at, np.uint32))
                places.append(part.at())
                groups.append(np.frombuffer(part.group_of, np.uint8))
            if own:
                kept.append(record)
            continue
        rows, scale = record.packed()
        if rows.shape[1] != width:
            continue
        packed.append(rows)
        weights.append(scale)
        counts = np.array([row.windows for row in record.chunks], np.uint32)
        documents.append(np.full(len(rows), len(kept), np.uint32))
        ordinals.append(np.repeat(np.arange(len(counts), dtype=np.uint32), counts))
        firsts = np.repeat((np.cumsum(counts) - counts).astype(np.uint32), counts)
        places.append(np.arange(len(rows), dtype=np.uint32) - firsts)
        groups.append(np.full(len(rows), GROUP_UNKNOWN, np.uint8))
        kept.append(record)
    return Table(
        tuple(kept),
        Sketches(model, np.concatenate(packed), np.concatenate(weights)),
        np.concatenate(documents),
        np.concatenate(ordinals),
        np.concatenate(places),
        np.concatenate(groups),
    )


def _empty() -> list[NDArray[np.uint32]]:
    return [np.zeros(0, np.uint32)]
