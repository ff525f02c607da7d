"""What a plan may be asked for: how many ranks, which cuts, on which nodes.  Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pyagent_node.base.errors import InvalidRequest, Unavailable
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts, PlanOptions


def rank_counts(
    model: ModelShape, nodes: Sequence[NodeFacts], options: PlanOptions
) -> Sequence[int]:
    """Return the numbers of ranks to try, having checked the options."""
    if not nodes:
        raise Unavailable("No node can take a model now.", code="no_nodes")
    if options.n_ctx < 1 or options.n_seq < 1:
        raise InvalidRequest(
            f"n_ctx ({options.n_ctx}) and n_seq ({options.n_seq}) must be at least 1.",
            code="bad_parameter",
        )
    n_layers = model.n_layers
    given: dict[str, int] = {}
    if options.ranks is not None:
        given["ranks"] = options.ranks
    if options.boundaries is not None:
        cuts = (0, *options.boundaries, n_layers)
        if any(b <= a for a, b in itertools.pairwise(cuts)):
            raise InvalidRequest(
                f"The boundaries {list(options.boundaries)} do not cut {n_layers} layers: they"
                f" must grow, from 1 to {n_layers - 1}.",
                code="bad_boundaries",
                n_layers=n_layers,
            )
        given["boundaries"] = len(options.boundaries) + 1
    if options.nodes is not None:
        known = {node.peer_id for node in nodes}
        for peer in options.nodes:
            if peer not in known:
                raise InvalidRequest(
                    f"Node {peer} is not among those that can take a model now.",
                    code="unknown_node",
                    peer_id=peer,
                )
        given["nodes"] = len(options.nodes)
    if len(set(given.values())) > 1:
        what = ", ".join(f"{name} say {n}" for name, n in given.items())
        raise InvalidRequest(f"How many ranks? {what}.", code="bad_ranks")
    if not given:
        return range(1, min(len(nodes), n_layers) + 1)
    count = next(iter(given.values()))
    most = n_layers if options.nodes is not None else min(n_layers, len(nodes))
    if not 1 <= count <= most:
        raise InvalidRequest(
            f"{count} ranks are not possible with {n_layers} layers on {len(nodes)} nodes.",
            code="bad_ranks",
            remedy="Name the nodes (--nodes) to put several ranks on one of them.",
            ranks=count,
            nodes=len(nodes),
        )
    return (count,)
