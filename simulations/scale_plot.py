"""Draws how a swarm's costs grow with its nodes, as SVG: the same figures, the same file.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyagent_node.simulations.scale import PHASES

if TYPE_CHECKING:
    from pyagent_node.simulations.scale import Size

WIDTH, HEIGHT = 360, 250
"""Of one panel, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 52, 96, 34, 36
COLOURS: Final = ("#1b6ca8", "#c8553d", "#588157", "#7b4b94", "#b08900", "#444444")
FLOOR: Final = 0.01
"""Smallest value that a logarithmic axis shows."""


class Line(NamedTuple):
    """A curve: its name and one value for each number of nodes."""

    name: str
    values: Sequence[float]


class _Panel:
    """One diagram with logarithmic axes."""

    def __init__(self, title: str, nodes: Sequence[int], lines: Sequence[Line]) -> None:
        self._title = title
        self._nodes = nodes
        self._lines = lines
        values = [max(FLOOR, v) for line in lines for v in line.values]
        self._low = math.floor(math.log10(min(values)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(values))))
        self._first, self._last = math.log10(min(nodes)), math.log10(max(nodes))

    def _x(self, nodes: int) -> float:
        span = self._last - self._first or 1.0
        return LEFT + (math.log10(nodes) - self._first) / span * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        share = (math.log10(max(FLOOR, value)) - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self, left: int, top: int) -> list[str]:
        """Return the panel's elements, moved to its place."""
        out = [f'<g transform="translate({left},{top})">']
        out.append(f'<text x="{LEFT}" y="18" class="title">{self._title}</text>')
        for power in range(self._low, self._high + 1):
            y = self._y(10.0**power)
            out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="left">{_short(power)}</text>')
        for nodes in self._nodes:
            x = self._x(nodes)
            out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="mid">{nodes}</text>')
        taken: list[float] = []
        for line, colour in zip(self._lines, COLOURS, strict=False):
            out += self._curve(line, colour, taken)
        return [*out, "</g>"]

    def _curve(self, line: Line, colour: str, taken: list[float]) -> list[str]:
        points = [(self._x(n), self._y(v)) for n, v in zip(self._nodes, line.values, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        name_at = points[-1][1] + 4
        while any(abs(name_at - other) < 12 for other in taken):
            name_at += 1
        taken.append(name_at)
        return [
            f'<path class="line" stroke="{colour}" d="M{path}"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points),
            f'<text x="{WIDTH - RIGHT + 8}" y="{name_at:.1f}" fill="{colour}">{line.name}</text>',
        ]


def _short(power: int) -> str:
    """Return ten to the ``power`` in few letters."""
    return f"{10.0**power:g}" if power < 3 else f"{10 ** (power % 3)}{'kMGT'[power // 3 - 1]}"


def plot(sizes: Sequence[Size]) -> str:
    """Return the plot of ``sizes``, in order of their nodes."""
    sizes = sorted(sizes, key=lambda size: size.nodes)
    nodes = [size.nodes for size in sizes]
    by_phase = [{p.phase: p for p in size.periods} for size in sizes]
    quiet = [phases["quiet"] for phases in by_phase]
    purposes = [p for p in quiet[0].mean if any(each.mean[p].messages >= FLOOR for each in quiet)]
    cost = [size.cpu_seconds / size.virtual_seconds for size in sizes]
    panels = [
        _Panel("processor seconds a virtual second", nodes, [Line("simulator", cost)]),
        _Panel(
            "messages a node and virtual second",
            nodes,
            [Line(p, [each[p].total.messages for each in by_phase]) for p in PHASES]
            + [Line("the busiest", [each.most.messages for each in quiet])],
        ),
        _Panel(
            "quiet: messages a node and second, by purpose",
            nodes,
            [Line(p, [each.mean[p].messages for each in quiet]) for p in purposes],
        ),
        _Panel(
            "bytes a node and virtual second",
            nodes,
            [Line(p, [each[p].total.bytes for each in by_phase]) for p in PHASES]
            + [Line("the busiest", [each.most.bytes for each in quiet])],
        ),
    ]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {2 * HEIGHT}"'
        ' font-family="sans-serif" font-size="11">',
        "<style>.title{font-weight:bold}.grid{stroke:#ddd;fill:none}.line{fill:none;"
        "stroke-width:2}.left{text-anchor:end;fill:#555}.mid{text-anchor:middle;fill:#555}</style>",
        f'<rect width="{2 * WIDTH}" height="{2 * HEIGHT}" fill="white"/>',
    ]
    for at, panel in enumerate(panels):
        out += panel.draw(at % 2 * WIDTH, at // 2 * HEIGHT)
    return "\n".join([*out, "</svg>", ""])
