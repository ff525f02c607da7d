"""What nodes tell each other about their ranks, over ``node.rpc``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.inference.drafting.remote_messages import DraftView
from pyagent_node.inference.pipeline.plan_types import NodeFacts
from pyagent_node.inference.pipeline.stage_types import StageView

HostState = Literal["fetching", "loading", "ready", "failed"]


class RankReport(msgspec.Struct, frozen=True):
    """One rank that the reporting node is to hold, and how far it is.

    ``done`` and ``total`` count the bytes of the slice while it is fetched.  ``failures`` counts
    the attempts that ended in ``error``, ``streak`` those since it last ran for a while.
    ``tokens_per_second`` is the stage's throughput lately.
    """

    model: Digest
    epoch: int
    rank: int
    state: HostState
    error: ErrorInfo | None = None
    failures: int = 0
    done: int = 0
    total: int | None = None
    memory_bytes: int | None = None
    load: StageView | None = None
    tokens_per_second: float = 0.0
    streak: int = 0


class ReserveReport(msgspec.Struct, frozen=True):
    """A rank that the reporting node could take over, and how far it is.

    ``loaded`` is for a standby, which keeps a runner; a spare keeps the slice's file.
    """

    model: Digest
    epoch: int
    rank: int
    slice: Slice
    loaded: bool
    state: HostState
    error: ErrorInfo | None = None
    failures: int = 0
    done: int = 0
    total: int | None = None
    memory_bytes: int | None = None


class PreparedReport(msgspec.Struct, frozen=True):
    """A rank of preparation ``number`` that the reporting node loads beside what it serves."""

    model: Digest
    number: int
    rank: int
    state: HostState
    error: ErrorInfo | None = None
    failures: int = 0
    done: int = 0
    total: int | None = None
    memory_bytes: int | None = None


class HeadReport(msgspec.Struct, frozen=True):
    """Whether the reporting node can be head for a placed model, and how far it is."""

    model: Digest
    epoch: int
    state: HostState
    error: ErrorInfo | None = None
    failures: int = 0
    done: int = 0
    total: int | None = None


class DrafterReport(msgspec.Struct, frozen=True):
    """The drafter rank that the reporting node is for a placed model, and how far it is."""

    model: Digest
    epoch: int
    drafter: Digest
    state: HostState
    error: ErrorInfo | None = None
    failures: int = 0
    done: int = 0
    total: int | None = None
    memory_bytes: int | None = None
    load: DraftView = DraftView()


class AskPlacements(msgspec.Struct, frozen=True, tag="ask_placements"):
    """Ask a node what it holds."""


class PlacementReports(msgspec.Struct, frozen=True, tag="placement_reports"):
    """Everything that the node hosts of the current placements.

    ``cut`` names the neighbours of its ranks that it is not connected to, and for how many
    seconds.  ``problems`` is what the node, if it leads, would like to change and cannot, by model.
    ``leaving`` counts processes that nothing wants any more and that have not ended yet.
    ``behind`` counts, for models with prepared ranks, the KV blocks of running sessions that the
    node holds and that have not got to the next ranks yet.
    """

    ranks: tuple[RankReport, ...]
    heads: tuple[HeadReport, ...]
    reserves: tuple[ReserveReport, ...] = ()
    cut: dict[PeerId, float] = {}
    problems: dict[Digest, tuple[str, ...]] = {}
    leaving: int = 0
    drafters: tuple[DrafterReport, ...] = ()
    prepared: tuple[PreparedReport, ...] = ()
    behind: dict[Digest, int] = {}


class AreYouThere(msgspec.Struct, frozen=True, tag="are_you_there"):
    """Ask a node for a sign of life."""


class Here(msgspec.Struct, frozen=True, tag="here"):
    """A sign of life."""


class TryPeer(msgspec.Struct, frozen=True, tag="try_peer"):
    """Ask a node whether it can reach ``peer`` within so many seconds."""

    peer: PeerId
    seconds: Annotated[float, msgspec.Meta(gt=0, le=2)] = 0.2


class Tried(msgspec.Struct, frozen=True, tag="tried"):
    """Whether the peer answered."""

    hears: bool


class AskFacts(msgspec.Struct, frozen=True, tag="ask_facts"):
    """Ask a node what a planner needs to know of it with regard to ``model``.

    Without ``distances`` its round-trip times are left out: all nodes' to all others are much.
    """

    model: Digest
    distances: bool = True


class FactsReply(msgspec.Struct, frozen=True, tag="facts"):
    """A node's facts and its round-trip times in milliseconds."""

    facts: NodeFacts
    rtt_ms: dict[PeerId, float]
