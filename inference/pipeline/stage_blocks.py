"""The part of a stage's pure core that deals in KV blocks.

*Harvest*: settled blocks are shown to the shelf once, in order, a few between two batches.
*Restore*: when a session that asked for it has its slot, the shell loads blocks for it and imports
them, window by window, before any of its steps; then the head is told how far that came.  Whatever
goes wrong with a restore costs the session nothing but the blocks: it begins at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import PREFILL_CHUNK, KvRange, Tokens
from pyagent_node.inference.kv.port import Rest, SettledBlock, Wanted
from pyagent_node.inference.kv.ranges import joined
from pyagent_node.inference.pipeline.frames import (
    MAX_HELD,
    MAX_SOURCES,
    Keep,
    Restore,
    Restored,
    Tail,
    unpack_tokens,
)
from pyagent_node.inference.pipeline.origins import Source
from pyagent_node.inference.pipeline.session_blocks import SessionBlocks
from pyagent_node.inference.pipeline.stage_session import QueuedStep, ServedSession
from pyagent_node.inference.pipeline.stage_types import Outgoing, StageSpec
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, block_chain, rest_links

LOAD_BLOCKS: Final = 64
"""Blocks that are loaded at once for one session."""
IMPORT_BLOCKS: Final = 8
"""Blocks that are imported between two batches."""
MAX_SECONDS: Final = 60.0
"""More than a token of a prompt can take; what a head says beyond that is not believed."""
_SMOOTHING: Final = 0.2


class Load:
    """The restoring of one session; the shell drives it (see ``stage_shelf``)."""

    __slots__ = ("active", "blocks", "chain", "held", "message", "rest", "seq", "session", "tokens")

    def __init__(self, session: ServedSession, message: Restore, tokens: Tokens) -> None:
        self.session = session
        self.tokens = tokens
        self.message = message
        self.held: dict[PeerId, list[range]] = {}
        for part in message.held:
            if 0 <= part.first_layer < part.last_layer:
                layers = range(part.first_layer, part.last_layer)
                self.held.setdefault(part.peer_id, []).append(layers)
        self.chain: tuple[bytes, ...] = ()
        self.seq = -1
        self.blocks = 0
        """Leading blocks that are in the session's slot."""
        self.rest = 0
        """Tokens behind them that are there, too."""
        self.active = True
        """Whether the head waits for it still."""

    @property
    def whole(self) -> bool:
        """Whether all the blocks are there."""
        return self.blocks == len(self.chain)


class Import(NamedTuple):
    """Cells to be imported for a load."""

    load: Load
    kv: KvRange
    tokens: Tokens


class Harvest(NamedTuple):
    """Settled blocks of one session: what each is, and the seconds it took to compute."""

    session: ServedSession
    seq: int
    blocks: tuple[SettledBlock, ...]
    seconds: tuple[float, ...]


class Parting(NamedTuple):
    """What is handed over of a session that goes on elsewhere: ``seq`` holds ``rest``."""

    seq: int
    rest: Rest


class StageBlocks:
    """The blocks of one stage.

    ``cells`` names the runner's format of cells, empty where blocks are neither kept nor restored
    on this rank; ``cut`` is its ``prefill_cut``.
    """

    def __init__(self, spec: StageSpec, cells: str, cut: int, shape: KvShape | None = None) -> None:
        self.restored = 0
        """Tokens whose KV was imported."""
        self.refused = 0
        """Times that blocks were not what they should be, to the stage or to its runner."""
        self.prefill_seconds = 0.0
        """What a token of a prompt takes here, smoothed; 0 before the first."""
        self._spec = spec
        self._cells = cells
        self._shape = shape
        self._cut = cut
        self._restoring: dict[SessionId, Load] = {}
        self._due: dict[SessionId, ServedSession] = {}
        self._ended: list[SessionId] = []

    def opened(
        self,
        session: ServedSession,
        root: bytes,
        cut: int,
        prompt_tokens: int,
        source: Source | None = None,
    ) -> int:
        """Take note of a new session; returns the ``cut`` that the next rank is told.

        Its blocks are named by ``root``; those that it begins from by ``source``, or also
        by ``root``.
        """
        cut = max(cut, self._cut)
        if root:
            session.blocks = SessionBlocks(root, prompt_tokens, cut, source)
        return cut

    def freed(self, session: ServedSession) -> None:
        """Forget a session."""
        load = self._restoring.pop(session.id, None)
        if load is not None:
            load.active = False
        self._due.pop(session.id, None)
        if session.blocks is not None:
            self._ended.append(session.id)

    def take_ended(self) -> list[SessionId]:
        """Return the sessions that ended since the last call, for the shelf."""
        ended, self._ended = self._ended, []
        return ended

    # ---- restore ---------------------------------------------------------------------------

    def restore(self, session: ServedSession, message: Restore, tail: Tail) -> list[Outgoing]:
        """Take a session's wish for blocks; returns what to send for it now.

        Raises :class:`CorruptData` (``malformed_restore``, ``out_of_order``) and
        :class:`InvalidRequest` (``bad_parameter``).
        """
        spec, blocks = self._spec, session.blocks
        tokens = unpack_tokens(tail, message.n, message.rest)
        if blocks is None:
            raise CorruptData(
                "A session without a root has no blocks to restore.", code="malformed_restore"
            )
        if session.restores or session.next_step:
            raise CorruptData(
                "Blocks are restored once, before the first step.", code="out_of_order"
            )
        named = max(len(message.sources), len(message.held))
        if len(tokens) > session.positions or named > min(MAX_SOURCES, MAX_HELD):
            raise InvalidRequest(
                f"A session of {session.positions} positions cannot have {len(tokens)} tokens"
                f" restored from {named} nodes.",
                code="bad_parameter",
                parameter="n",
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= spec.n_vocab:
            raise InvalidRequest(
                f"Tokens run from 0 to {spec.n_vocab - 1}.",
                code="bad_parameter",
                parameter="tokens",
            )
        session.restores = True
        load = Load(session, message, tokens)
        self._restoring[session.id] = load
        out: list[Outgoing] = []
        if spec.downstream is not None:
            onward = msgspec.structs.replace(message, rank=spec.rank + 1)
            out.append(Outgoing(spec.downstream, onward, tail))
        if not self._cells:
            out += self.loaded(load)
        return out

    def stepped(self, session: ServedSession) -> None:
        """Note a step of a session: its head waits for blocks no longer."""
        load = self._restoring.pop(session.id, None) if self._restoring else None
        if load is not None:
            load.active = False

    @property
    def restoring(self) -> bool:
        """Whether any session waits for blocks."""
        return bool(self._restoring)

    def take_loads(self) -> list[Load]:
        """Return the loads that can begin now: their sessions have their slots."""
        began: list[Load] = []
        for load in self._restoring.values():
            blocks, seq = load.session.blocks, load.session.seq
            if load.seq < 0 and seq is not None and blocks is not None:
                load.seq = seq
                load.chain = block_chain(
                    blocks.source.root,
                    load.tokens,
                    blocks.prompt_tokens,
                    prefill_cut=blocks.source.cut,
                )
                began.append(load)
        return began

    def wanted(self, load: Load) -> Wanted:
        """Return what to ask the shelf for next."""
        part = self._spec.slice
        return Wanted(
            session=load.session.id,
            model=self._spec.model,
            chain=load.chain,
            first_layer=part.first,
            last_layer=part.last,
            cells=self._cells,
            skip=load.blocks,
            limit=LOAD_BLOCKS,
            sources=load.message.sources,
            prefill_seconds=self.prefill_seconds,
            wait_seconds=load.message.seconds if 0 <= load.message.seconds < MAX_SECONDS else 0.0,
            fetch=load.message.fetch,
        )

    def imports(self, load: Load, blocks: Sequence[KvRange]) -> list[Import]:
        """Return what the shelf has given for a load as imports, up to what is wrong with it."""
        part, at = self._spec.slice, load.blocks
        names = list(range(part.first, part.last))
        good: list[KvRange] = []
        for index, kv in enumerate(blocks[: len(load.chain) - at], start=at):
            span = (index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
            layers = [layer.layer for layer in kv.layers]
            if kv.codec != self._cells or (kv.start, kv.stop) != span or layers != names:
                self.refused += 1
                break
            good.append(kv)
        found: list[Import] = []
        for first in range(0, len(good), IMPORT_BLOCKS):
            kv = joined(good[first : first + IMPORT_BLOCKS])
            found.append(Import(load, kv, load.tokens[kv.start : kv.stop]))
        return found

    def wanted_rest(self, load: Load) -> Rest | None:
        """Return what to ask the shelf for behind the last block, ``None`` where there is none."""
        blocks, start = load.session.blocks, len(load.chain) * BLOCK_TOKENS
        if blocks is None or len(load.tokens) == start or not load.held:
            return None
        parent = load.chain[-1] if load.chain else blocks.source.root
        part = self._spec.slice
        return Rest(
            session=load.session.id,
            model=self._spec.model,
            epoch=self._spec.epoch,
            cells=self._cells,
            parent=parent,
            links=rest_links(parent, load.tokens[start:], blocks.prompt_tokens),
            start=start,
            first_layer=part.first,
            last_layer=part.last,
        )

    def rest_import(self, load: Load, kv: KvRange) -> Import | None:
        """Return what the shelf has given of a rest as an import, ``None`` for what is wrong."""
        layers, part = [layer.layer for layer in kv.layers], self._spec.slice
        right = kv.codec == self._cells and layers == list(range(part.first, part.last))
        begins = kv.start == load.blocks * BLOCK_TOKENS and load.whole
        if not right or not begins or not kv.start < kv.stop <= len(load.tokens):
            self.refused += 1
            return None
        return Import(load, kv, load.tokens[kv.start : kv.stop])

    def imported(self, job: Import) -> None:
        """Note that the cells of ``job`` are in the session's slot."""
        load, session, stop = job.load, job.load.session, job.kv.stop
        if session.closed or session.blocks is None:
            return
        self.restored += stop - job.kv.start
        load.blocks, load.rest = divmod(stop, BLOCK_TOKENS)
        session.blocks.restored(job.kv.start, job.tokens)
        session.end = stop
        if not session.next_step:
            session.next_position = session.sure = stop

    def not_imported(self, job: Import) -> None:
        """Note that the runner refused ``job``; the caller empties the slot."""
        self.refused += 1
        load, session = job.load, job.load.session
        load.blocks = load.rest = 0
        if session.closed or session.blocks is None:
            return
        session.blocks.back(0)
        session.end = 0
        if not session.next_step:
            session.next_position = session.sure = 0

    def loaded(self, load: Load) -> list[Outgoing]:
        """End a load; returns the answer to the head, if it waits for one."""
        if not load.active:
            return []
        load.active = False
        session, spec = load.session, self._spec
        self._restoring.pop(session.id, None)
        cut = self._cut if session.blocks is None else session.blocks.cut
        answer = Restored(
            session.id, spec.model, spec.epoch, spec.rank, load.blocks, cut, load.rest
        )
        return [Outgoing(session.head, answer)]

    # ---- the end of an epoch ---------------------------------------------------------------

    def parting(self, session: ServedSession) -> Parting | None:
        """Return what to hand over of a session whose epoch ends, if there is anything.

        Only what lies beyond a prompt: inside it a session begins at the end of a block.
        """
        blocks, seq, spec = session.blocks, session.seq, self._spec
        if not self._cells or blocks is None or seq is None:
            return None
        if not blocks.settled or blocks.settled < blocks.prompt_tokens:
            return None
        start, parent, links = blocks.rest()
        rest = Rest(
            session=session.id,
            model=spec.model,
            epoch=spec.epoch,
            cells=self._cells,
            parent=parent,
            links=links,
            start=start,
            first_layer=spec.slice.first,
            last_layer=spec.slice.last,
        )
        return Parting(seq, rest)

    # ---- harvest ---------------------------------------------------------------------------

    def computed(self, session: ServedSession, queued: QueuedStep, seconds: float) -> None:
        """Note a step that took ``seconds``."""
        message = queued.message
        if BLOCK_TOKENS <= message.n <= PREFILL_CHUNK and not message.drafts:
            each = seconds / message.n
            before = self.prefill_seconds or each
            self.prefill_seconds = before + _SMOOTHING * (each - before)
        blocks = session.blocks
        if blocks is not None and self._cells:
            blocks.computed(message, queued.tokens, seconds)
            if blocks.due > 0:
                self._due[session.id] = session

    def keep(self, session: ServedSession, message: Keep) -> list[Outgoing]:
        """Take a head's wish to know when its blocks are kept; returns what to send now."""
        session.keeps = True
        out: list[Outgoing] = []
        if self._spec.downstream is not None:
            onward = msgspec.structs.replace(message, rank=self._spec.rank + 1)
            out.append(Outgoing(self._spec.downstream, onward))
        return out + self.kept(session)

    def exported(self, harvest: Harvest) -> list[Outgoing]:
        """Note that the shelf has been shown a harvest; returns what to send for that."""
        blocks = harvest.session.blocks
        if blocks is not None:
            blocks.shown = max(blocks.shown, harvest.blocks[-1].index + 1)
        return self.kept(harvest.session)

    def kept(self, session: ServedSession) -> list[Outgoing]:
        """Return the answer to a :class:`Keep` if it is time for it."""
        spec, blocks = self._spec, session.blocks
        shown = 0 if blocks is None else blocks.shown
        waits = session.queue or session.in_flight or session.end < session.prompt_tokens
        waits = waits or session.marks is not None  # their blocks are made after all others
        if not session.keeps or session.closed or (self._cells and blocks is not None and waits):
            return []
        if self._cells and blocks is not None and shown < blocks.settled // BLOCK_TOKENS:
            return []
        session.keeps = False
        cut = self._cut if blocks is None else blocks.cut
        answer = Restored(session.id, spec.model, spec.epoch, spec.rank, shown, cut)
        return [Outgoing(session.head, answer)]

    @property
    def has_harvest(self) -> bool:
        """Whether :meth:`next_harvest` would return something."""
        return bool(self._due)

    def next_harvest(self, most: int) -> Harvest | None:
        """Take up to ``most`` settled blocks of the session whose turn it is."""
        if not self._due:
            return None
        session = self._due.pop(next(iter(self._due)))
        blocks, seq, spec = session.blocks, session.seq, self._spec
        assert blocks is not None, "only those with blocks are due"
        assert seq is not None, "only those that computed are due"
        shown = blocks.show(most)
        if blocks.due > 0:
            self._due[session.id] = session
        return Harvest(
            session,
            seq,
            tuple(
                SettledBlock(
                    session=session.id,
                    head=session.head,
                    model=spec.model,
                    epoch=spec.epoch,
                    index=index,
                    chain=chain,
                    first_layer=spec.slice.first,
                    last_layer=spec.slice.last,
                    cells=self._cells,
                    shape=self._shape,
                )
                for index, chain, _ in shown
            ),
            tuple(seconds for _, _, seconds in shown),
        )
