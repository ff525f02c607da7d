"""What a malicious member answers when it is asked."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import trio

from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.node.journal_holding import JournalHolder
from pyagent_node.node.journal_messages import JournalCopy
from pyagent_node.node.placement_messages import FactsReply, PlacementReports
from pyagent_node.simulations.placements import SHAPE


def untruth(truth: msgspec.Struct, rng: random.Random) -> msgspec.Struct:
    """Return a lie of the right type, or something of another type."""
    match truth:
        case FactsReply():
            figure = rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf"), 1e17))
            memory = rng.choice((0, -1, 1 << 62, 1 << 40))
            name = rng.choice((truth.facts.peer_id, PeerId("nobody")))
            facts = msgspec.structs.replace(
                truth.facts,
                peer_id=name,
                memory_bytes=memory,
                bandwidth=figure,
                compute=figure,
            )
            return FactsReply(facts, {name: figure, PeerId(""): -figure})
        case PlacementReports():
            state = rng.choice(("ready", "failed", "fetching", "loading"))
            ranks = tuple(
                msgspec.structs.replace(rank, state=state, failures=rng.randrange(1 << 40))
                for rank in truth.ranks
            )
            reserves = tuple(msgspec.structs.replace(each, state=state) for each in truth.reserves)
            cut = {PeerId("nobody"): 1e9}
            return rng.choice((PlacementReports(ranks, (), reserves, cut), SHAPE))
        case _:
            return SHAPE


def lying_journals(
    holder: JournalHolder, rng: random.Random
) -> Callable[[SessionId], tuple[JournalCopy, bytes] | None]:
    """Return what gives changed copies of the journals that ``holder`` keeps."""
    honest = holder.own

    def give(session: SessionId) -> tuple[JournalCopy, bytes] | None:
        found = honest(session)
        if found is None:
            kept = holder.book.get(session, trio.current_time())
            found = kept.export() if kept is not None else None
        if found is None:
            return None
        copy, tail = found
        changed = bytearray(tail)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return rng.choice(((copy, bytes(changed)), (copy, tail[: len(tail) // 2])))

    return give
