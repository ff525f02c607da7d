"""How a context's costs grow with its size: rows of runs on daemons, and of an index alone.

A row of daemons is a run of ``context_swarm``.  Where so many documents are more than a machine can
embed in minutes, the index alone is measured: sketches of random vectors, as many as documents of
that size have windows, by the axes of MiniLM.  What searching costs depends on their number only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import read_limited
from pyagent_node.base.limits import MIB
from pyagent_node.benchmarks.context_swarm import ContextReport
from pyagent_node.benchmarks.panels import Line, Panel, drawing
from pyagent_node.sharding.context.defaults import default_model
from pyagent_node.sharding.context.index import RERANKED
from pyagent_node.sharding.context.minilm import DIMENSIONS, IDENTITY
from pyagent_node.sharding.context.sketches import BITS, Sketches

SIZES: Final = (10_000, 100_000, 1_000_000)
"""Tokens of the runs on daemons,"""
INDEX_ONLY: Final = 10_000_000
"""and of the index alone: as many or more."""
WINDOWS_PER_TOKEN: Final = 30_842 / 1_018_931
"""Of the standard library in the run of a million tokens."""
QUESTIONS: Final = 100
BLOCK: Final = 8192
WEIGHT_BYTES: Final = 2


class GrowthRow(msgspec.Struct, frozen=True, kw_only=True):
    """One size.  ``nodes`` is 0 for the index alone, whose other figures are null.

    ``index_bytes_per_token`` is on every node, ``chunk_bytes_per_token`` of texts and vectors over
    all of them, copies counted.
    """

    tokens: int
    nodes: int
    windows: int
    index_bytes_per_token: float
    query_ms_p50: float
    query_ms_p99: float
    tokens_per_second: float | None = None
    chunk_bytes_per_token: float | None = None
    recall_at_8: float | None = None
    exact_recall_at_8: float | None = None


class GrowthReport(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of all sizes, the smallest first."""

    bench: str
    time: float
    machine: dict[str, str | int]
    rows: tuple[GrowthRow, ...]


class SwarmFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a row needs of a report of ``bench context``; it may lie in a file of such a run."""

    tokens: int
    nodes: int
    windows: int
    index_bytes: int
    chunk_bytes: int
    tokens_per_second: float
    query_ms_p50: float
    query_ms_p99: float
    recall_at_8: float
    exact_recall_at_8: float


def row_of(report: SwarmFigures | ContextReport) -> GrowthRow:
    """Return the row of a run on daemons."""
    return GrowthRow(
        tokens=report.tokens,
        nodes=report.nodes,
        windows=report.windows,
        index_bytes_per_token=round(report.index_bytes / report.tokens, 3),
        chunk_bytes_per_token=round(report.chunk_bytes / report.tokens, 2),
        query_ms_p50=report.query_ms_p50,
        query_ms_p99=report.query_ms_p99,
        tokens_per_second=report.tokens_per_second,
        recall_at_8=report.recall_at_8,
        exact_recall_at_8=report.exact_recall_at_8,
    )


def rows_in(path: Path) -> list[GrowthRow]:
    """Return the rows that an earlier run stored, one of this benchmark or of ``bench context``.

    Raises :class:`CorruptData` (``bad_report``) for another file, and what reading raises.
    """
    data = read_limited(path, 16 * MIB)
    try:
        if b'"rows"' in data:
            return list(msgspec.json.decode(data, type=GrowthReport).rows)
        return [row_of(msgspec.json.decode(data, type=SwarmFigures))]
    except (msgspec.DecodeError, ValueError):
        raise CorruptData(
            f"{path} holds no report of bench context.",
            code="bad_report",
            remedy="Name files that `bench context` stored, or wrote with --json.",
        ) from None


def joined(rows: Sequence[GrowthRow]) -> tuple[GrowthRow, ...]:
    """Return rows by size; of several of one size and number of nodes the last counts."""
    by_size = {(row.tokens, row.nodes): row for row in rows}
    return tuple(by_size[key] for key in sorted(by_size))


def index_alone(
    tokens: int, *, seed: int = 0, clock: Callable[[], float] = time.perf_counter
) -> GrowthRow:
    """Measure the index of so many tokens: scanning all sketches for the best windows."""
    generator = np.random.Generator(np.random.PCG64(seed))
    model = default_model(IDENTITY, DIMENSIONS).model
    windows = max(1, round(tokens * WINDOWS_PER_TOKEN))
    packed = np.empty((windows, BITS // 8), np.uint8)
    weights = np.empty(windows, np.float16)
    for at in range(0, windows, BLOCK):
        some = generator.standard_normal((min(BLOCK, windows - at), DIMENSIONS)).astype(np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
        packed[at : at + len(some)], weights[at : at + len(some)] = model.sketch(some)
    sketches = Sketches(model, packed, weights)
    took: list[float] = []
    for _ in range(QUESTIONS):
        question = generator.standard_normal(DIMENSIONS).astype(np.float32)
        began = clock()
        sketches.nearest(question / np.float32(np.linalg.norm(question)), RERANKED)
        took.append((clock() - began) * 1e3)
    return GrowthRow(
        tokens=tokens,
        nodes=0,
        windows=windows,
        index_bytes_per_token=round(windows * (BITS // 8 + WEIGHT_BYTES) / tokens, 3),
        query_ms_p50=round(float(np.percentile(took, 50)), 2),
        query_ms_p99=round(float(np.percentile(took, 99)), 2),
    )


def plot(rows: Sequence[GrowthRow]) -> str:
    """Return the curves of the runs on daemons as SVG: costs against tokens.

    Raises :class:`CorruptData` (``bad_report``) where there is none.
    """
    swarm = [row for row in rows if row.nodes]
    if not swarm:
        raise CorruptData(
            "There is nothing to draw: no run on daemons.",
            code="bad_report",
            remedy="Leave --tokens out, or name stored runs with --with.",
        )
    across = [row.tokens for row in swarm]
    daemons = " or ".join(str(count) for count in sorted({row.nodes for row in swarm}))
    return drawing(
        [
            Panel(
                "tokens added a second",
                across,
                [Line(f"{daemons} daemons", [row.tokens_per_second or 0.0 for row in swarm])],
            ),
            Panel(
                "milliseconds a question",
                across,
                [
                    Line("p50", [row.query_ms_p50 for row in swarm]),
                    Line("p99", [row.query_ms_p99 for row in swarm]),
                ],
            ),
            Panel(
                "bytes a token",
                across,
                [
                    Line("every node", [row.index_bytes_per_token for row in swarm]),
                    Line("texts, vectors", [row.chunk_bytes_per_token or 0.0 for row in swarm]),
                ],
            ),
            Panel(
                "recall@8",
                across,
                [
                    Line("found", [row.recall_at_8 or 0.0 for row in swarm]),
                    Line("exact search", [row.exact_recall_at_8 or 0.0 for row in swarm]),
                ],
                linear=True,
            ),
        ]
    )
