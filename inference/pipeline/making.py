"""Makes the KV of pieces (``kv.chunks``): each is the prompt of a session that asks for no token.

The ranks keep its blocks as they keep those of any prompt; the session ends when all of them have
said so.  Nothing depends on it: what could not be made in time is computed with the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, cast

import numpy as np
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import MAX_DECODE_ROWS, Activations, Tokens
from pyagent_node.inference.kv.landmarks import PROBE
from pyagent_node.inference.kv.pieces import Marks
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.driver import LOOKUP_ROWS, embedder
from pyagent_node.inference.pipeline.flights import Route
from pyagent_node.inference.pipeline.frames import Keep, Restored, Step, pack_tail
from pyagent_node.inference.pipeline.joining import NewPiece
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.stage_landmarks import MAX_PROBE, worth_marking
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_keys import PREFILL_PIECE

logger = logging.getLogger("pyagent_node.pipeline")

MAKE_SECONDS: Final = 60.0
"""How long all pieces of a request may take."""
_NOTHING: Final[Tokens] = np.zeros(0, np.int32)
AT_ONCE: Final = 4
"""Pieces that are computed at the same time, one behind the other through the ranks."""


class _Making:
    __slots__ = ("attempt", "done", "error", "ranks")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.ranks = {rank.rank: rank.peer_id for rank in attempt.route.placement.ranks}
        self.done = trio.Event()
        self.error: PyAgentError | None = None


class PieceMaker:
    """Makes pieces for the head ``peer_id``; ``send`` sends, ``fresh`` draws ids for the wire."""

    def __init__(
        self,
        peer_id: PeerId,
        send: Callable[[Outgoing], None],
        fresh: Callable[[], SessionId],
    ) -> None:
        self.made = 0
        """Pieces whose KV all ranks have kept."""
        self.failed = 0
        self.landmarks = False
        """Whether landmarks are made of pieces, too."""
        self._peer_id = peer_id
        self._send = send
        self._fresh = fresh
        self._wires: dict[SessionId, _Making] = {}

    def makes(self, wire: SessionId) -> bool:
        """Whether ``wire`` is the session of a piece."""
        return wire in self._wires

    async def make(
        self, model: HeadModel, root: bytes, pieces: Sequence[NewPiece], skip: int
    ) -> None:
        """Have the ranks compute and keep ``pieces``; returns in any case, after a while.

        With :attr:`landmarks` they choose and keep these of each, too, but for its first ``skip``.
        """
        limiter = trio.CapacityLimiter(AT_ONCE)
        with trio.move_on_after(MAKE_SECONDS):
            probe = await _probe(model) if self.landmarks and pieces else _NOTHING
            async with trio.open_nursery() as nursery:
                for piece in pieces:
                    fits = len(piece.padded) + len(probe) <= model.placement.n_ctx
                    few = fits and len(probe) > 0 and worth_marking(piece.tokens, skip)
                    marks = Marks(piece.tokens, skip, len(probe)) if few else None
                    behind = probe if few else _NOTHING
                    start = partial(self._make, marks=marks, probe=behind)
                    nursery.start_soon(start, model, root, piece.padded, limiter)

    async def _make(
        self,
        model: HeadModel,
        root: bytes,
        tokens: Tokens,
        limiter: trio.CapacityLimiter,
        *,
        marks: Marks | None,
        probe: Tokens,
    ) -> None:
        async with limiter:
            wire, embed = self._fresh(), embedder(model)
            route = Route(wire, self._peer_id, model.placement, SamplingParams(), root)
            end = len(tokens) + len(probe)
            attempt = Attempt(route, tokens, (), end, embed, trio.current_time())
            making = self._wires[wire] = _Making(attempt)
            parts = [(at, tokens[at : at + PREFILL_PIECE]) for at in _starts(len(tokens))]
            if marks is not None:
                parts.append((len(tokens), probe))
            try:
                self._send(attempt.open(landmarks=marks))
                for step, (start, part) in enumerate(parts):
                    rows = None if embed is None else await _lookup(embed, part)
                    if making.done.is_set():
                        break
                    self._send(self._step(route, step, start, part, rows))
                placement = route.placement
                keep = Keep(wire, placement.model, placement.epoch, 0)
                self._send(Outgoing(placement.ranks[0].peer_id, keep))
                await making.done.wait()
            finally:
                del self._wires[wire]
                for out in attempt.close():
                    self._send(out)
            self.made += making.error is None
            self.failed += making.error is not None

    @staticmethod
    def _step(
        route: Route, number: int, start: int, part: Tokens, rows: Activations | None
    ) -> Outgoing:
        placement = route.placement
        step = Step(
            route.session,
            placement.model,
            placement.epoch,
            0,
            number,
            start,
            len(part),
            sample=False,
        )
        return Outgoing(placement.ranks[0].peer_id, step, pack_tail(part, rows, placement.crossing))

    def on_restored(self, sender: PeerId, message: Restored) -> None:
        """Take a rank's word that it has kept the blocks of a piece."""
        making = self._wires.get(message.session)
        if making is not None and making.ranks.get(message.rank) == sender:
            del making.ranks[message.rank]
            if not making.ranks:
                making.done.set()

    def on_error(self, sender: PeerId, wire: SessionId, error: PyAgentError) -> None:
        """Take a rank's word that it gave up the session of a piece."""
        making = self._wires.get(wire)
        if making is not None and sender in making.attempt.peers:
            self._give_up(making, error)

    def peer_down(self, peer: PeerId, error: PyAgentError) -> None:
        """Give up what relied on ``peer``."""
        for making in self._wires.values():
            if peer in making.attempt.peers:
                self._give_up(making, error)

    @staticmethod
    def _give_up(making: _Making, error: PyAgentError) -> None:
        making.error = making.error or error
        making.done.set()


def _starts(tokens: int) -> range:
    return range(0, tokens, PREFILL_PIECE)


async def _probe(model: HeadModel) -> Tokens:
    """Return the tokens to read behind pieces, none where the vocabulary has too few, or fails."""
    try:
        words = await model.tokenizer.tokenize(PROBE, add_special=False, parse_special=False)
    except PyAgentError as error:
        logger.warning("no landmarks are made of pieces: %s", error)
        return _NOTHING
    good = MAX_DECODE_ROWS < len(words) < MAX_PROBE
    return np.array(words, dtype=np.int32) if good else _NOTHING


async def _lookup(embed: Callable[[Tokens], Activations], tokens: Tokens) -> Activations:
    parts: list[Activations] = []
    for at in range(0, len(tokens), LOOKUP_ROWS):
        parts.append(embed(tokens[at : at + LOOKUP_ROWS]))
        await trio.lowlevel.checkpoint()
    return cast("Activations", np.concatenate(parts))
