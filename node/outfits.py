"""What a placement is planned with: the nodes' facts as the planner shall see them.  Pure.

From the answers of the nodes, what the model in question gives back of their memory, and what was
asked for, to who computes with what, how fast, and in which memory (``plan_speeds``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from pyagent_node.base.types import Backends, PeerId, Placement
from pyagent_node.inference.backend_names import Choice
from pyagent_node.inference.pipeline.plan_speeds import Ability, abilities, resolved
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts, PlanOptions
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.backend_choice import best_backends, chosen_backend, with_backends
from pyagent_node.node.drafts import slowed
from pyagent_node.node.planning import Swarm, choose_nodes


class Outfit(NamedTuple):
    """``nodes`` may get ranks, those of ``swarm`` reserves too.

    ``free`` is what each has beside the placement as it is, ``backends`` who shall use which, and
    ``able`` what each computes with.
    """

    swarm: Swarm
    nodes: list[NodeFacts]
    options: PlanOptions
    free: dict[PeerId, int]
    backends: Backends
    able: dict[PeerId, Ability]


def outfit(
    request: LoadRequest,
    found: Swarm,
    shape: ModelShape,
    before: Placement | None,
    *,
    used: Mapping[PeerId, int],
    draining: Collection[PeerId],
    slowness: Mapping[PeerId, float],
    n_ctx: int,
    n_seq: int,
) -> Outfit:
    """Return what to plan with; raises as ``choose_nodes`` and ``with_backends`` do.

    ``used`` is the memory of this model's processes by node, ``slowness`` by what factor nodes are
    slower than they say.
    """
    back = [_given_back(node, shape, before, used) for node in found.nodes]
    swarm = Swarm([node for node in back if node.peer_id not in draining], found.rtt_ms)
    nodes, options = choose_nodes(request, swarm, n_ctx=n_ctx, n_seq=n_seq)
    nodes, asked = with_backends(
        nodes,
        request.backend,
        shape.architecture,
        swarm=swarm.nodes,
        before=before.backends if before is not None else (),
    )
    backends, choices = best_backends(swarm.nodes, asked, shape.architecture)
    able = abilities(swarm.nodes, lambda node: choices[node.peer_id])
    swarm = slowed(Swarm(resolved(swarm.nodes, able), swarm.rtt_ms), slowness)
    shares = {node.peer_id: node.share for node in nodes}
    planned = {node.peer_id: node for node in swarm.nodes}

    def choice(node: NodeFacts) -> Choice:
        known = choices.get(node.peer_id)
        return known or chosen_backend(node, backends, shape.architecture)

    now = abilities(found.nodes, choice)
    return Outfit(
        swarm,
        [
            msgspec.structs.replace(planned[peer], share=shares[peer])
            for peer in (node.peer_id for node in nodes)
        ],
        options,
        {peer: each.memory.free_bytes for peer, each in now.items()},
        backends,
        able,
    )


def with_speeds(
    facts: Mapping[PeerId, NodeFacts], placement: Placement, shape: ModelShape
) -> dict[PeerId, NodeFacts]:
    """Return the facts with the speeds of the backends that a placement uses."""
    nodes = list(facts.values())
    able = abilities(
        nodes, lambda node: chosen_backend(node, placement.backends, shape.architecture)
    )
    return {node.peer_id: node for node in resolved(nodes, able)}


def _given_back(
    node: NodeFacts, shape: ModelShape, before: Placement | None, used: Mapping[PeerId, int]
) -> NodeFacts:
    """Return the node with the memory that it gets back when the placement goes.

    A GPU's memory does not show in its processes' size: it is what the slices need.
    """
    held = 0
    if before is not None:
        held = sum(
            shape.needs(rank.slice, n_ctx=before.n_ctx, n_seq=before.n_seq)
            for rank in before.ranks
            if node.peer_id in (rank.peer_id, *rank.standbys)
        )
    memories = tuple(
        msgspec.structs.replace(m, free_bytes=min(m.total_bytes, m.free_bytes + held))
        if m.kind == "vram"
        else m
        for m in node.memories
    )
    memory = node.memory_bytes + used.get(node.peer_id, 0)
    return msgspec.structs.replace(node, memory_bytes=memory, memories=memories)
