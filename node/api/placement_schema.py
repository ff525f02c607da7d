"""The messages of the admin API about placements: plans and drains.

As ``schema``: plain values only, for the command line as well.
"""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Digest, PeerId
from pyagent_node.node.api.schema import PlacementView


class PlannedRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank as it would be; ``standbys`` and ``spares`` are names of nodes."""

    rank: int
    layers: tuple[int, int]
    head: bool
    peer_id: PeerId
    name: str
    standbys: tuple[str, ...] = ()
    spares: tuple[str, ...] = ()


class PlannedNode(msgspec.Struct, frozen=True, kw_only=True):
    """What one node would do, with what, how fast, and ``why`` not more and not less.

    ``layers`` are those of its ranks.  ``source`` is where the speed comes from: ``sessions`` (what
    real ones showed), ``loading`` (a short run), ``others`` (measured with other models) or
    ``estimate``.  ``decode_bytes_per_second`` of weights and ``prefill_flops_per_second`` are that
    speed; ``token_seconds`` and ``prompt_seconds`` are what its layers take for a token of an
    answer and of a prompt.  Of its memory (``ram``, ``vram``, ``unified``; ``total`` is 0 where it
    is not known) ``free_bytes`` could go to this model, ``usable_bytes`` of them are planned with
    and ``need_bytes`` are taken.  ``share`` of its speed is what it counts for.
    """

    peer_id: PeerId
    name: str
    layers: tuple[tuple[int, int], ...]
    backend: str
    version: str
    device: str
    backend_why: str
    threads: int
    source: str
    decode_bytes_per_second: float
    prefill_flops_per_second: float
    token_seconds: float
    prompt_seconds: float
    memory: str
    total_bytes: int
    free_bytes: int
    usable_bytes: int
    need_bytes: int
    supply: str
    charge: float | None
    saver: bool
    throttled: bool
    share: float
    power: str
    why: str


class PlanView(msgspec.Struct, frozen=True, kw_only=True):
    """What planning a model again would give.

    ``epoch`` is that of the placement as it is, ``None`` when the model is not loaded.
    ``token_seconds`` is the predicted time of one token, ``token_seconds_now`` that of the
    placement as it is (``None`` when a node of it does not answer).  ``changes`` is empty when
    nothing would change; ``explanation`` says what decided, ``guessing`` who would guess and
    ``switch`` what running answers would notice of the change.  ``prompt_seconds`` is the predicted
    time of one token of a prompt in all ranks together, ``nodes`` every node that was considered.
    """

    model: Digest
    name: str
    epoch: int | None
    n_ctx: int
    n_seq: int
    token_seconds: float
    token_seconds_now: float | None
    ranks: tuple[PlannedRank, ...]
    changes: tuple[str, ...]
    explanation: tuple[str, ...]
    guessing: str = ""
    switch: str = ""
    prompt_seconds: float = 0.0
    nodes: tuple[PlannedNode, ...] = ()


class PlacementsReply(msgspec.Struct, frozen=True):
    """Every placement with the state of its ranks, standbys and spares."""

    placements: tuple[PlacementView, ...]


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Take the work of a node (name or peer id) away, or let it work again (``undo``)."""

    node: str
    undo: bool = False


class DrainReply(msgspec.Struct, frozen=True, kw_only=True):
    """The node holds nothing any more and may leave, or works again."""

    peer_id: PeerId
    name: str
    draining: bool
