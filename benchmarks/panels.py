"""Small diagrams as SVG, side by side: the same figures, the same file.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

WIDTH, HEIGHT = 360, 250
"""Of one panel, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 52, 96, 34, 36
COLOURS: Final = ("#1b6ca8", "#c8553d", "#588157", "#7b4b94", "#b08900", "#444444")
FLOOR: Final = 0.01
"""Smallest value that a logarithmic axis shows."""


class Line(NamedTuple):
    """A curve: its name and one value for each number along the axis."""

    name: str
    values: Sequence[float]


class Panel:
    """One diagram; ``across`` are the places of the values on the lower axis, a logarithmic one.

    The other axis is logarithmic, too, unless it is ``linear``: then it begins at 0.
    """

    def __init__(
        self, title: str, across: Sequence[int], lines: Sequence[Line], *, linear: bool = False
    ) -> None:
        """Make it of curves that have a value for each place."""
        self._title = title
        self._across = across
        self._lines = lines
        self._linear = linear
        values = [max(0.0 if linear else FLOOR, v) for line in lines for v in line.values]
        if linear:
            self._low, self._high = 0, max(1, math.ceil(max(values)))
        else:
            self._low = math.floor(math.log10(min(values)))
            self._high = max(self._low + 1, math.ceil(math.log10(max(values))))
        self._first, self._last = math.log10(min(across)), math.log10(max(across))

    def _x(self, place: int) -> float:
        span = self._last - self._first or 1.0
        return LEFT + (math.log10(place) - self._first) / span * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        place = value if self._linear else math.log10(max(FLOOR, value))
        share = (place - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def _marks(self) -> list[tuple[float, str]]:
        """Return the values at which the upright axis has a line, and their names."""
        if self._linear:
            values = [self._high * part / 4 for part in range(5)]
            return [(value, f"{value:g}") for value in values]
        return [(10.0**power, _short(power)) for power in range(self._low, self._high + 1)]

    def draw(self, left: int, top: int) -> list[str]:
        """Return the panel's elements, moved to its place."""
        out = [f'<g transform="translate({left},{top})">']
        out.append(f'<text x="{LEFT}" y="18" class="title">{self._title}</text>')
        for value, name in self._marks():
            y = self._y(value)
            out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="left">{name}</text>')
        for place in self._across:
            x = self._x(place)
            out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="mid">{place}</text>')
        taken: list[float] = []
        for line, colour in zip(self._lines, COLOURS, strict=False):
            out += self._curve(line, colour, taken)
        return [*out, "</g>"]

    def _curve(self, line: Line, colour: str, taken: list[float]) -> list[str]:
        points = [(self._x(n), self._y(v)) for n, v in zip(self._across, line.values, strict=True)]
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


def drawing(panels: Sequence[Panel]) -> str:
    """Return the panels as an SVG file, two beside each other."""
    width, height = 2 * WIDTH, -(-len(panels) // 2) * HEIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="11">',
        "<style>.title{font-weight:bold}.grid{stroke:#ddd;fill:none}.line{fill:none;"
        "stroke-width:2}.left{text-anchor:end;fill:#555}.mid{text-anchor:middle;fill:#555}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for at, panel in enumerate(panels):
        out += panel.draw(at % 2 * WIDTH, at // 2 * HEIGHT)
    return "\n".join([*out, "</svg>", ""])
