"""Tells what led to a broken invariant in a few dozen lines.  Pure.

A run records thousands of events.  Those that matter to a person are what was done to the swarm
(faults), what it decided (leaders, placements), who died and came back, which answers changed
hands, and the last steps of the nodes that the violation names.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from pyagent_node.simulations.trace import Event

MAIN: Final = 24
"""Lines about the swarm."""
LAST: Final = 12
"""Lines about each node and request that the violation names."""
MOST: Final = 3
"""Nodes, and requests, that are told of."""
STATES: Final = 8
"""Nodes whose state is told of even if the violation does not name them."""
TELLING: Final = frozenset(
    {
        "VIOLATION",
        "crashed",
        "dies",
        "failed",
        "fault",
        "leads",
        "phase",
        "placed",
        "resumed",
        "runner died",
        "suspended",
        "up",
    }
)
"""Kinds of events that are told of every node."""
_COUNTED: Final = {
    "fault": ("fault", "faults"),
    "leads": ("election", "elections"),
    "dies": ("death", "deaths"),
    "placed": ("placement", "placements"),
    "resumed": ("session resumed", "sessions resumed"),
}
_NODES: Final = re.compile(r"\bnodes? (\d+)(?: and (\d+))?")
_REQUESTS: Final = re.compile(r"\brequests? \[?(\d+(?:, \d+)*)")


def named(text: str) -> list[int]:
    """Return the numbers of the nodes that a violation names, each once."""
    found = [int(n) for match in _NODES.finditer(text) for n in match.groups() if n is not None]
    return list(dict.fromkeys(found))


def tell(events: Sequence[Event], *, main: int = MAIN, last: int = LAST) -> list[str]:
    """Return the story of a run as lines.

    First what happened to the swarm up to the violation, then the last of the nodes and requests
    that it names, then how the nodes were in the end.
    """
    broken = [event for event in events if event.kind == "VIOLATION"]
    if not broken:
        return []
    end = next(i for i, event in enumerate(events) if event is broken[0]) + len(broken)
    upto = list(events[:end])
    telling = [event for event in _merged(upto) if event.kind in TELLING]
    details = " ".join(event.detail for event in broken)
    fresh = [event for event in upto if event.kind not in TELLING and event.kind != "pulse"]
    waits = [_repeated(e for e in fresh if _is_of(e, request)) for request in _requests(details)]
    since = min((found[-1].time for found in waits if found), default=None)
    lines = _main_lines(telling, main, since)
    groups = [
        (f"The last of node {node}:", [event for event in fresh if event.node == node])
        for node in named(details)[:MOST]
    ] + [
        (f"The last of request {request}:", [event for event in fresh if _is_of(event, request)])
        for request in _requests(details)[:MOST]
    ]
    for title, found in groups or [("The last events:", fresh)]:
        if found:
            lines += [title, *(str(event) for event in _repeated(found)[-last:])]
    states = [event for event in events if event.kind == "state"]
    involved = [event for event in states if event.node in named(details)]
    if states:
        chosen = states if len(states) <= STATES else involved or states[:STATES]
        lines += ["The nodes in the end:", *(f"  node {e.node}: {e.detail}" for e in chosen)]
    return lines


def _main_lines(telling: Sequence[Event], main: int, since: float | None) -> list[str]:
    """Return what happened to the swarm in ``main`` lines or little more.

    The last of it, and what came just before ``since``, when a trouble that lasts began.
    """
    if len(telling) <= main:
        return [str(event) for event in telling]
    cut = len(telling) - main
    if since is None or telling[cut].time <= since:
        return [f"Before: {_counts(telling[:cut])}.", *(str(event) for event in telling[cut:])]
    began = sum(event.time <= since for event in telling)
    early = telling[max(0, began - main // 2) : began]
    before, between = telling[: began - len(early)], telling[began : cut + len(early)]
    lines = [f"Before: {_counts(before)}."] if before else []
    lines += [*(str(event) for event in early), f"Then: {_counts(between)}."]
    return lines + [str(event) for event in telling[cut + len(early) :]]


def _requests(text: str) -> list[int]:
    """Return the numbers of the requests that a violation names, each once."""
    found = [int(n) for match in _REQUESTS.finditer(text) for n in match[1].split(",")]
    return list(dict.fromkeys(found))


def _is_of(event: Event, request: int) -> bool:
    return event.kind in ("answered", "asker") and event.detail.startswith(f"{request}:")


def _repeated(events: Iterable[Event]) -> list[Event]:
    """Return the events, of those that say the same one after the other the first alone."""
    told: list[Event] = []
    for _, group in itertools.groupby(events, key=lambda event: (event.kind, event.detail)):
        first, *again = group
        more = len(again)
        detail = f"{first.detail} (and {more} times more)" if more else first.detail
        told.append(first._replace(detail=detail))
    return told


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
    """Return how many of what happened: ``9 faults, 1 election``."""
    counts = Counter(event.kind for event in events)
    told = [
        f"{counts[kind]} {one if counts[kind] == 1 else many}"
        for kind, (one, many) in _COUNTED.items()
        if counts[kind]
    ]
    return ", ".join(told) or f"{sum(counts.values())} events"
