"""What the planner is given and what it answers."""

from __future__ import annotations

import math
from typing import Final

import msgspec

from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId, Rank, Slice
from pyagent_node.inference.backend_names import BackendState

MEMORY_SHARE: Final = 0.9
"""Share of a node's free memory that a plan may use."""
RUNNER_BYTES: Final = 96 * MIB
"""Memory of a runner process besides weights and KV."""


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node measured of itself.

    ``memory_bytes`` is what it can give to a model now, ``bandwidth`` its memory's bytes a second
    and ``compute`` its floating-point operations a second with all ``threads``.  ``held`` are the
    slices of the model in question whose bytes are on its disk already.  ``backends`` are
    those that it knows of, installed or not; ``activations`` how it can pass them on.
    """

    peer_id: PeerId
    name: str
    memory_bytes: int
    threads: int
    bandwidth: float
    compute: float
    held: tuple[Slice, ...] = ()
    backends: tuple[BackendState, ...] = ()
    activations: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether the figures make sense; those of a peer need not."""
        figures = (float(self.memory_bytes), self.bandwidth, self.compute)
        return all(math.isfinite(x) and 0 < x < 1e18 for x in figures)


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes of a model that placing it depends on.

    ``layer_bytes`` and ``layer_flops`` have one entry a layer, the latter for one token;
    ``head_bytes`` and ``head_flops`` are the output head's, ``embedding_bytes`` what a rank that
    holds the whole model needs besides.  ``kv_bytes`` is one layer's KV of one token.
    """

    name: str
    layer_bytes: tuple[int, ...]
    layer_flops: tuple[int, ...]
    head_bytes: int
    head_flops: int
    embedding_bytes: int
    kv_bytes: int

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_bytes)

    def needs(self, part: Slice, *, n_ctx: int, n_seq: int) -> int:
        """Return the bytes of memory of a runner of ``part``."""
        need = sum(self.layer_bytes[part.first : part.last]) + RUNNER_BYTES
        need += (part.last - part.first) * self.kv_bytes * n_ctx * n_seq
        if part.head:
            need += self.head_bytes + (self.embedding_bytes if part.first == 0 else 0)
        return need


class PlanOptions(msgspec.Struct, frozen=True):
    """What the user decided.

    ``boundaries`` are the inner cuts: ``(10, 20)`` of 30 layers makes the ranks 0-10, 10-20 and
    20-30.  ``nodes`` are the ranks' nodes in order; only here may a node come twice.  ``n_seq``
    sessions of ``n_ctx`` tokens are reserved on every rank.
    """

    n_ctx: int
    n_seq: int
    ranks: int | None = None
    boundaries: tuple[int, ...] | None = None
    nodes: tuple[PeerId, ...] | None = None


class Plan(msgspec.Struct, frozen=True):
    """Ranks, the predicted time of one token in seconds (alone in the pipeline), and why."""

    ranks: tuple[Rank, ...]
    token_seconds: float
    explanation: tuple[str, ...]
