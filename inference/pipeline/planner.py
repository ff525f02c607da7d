"""Which node holds which layers: a pure function from measured facts to ranks.

A stage's time ``s`` for one token is what reading its weights takes, or computing with them if that
is longer, plus a fixed cost; a hop costs half a round trip.  A pipeline's *latency* is the sum over
its stages and hops, from the head's node round to it again.

Latency alone would give the fastest node all layers but one and every other node one.  That is
wrong as soon as two sessions run, and it makes the plan follow the noise of the measurements.  So
the *cost* that is minimised for a given number of ranks adds what a token waits for another session
somewhere in the pipeline: it is in a stage with probability ``s/T`` and takes ``s/2`` more there on
average, hence ``s*s/(2*T)`` a stage, where T is the time of the whole model on an average node.

Where options say so, a token of an answer brings some tokens of prompts with it, whose time counts
like its own.  A node that counts for a share of its speed only (one on battery) looks that much
slower to the choice; predicted times are not touched by that.

The number of ranks, when it is open, is the one with the least *latency*, so weighed: as few nodes
as fit, unless more are faster.

Search: Held and Karp's dynamic programme over (set of nodes, last node), each state holding the
least cost for every number of layers covered.  Exact up to :data:`EXACT_NODES` nodes; beyond that
only the most promising states of each length are kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.types import PeerId, Rank, Slice
from pyagent_node.inference.pipeline.plan_checks import rank_counts
from pyagent_node.inference.pipeline.plan_types import (
    LEAST_SHARE,
    MEMORY_SHARE,
    RUNNER_BYTES,
    ModelShape,
    NodeFacts,
    Plan,
    PlanOptions,
)
from pyagent_node.inference.pipeline.plan_words import PlanWords, shown_size

EXACT_NODES: Final = 8
BEAM: Final = 48
"""States of one length that are kept beyond :data:`EXACT_NODES` nodes."""
STAGE_SECONDS: Final = 0.0005
"""Fixed time of a stage: two process borders and a batch's set-up."""
FETCH_SECONDS: Final = 0.00002
"""Handicap of a node that must fetch its slice first: decides between equals."""
UNKNOWN_RTT_MS: Final = 50.0
"""Round trip assumed between nodes that have not measured theirs."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
RttMatrix = Mapping[tuple[PeerId, PeerId], float]
"""Round-trip times in milliseconds; either direction of a pair will do."""


class _Stage(NamedTuple):
    """One node's costs: ``[a, b]`` for layers a to b without and with the output head.

    ``seconds`` are those of a token of an answer, ``prompt`` those of one of a prompt.
    """

    body: _Floats
    tail: _Floats
    body_seconds: _Floats
    tail_seconds: _Floats
    body_prompt: _Floats
    tail_prompt: _Floats
    share: float


class _Key(NamedTuple):
    """The nodes used so far, as bits, and the last of them."""

    used: int
    last: int


_START: Final = _Key(0, -1)


class _State(NamedTuple):
    """For each number of layers covered: least cost, where its last rank begins, and after whom."""

    cost: _Floats
    cut: _Ints | None
    before: _Ints | None


def plan(
    model: ModelShape,
    nodes: Sequence[NodeFacts],
    rtt_ms: RttMatrix,
    options: PlanOptions,
    *,
    head: PeerId,
) -> Plan:
    """Return the best ranks for ``model`` on ``nodes``, as seen from the node ``head``.

    Raises :class:`InvalidRequest` (``bad_boundaries``, ``bad_ranks``, ``unknown_node``) for options
    that can never hold, and :class:`Unavailable` (``not_enough_memory``, with facts
    ``needed_bytes`` and ``available_bytes``) when the model does not fit.
    """
    nodes = [node for node in nodes if node.usable]
    willing = [node for node in nodes if node.willing]
    if options.nodes is None and 0 < len(willing) < len(nodes):
        with contextlib.suppress(PyAgentError):
            return _plan(model, willing, rtt_ms, options, head=head, known=nodes)
    return _plan(model, nodes, rtt_ms, options, head=head, known=nodes)


def _plan(
    model: ModelShape,
    nodes: Sequence[NodeFacts],
    rtt_ms: RttMatrix,
    options: PlanOptions,
    *,
    head: PeerId,
    known: Sequence[NodeFacts],
) -> Plan:
    """Plan with ``nodes``, and say of all that are ``known`` why they have what they have."""
    counts = rank_counts(model, nodes, options)
    search = _Search(model, sorted(nodes, key=lambda n: n.peer_id), rtt_ms, options, head)
    found = [(search.weighed(ranks), ranks) for n in counts if (ranks := search.best(n))]
    if not found:
        raise search.no_room()
    weighed, ranks = min(found, key=lambda f: (f[0], len(f[1])))
    rivals = {len(other): time for time, other in found}
    words = PlanWords(search, known, rivals)
    latency = search.latency(ranks)
    return Plan(
        ranks,
        latency,
        words.explain(ranks, latency, model, search.kv_bytes_per_layer()),
        search.prompt(ranks),
        weighed,
        search.cost(ranks),
        words.nodes(ranks),
    )


class _Search:
    def __init__(
        self,
        model: ModelShape,
        nodes: Sequence[NodeFacts],
        rtt_ms: RttMatrix,
        options: PlanOptions,
        head: PeerId,
    ) -> None:
        self._model = model
        self._nodes = nodes
        self._index = {node.peer_id: i for i, node in enumerate(nodes)}
        self._rtt = rtt_ms
        self._options = options
        self._head = head
        self._bytes = np.cumsum((0, *model.layer_bytes), dtype=np.float64)
        self._flops = np.cumsum((0, *model.layer_flops), dtype=np.float64)
        n = len(nodes)
        speed = sum(node.bandwidth for node in nodes) / n
        power = sum(node.compute for node in nodes) / n
        work = (self._flops[-1] + model.head_flops) / power
        self._typical = max((self._bytes[-1] + model.head_bytes) / speed, work)
        prompts = sum(node.prompt_compute or node.compute for node in nodes) / n
        self._typical += options.prompt_tokens * self._flops[-1] / prompts
        self._stages = [self._stage(node) for node in nodes]
        self._hops = np.array([[self._hop(a.peer_id, b.peer_id) for b in nodes] for a in nodes])
        self._entry = np.array([self._hop(head, node.peer_id) for node in nodes])

    @property
    def options(self) -> PlanOptions:
        """What the user decided."""
        return self._options

    # ---- costs -----------------------------------------------------------------------------

    def _hop(self, a: PeerId, b: PeerId) -> float:
        if a == b:
            return 0.0
        rtt = self._rtt.get((a, b), self._rtt.get((b, a), UNKNOWN_RTT_MS))
        return rtt / 2000

    def _stage(self, node: NodeFacts) -> _Stage:
        model, at = self._model, np.arange(self._model.n_layers + 1)
        first, last = at[:, None], at[None, :]
        layers = last - first
        weights = self._bytes[None, :] - self._bytes[:, None]
        flops = self._flops[None, :] - self._flops[:, None]
        kv = layers * self.kv_bytes_per_layer()
        room = node.memory_bytes * MEMORY_SHARE - RUNNER_BYTES
        whole = (first == 0) * model.embedding_bytes
        held = np.zeros(layers.shape, dtype=bool)
        for part in node.held:
            held |= (part.first <= first) & (last <= part.last)
        handicap = np.where(held, 0.0, FETCH_SECONDS)

        share = max(node.share, LEAST_SHARE)

        def costs(
            head_bytes: int, head_flops: int, extra: _Floats | int
        ) -> tuple[_Floats, _Floats, _Floats]:
            reading = weights / node.bandwidth
            reading += head_bytes / (node.head_bandwidth or node.bandwidth)
            seconds = np.maximum(reading, (flops + head_flops) / node.compute) + STAGE_SECONDS
            # Of a prompt only the last token goes through the output head.
            prompt = flops / (node.prompt_compute or node.compute)
            fits = (layers > 0) & (weights + kv + head_bytes + extra <= room)
            weighed = (seconds + self._options.prompt_tokens * prompt) / share
            cost = weighed + weighed**2 / (2 * self._typical) + handicap
            return np.where(fits, cost, np.inf), seconds, prompt

        body, body_seconds, body_prompt = costs(0, 0, 0)
        tail, tail_seconds, tail_prompt = costs(model.head_bytes, model.head_flops, whole)
        return _Stage(body, tail, body_seconds, tail_seconds, body_prompt, tail_prompt, share)

    def kv_bytes_per_layer(self) -> int:
        """Return the bytes of KV that a layer is given."""
        return self._model.kv_bytes * self._options.n_ctx * self._options.n_seq

    def _travelling(self, ranks: Sequence[Rank]) -> float:
        total = self._hop(self._head, ranks[0].peer_id) + self._hop(ranks[-1].peer_id, self._head)
        return total + sum(self._hop(a.peer_id, b.peer_id) for a, b in itertools.pairwise(ranks))

    def latency(self, ranks: Sequence[Rank]) -> float:
        """Return the time of one token alone in the pipeline ``ranks``."""
        return self._travelling(ranks) + sum(self.seconds(rank)[0] for rank in ranks)

    def prompt(self, ranks: Sequence[Rank]) -> float:
        """Return the time that one token of a prompt takes in all ``ranks`` together."""
        return sum(self.seconds(rank)[1] for rank in ranks)

    def weighed(self, ranks: Sequence[Rank]) -> float:
        """Return the time by which numbers of ranks are compared."""
        total = self._travelling(ranks)
        for rank in ranks:
            token, prompt = self.seconds(rank)
            share = self._stages[self._index[rank.peer_id]].share
            total += (token + self._options.prompt_tokens * prompt) / share
        return total

    def cost(self, ranks: Sequence[Rank]) -> float:
        """Return what the search minimises; infinite where a rank has no room."""
        total = self._travelling(ranks)
        for rank in ranks:
            stage, part = self._stages[self._index[rank.peer_id]], rank.slice
            total += float((stage.tail if part.head else stage.body)[part.first, part.last])
        return total

    def seconds(self, rank: Rank) -> tuple[float, float]:
        """Return the time of a token of an answer, and of a prompt, in one rank."""
        stage, part = self._stages[self._index[rank.peer_id]], rank.slice
        token = stage.tail_seconds if part.head else stage.body_seconds
        prompt = stage.tail_prompt if part.head else stage.body_prompt
        at = part.first, part.last
        return float(token[at]), float(prompt[at])

    # ---- search ----------------------------------------------------------------------------

    def best(self, count: int) -> tuple[Rank, ...] | None:
        """Return the least costly ``count`` ranks, or ``None`` when none fit."""
        n_layers = self._model.n_layers
        start = np.full(n_layers + 1, np.inf)
        start[0] = 0.0
        steps: list[dict[_Key, _State]] = [{_START: _State(start, None, None)}]
        for rank in range(count):
            steps.append(self._extend(steps[-1], rank, tail=rank == count - 1))
        ends = [(state.cost[n_layers], key) for key, state in steps[-1].items()]
        cost, key = min(ends, default=(np.inf, _START))
        if not np.isfinite(cost):
            return None
        ranks: list[Rank] = []
        stop = n_layers
        for rank in range(count - 1, -1, -1):
            state = steps[rank + 1][key]
            assert state.cut is not None, "only the start has no cut"
            assert state.before is not None, "only the start has nothing before it"
            first = int(state.cut[stop])
            part = Slice(first, stop, rank == count - 1)
            ranks.append(Rank(rank, part, self._nodes[key.last].peer_id))
            key, stop = _Key(self._without(key), int(state.before[stop])), first
        ranks.reverse()
        return tuple(ranks) if self._fits_together(ranks) else None

    def _extend(self, states: dict[_Key, _State], rank: int, *, tail: bool) -> dict[_Key, _State]:
        """Return the states with one more rank."""
        columns = np.arange(self._model.n_layers + 1)
        found: dict[_Key, _State] = {}
        for before, state in states.items():
            for node in self._candidates(before, rank):
                stage = self._stages[node]
                through = state.cost[:, None] + (stage.tail if tail else stage.body)
                cut = np.argmin(through, axis=0)
                total = through[cut, columns] + self._travel(before, node, tail=tail)
                self._restrict(total, rank)
                last = np.full(len(columns), before.last)
                key = self._with(before, node)
                if (known := found.get(key)) is not None:
                    assert known.cut is not None, "extended states have cuts"
                    assert known.before is not None, "and predecessors"
                    keep = known.cost <= total
                    total = np.where(keep, known.cost, total)
                    cut = np.where(keep, known.cut, cut)
                    last = np.where(keep, known.before, last)
                found[key] = _State(total, cut, last)
        return self._prune({k: v for k, v in found.items() if np.isfinite(v.cost).any()})

    def _travel(self, before: _Key, node: int, *, tail: bool) -> float:
        hop = self._entry[node] if before.last < 0 else self._hops[before.last, node]
        return float(hop + (self._entry[node] if tail else 0.0))

    def _restrict(self, total: _Floats, rank: int) -> None:
        """Rule out every end of ``rank`` but the one that the user chose."""
        if self._options.boundaries is not None:
            ends = (*self._options.boundaries, self._model.n_layers)
            chosen = total[ends[rank]]
            total[:] = np.inf
            total[ends[rank]] = chosen

    def _prune(self, states: dict[_Key, _State]) -> dict[_Key, _State]:
        """Keep all states of a small search, else the cheapest and the furthest."""
        if len(self._nodes) <= EXACT_NODES or len(states) <= BEAM:
            return states
        left = self._bytes[-1] - self._bytes
        rest = left / max(node.bandwidth for node in self._nodes)
        cheap = sorted(states, key=lambda k: (float(np.min(states[k].cost + rest)), k))
        far = sorted(states, key=lambda k: (-_reach(states[k]), k))
        return {k: states[k] for k in (*cheap[: BEAM // 2], *far[: BEAM // 2])}

    def _candidates(self, before: _Key, rank: int) -> Sequence[int]:
        if self._options.nodes is not None:
            return (self._index[self._options.nodes[rank]],)
        return [i for i in range(len(self._nodes)) if not before.used >> i & 1]

    def _with(self, before: _Key, node: int) -> _Key:
        # With the nodes given there is one state a rank, and a node may come twice.
        return _Key(0 if self._options.nodes is not None else before.used | 1 << node, node)

    def _without(self, key: _Key) -> int:
        return 0 if self._options.nodes is not None else key.used & ~(1 << key.last)

    # ---- memory ----------------------------------------------------------------------------

    def need(self, part: Slice) -> int:
        """Return the bytes of memory that a slice takes."""
        options = self._options
        return self._model.needs(part, n_ctx=options.n_ctx, n_seq=options.n_seq)

    def _fits_together(self, ranks: Sequence[Rank]) -> bool:
        """Whether each node can hold all its ranks (the search looks at one at a time)."""
        need = dict.fromkeys(self._index, 0)
        for rank in ranks:
            need[rank.peer_id] += self.need(rank.slice)
        return all(need[n.peer_id] <= n.memory_bytes * MEMORY_SHARE for n in self._nodes)

    def no_room(self) -> Unavailable:
        """Return the error for a model that does not fit."""
        chosen = self._options.nodes
        nodes = [n for n in self._nodes if chosen is None or n.peer_id in chosen]
        whole = Slice(0, self._model.n_layers, True)
        need = self.need(whole) + RUNNER_BYTES * ((self._options.ranks or 1) - 1)
        room = sum(int(n.memory_bytes * MEMORY_SHARE) for n in nodes)
        each = ", ".join(f"{n.name} {shown_size(n.memory_bytes * MEMORY_SHARE)}" for n in nodes)
        return Unavailable(
            f"{self._model.name} needs about {shown_size(need)} with {self._options.n_seq} sessions"
            f" of {self._options.n_ctx} tokens; usable are {shown_size(room)} ({each})"
            + ("." if room < need else ", but not cut that way."),
            code="not_enough_memory",
            remedy="Add a node, free memory, or give fewer --context tokens or --sessions.",
            needed_bytes=need,
            available_bytes=room,
            missing_bytes=max(0, need - room),
        )


def _reach(state: _State) -> int:
    return int(np.flatnonzero(np.isfinite(state.cost))[-1])
