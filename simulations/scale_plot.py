"""Draws how a swarm's costs grow with its nodes.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyagent_node.benchmarks.panels import FLOOR, Line, Panel, drawing
from pyagent_node.simulations.scale import PHASES

if TYPE_CHECKING:
    from pyagent_node.simulations.scale import Size


def plot(sizes: Sequence[Size]) -> str:
    """Return the plot of ``sizes``, in order of their nodes."""
    sizes = sorted(sizes, key=lambda size: size.nodes)
    nodes = [size.nodes for size in sizes]
    by_phase = [{p.phase: p for p in size.periods} for size in sizes]
    quiet = [phases["quiet"] for phases in by_phase]
    purposes = [p for p in quiet[0].mean if any(each.mean[p].messages >= FLOOR for each in quiet)]
    cost = [size.cpu_seconds / size.virtual_seconds for size in sizes]
    panels = [
        Panel("processor seconds a virtual second", nodes, [Line("simulator", cost)]),
        Panel(
            "messages a node and virtual second",
            nodes,
            [Line(p, [each[p].total.messages for each in by_phase]) for p in PHASES]
            + [Line("the busiest", [each.most.messages for each in quiet])],
        ),
        Panel(
            "quiet: messages a node and second, by purpose",
            nodes,
            [Line(p, [each.mean[p].messages for each in quiet]) for p in purposes],
        ),
        Panel(
            "bytes a node and virtual second",
            nodes,
            [Line(p, [each[p].total.bytes for each in by_phase]) for p in PHASES]
            + [Line("the busiest", [each.most.bytes for each in quiet])],
        ),
    ]
    return drawing(panels)
