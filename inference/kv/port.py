"""The ``KvShelf`` port: where the stages of this node put finished blocks and get them back.

A *block* is the KV of :data:`~pyagent_node.sharding.kv_keys.BLOCK_TOKENS` consecutive tokens of one
session, in all layers of a slice.  Its name is a *chain hash*: a digest of a root (model and salt)
and of all tokens up to its end, so that a block can be found again by whoever has the same tokens,
and by nobody who does not know the root.  Blocks are content: they are never changed, and one that
is not there is computed again.

``chain`` are the chain hashes of the leading blocks of some tokens, the first block first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import KvRange
from pyagent_node.inference.generation import FetchWhen
from pyagent_node.sharding.kv_codec import KvShape


class SettledBlock(msgspec.Struct, frozen=True, gc=False):
    """A block whose tokens are accepted on this rank.

    ``session`` is the id on the wire: its first 16 digits are those of the stable id.  ``head`` is
    the session's.  The block is number ``index`` of its session (it begins at position 64 *
    ``index``) and holds the layers ``[first_layer, last_layer)``.  ``chain`` is its chain hash.
    ``cells`` names the format of its rows, as in ``KvRange.codec``; ``shape`` says how rows of
    16-bit floats are made up, where that is known.
    """

    session: SessionId
    head: PeerId
    model: Digest
    epoch: int
    index: int
    chain: bytes
    first_layer: int
    last_layer: int
    cells: str
    shape: KvShape | None = None

    @property
    def layers(self) -> range:
        """The layers that it holds."""
        return range(self.first_layer, self.last_layer)


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """What a rank would like to have back.

    ``chain`` and ``layers`` say of what; ``cells`` in which format of rows (others are of no use).
    The first ``skip`` blocks of the chain are there already, and no more than ``limit`` can be
    taken at once: whoever wants more asks again, so that a long context is never held twice.
    ``sources`` are peers that may well have them, the likeliest first: hints of the head, who may
    be wrong.  ``prefill_seconds`` is what it takes here to compute a token of a prompt in these
    layers, 0 when that was not measured yet; ``wait_seconds`` is what a token takes all ranks
    together, by the head's measure, 0 likewise.  ``block_bytes`` are those of a block of one layer,
    0 where nobody knows.
    """

    session: SessionId
    model: Digest
    chain: tuple[bytes, ...]
    first_layer: int
    last_layer: int
    cells: str
    skip: int = 0
    limit: int = 64
    sources: tuple[PeerId, ...] = ()
    prefill_seconds: float = 0.0
    wait_seconds: float = 0.0
    fetch: FetchWhen = "auto"
    block_bytes: float = 0.0

    @property
    def computing(self) -> float:
        """What a token takes to compute until the session goes on, 0 where nobody knows."""
        return max(self.prefill_seconds, self.wait_seconds)

    @property
    def layers(self) -> range:
        """The layers that are wanted."""
        return range(self.first_layer, self.last_layer)


class Rest(msgspec.Struct, frozen=True, gc=False):
    """The tokens of a session behind its last full block, in the layers of a rank.

    They begin at ``start``, behind the block named ``parent`` (the root for none); ``links`` names
    every number of them (``kv_keys.rest_links``).  ``cells`` is as in :class:`Wanted`.  ``epoch``
    is that of the rank: of the one that hands them over, or of the one that wants them.
    """

    session: SessionId
    model: Digest
    epoch: int
    cells: str
    parent: bytes
    links: tuple[bytes, ...]
    start: int
    first_layer: int
    last_layer: int

    @property
    def layers(self) -> range:
        """The layers."""
        return range(self.first_layer, self.last_layer)


class KvShelf(Protocol):
    """Keeps blocks; used from the pipeline's own tasks.

    Every method but :meth:`load` returns at once, does no I/O and never raises.
    """

    def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
        """Return how many leading blocks of ``layers`` can likely be had, here or from peers.

        Asked by a head of all layers of its model.  0 says: do not bother to ask the ranks.
        """
        ...

    async def load(self, wanted: Wanted) -> list[KvRange]:
        """Return the next blocks of a chain, as many as are worth it rather than computing them.

        The result has one entry a block, in order from block ``wanted.skip`` on, without a gap,
        with the layers wanted; it may be empty.  Fewer than ``wanted.limit`` say that there are no
        more.  Never raises for what is not there, cannot be had or is corrupt; the caller sets a
        deadline and cancels.
        """
        ...

    async def cost(self, wanted: Wanted) -> float:
        """Return in how many seconds all that is wanted would likely be here.

        0 for what is here already, infinity where some of it cannot be had.  Nothing is fetched.
        As with :meth:`load` the caller cancels, and nothing is raised.
        """
        ...

    def wants(self, block: SettledBlock) -> bool:
        """Take note of a settled block; returns whether its cells are wanted.

        Called once for every block of a session on this rank, in order, those that were restored
        too.  If it says yes :meth:`keep` follows, unless the session ends first.
        """
        ...

    def keep(self, block: SettledBlock, kv: KvRange, seconds: float) -> None:
        """Take the cells of a block, which took ``seconds`` to compute on this rank."""
        ...

    def ended(self, session: SessionId) -> None:
        """Note that a session is over on this rank, however that came; called once, last."""
        ...

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """Take the cells of a rest when the epoch ends: the next ranks ask for them at once."""
        ...

    async def load_rest(
        self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]
    ) -> KvRange | None:
        """Return as much of the beginning of a rest as was handed over; see :meth:`load`.

        ``held`` says which layers were whose; those who have not ended yet are waited for.
        """
        ...


class NullShelf:
    """A shelf that keeps nothing."""

    def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
        """Promise nothing."""
        return 0

    async def load(self, wanted: Wanted) -> list[KvRange]:
        """Return nothing."""
        return []

    async def cost(self, wanted: Wanted) -> float:
        """Have nothing."""
        return math.inf

    def wants(self, block: SettledBlock) -> bool:
        """Want nothing."""
        return False

    def keep(self, block: SettledBlock, kv: KvRange, seconds: float) -> None:
        """Drop the block."""

    def ended(self, session: SessionId) -> None:
        """Take no notice."""

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """Drop the cells."""

    async def load_rest(
        self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]
    ) -> KvRange | None:
        """Return nothing."""
        return None
