"""From a load request to a plan: sizes from the model's header, facts from the nodes."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple, Protocol

import msgspec
import trio

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.inference.llama.memory import kv_bytes_per_token
from pyagent_node.inference.models.architectures import EMBEDDING, layer_of, model_shape
from pyagent_node.inference.models.gguf_header import GgufHeader
from pyagent_node.inference.pipeline.plan_types import (
    LEAST_SHARE,
    ModelShape,
    NodeFacts,
    PlanOptions,
)
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.placement_messages import AskFacts, FactsReply
from pyagent_node.node.rpc import Rpc

logger = logging.getLogger("pyagent_node.placements")

PROMPT_TOKENS = 2.0
"""Tokens of prompts for each token of an answer that plans reckon with: those that are not found
in KV blocks of earlier prompts."""
FACTS_SECONDS = 10.0
"""Longest wait for a node's facts; one that does not answer takes no part."""


class FactsSource(Protocol):
    """Knows this node (see ``node.facts``)."""

    async def facts(self, model: Digest) -> NodeFacts:
        """Return this node's facts with regard to a model."""
        ...


class Swarm(NamedTuple):
    """The nodes that can take a model, and their distances."""

    nodes: list[NodeFacts]
    rtt_ms: dict[tuple[PeerId, PeerId], float]


def planner_shape(header: GgufHeader, name: str) -> ModelShape:
    """Return the sizes that placing a model depends on.

    A token multiplies every weight matrix once: two operations an element.
    """
    shape = model_shape(header)
    sizes = [0] * shape.n_layers
    flops = [0] * shape.n_layers
    head_bytes = head_flops = 0
    embedding = header.tensor(EMBEDDING)
    for tensor in header.tensors.values():
        elements = 2 * math.prod(tensor.shape) if len(tensor.shape) > 1 else 0
        place = layer_of(tensor.name)
        if place is not None and place[0] < shape.n_layers:
            sizes[place[0]] += tensor.nbytes
            flops[place[0]] += elements
        elif tensor.name != EMBEDDING or shape.tied:
            head_bytes += tensor.nbytes
            head_flops += elements
    return ModelShape(
        name=name,
        layer_bytes=tuple(sizes),
        layer_flops=tuple(flops),
        head_bytes=head_bytes,
        head_flops=head_flops,
        embedding_bytes=0 if shape.tied else embedding.nbytes,
        kv_bytes=-(-kv_bytes_per_token(header) // shape.n_layers),
        architecture=header.architecture,
    )


async def survey(
    mesh: Mesh, rpc: Rpc, facts: FactsSource, model: Digest, *, distances: bool = True
) -> Swarm:
    """Ask every connected member for its facts, all at once; those that do not answer are left out.

    ``distances`` asks for their round-trip times, too.

    The order of the answers does not show in the result.
    """
    swarm = Swarm([], {})

    async def ask(peer: PeerId) -> None:
        try:
            request = AskFacts(model, distances)
            reply, _ = await rpc.call(peer, request, FactsReply, seconds=FACTS_SECONDS)
        except PyAgentError as error:
            logger.info("node %s gave no facts: %s", peer, error)
            return
        if reply.facts.peer_id == peer:
            take(reply)

    def take(reply: FactsReply) -> None:
        swarm.nodes.append(reply.facts)
        for other, rtt in reply.rtt_ms.items():
            if math.isfinite(rtt) and rtt >= 0:
                swarm.rtt_ms[reply.facts.peer_id, other] = rtt

    take(await facts_reply(mesh, facts, AskFacts(model, distances)))
    async with trio.open_nursery() as nursery:
        for peer in mesh.peers():
            if peer.role != "client":
                nursery.start_soon(ask, peer.peer_id)
    swarm.nodes.sort(key=lambda node: node.peer_id)
    return swarm


async def facts_reply(mesh: Mesh, facts: FactsSource, ask: AskFacts) -> FactsReply:
    """Return what this node answers to :class:`AskFacts`."""
    peers = mesh.peers() if ask.distances else ()
    rtt = {p.peer_id: p.rtt_ms for p in peers if p.rtt_ms is not None}
    return FactsReply(await facts.facts(ask.model), rtt)


def choose_nodes(
    request: LoadRequest, swarm: Swarm, *, n_ctx: int, n_seq: int
) -> tuple[list[NodeFacts], PlanOptions]:
    """Return the nodes to plan with, and the options, as ``request`` has them.

    As many nodes as ranks are taken in that order; any other number only restricts the choice.
    Raises :class:`InvalidRequest` (``unknown_node``, ``ambiguous_node``).
    """
    options = PlanOptions(
        n_ctx=n_ctx,
        n_seq=n_seq,
        ranks=request.ranks,
        boundaries=request.layers,
        prompt_tokens=PROMPT_TOKENS,
    )
    if request.nodes is None:
        return swarm.nodes, options
    chosen = [_meant(find_node(name, swarm.nodes)) for name in request.nodes]
    count = request.ranks if request.layers is None else len(request.layers) + 1
    if count == len(chosen):
        peers = tuple(node.peer_id for node in chosen)
        options = msgspec.structs.replace(options, nodes=peers)
    return list({node.peer_id: node for node in chosen}.values()), options


def _meant(node: NodeFacts) -> NodeFacts:
    """Return a node that was named: it takes work, whatever it runs on."""
    return node if node.willing else msgspec.structs.replace(node, share=LEAST_SHARE)


def find_node(name: str, nodes: list[NodeFacts]) -> NodeFacts:
    """Return the node of a name or a peer id.

    Raises :class:`InvalidRequest` (``unknown_node``, ``ambiguous_node``).
    """
    found = [node for node in nodes if name in (node.peer_id, node.name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(sorted(node.name for node in nodes))
    raise InvalidRequest(
        f"{name[:80]!r} names {len(found)} of the nodes that can take a model now: {known}.",
        code="ambiguous_node" if found else "unknown_node",
        remedy="Use a peer id; see 'pyagent-node peers'.",
    )
