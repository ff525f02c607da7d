"""What the planner is given and what it answers."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId, Rank, Slice
from pyagent_node.inference.backend_names import BackendState
from pyagent_node.inference.machine import DeviceMemory, MeasuredSpeed, Power, sensible

MEMORY_SHARE: Final = 0.9
"""Share of a node's free memory that a plan may use."""
RUNNER_BYTES: Final = 96 * MIB
"""Memory of a runner process besides weights and KV."""


LEAST_SHARE: Final = 0.25
"""What counts of the speed of a node that wants no work, where it is needed all the same."""


class Work(NamedTuple):
    """Bytes of weights that a token reads and operations that it takes, in layers and the head."""

    bytes: int
    head_bytes: int
    flops: int
    head_flops: int


class NodeFacts(msgspec.Struct, frozen=True):
    """What a node measured of itself.

    ``memory_bytes`` is what it can give to a model now, ``bandwidth`` its memory's bytes a second
    and ``compute`` its floating-point operations a second with all ``threads``.  ``held`` are the
    slices of the model in question whose bytes are on its disk already.  ``backends`` are
    those that it knows of, installed or not, ``activations`` how it can pass them on; ``speeds``
    are what backends were measured to do, ``memories`` where weights can lie.  ``share`` of its
    speed is what it counts for, in its own judgement of its ``power``: 0 is no work unless there is
    no other way.
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
    speeds: tuple[MeasuredSpeed, ...] = ()
    memories: tuple[DeviceMemory, ...] = ()
    power: Power = Power()
    share: float = 1.0
    head_bandwidth: float = 0.0
    prompt_compute: float = 0.0

    def token_seconds(self, work: Work) -> float:
        """Return what a token takes that does so much work, without the fixed time of a stage."""
        reading = work.bytes / self.bandwidth
        reading += work.head_bytes / (self.head_bandwidth or self.bandwidth)
        return max(reading, (work.flops + work.head_flops) / self.compute)

    @property
    def usable(self) -> bool:
        """Whether the figures make sense; those of a peer need not."""
        figures = (float(self.memory_bytes), self.bandwidth, self.compute)
        return all(map(sensible, figures)) and 0 <= self.share <= 1

    @property
    def willing(self) -> bool:
        """Whether it takes work where others could."""
        return self.share > 0


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
    architecture: str = ""

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

    def work(self, part: Slice) -> Work:
        """Return what one token takes in ``part``."""
        return Work(
            sum(self.layer_bytes[part.first : part.last]),
            self.head_bytes if part.head else 0,
            sum(self.layer_flops[part.first : part.last]),
            self.head_flops if part.head else 0,
        )


class PlanOptions(msgspec.Struct, frozen=True):
    """What the user decided.

    ``boundaries`` are the inner cuts: ``(10, 20)`` of 30 layers makes the ranks 0-10, 10-20 and
    20-30.  ``nodes`` are the ranks' nodes in order; only here may a node come twice.  ``n_seq``
    sessions of ``n_ctx`` tokens are reserved on every rank.  ``prompt_tokens`` are the tokens of
    prompts that are computed for each token of an answer; their time counts in the choice.
    """

    n_ctx: int
    n_seq: int
    ranks: int | None = None
    boundaries: tuple[int, ...] | None = None
    nodes: tuple[PeerId, ...] | None = None
    prompt_tokens: float = 0.0


class NodePlan(msgspec.Struct, frozen=True):
    """What one node does in a plan, and ``why`` not more and not less.

    ``token_seconds`` and ``prompt_seconds`` are what its slices take for a token of an answer and
    of a prompt; ``need_bytes`` is their memory, of the ``usable_bytes`` that a plan may use.
    """

    peer_id: PeerId
    name: str
    slices: tuple[Slice, ...]
    token_seconds: float
    prompt_seconds: float
    need_bytes: int
    usable_bytes: int
    why: str


class Plan(msgspec.Struct, frozen=True):
    """Ranks, the predicted time of one token in seconds (alone in the pipeline), and why.

    ``prompt_seconds`` is that of one token of a prompt, ``weighed_seconds`` that of a token with
    its share of prompts, nodes counting as they wish to, and ``cost_seconds`` what was minimised.
    """

    ranks: tuple[Rank, ...]
    token_seconds: float
    explanation: tuple[str, ...]
    prompt_seconds: float = 0.0
    weighed_seconds: float = 0.0
    cost_seconds: float = 0.0
    nodes: tuple[NodePlan, ...] = ()
