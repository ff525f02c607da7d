"""How the parts of placements on this node fare, as it tells others."""

from __future__ import annotations

from typing import Final, TypeVar

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank
from pyagent_node.inference.drafting.remote_messages import DraftView
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.pipeline.stage_types import StageView
from pyagent_node.node.keeping import Kept, Mortal
from pyagent_node.node.placement_messages import (
    DrafterReport,
    HeadReport,
    PreparedReport,
    RankReport,
    ReserveReport,
)

T = TypeVar("T", bound=Mortal)

RATE_SECONDS: Final = 1.0
"""Shortest time over which a stage's throughput is measured."""


class Rate:
    """Measures a stage's throughput between reports."""

    def __init__(self) -> None:
        self.value = 0.0
        self._at = 0.0
        self._tokens = 0

    def sample(self, tokens: int, now: float) -> float:
        """Take the tokens computed so far; return tokens a second lately."""
        if tokens < self._tokens or self._at == 0.0:
            self._at, self._tokens = now, tokens
        elif now - self._at >= RATE_SECONDS:
            self.value = (tokens - self._tokens) / (now - self._at)
            self._at, self._tokens = now, tokens
        return self.value


def rank_report(
    placement: Placement,
    rank: Rank,
    kept: Kept[StageRunner],
    view: StageView | None,
    rate: float,
) -> RankReport:
    """Return the report of a rank; ``view`` is its stage, ``rate`` that one's throughput."""
    return RankReport(
        model=placement.model,
        epoch=placement.epoch,
        rank=rank.rank,
        state=kept.state,
        error=kept.failure,
        failures=kept.failures,
        done=kept.done,
        total=kept.total,
        memory_bytes=kept.value.info.memory_bytes if kept.value is not None else None,
        load=view,
        tokens_per_second=rate,
        streak=kept.streak,
    )


def reserve_report(
    placement: Placement, rank: Rank, kept: Kept[T], *, loaded: bool, memory: int | None
) -> ReserveReport:
    """Return the report of a standby (``loaded``) or a spare of a rank."""
    return ReserveReport(
        model=placement.model,
        epoch=placement.epoch,
        rank=rank.rank,
        slice=rank.slice,
        loaded=loaded,
        state=kept.state,
        error=kept.failure,
        failures=kept.failures,
        done=kept.done,
        total=kept.total,
        memory_bytes=memory,
    )


def prepared_report(prepared: Prepared, rank: Rank, kept: Kept[StageRunner]) -> PreparedReport:
    """Return the report of a rank that is loaded beside those in force."""
    return PreparedReport(
        model=prepared.model,
        number=prepared.number,
        rank=rank.rank,
        state=kept.state,
        error=kept.failure,
        failures=kept.failures,
        done=kept.done,
        total=kept.total,
        memory_bytes=kept.value.info.memory_bytes if kept.value is not None else None,
    )


def drafter_report(
    placement: Placement, drafter: Digest, kept: Kept[T], memory: int | None, load: DraftView
) -> DrafterReport:
    """Return the report of a drafter rank."""
    return DrafterReport(
        model=placement.model,
        epoch=placement.epoch,
        drafter=drafter,
        state=kept.state,
        error=kept.failure,
        failures=kept.failures,
        done=kept.done,
        total=kept.total,
        memory_bytes=memory,
        load=load,
    )


def head_report(placement: Placement, kept: Kept[T]) -> HeadReport:
    """Return the report of a head."""
    return HeadReport(
        model=placement.model,
        epoch=placement.epoch,
        state=kept.state,
        error=kept.failure,
        failures=kept.failures,
        done=kept.done,
        total=kept.total,
    )


def not_hosted(what: str, peer: PeerId, *, rank: int | None = None) -> Unavailable:
    """Return the error for a part that its node does not report."""
    facts: dict[str, int] = {} if rank is None else {"rank": rank}
    return Unavailable(
        f"Node {peer} does not answer for {what}.",
        code="peer_lost",
        remedy="Check that it runs and is connected: 'pyagent-node peers'.",
        peer_id=peer,
        **facts,
    )
