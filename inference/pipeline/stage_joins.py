"""The part of a stage's pure core that takes over the KV of pieces of a prompt (``kv.chunks``).

When a session that asked for it has its slot, the shell loads the blocks of each piece and moves
their keys to where they are to stand; then the head is told of which pieces this rank has the
cells.  They wait here until the step comes that begins behind them, and go into the slot right
before it.  Whatever goes wrong costs a piece, never the session: the head has it computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend import KvRange, LayerKv, Tokens
from pyagent_node.inference.kv.chunks import blocks_of, check_pieces, movable, split_alone
from pyagent_node.inference.kv.pieces import Piece
from pyagent_node.inference.kv.port import Wanted
from pyagent_node.inference.kv.ranges import joined, part_of
from pyagent_node.inference.pipeline.frames import (
    MAX_SOURCES,
    Join,
    Joined,
    Tail,
    unpack_tokens,
)
from pyagent_node.inference.pipeline.origins import block_root
from pyagent_node.inference.pipeline.stage_session import ServedSession
from pyagent_node.inference.pipeline.stage_types import Outgoing, StageSpec
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, LINK_BYTES, block_chain


class JoinLoad:
    """The pieces of one session on their way; the shell drives it (see ``stage_shelf``)."""

    __slots__ = ("active", "began", "held", "landmarks", "message", "session", "tokens")

    def __init__(self, session: ServedSession, message: Join, tokens: tuple[Tokens, ...]) -> None:
        self.session = session
        self.message = message
        self.tokens = tokens
        """Those of each piece as it was computed alone."""
        self.held: set[int] = set()
        """The pieces that are there."""
        self.landmarks: set[int] = set()
        """Those of them that are there in the smaller form."""
        self.active = True
        """Whether the head waits for it still."""
        self.began = False

    def gap(self, index: int) -> Piece:
        """Return what of a piece comes from its KV."""
        piece = self.message.pieces[index]
        return Piece(piece.start + self.message.skip, piece.stop)


class StageJoins:
    """The pieces of one stage; ``cells`` and ``shape`` are what its runner says of its KV."""

    def __init__(self, spec: StageSpec, cells: str, shape: KvShape | None) -> None:
        self.joined = 0
        """Tokens whose KV was ready to be taken over."""
        self.refused = 0
        """Times that blocks were not what they should be."""
        self._spec = spec
        self._cells = cells
        self.shape = shape if movable(shape, cells) else None
        """``None`` where nothing can be joined on this rank."""
        self._loads: dict[SessionId, JoinLoad] = {}

    def freed(self, session: ServedSession) -> None:
        """Forget a session."""
        load = self._loads.pop(session.id, None)
        if load is not None:
            load.active = False
        session.gaps.clear()

    def join(self, session: ServedSession, message: Join, tail: Tail) -> list[Outgoing]:
        """Take a session's wish; returns what to send for it now.

        Raises :class:`CorruptData` (``malformed_restore``, ``malformed_join``, ``out_of_order``)
        and :class:`InvalidRequest` (``bad_join``, ``bad_parameter``).
        """
        spec = self._spec
        tokens = unpack_tokens(tail, memoryview(tail).nbytes // 4)
        if session.blocks is not None or len(message.root) != LINK_BYTES:
            # cells that were joined must never be found as those of a whole prompt
            raise CorruptData(
                "Pieces are joined in sessions that keep no blocks of their own, by a root.",
                code="malformed_join",
            )
        if session.restores or session.next_step:
            raise CorruptData("Pieces are joined once, before the first step.", code="out_of_order")
        check_pieces(message.pieces, message.skip, session.prompt_tokens)
        if len(message.sources) > MAX_SOURCES:
            raise InvalidRequest(
                f"{len(message.sources)} sources are named; {MAX_SOURCES} may be.",
                code="bad_parameter",
                parameter="sources",
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= spec.n_vocab:
            raise InvalidRequest(
                f"Tokens run from 0 to {spec.n_vocab - 1}.",
                code="bad_parameter",
                parameter="tokens",
            )
        session.restores = True
        load = JoinLoad(session, message, tuple(split_alone(tokens, message.pieces)))
        self._loads[session.id] = load
        out: list[Outgoing] = []
        if spec.downstream is not None:
            onward = msgspec.structs.replace(message, rank=spec.rank + 1)
            out.append(Outgoing(spec.downstream, onward, tail))
        if self.shape is None:
            out += self.loaded(load)
        return out

    def stepped(self, session: ServedSession) -> None:
        """Note a step of a session: its head waits for pieces no longer."""
        load = self._loads.pop(session.id, None) if self._loads else None
        if load is not None:
            load.active = False

    @property
    def waiting(self) -> bool:
        """Whether any session waits for pieces."""
        return bool(self._loads)

    def take_loads(self) -> list[JoinLoad]:
        """Return the loads that can begin now: their sessions have their slots."""
        began = [
            load for load in self._loads.values() if not load.began and load.session.seq is not None
        ]
        for load in began:
            load.began = True
        return began

    def fitting(self, load: JoinLoad) -> range:
        """Return the leading pieces for which a slot has room; the others are computed.

        Cells of all pieces wait here together, and the prompt of a session that gives cells up may
        be many times as long as a slot.
        """
        room, count = self._spec.n_ctx, 0
        for piece in load.message.pieces:
            room -= piece.tokens
            if room < 0:
                break
            count += 1
        return range(count)

    def wanted(self, load: JoinLoad, index: int, skip: int, prefill_seconds: float) -> Wanted:
        """Return what to ask the shelf for, from block ``skip`` of a piece on."""
        part, message, tokens = self._spec.slice, load.message, load.tokens[index]
        session = load.session
        root = block_root(message.root, session.classes, session.trail, session=session.id)
        return Wanted(
            session=load.session.id,
            model=self._spec.model,
            chain=block_chain(root, tokens, len(tokens), prefill_cut=load.session.cut),
            first_layer=part.first,
            last_layer=part.last,
            cells=self._cells,
            skip=skip,
            sources=message.sources,
            prefill_seconds=prefill_seconds,
        )

    def taken(self, load: JoinLoad, index: int, blocks: Sequence[KvRange]) -> KvRange | None:
        """Return the cells of a piece that are to be moved; ``None`` if blocks are missing."""
        part, piece = self._spec.slice, load.message.pieces[index]
        names = list(range(part.first, part.last))
        for number, kv in enumerate(blocks):
            span = (number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)
            layers = [layer.layer for layer in kv.layers]
            if kv.codec != self._cells or (kv.start, kv.stop) != span or layers != names:
                self.refused += 1
                return None
        if len(blocks) < blocks_of(piece):
            return None
        return part_of(joined(blocks), load.message.skip, piece.tokens)

    def moved(
        self,
        load: JoinLoad,
        index: int,
        layers: tuple[LayerKv, ...],
        kept: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Take the cells of a piece as they are at its place, those at ``kept`` if not all."""
        gap, session = load.gap(index), load.session
        if not load.active or session.closed:
            return
        skip, piece = load.message.skip, load.message.pieces[index]
        tokens = load.tokens[index][skip : piece.tokens]
        kv = KvRange(self._cells, gap.start, gap.stop, layers, kept)
        session.gaps[gap.start] = (kv, tokens)
        load.held.add(index)
        if kept:
            load.landmarks.add(index)
        self.joined += len(tokens)

    def loaded(self, load: JoinLoad) -> list[Outgoing]:
        """End a load; returns the answer to the head, if it waits for one."""
        if not load.active:
            return []
        load.active = False
        session, spec = load.session, self._spec
        self._loads.pop(session.id, None)
        held, smaller = tuple(sorted(load.held)), tuple(sorted(load.landmarks))
        answer = Joined(session.id, spec.model, spec.epoch, spec.rank, held, smaller)
        return [Outgoing(session.head, answer)]
