"""Tells what led to a broken invariant in a few dozen lines.  Pure.

A run records thousands of events.  Those that matter to a person are what was done to the swarm
(faults), what it decided (leaders, placements), who died and came back, which answers changed
hands, and the last steps of the nodes that the violation names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from pyagent_node.simulations.trace import Event

MAIN: Final = 24
"""Lines about the swarm."""
LAST: Final = 12
"""Lines about the nodes that the violation names."""
TELLING: Final = frozenset(
    {
        "VIOLATION",
        "crashed",
        "dies",
        "failed",
        "fault",
        "leads",
        "moved",
        "phase",
        "placed",
        "resumed",
        "runner died",
        "unplaced",
        "up",
    }
)
"""Kinds of events that are told of every node."""
_COUNTED: Final = ("fault", "leads", "dies", "placed", "resumed", "answered")
_NODES: Final = re.compile(r"\bnodes? (\d+)(?: and (\d+))?")


def named(text: str) -> list[int]:
    """Return the numbers of the nodes that a violation names, each once."""
    found = [int(n) for match in _NODES.finditer(text) for n in match.groups() if n is not None]
    return list(dict.fromkeys(found))


def tell(events: Sequence[Event], *, main: int = MAIN, last: int = LAST) -> list[str]:
    """Return the story of a run as lines: the swarm up to the violation, then who was involved."""
    broken = [event for event in events if event.kind == "VIOLATION"]
    if not broken:
        return []
    end = next(i for i, event in enumerate(events) if event is broken[0]) + len(broken)
    upto = list(events[:end])
    telling = [event for event in _merged(upto) if event.kind in TELLING]
    lines = []
    if len(telling) > main:
        left_out, telling = telling[:-main], telling[-main:]
        lines.append(f"Before: {_counts(left_out)}.")
    lines += [str(event) for event in telling]
    nodes = list(dict.fromkeys(n for event in broken for n in named(event.detail)))
    shown = set(telling)
    for node in nodes[:3]:
        own = [event for event in upto if event.node == node]
        fresh = [event for event in own[-last:] if event not in shown]
        if fresh:
            lines += [f"The last of node {node}:", *(str(event) for event in fresh)]
    if not nodes:
        fresh = [event for event in upto[-last:] if event not in shown]
        if fresh:
            lines += ["The last events:", *(str(event) for event in fresh)]
    return lines


def _merged(events: Iterable[Event]) -> list[Event]:
    """Return the events, with the same of several nodes at one time as one of the swarm."""
    merged: list[Event] = []
    who: list[int] = []
    for event in events:
        before = merged[-1] if merged else None
        same = (
            before is not None
            and event.node is not None
            and who
            and (before.time, before.kind, before.detail) == (event.time, event.kind, event.detail)
        )
        if same and before is not None and event.node is not None:
            who.append(event.node)
            merged[-1] = before._replace(node=None)
            continue
        if len(who) > 1:
            merged[-1] = _all_of(merged[-1], who)
        merged.append(event)
        who = [event.node] if event.node is not None else []
    if len(who) > 1:
        merged[-1] = _all_of(merged[-1], who)
    return merged


def _all_of(event: Event, nodes: Sequence[int]) -> Event:
    return event._replace(detail=f"{event.detail} (nodes {', '.join(map(str, nodes))})".strip())


def _counts(events: Iterable[Event]) -> str:
    """Return how many of what happened: ``9 faults, 3 elections``."""
    words = {
        "fault": "faults",
        "leads": "elections",
        "dies": "deaths",
        "placed": "placements",
        "resumed": "sessions resumed",
        "answered": "answers",
    }
    counts = Counter(event.kind for event in events)
    told = [f"{counts[kind]} {words[kind]}" for kind in _COUNTED if counts[kind]]
    return ", ".join(told) or f"{sum(counts.values())} events"
