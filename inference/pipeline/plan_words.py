"""Says why a plan is as it is: rank by rank, and node by node.  Pure.

What a node has is explained by what one layer more or less would cost, by the same measure that the
search minimises, and what a node has not by memory, power, or the plan with one rank more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from pyagent_node.base.types import Rank, Slice
from pyagent_node.inference.pipeline.plan_types import (
    MEMORY_SHARE,
    RUNNER_BYTES,
    ModelShape,
    NodeFacts,
    NodePlan,
    PlanOptions,
)


class Judge(Protocol):
    """What ranks cost (see ``planner``)."""

    @property
    def options(self) -> PlanOptions:
        """What the user decided."""
        ...

    def seconds(self, rank: Rank) -> tuple[float, float]:
        """Return the time of a token of an answer, and of a prompt, in one rank."""
        ...

    def cost(self, ranks: Sequence[Rank]) -> float:
        """Return what the search minimises; infinite where a rank has no room."""
        ...

    def weighed(self, ranks: Sequence[Rank]) -> float:
        """Return the time by which numbers of ranks are compared."""
        ...

    def need(self, part: Slice) -> int:
        """Return the bytes of memory that a slice takes."""
        ...


class PlanWords:
    """``known`` are all usable nodes, ``rivals`` the weighed time of the best plan by number of
    ranks.
    """

    def __init__(
        self, judge: Judge, known: Sequence[NodeFacts], rivals: Mapping[int, float]
    ) -> None:
        self._judge = judge
        self._known = sorted(known, key=lambda node: node.peer_id)
        self._rivals = rivals

    def nodes(self, ranks: Sequence[Rank]) -> tuple[NodePlan, ...]:
        """Return every node's part, those with ranks first, in the order of the ranks."""
        order = {rank.peer_id: rank.rank for rank in reversed(ranks)}
        known = sorted(self._known, key=lambda node: order.get(node.peer_id, len(ranks)))
        return tuple(self._node(node, ranks) for node in known)

    def explain(
        self, ranks: Sequence[Rank], latency: float, model: ModelShape, kv_bytes_per_layer: int
    ) -> tuple[str, ...]:
        """Say what each rank holds and what a token costs."""
        names = {node.peer_id: node.name for node in self._known}
        lines = []
        computing = 0.0
        for rank in ranks:
            part, (seconds, _) = rank.slice, self._judge.seconds(rank)
            computing += seconds
            kv = (part.last - part.first) * kv_bytes_per_layer
            weights = model.needs(part, n_ctx=0, n_seq=0) - RUNNER_BYTES
            lines.append(
                f"rank {rank.rank}: layers {part.first}-{part.last - 1}"
                f"{' and the output head' if part.head else ''} on {names[rank.peer_id]}:"
                f" {shown_size(weights)} of weights, {shown_size(kv)} of KV,"
                f" {seconds * 1000:.2f} ms a token"
            )
        lines.append(
            f"predicted {latency * 1000:.2f} ms a token: {computing * 1000:.2f} computing,"
            f" {(latency - computing) * 1000:.2f} travelling"
        )
        return tuple(lines)

    def _node(self, node: NodeFacts, ranks: Sequence[Rank]) -> NodePlan:
        own = [rank for rank in ranks if rank.peer_id == node.peer_id]
        times = [self._judge.seconds(rank) for rank in own]
        return NodePlan(
            peer_id=node.peer_id,
            name=node.name,
            slices=tuple(rank.slice for rank in own),
            token_seconds=sum(token for token, _ in times),
            prompt_seconds=sum(prompt for _, prompt in times),
            need_bytes=sum(self._judge.need(rank.slice) for rank in own),
            usable_bytes=int(node.memory_bytes * MEMORY_SHARE),
            why=self._with_ranks(node, own, ranks) if own else self._without(node, ranks),
        )

    # ---- nodes with ranks --------------------------------------------------------------------

    def _with_ranks(self, node: NodeFacts, own: Sequence[Rank], ranks: Sequence[Rank]) -> str:
        words: list[str] = []
        if not node.willing:
            words.append(f"taken all the same ({power_words(node)}): it does not work without it")
        elif node.share < 1:
            words.append(f"counts for {node.share:.0%} of its speed ({power_words(node)})")
        if self._judge.options.boundaries is not None:
            words.append("the cut was asked for")
        elif len(ranks) == 1:
            words.append(self._alone(ranks))
        elif len(own) == 1:
            words += [self._moved(own[0], ranks, 1), self._moved(own[0], ranks, -1)]
        return "; ".join(filter(None, words))

    def _alone(self, ranks: Sequence[Rank]) -> str:
        if self._judge.options.ranks == 1 or self._judge.options.nodes is not None:
            return "one rank was asked for"
        two, now = self._rivals.get(2), self._judge.weighed(ranks)
        if two is None or now <= 0:
            return "holds all of it"
        return f"holds all of it: two ranks would take {two / now:.1f} times as long"

    def _moved(self, rank: Rank, ranks: Sequence[Rank], by: int) -> str:
        """Say what one layer more or less for ``rank`` costs, whichever neighbour it comes from."""
        word = "more" if by > 0 else "less"
        now, tries = self._judge.cost(ranks), []
        for at, shift in ((rank.rank, by), (rank.rank - 1, -by)):
            other = _shifted(ranks, at, shift)
            if other is not None:
                tries.append(self._judge.cost(other) - now)
        if not tries:
            return ""
        cost = min(tries)
        if math.isinf(cost):
            return f"no room for a layer {word}" if by > 0 else "no room elsewhere for a layer"
        return f"a layer {word} would cost {cost * 1000:+.2f} ms"

    # ---- nodes without -----------------------------------------------------------------------

    def _without(self, node: NodeFacts, ranks: Sequence[Rank]) -> str:
        options = self._judge.options
        if options.nodes is not None:
            return "not among the nodes that were asked for"
        if not node.willing:
            return f"takes no work ({power_words(node)})"
        least = min(self._judge.need(Slice(at, at + 1, False)) for at in range(_n_layers(ranks)))
        if least > node.memory_bytes * MEMORY_SHARE:
            free = shown_size(node.memory_bytes * MEMORY_SHARE)
            return f"no room: a layer needs {shown_size(least)}, {free} are usable"
        if options.ranks is not None or options.boundaries is not None:
            return f"{len(ranks)} ranks were asked for, and others are faster or nearer"
        more = self._rivals.get(len(ranks) + 1)
        now = self._judge.weighed(ranks)
        if more is None or now <= 0:
            return "others are faster or nearer"
        return f"not needed: {len(ranks) + 1} ranks would take {more / now:.1f} times as long"


def power_words(node: NodeFacts) -> str:
    """Say what a node runs on, in a few words."""
    power = node.power
    words = {"mains": "mains", "battery": "battery", "unknown": ""}[power.supply]
    if power.supply == "battery" and power.charge is not None:
        words += f" at {power.charge:.0f}%"
    found = [words, "saves power" if power.saver else "", "throttled" if power.throttled else ""]
    return ", ".join(filter(None, found)) or "not known"


def shown_size(count: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _n_layers(ranks: Sequence[Rank]) -> int:
    return ranks[-1].slice.last


def _shifted(ranks: Sequence[Rank], at: int, by: int) -> tuple[Rank, ...] | None:
    """Return the ranks with the end of number ``at`` moved, ``None`` where that cannot be."""
    if not 0 <= at < len(ranks) - 1:
        return None
    first, second = ranks[at].slice, ranks[at + 1].slice
    end = first.last + by
    if not first.first < end < second.last:
        return None
    changed = list(ranks)
    for index, part in (
        (at, Slice(first.first, end, first.head)),
        (at + 1, Slice(end, second.last, second.head)),
    ):
        changed[index] = msgspec.structs.replace(changed[index], slice=part)
    return tuple(changed)
