"""The words that the core of a stage and its neighbours share; see ``stage`` for the rules."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.limits import (
    MAX_QUEUED_STEPS,
    MAX_SESSIONS,
    MAX_SESSIONS_PER_PEER,
    MIB,
)
from pyagent_node.base.types import EXACT_ACTIVATIONS, Digest, PeerId, SessionId, Slice
from pyagent_node.inference.backend import MAX_DECODE_ROWS
from pyagent_node.inference.pipeline.frames import PipeMessage, Tail

MAX_STEPS_PER_SESSION: Final = 16
"""Steps of one session that may wait in one stage."""
MAX_QUEUED_BYTES: Final = 512 * MIB
"""Bytes of tails that may wait in one stage."""
MAX_TOMBSTONES: Final = 4096
"""Closed sessions that a stage remembers, to drop what of theirs is still on its way."""
IDLE_SECONDS: Final = 300.0
"""A session that nothing was heard of for so long is freed."""


class StageSpec(msgspec.Struct, frozen=True):
    """What a stage is: its place in the pipeline and the shape of its slice.

    ``upstream`` is the peer of the rank before (``None`` at rank 0, where heads send), and
    ``downstream`` that of the rank after (``None`` at the last).  ``max_width`` is the greatest
    number of sessions in one batch.  ``activations`` is how they cross (see ``activations``).
    """

    model: Digest
    epoch: int
    rank: int
    peer_id: PeerId
    slice: Slice
    upstream: PeerId | None
    downstream: PeerId | None
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_seq: int
    max_width: int = MAX_DECODE_ROWS
    activations: str = EXACT_ACTIVATIONS

    @property
    def is_tail(self) -> bool:
        """Whether this is the last rank, which samples."""
        return self.downstream is None

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds the whole model and takes tokens instead of activations."""
        return self.upstream is None and self.downstream is None


class StageLimits(msgspec.Struct, frozen=True):
    """The bounds of a stage; see the constants they default to."""

    sessions: int = MAX_SESSIONS
    sessions_per_peer: int = MAX_SESSIONS_PER_PEER
    queued_steps: int = MAX_QUEUED_STEPS
    queued_bytes: int = MAX_QUEUED_BYTES
    steps_per_session: int = MAX_STEPS_PER_SESSION
    tombstones: int = MAX_TOMBSTONES
    idle_seconds: float = IDLE_SECONDS


class Outgoing(NamedTuple):
    """A message to send, with its tail."""

    peer: PeerId
    message: PipeMessage
    tail: Tail = b""


class StageView(msgspec.Struct, frozen=True):
    """A stage as ``status`` shows it; the counters count since it was started.

    ``restored`` counts tokens whose KV was imported instead of computed, ``kept`` the blocks that
    were given to the shelf, ``unfit`` the times that blocks were not what they should be,
    ``evicted`` the cells that pruned sessions have given up, of ``evicted_bytes``.  ``marked`` are
    the pieces of which landmarks were kept, ``joined_landmarks`` tokens taken over in that form.
    """

    model: Digest
    epoch: int
    rank: int
    slice: Slice
    sessions: int
    waiting: int
    queued: int
    batches: int
    tokens: int
    busy_seconds: float
    refused: int
    dropped: int = 0
    restored: int = 0
    kept: int = 0
    unfit: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    marked: int = 0
    joined_landmarks: int = 0


class StageSession(NamedTuple):
    """A session as its stage sees it."""

    session: SessionId
    model: Digest
    epoch: int
    head: PeerId
    prompt_tokens: int
    generated: int
    first_sample: float | None
    last_seen: float


def peer_lost(rank: int, peer: PeerId) -> Unavailable:
    """Return the error for a rank whose node cannot be reached."""
    return Unavailable(
        f"The node of rank {rank} ({peer}) cannot be reached.",
        code="peer_lost",
        remedy="Start it again, or load the model on the nodes that are left.",
        rank=rank,
        peer_id=peer,
    )
