"""The part of a stage's pure core that deals in landmarks of pieces (``kv.landmarks``).

*Making*: a session of a piece that asks for it has tokens read behind its prompt; the rank measures
what these rest on.  When they are computed, the shell asks the runner for it, and for the cells,
and keeps those that were chosen, as blocks of their own.  The head is told that the session's
blocks are kept only after that.  Every rank goes by its own layers, and names what it chose by
them.

*Taking*: a session that joins pieces and may be pruned can have them in this form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend import MAX_DECODE_ROWS, KvRange, LayerKv
from pyagent_node.inference.kv.landmarks import NEAR, block_bytes, cells_name, cells_of, unpacked
from pyagent_node.inference.kv.pieces import MAX_PIECE, MAX_SKIP, Marks
from pyagent_node.inference.kv.port import SettledBlock, Wanted
from pyagent_node.inference.kv.pruning import ranges
from pyagent_node.inference.pipeline.frames import OpenSession
from pyagent_node.inference.pipeline.stage_joins import JoinLoad
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS
from pyagent_node.sharding.kv_landmarks import landmark_chain

MAX_PROBE: Final = BLOCK_TOKENS
"""Fewer tokens than this are read behind a piece, so no block of theirs is ever full."""
_STABLE: Final = 16
"""The digits of a session's id that are those of its stable id."""


def worth_marking(tokens: int, skip: int) -> bool:
    """Whether a piece is long enough to have landmarks."""
    return NEAR <= cells_of(tokens) <= tokens - skip


def check_marks(message: OpenSession) -> None:
    """Raise :class:`InvalidRequest` (``bad_parameter``) for landmarks that cannot be made."""
    marks, end = message.landmarks, message.prompt_tokens
    if marks is None:
        return
    if (
        not 0 <= end - marks.tokens < BLOCK_TOKENS
        or end % BLOCK_TOKENS
        or not marks.tokens <= MAX_PIECE
        or not 0 <= marks.skip <= MAX_SKIP
        or not worth_marking(marks.tokens, marks.skip)
        or not MAX_DECODE_ROWS < marks.probe < MAX_PROBE
        or message.positions < end + marks.probe
    ):
        raise InvalidRequest(
            f"Landmarks of {marks.tokens} tokens cannot be made in a session of {end}.",
            code="bad_parameter",
            parameter="landmarks",
        )


class MarkTurn(msgspec.Struct, frozen=True, gc=False):
    """A session whose landmarks are to be chosen now; ``blocks`` is what they are kept as."""

    session: ServedSession
    seq: int
    marks: Marks
    blocks: tuple[SettledBlock, ...]


class StageLandmarks:
    """The landmarks of one stage.

    ``shape`` is ``None`` where its rows cannot be moved; ``able`` says whether its runner can watch
    attention, and take cells with gaps.
    """

    def __init__(self, spec: StageSpec, cells: str, shape: KvShape | None, *, able: bool) -> None:
        self.made = 0
        """Pieces whose landmarks were kept."""
        self.joined = 0
        """Tokens of pieces that came in this form."""
        self.shape = shape if able else None
        """``None`` where no landmarks are made or taken on this rank."""
        self.cells = cells_name(cells)
        self._spec = spec
        self._exact = cells
        self._due: deque[ServedSession] = deque()
        self._ended: list[SessionId] = []

    # ---- making ----------------------------------------------------------------------------

    def opened(self, session: ServedSession, marks: Marks | None) -> None:
        """Take note of a session that opens."""
        session.marks = marks if self.shape is not None and session.blocks is not None else None

    def computed(self, session: ServedSession) -> None:
        """Note a step of a session."""
        marks = session.marks
        if marks is not None and session.watched and session not in self._due:
            self._due.append(session)

    @property
    def has_turn(self) -> bool:
        """Whether :meth:`next_turn` may return something."""
        return bool(self._due)

    def next_turn(self) -> MarkTurn | None:
        """Take the session whose turn it is."""
        while self._due:
            session = self._due.popleft()
            marks, blocks, seq = session.marks, session.blocks, session.seq
            if session.closed or marks is None or blocks is None or seq is None:
                continue
            if session.end < session.prompt_tokens + marks.probe:
                continue  # it is due again with its next step
            link = blocks.link(session.prompt_tokens // BLOCK_TOKENS)
            return MarkTurn(
                session, seq, marks, self._blocks(session, self._names(link, marks.tokens))
            )
        return None

    def done(self, turn: MarkTurn, *, kept: bool) -> None:
        """Note that the landmarks of a session were kept, or cannot be."""
        turn.session.marks = None
        self.made += kept
        # not before: whoever looks while they are made would end what has yet to begin, for good
        self._ended.append(turn.blocks[0].session)

    def take_ended(self) -> list[SessionId]:
        """Return the sessions of blocks that were given to the shelf since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _names(self, link: bytes, tokens: int) -> tuple[bytes, ...]:
        part = self._spec.slice
        return landmark_chain(link, part.first, part.last, cells_of(tokens) // BLOCK_TOKENS)

    def _blocks(self, session: ServedSession, names: Sequence[bytes]) -> tuple[SettledBlock, ...]:
        """Return what the blocks are, as if of a session of their own beside that of the piece."""
        spec, wire = self._spec, session.id
        beside = blake3(b"landmarks\0" + wire.encode()).hex()[: max(1, len(wire) - _STABLE)]
        return tuple(
            SettledBlock(
                session=SessionId(wire[:_STABLE] + beside),
                head=session.head,
                model=spec.model,
                epoch=spec.epoch,
                index=index,
                chain=name,
                first_layer=spec.slice.first,
                last_layer=spec.slice.last,
                cells=self.cells,
            )
            for index, name in enumerate(names)
        )

    # ---- taking ----------------------------------------------------------------------------

    def wanted(self, load: JoinLoad, index: int, whole: Wanted) -> Wanted | None:
        """Return what to ask the shelf for instead of ``whole``, if the piece may come so."""
        piece, skip = load.message.pieces[index], load.message.skip
        able = load.message.landmarks and load.session.pruning is not None
        if not able or self.shape is None or not worth_marking(piece.tokens, skip):
            return None
        names = self._names(whole.chain[-1], piece.tokens)
        each = (piece.tokens - skip) / (len(names) * BLOCK_TOKENS)
        return msgspec.structs.replace(
            whole,
            chain=names,
            cells=self.cells,
            skip=0,
            prefill_seconds=whole.prefill_seconds * each,
            block_bytes=block_bytes(self.shape),
        )

    def layer(
        self, load: JoinLoad, index: int, blocks: Sequence[LayerKv]
    ) -> tuple[tuple[tuple[int, int], ...], LayerKv]:
        """Return the rows of one layer of a piece, and their places in it.

        Raises :class:`CorruptData` for what cannot be them.
        """
        assert self.shape is not None, "nothing was asked for without"
        piece = load.message.pieces[index]
        at, kv = unpacked(blocks, tokens=piece.tokens, skip=load.message.skip, shape=self.shape)
        return ranges(at), kv

    def taken(self, load: JoinLoad, index: int, blocks: Sequence[KvRange]) -> bool:
        """Whether what the shelf has given are all landmark blocks of a piece."""
        part, tokens = self._spec.slice, load.message.pieces[index].tokens
        names = list(range(part.first, part.last))
        return len(blocks) == cells_of(tokens) // BLOCK_TOKENS and all(
            kv.codec == self.cells and [layer.layer for layer in kv.layers] == names
            for kv in blocks
        )

    def whole(self, wanted: Wanted) -> Wanted:
        """Return ``wanted`` with what a block of the whole form of a piece takes."""
        shape = self.shape
        size = 0 if shape is None else 2 * BLOCK_TOKENS * shape.row_bytes
        return msgspec.structs.replace(wanted, block_bytes=float(size))

    def computing(self, load: JoinLoad, index: int, wanted: Wanted) -> float:
        """Return the seconds that the rank takes to compute a piece, 0 if nobody knows."""
        return wanted.computing * (load.message.pieces[index].tokens - load.message.skip)
