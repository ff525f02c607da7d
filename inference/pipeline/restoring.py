"""How a head begins an attempt from KV blocks: what it asks for, and what it makes of the answers.

All ranks begin at one position, the least that every one of them can restore; from there on the
journal is computed as if it had been computed from its beginning (see ``kv_keys.reusable``).  A
rank that does not answer in time has restored nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import PeerId, Placement, SessionId
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.kv.port import KvShelf
from pyagent_node.inference.pipeline.frames import MAX_HELD, Held, Restored
from pyagent_node.inference.pipeline.origins import Origin, block_root
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, block_chain, reusable

RESTORE_SECONDS: Final = 30.0
"""How long the head of a session waits for its ranks to restore blocks."""


class Restoring:
    """The wait of one attempt for ``blocks`` leading blocks on every rank of a placement.

    And for the ``rest`` tokens behind them.
    """

    __slots__ = ("_answers", "_asked", "_ranks", "_rest", "until")

    def __init__(self, placement: Placement, blocks: int, now: float, rest: int = 0) -> None:
        self.until = now + RESTORE_SECONDS
        """When the attempt begins without."""
        self._ranks = {rank.rank: rank.peer_id for rank in placement.ranks}
        self._asked = blocks
        self._rest = rest
        self._answers: dict[int, tuple[int, int, int]] = {}

    def take(self, sender: PeerId, message: Restored) -> bool:
        """Take a rank's word; returns whether all have spoken.

        The first word counts, and only that of the rank itself.  Raises :class:`CorruptData`
        (``bad_result``) for one that cannot be.
        """
        if self._ranks.get(message.rank) != sender or message.rank in self._answers:
            return False
        cut, rest = message.cut, message.rest
        whole = (
            0 <= message.blocks <= self._asked and cut >= BLOCK_TOKENS and not cut % BLOCK_TOKENS
        )
        if not whole or not 0 <= rest <= (self._rest if message.blocks == self._asked else 0):
            raise bad_result(
                sender,
                f"it restored {message.blocks} blocks of {self._asked} and {rest} tokens of"
                f" {self._rest} (cut {cut})",
            )
        self._answers[message.rank] = (message.blocks, cut, rest)
        return len(self._answers) == len(self._ranks)

    def position(self, prompt_tokens: int, journal_tokens: int) -> int:
        """Return where to begin, by what was said so far."""
        if len(self._answers) < len(self._ranks):
            return 0
        blocks = min(blocks for blocks, _, _ in self._answers.values())
        stop = blocks * BLOCK_TOKENS + min(rest for _, _, rest in self._answers.values())
        if prompt_tokens <= stop < journal_tokens:
            return stop  # beyond the prompt any place will do
        blocks = reusable(
            prompt_tokens=prompt_tokens,
            journal_tokens=journal_tokens,
            blocks=blocks,
            prefill_cut=max(cut for _, cut, _ in self._answers.values()),
        )
        return blocks * BLOCK_TOKENS


def worth_asking(
    root: bytes,
    prompt: Tokens,
    journal_tokens: int,
    placement: Placement,
    shelf: KvShelf,
    *,
    known: bool,
    last: tuple[tuple[str, ...], tuple[Origin, ...]] = ((), ()),
) -> int:
    """Return how many leading blocks of a journal to ask the ranks for; 0: do not ask.

    ``known`` says that the journal was computed before, here or elsewhere, so that its blocks may
    well be there; otherwise the ``shelf`` is asked what it promises.  ``last`` are the classes
    and the ranks of the model's last answer: the names of the last rank's blocks may depend on
    them, and speak for those of the others.
    """
    if not root:
        return 0
    most = reusable(
        prompt_tokens=len(prompt),
        journal_tokens=journal_tokens,
        blocks=journal_tokens // BLOCK_TOKENS,
        prefill_cut=BLOCK_TOKENS,
    )
    if known or not most:
        return most
    part = placement.ranks[-1].slice
    names = {root: range(part.last)}
    other = block_root(root, *last, session=SessionId(""))
    names.setdefault(other, range(part.first, part.last))
    chains = {each: block_chain(each, prompt[: most * BLOCK_TOKENS], len(prompt)) for each in names}
    promised = (shelf.promises(placement.model, chains[each], names[each]) for each in names)
    return min(most, max(promised))


def parted(placement: Placement) -> tuple[Held, ...]:
    """Return who hands over which layers when ``placement`` ends."""
    return tuple(
        Held(rank.peer_id, rank.slice.first, rank.slice.last) for rank in placement.ranks[:MAX_HELD]
    )


def holders(placement: Placement, before: Sequence[PeerId], most: int) -> tuple[PeerId, ...]:
    """Return peers that may hold what was computed over ``placement``, then those of before."""
    peers = [rank.peer_id for rank in placement.ranks]
    peers += [peer for rank in placement.ranks for peer in rank.standbys]
    return tuple(dict.fromkeys([*peers, *before]))[:most]


def bad_result(sender: PeerId, what: str) -> CorruptData:
    """Return the error for a result that breaks the protocol."""
    return CorruptData(
        f"Node {sender} sent a result that does not belong here: {what}.",
        code="bad_result",
        peer_id=sender,
    )
