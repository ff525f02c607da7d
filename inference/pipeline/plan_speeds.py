"""With which backend each node computes and how fast: what was measured before what is estimated.

Pure.  A node's own measurements of the model with the backend in question count before what it
measured of other models, and that before the two benchmarks of its processor (``node.facts``).  An
estimate promises more than any model reaches, so it is scaled by what those nodes of the same kind
of device reach that have measured; without one it stands, times :data:`ACCELERATION` for a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, cast

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.inference.backend_names import BACKENDS, DEFAULT, BackendName, Choice
from pyagent_node.inference.machine import DeviceMemory, MeasuredSpeed, SpeedSource
from pyagent_node.inference.pipeline.plan_types import (
    NodeFacts,
)

ACCELERATION: Final[Mapping[str, float]] = {"cuda": 10.0, "metal": 4.0, "mps": 4.0}
"""How many times faster than its processor a node's GPU is taken to be until it is measured."""
SWITCH: Final = 1.25
"""How many times faster than the backend that a node would choose another must have measured."""
SPREAD: Final = 64.0
"""Most that an estimate is scaled by, either way."""

UNBOUND: Final = 1e17
"""Operations a second that bound nothing."""

_ORDER: Final[tuple[SpeedSource, ...]] = ("sessions", "loading", "others")


class Ability(msgspec.Struct, frozen=True):
    """What a node computes with, how fast, and in which memory.

    ``bandwidth``, ``head`` and ``compute`` are bytes of layers and of the output head that a token
    reads a second, and operations a second in prompts; ``bound`` says that operations bound
    the tokens of answers, too: nothing was measured.
    """

    backend: str
    version: str
    device: str
    why: str
    source: SpeedSource
    bandwidth: float
    head: float
    compute: float
    bound: bool
    memory: DeviceMemory


def measured(
    node: NodeFacts, backend: str, sources: Sequence[SpeedSource] = _ORDER
) -> MeasuredSpeed | None:
    """Return a node's speed with a backend, by the best source that it has; medians of slices."""
    for source in sources:
        found = [
            each
            for each in node.speeds
            if each.source == source
            and each.backend == backend
            and each.threads == node.threads
            and each.usable
        ]
        if not found:
            continue
        prefill = [each.prefill for each in found if each.prefill]
        head = [each.head for each in found if each.head]
        return MeasuredSpeed(
            backend=backend,
            threads=node.threads,
            decode=statistics.median(each.decode for each in found),
            prefill=statistics.median(prefill) if prefill else 0.0,
            source=source,
            head=statistics.median(head) if head else 0.0,
        )
    return None


def faster_backend(node: NodeFacts, choice: Choice) -> Choice:
    """Return another backend that was measured clearly faster with this model, else ``choice``."""
    own: tuple[SpeedSource, ...] = ("sessions", "loading")
    base = measured(node, choice.name, own)
    if base is None:
        return choice
    best, least = choice, base.decode * SWITCH
    for state in node.backends:
        known = state.installed and state.name in BACKENDS
        speed = measured(node, state.name, own) if known else None
        if speed is not None and speed.decode >= least and state.name != choice.name:
            why = f"measured {speed.decode / base.decode:.1f} times as fast as {choice.name}"
            best, least = Choice(cast(BackendName, state.name), why), speed.decode
    return best


def abilities(
    nodes: Sequence[NodeFacts], choose: Callable[[NodeFacts], Choice]
) -> dict[PeerId, Ability]:
    """Return what each usable node can do with the backend that ``choose`` says."""
    found = {node.peer_id: _ability(node, choose(node)) for node in nodes if node.usable}
    known = {node.peer_id: node for node in nodes}
    scales: dict[str, _Scales] = {}
    for peer, each in found.items():
        if each.source != "estimate":
            scale = scales.setdefault(each.device, _Scales([], [], []))
            scale.bandwidth.append(each.bandwidth / known[peer].bandwidth)
            scale.compute.append(each.compute / known[peer].compute)
            if each.head:
                scale.head.append(each.head / each.bandwidth)
    return {
        peer: _completed(each, known[peer], scales.get(each.device)) for peer, each in found.items()
    }


class _Scales(NamedTuple):
    """What nodes of one kind of device measured over what was estimated of them, and the output
    head's speed over that of their layers.
    """

    bandwidth: list[float]
    compute: list[float]
    head: list[float]


def resolved(nodes: Sequence[NodeFacts], able: Mapping[PeerId, Ability]) -> list[NodeFacts]:
    """Return the nodes with their speed and memory as the planner shall see them."""
    return [
        node
        if (ability := able.get(node.peer_id)) is None
        else msgspec.structs.replace(
            node,
            bandwidth=ability.bandwidth,
            compute=ability.compute if ability.bound else UNBOUND,
            head_bandwidth=ability.head,
            prompt_compute=ability.compute,
            memory_bytes=ability.memory.free_bytes,
        )
        for node in nodes
    ]


def _ability(node: NodeFacts, choice: Choice) -> Ability:
    state = next((s for s in node.backends if s.name == choice.name), None)
    device = state.device if state is not None else "cpu"
    speed = measured(node, choice.name)
    bandwidth = speed.decode if speed is not None else node.bandwidth
    compute = speed.prefill if speed is not None and speed.prefill else node.compute
    if speed is not None and not speed.prefill:
        compute = node.compute * speed.decode / node.bandwidth
    return Ability(
        backend=choice.name,
        version=state.version if state is not None else "",
        device=device,
        why=choice.why,
        source=speed.source if speed is not None else "estimate",
        bandwidth=bandwidth,
        head=speed.head if speed is not None else 0.0,
        compute=compute,
        bound=speed is None,
        memory=_memory(node, choice.name, device),
    )


def _memory(node: NodeFacts, backend: str, device: str) -> DeviceMemory:
    """Return where the weights would lie; ``memory_bytes`` is what a node gives of its RAM."""
    kinds = {m.kind: m for m in node.memories if m.total_bytes > 0 and m.free_bytes >= 0}
    if device == "cuda" and backend != DEFAULT and "vram" in kinds:
        return kinds["vram"]
    own = kinds.get("unified") or kinds.get("ram")
    total = own.total_bytes if own is not None else 0
    return DeviceMemory(own.kind if own is not None else "ram", total, node.memory_bytes)


def _completed(each: Ability, node: NodeFacts, scales: _Scales | None) -> Ability:
    """Return what a node can do with what it has not measured taken from those that have.

    An estimate promises more than models reach, so it is scaled by what nodes with the same kind of
    device reach; there are those that have measured nothing but their layers, too.
    """
    bandwidth, compute, head = each.bandwidth, each.compute, each.head
    if scales is None:
        faster = ACCELERATION.get(each.device, 1.0)
        bandwidth, compute = bandwidth * faster, compute * faster
    elif each.source == "estimate":
        bandwidth = node.bandwidth * _scale(scales.bandwidth)
        compute = node.compute * _scale(scales.compute)
    if not head and scales is not None and scales.head:
        head = bandwidth * _scale(scales.head)
    bound = each.bound and scales is None
    return msgspec.structs.replace(
        each, bandwidth=bandwidth, compute=compute, head=head, bound=bound
    )


def _scale(found: Sequence[float]) -> float:
    return min(max(statistics.median(found), 1 / SPREAD), SPREAD)
