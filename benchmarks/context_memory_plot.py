"""Draws memory against context length, and quality beside it, as SVG.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pyagent_node.benchmarks.context_memory_types import ARMS, OFF, ONCE, MemoryRow
from pyagent_node.benchmarks.panels import Line, Panel, drawing

_MIB: Final = 1 << 20


def plot(rows: Sequence[MemoryRow]) -> str:
    """Return the plot of ``rows``, which have every arm at every length."""
    lengths = sorted({row.tokens for row in rows})
    found = {(row.arm, row.tokens): row for row in rows}
    arms = [arm for arm in ARMS if all((arm, length) in found for length in lengths)]

    def lines(read: Callable[[MemoryRow], float]) -> list[Line]:
        return [Line(arm, [read(found[arm, length]) for length in lengths]) for arm in arms]

    facts = lines(lambda row: row.later)
    if ONCE in arms:
        before = [found[ONCE, length].asked or 0.0 for length in lengths]
        facts.append(Line(f"{ONCE}, asked", before))
    panels = [
        Panel("KV held, MiB", lengths, lines(lambda row: row.bytes / _MIB)),
        Panel("most KV held at once, MiB", lengths, lines(lambda row: row.most_bytes / _MIB)),
        Panel("resident KV, MiB", lengths, lines(lambda row: row.resident / _MIB)),
        Panel("facts told right", lengths, facts, linear=True),
        Panel(
            f"perplexity, in parts of {OFF}",
            lengths,
            lines(lambda row: row.perplexity / found[OFF, row.tokens].perplexity),
            linear=True,
        ),
    ]
    return drawing(panels)
