"""What happens while the answer is made: cuts, worse links, daemons that die and come back.  Pure.

Times count from the moment at which the question is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from pyagent_node.simulations.lab.link import LinkSpec
from pyagent_node.simulations.lab.parts import (
    Host,
    LinkTable,
    Strict,
    bad_scenario,
    read_link,
    read_side,
    read_span,
)

MAX_EVENTS: Final = 64

Pair = frozenset[str]
"""The names of two sites; of one, for the links between the hosts in it."""


class _Event(Strict, frozen=True, kw_only=True):
    at: str


class Partition(_Event, frozen=True, kw_only=True, tag="partition", tag_field="do"):
    """No packet passes between two sides (one way: from the first to the second)."""

    sides: tuple[tuple[str, ...], tuple[str, ...]]
    lasts: str | None = None
    one_way: bool = False


class Degrade(LinkTable, frozen=True, kw_only=True, tag="degrade", tag_field="do"):
    """A link becomes what is said; what is not said stays."""

    at: str
    between: tuple[str, str]
    lasts: str | None = None


class Heal(_Event, frozen=True, kw_only=True, tag="heal", tag_field="do"):
    """Every partition and every worse link ends."""


class Kill(_Event, frozen=True, kw_only=True, tag="kill", tag_field="do"):
    """The daemon of a host ends as by a power cut."""

    host: str


class Start(_Event, frozen=True, kw_only=True, tag="start", tag_field="do"):
    """The daemon of a host is started again."""

    host: str


Event = Partition | Degrade | Heal | Kill | Start


class Cut(msgspec.Struct, frozen=True):
    """No packet of ``left`` reaches ``right`` (host names) from ``start`` until before ``end``.

    Both ways unless ``one_way``; ``end`` may be infinite.
    """

    start: float
    end: float
    left: frozenset[str]
    right: frozenset[str]
    one_way: bool

    def severs(self, source: str, target: str) -> bool:
        """Whether packets of ``source`` to ``target`` are stopped while the cut lasts."""
        if source in self.left and target in self.right:
            return True
        return not self.one_way and source in self.right and target in self.left


class Change(msgspec.Struct, frozen=True):
    """From ``at`` on the links of a pair are as ``spec`` says (``None``: as at the beginning)."""

    at: float
    pair: Pair
    spec: LinkSpec | None


class Act(msgspec.Struct, frozen=True):
    """What happens to the daemon of a host."""

    at: float
    host: str
    do: Literal["kill", "start"]


class Timeline(msgspec.Struct, frozen=True):
    """All that happens; each part in the order of time."""

    cuts: tuple[Cut, ...] = ()
    changes: tuple[Change, ...] = ()
    acts: tuple[Act, ...] = ()


def read_timeline(
    events: Sequence[Event],
    hosts: Sequence[Host],
    spec_of: Callable[[Pair], LinkSpec],
    asked: str,
) -> Timeline:
    """Check the events of a file; ``asked`` is the host that must live to give the answer."""
    if len(events) > MAX_EVENTS:
        raise bad_scenario(f"it has {len(events)} events; allowed are {MAX_EVENTS}")
    timed = sorted(
        ((read_span(e.at, f"event[{n}].at"), n, e) for n, e in enumerate(events)),
        key=lambda item: item[:2],
    )
    heals = [at for at, _, event in timed if isinstance(event, Heal)]
    cuts: list[Cut] = []
    worse: list[tuple[float, float, Pair, LinkSpec]] = []
    acts: list[Act] = []
    for at, number, event in timed:
        where = f"event[{number}]"
        match event:
            case Partition():
                cuts.append(_cut(event, at, _end(event.lasts, at, heals, where), hosts, where))
            case Degrade():
                pair = _pair(event.between, hosts, where)
                spec = read_link(event, spec_of(pair), where)
                worse.append((at, _end(event.lasts, at, heals, where), pair, spec))
            case Kill() | Start():
                if event.host == asked:
                    raise bad_scenario(f"{where}: {asked!r} is asked, so its daemon must live")
                acts.append(_act(event, at, hosts, acts, where))
            case Heal():
                pass
    return Timeline(tuple(cuts), _changes(worse), tuple(acts))


def _end(lasts: str | None, at: float, heals: list[float], where: str) -> float:
    """Return when something ends that began at ``at``: by itself, or by the next healing."""
    length = float("inf")
    if lasts is not None:
        length = read_span(lasts, f"{where}.lasts")
        if not length:
            raise bad_scenario(f"{where}.lasts is nothing")
    return min([at + length, *(heal for heal in heals if heal > at)])


def _cut(event: Partition, at: float, end: float, hosts: Sequence[Host], where: str) -> Cut:
    left, right = (read_side(side, hosts, f"{where}.sides") for side in event.sides)
    if left & right:
        raise bad_scenario(f"{where}: {sorted(left & right)[0]!r} is on both sides")
    return Cut(at, end, left, right, event.one_way)


def _pair(names: tuple[str, str], hosts: Sequence[Host], where: str) -> Pair:
    sites = {host.site for host in hosts}
    for name in names:
        if name not in sites:
            raise bad_scenario(f"{where}.between names {name[:40]!r}, which is no site")
    return frozenset(names)


def _changes(worse: list[tuple[float, float, Pair, LinkSpec]]) -> tuple[Change, ...]:
    """Lay periods of worse links out in time: of two at once, the later one counts."""
    found: list[Change] = []
    for start, end, pair, spec in worse:
        following = [s for s, _, p, _ in worse if p == pair and s > start]
        found.append(Change(start, pair, spec))
        if end < min(following, default=float("inf")):
            found.append(Change(end, pair, None))
    return tuple(sorted(found, key=lambda change: change.at))


def _act(
    event: Kill | Start, at: float, hosts: Sequence[Host], before: list[Act], where: str
) -> Act:
    if event.host not in {host.name for host in hosts}:
        raise bad_scenario(f"{where}.host is {event.host[:40]!r}, which is no host")
    last = next((act.do for act in reversed(before) if act.host == event.host), "start")
    do: Literal["kill", "start"] = "kill" if isinstance(event, Kill) else "start"
    if do == last:
        state = "dead" if do == "kill" else "running"
        raise bad_scenario(f"{where}: the daemon of {event.host!r} is {state} already")
    return Act(at, event.host, do)


class Moment(msgspec.Struct, frozen=True):
    """Something that happens at a time, in words; ``act`` when it happens to a daemon."""

    at: float
    text: str
    act: Act | None = None


def moments(timeline: Timeline) -> list[Moment]:
    """Return all that happens in the order of time."""
    found: list[Moment] = []
    for cut in timeline.cuts:
        left, right = (", ".join(sorted(side)) for side in (cut.left, cut.right))
        found.append(Moment(cut.start, f"{left} {'-x->' if cut.one_way else '-x-'} {right}"))
        if cut.end != float("inf"):
            found.append(Moment(cut.end, f"{left} {'--->' if cut.one_way else '---'} {right}"))
    for change in timeline.changes:
        ends = " - ".join(sorted(change.pair))
        how = "as at the beginning" if change.spec is None else describe(change.spec)
        found.append(Moment(change.at, f"{ends}: {how}"))
    verbs = {"kill": "is killed", "start": "starts again"}
    found += [Moment(act.at, f"{act.host} {verbs[act.do]}", act) for act in timeline.acts]
    return sorted(found, key=lambda moment: moment.at)


def describe(spec: LinkSpec) -> str:
    """Return a link in words: ``60 ms (+-3 ms), loss 1%, 50 Mbit/s``."""
    words = [f"{2000 * spec.delay:g} ms"]
    if spec.jitter:
        words[0] += f" (+-{1000 * spec.jitter:g} ms)"
    if spec.loss:
        words.append(f"loss {100 * spec.loss:g}%")
    if spec.rate is not None:
        words.append(f"{spec.rate / 1e6:g} Mbit/s")
    return ", ".join(words)
