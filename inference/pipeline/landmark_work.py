"""What a stage does for landmarks between two batches, and for joins: the shell around them.

See ``stage_landmarks`` for what is decided, and ``stage_shelf`` for who calls this when.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from pyagent_node.base.errors import CorruptData, PyAgentError, RunnerFailed
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.chunks import moved_to
from pyagent_node.inference.kv.forms import form_of
from pyagent_node.inference.kv.landmarks import cells_of, chosen, packed, picked, spans_at
from pyagent_node.inference.kv.port import KvShelf, Wanted
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_joins import JoinLoad
from pyagent_node.inference.pipeline.stage_landmarks import MarkTurn
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

logger = logging.getLogger("pyagent_node.pipeline")

MAX_GAPPED_BYTES: Final = 48 << 20
"""Cells with gaps go to a runner in one message; pieces with more come whole."""


class LandmarkWork:
    """The landmarks of one stage, made and taken."""

    def __init__(self, core: StageCore, runner: StageRunner, shelf: KvShelf) -> None:
        self._core = core
        self._runner = runner
        self._shelf = shelf

    # ---- making ----------------------------------------------------------------------------

    async def make(self, turn: MarkTurn) -> None:
        """Choose the landmarks of a session's piece and keep them; a failure costs only these."""
        core, kept = self._core, False
        try:
            kept = await self._make(turn)
        except RunnerFailed:
            raise
        except PyAgentError as error:
            logger.warning("rank %d: no landmarks were made: %s", core.spec.rank, error)
        finally:
            core.landmarks.done(turn, kept=kept)

    async def _make(self, turn: MarkTurn) -> bool:
        shape, marks = self._core.landmarks.shape, turn.marks
        if shape is None or turn.session.closed:
            return False
        found = await self._runner.attention(turn.seq)
        whole = await self._runner.export_kv(turn.seq, marks.skip, marks.tokens)
        if turn.session.closed or self._core.stopped or not found.rows:
            return False  # what nothing is known of would be chosen by its age, and kept for good
        at = chosen(
            found.positions,
            found.mass.sum(0),
            found.seen,
            start=marks.skip,
            stop=marks.tokens,
            cells=cells_of(marks.tokens),
        )
        kv = picked(whole, at)
        made: list[list[LayerKv]] = [[] for _ in turn.blocks]
        for layer in kv.layers:
            for number, few in enumerate(made):
                few.append(packed(kv, layer, number, tokens=marks.tokens, shape=shape))
            await trio.lowlevel.checkpoint()
        for block, layers in zip(turn.blocks, made, strict=True):
            start = block.index * BLOCK_TOKENS
            if self._shelf.wants(block):
                rows = KvRange(block.cells, start, start + BLOCK_TOKENS, tuple(layers))
                self._shelf.keep(block, rows, 0.0)
        return True

    # ---- taking ----------------------------------------------------------------------------

    async def take(self, load: JoinLoad, index: int, whole: Wanted) -> bool:
        """Take a piece as landmarks if it is better so; returns whether it is settled by that.

        What is damaged is computed, with the rest of the prompt.
        """
        landmarks = self._core.landmarks
        small = landmarks.wanted(load, index, whole)
        if small is None or not await self._preferred(load, index, whole, small):
            return False
        found = await self._shelf.load(small)
        if len(found) < len(small.chain):  # what is left of them is of no use
            return False
        if not landmarks.taken(load, index, found):
            self._core.joins.refused += 1
            return True
        try:
            await self._join(load, index, found)
        except CorruptData as error:
            self._core.joins.refused += 1
            logger.warning("landmarks of a piece were refused: %s", error)
        return True

    async def _preferred(self, load: JoinLoad, index: int, whole: Wanted, small: Wanted) -> bool:
        """Whether the landmarks of a piece are there and worth more than all of it."""
        landmarks, piece = self._core.landmarks, load.message.pieces[index]
        size = cells_of(piece.tokens) * self._runner.info.kv_bytes_per_token
        promised = self._shelf.promises(small.model, small.chain, small.layers)
        if size > MAX_GAPPED_BYTES or promised < len(small.chain):
            return False
        every = await self._shelf.cost(landmarks.whole(whole))
        if every == 0:
            return False
        few = await self._shelf.cost(small)
        return form_of(every, few, landmarks.computing(load, index, whole)) == "landmarks"

    async def _join(self, load: JoinLoad, index: int, found: list[KvRange]) -> None:
        core, piece, skip = self._core, load.message.pieces[index], load.message.skip
        landmarks, codec = core.landmarks, self._runner.info.kv_codec
        if landmarks.shape is None:
            return
        start, layers = load.gap(index).start, list[LayerKv]()
        spans: tuple[tuple[int, int], ...] = ()
        for each in zip(*(kv.layers for kv in found), strict=True):
            kept, layer = landmarks.layer(load, index, each)
            if layers and kept != spans:
                raise CorruptData(
                    "The layers of a piece have other landmarks.", code="bad_landmarks"
                )
            spans = kept
            kv = KvRange(codec, skip, piece.tokens, (layer,), kept)
            layers += moved_to(kv, start, landmarks.shape)
            await trio.lowlevel.checkpoint()
        moved = KvRange(codec, skip, piece.tokens, tuple(layers), spans)
        core.joins.moved(load, index, moved.layers, spans_at(moved, start))
        if index in load.landmarks:
            landmarks.joined += piece.tokens - skip
