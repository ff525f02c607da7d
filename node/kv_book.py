"""The finished blocks of the sessions that run here, and how far they are at whom.  Pure.

A session's blocks become *ready* when they lie in the store; those from the first on without a gap
are worth sending.  Each target has a mark in each session; what is ready beyond the mark is to be
sent, sessions in turn, so that a long one does not hold up the others.  When a target comes late,
its marks begin at 0 and the older blocks follow by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final, NamedTuple

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.kv.port import SettledBlock

MAX_SESSIONS: Final = 512
"""Sessions, in each slice, of which blocks are sent on; those that come then are not."""


class PartKey(NamedTuple):
    """The blocks of one session in one slice of this node."""

    session: SessionId
    model: Digest
    first_layer: int
    last_layer: int

    @property
    def layers(self) -> range:
        """The layers of the slice."""
        return range(self.first_layer, self.last_layer)


class Part:
    """What is known of a :class:`PartKey`."""

    __slots__ = ("chain", "codec", "epoch", "head", "key", "marks", "ready", "seconds", "told")

    def __init__(self, block: SettledBlock, codec: str) -> None:
        self.key = part_key(block)
        self.head = block.head
        self.epoch = block.epoch
        self.codec = codec
        self.chain: list[bytes] = []
        self.seconds: list[float] = []
        """What each layer of each block took to compute."""
        self.ready: set[int] = set()
        """Blocks in the store beyond the first without one."""
        self.marks: dict[PeerId, Mark] = {}
        self.told: dict[PeerId, int] = {}
        """What the head knows of the holders."""

    @property
    def leading(self) -> int:
        """How many blocks are in the store, from the first on without a gap."""
        count = 0
        while count in self.ready:
            count += 1
        return count

    def holders(self, here: PeerId) -> dict[PeerId, int]:
        """Return who holds how many leading blocks, this node first."""
        held = {here: self.leading}
        held.update((peer, mark.held) for peer, mark in self.marks.items() if mark.held)
        return held


class Mark:
    """How far a target is: blocks ``held`` there, and the ``layers`` that it gets.

    ``asked`` says whether it was asked what it has already: another session's, or from before.
    """

    __slots__ = ("asked", "held", "layers")

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.asked = False
        self.held = 0
        self.layers = layers


class Job(NamedTuple):
    """One block to send: ``number`` of a session, some layers of it."""

    part: Part
    number: int
    layers: tuple[int, ...]


def part_key(block: SettledBlock) -> PartKey:
    """Return where a block belongs."""
    return PartKey(block.session, block.model, block.first_layer, block.last_layer)


class BlockBook:
    """The blocks of all sessions that run here."""

    def __init__(self) -> None:
        self._parts: dict[PartKey, Part] = {}
        self._turns: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts.values())

    def settled(self, block: SettledBlock, codec: str) -> None:
        """Note a block; one out of order, or of one session too many, is not followed."""
        key = part_key(block)
        part = self._parts.get(key)
        if part is None:
            if block.index or len(self._parts) >= MAX_SESSIONS:
                return
            part = self._parts[key] = Part(block, codec)
        if block.index == len(part.chain):
            part.chain.append(block.chain)
            part.seconds.append(0.0)

    def ready(self, block: SettledBlock, seconds: float = 0.0) -> bool:
        """Note that a block lies in the store; returns whether that may be news to anybody."""
        part = self._parts.get(part_key(block))
        if part is None or not 0 <= block.index < len(part.chain):
            return False
        if part.chain[block.index] != block.chain:
            return False
        part.ready.add(block.index)
        part.seconds[block.index] = seconds
        return True

    def part_of(self, block: SettledBlock) -> Part | None:
        """Return the part of a block, ``None`` for a session that is not followed."""
        return self._parts.get(part_key(block))

    def ended(self, session: SessionId) -> None:
        """Forget a session."""
        for key in [key for key in self._parts if key.session == session]:
            del self._parts[key]

    def retarget(self, part: Part, wanted: Mapping[PeerId, tuple[int, ...]]) -> None:
        """Send the blocks of a session to the peers ``wanted`` from now on, and nobody else.

        Who gets other layers than before gets them all again: what it has it does not take twice.
        """
        for peer in part.marks.keys() - wanted.keys():
            del part.marks[peer]
        for peer, layers in wanted.items():
            mark = part.marks.get(peer)
            if mark is None or mark.layers != layers:
                part.marks[peer] = Mark(layers)

    def targets(self) -> set[PeerId]:
        """Return everybody who gets blocks."""
        return {peer for part in self._parts.values() for peer in part.marks}

    def next_for(self, peer: PeerId) -> Job | None:
        """Return what to send to ``peer`` next, the sessions taking turns."""
        parts = [part for part in self._parts.values() if peer in part.marks]
        start = self._turns.get(peer, 0)
        for step in range(len(parts)):
            part = parts[(start + step) % len(parts)]
            mark = part.marks[peer]
            if mark.held in part.ready:
                self._turns[peer] = (start + step + 1) % len(parts)
                return Job(part, mark.held, mark.layers)
        return None

    def behind(self, model: Digest, peers: Collection[PeerId]) -> int:
        """Return how many blocks of a model's sessions are ready and not at ``peers`` yet."""
        return sum(
            max(0, part.leading - mark.held)
            for part in self._parts.values()
            if part.key.model == model
            for peer, mark in part.marks.items()
            if peer in peers and mark.layers
        )

    def sent(self, peer: PeerId, job: Job) -> None:
        """Note that ``peer`` has taken a block."""
        mark = job.part.marks.get(peer)
        if mark is not None and mark.held == job.number and mark.layers == job.layers:
            mark.held += 1

    def lost(self, peer: PeerId) -> None:
        """A peer went away; what it kept in memory is not relied upon."""
        for part in self._parts.values():
            mark = part.marks.get(peer)
            if mark is not None:
                mark.held, mark.asked = 0, False

    def has(self, peer: PeerId, job: Job, held: int) -> None:
        """Note that a target says it has so many leading blocks of a session."""
        mark = job.part.marks.get(peer)
        if mark is not None and mark.layers == job.layers:
            mark.asked = True
            mark.held = max(mark.held, min(held, len(job.part.chain)))

    def dropped(self, job: Job) -> None:
        """The store has let go of a block before it was sent: the session's ends there."""
        job.part.ready.discard(job.number)
