"""The nodes of a plan as the API shows them.  Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pyagent_node.base.types import PeerId
from pyagent_node.inference.pipeline.plan_speeds import Ability
from pyagent_node.inference.pipeline.plan_types import NodeFacts, Plan
from pyagent_node.inference.pipeline.plan_words import power_words
from pyagent_node.node.api.placement_schema import PlannedNode


def planned_nodes(
    plan: Plan, facts: Mapping[PeerId, NodeFacts], able: Mapping[PeerId, Ability]
) -> tuple[PlannedNode, ...]:
    """Return what each node would do and why."""
    return tuple(
        PlannedNode(
            peer_id=each.peer_id,
            name=each.name,
            layers=tuple((part.first, part.last) for part in each.slices),
            backend=ability.backend,
            version=ability.version,
            device=ability.device,
            backend_why=ability.why,
            threads=node.threads,
            source=ability.source,
            decode_bytes_per_second=node.bandwidth,
            prefill_flops_per_second=node.prompt_compute or node.compute,
            token_seconds=each.token_seconds,
            prompt_seconds=each.prompt_seconds,
            memory=ability.memory.kind,
            total_bytes=ability.memory.total_bytes,
            free_bytes=ability.memory.free_bytes,
            usable_bytes=each.usable_bytes,
            need_bytes=each.need_bytes,
            supply=node.power.supply,
            charge=node.power.charge,
            saver=node.power.saver,
            throttled=node.power.throttled,
            share=node.share,
            power=power_words(node),
            why=each.why,
        )
        for each in plan.nodes
        if (node := facts.get(each.peer_id)) is not None
        and (ability := able.get(each.peer_id)) is not None
    )
