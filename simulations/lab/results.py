"""What a run of a scenario found.  Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

GroundKind = Literal["hosts", "shape"]
"""``hosts``: a namespace each, joined by the router; ``shape``: one host, ``--shape``."""


class AnswerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One answer.  ``stall_seconds`` and ``pause_ms``: longest and median pause between pieces."""

    tokens: int
    tokens_per_second: float
    ttft_seconds: float
    seconds: float
    stall_seconds: float
    pause_ms: float
    failovers: int
    recomputed_tokens: int


class TransferFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model's way from one host to another over the scenario's links."""

    source: str
    target: str
    bytes: int
    seconds: float

    @property
    def megabits_per_second(self) -> float:
        """The rate in Mbit/s."""
        return self.bytes * 8 / 1e6 / self.seconds


class LinkFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between two hosts under conditions, in packets; ``bytes`` include headers.

    ``packets`` counts all that were sent, ``lost``, ``queue`` and ``cut`` those of them that did
    not arrive: by chance, because a queue was full, because of a partition.
    """

    source: str
    target: str
    packets: int
    bytes: int
    lost: int
    queue: int
    cut: int


class RouterFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How well the router kept up: packets delivered later than they should be, and overruns."""

    packets: int
    late_ms_p50: float
    late_ms_p99: float
    overruns: int
    held_over: int


class LabResult(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of ``lab run --json``."""

    scenario: str
    ground: GroundKind
    identical: bool
    hosts: tuple[str, ...]
    ranks: tuple[str, ...]
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    join_seconds: float
    load_seconds: float
    transfer: TransferFigures | None
    rtt_ms: dict[str, float]
    undisturbed: AnswerFigures
    disturbed: AnswerFigures
    links: tuple[LinkFigures, ...]
    router: RouterFigures | None
