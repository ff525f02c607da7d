"""How a head joins KV of pieces into an attempt: what it asks for, and what answers come to.

A piece is taken over where every rank has its cells; the others are computed like the rest of the
prompt.  A rank that does not answer in time has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import numpy as np

from pyagent_node.base.types import PeerId, Placement, SessionId
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.kv.chunks import alone
from pyagent_node.inference.kv.pieces import JoinPlan
from pyagent_node.inference.kv.port import KvShelf
from pyagent_node.inference.pipeline.frames import Join, Joined, pack_tail
from pyagent_node.inference.pipeline.restoring import bad_result
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.sharding.kv_keys import block_chain

JOIN_SECONDS: Final = 30.0
"""How long the head of a session waits for its ranks to get pieces ready."""


class NewPiece(NamedTuple):
    """A piece to be computed: how many ``tokens`` it has, and they, ``padded`` to whole blocks."""

    tokens: int
    padded: Tokens


class Joining:
    """The wait of one attempt for the pieces of ``plan`` on every rank of a placement."""

    __slots__ = ("_answers", "_plan", "_ranks", "_smaller", "until")

    def __init__(self, placement: Placement, plan: JoinPlan, now: float) -> None:
        self.until = now + JOIN_SECONDS
        """When the attempt begins without."""
        self._ranks = {rank.rank: rank.peer_id for rank in placement.ranks}
        self._plan = plan
        self._answers: dict[int, frozenset[int]] = {}
        self._smaller: set[int] = set()

    def take(self, sender: PeerId, message: Joined) -> bool:
        """Take a rank's word; returns whether all have spoken.

        The first word counts, and only that of the rank itself.  Raises :class:`CorruptData`
        (``bad_result``) for one that cannot be.
        """
        if self._ranks.get(message.rank) != sender or message.rank in self._answers:
            return False
        held = frozenset(message.pieces)
        if not held <= set(range(len(self._plan.pieces))):
            raise bad_result(sender, f"it has pieces of {len(self._plan.pieces)} that are none")
        if not held >= set(message.landmarks):
            raise bad_result(sender, "it has landmarks of pieces that it does not have")
        self._answers[message.rank] = held
        self._smaller.update(message.landmarks)
        return len(self._answers) == len(self._ranks)

    def gaps(self) -> dict[int, int]:
        """Return which positions come from pieces, by what was said so far: start to stop."""
        if len(self._answers) < len(self._ranks):
            return {}
        plan, held = self._plan, self._held()
        return {plan.pieces[i].start + plan.skip: plan.pieces[i].stop for i in sorted(held)}

    def landmarks(self) -> int:
        """Return how many tokens come from pieces of which a rank has the smaller form."""
        plan = self._plan
        few = self._held() & self._smaller if self._smaller and self.gaps() else ()
        return sum(plan.pieces[i].tokens - plan.skip for i in few)

    def _held(self) -> frozenset[int]:
        return frozenset.intersection(*self._answers.values())


def wish(  # noqa: PLR0917 - private to the attempt
    session: SessionId,
    placement: Placement,
    root: bytes,
    plan: JoinPlan,
    prompt: Tokens,
    sources: Sequence[PeerId],
    *,
    landmarks: bool,
) -> Outgoing:
    """Return what asks the ranks for the pieces of a prompt; ``landmarks`` as in ``Join``."""
    tokens = cast("Tokens", np.concatenate([alone(prompt, piece) for piece in plan.pieces]))
    message = Join(
        session,
        placement.model,
        placement.epoch,
        0,
        root,
        plan.skip,
        plan.pieces,
        tuple(sources),
        landmarks,
    )
    return Outgoing(placement.ranks[0].peer_id, message, pack_tail(tokens, None))


def missing(
    root: bytes, plan: JoinPlan, prompt: Tokens, placement: Placement, shelf: KvShelf
) -> list[NewPiece]:
    """Return the pieces, as they are computed alone, of which not all blocks can likely be had."""
    layers = range(placement.ranks[0].slice.first, placement.ranks[-1].slice.last)
    found: dict[bytes, NewPiece] = {}
    for piece in plan.pieces:
        tokens = alone(prompt, piece)
        chain = block_chain(root, tokens, len(tokens))
        if shelf.promises(placement.model, chain, layers) < len(chain):
            found[chain[-1]] = NewPiece(piece.tokens, tokens)
    return list(found.values())
