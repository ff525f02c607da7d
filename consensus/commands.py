"""The commands that change the replicated state.

They carry decisions, digests and pointers only: never a prompt, KV or weights.  Each is a tagged
struct with a schema; an engine refuses an unknown or malformed one before it is appended.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.types import (
    Backends,
    ContextId,
    Digest,
    Drafting,
    PeerId,
    Rank,
    SessionId,
)
from pyagent_node.base.wire import Codec


class AdmitMember(msgspec.Struct, frozen=True, tag="admit_member"):
    """A certificate was issued: ``certificate`` is its signed encoding.

    ``issued`` repeats its date, Unix seconds: one from before a removal admits nobody again.
    """

    peer_id: PeerId
    name: str
    role: str
    certificate: bytes
    issued: int = 0


class RevokeMember(msgspec.Struct, frozen=True, tag="revoke_member"):
    """The peer's certificates count no more."""

    peer_id: PeerId
    reason: str


class BurnTicket(msgspec.Struct, frozen=True, tag="burn_ticket"):
    """A single-use ticket was redeemed by ``peer_id``; ``expires`` is its expiry, Unix seconds.

    ``at`` is the redeeming node's clock: burnt tickets that expired long before it are forgotten.
    """

    ticket_id: str
    peer_id: PeerId
    expires: int
    at: int = 0


class ModelRecord(msgspec.Struct, frozen=True):
    """A model the mesh knows: identity, shape and where its chunk list can be checked.

    ``digest`` is BLAKE3 of the whole file, ``manifest`` BLAKE3 of the encoded manifest.
    """

    digest: Digest
    name: str
    size: int
    architecture: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    manifest: Digest
    created: int


class RegisterModel(msgspec.Struct, frozen=True, tag="register_model"):
    """Make a model known; registering the same record twice changes nothing."""

    model: ModelRecord


class ForgetModel(msgspec.Struct, frozen=True, tag="forget_model"):
    """Remove a model that has no placement."""

    digest: Digest


class SetPlacement(msgspec.Struct, frozen=True, tag="set_placement"):
    """Place a model; the state machine gives the placement its epoch.

    ``after_epoch`` is the epoch the proposer saw (0 for none): another one in between is a
    :class:`Conflict` (``stale_epoch``).  ``want_standbys`` and ``want_spares`` are how many each
    rank shall have from now on, ``None`` what the mesh's settings say.  ``prepared`` is the number
    of the preparation that this commits: if that is not what is prepared now, it is a
    :class:`Conflict` (``not_prepared``).  With 0 whatever was prepared for the model is dropped.
    ``fixed``: a person chose the cut or the nodes.  ``backends``: those that a person chose.
    ``activations`` as in ``Placement``.
    """

    model: Digest
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    after_epoch: int
    want_standbys: int | None = None
    want_spares: int | None = None
    prepared: int = 0
    fixed: bool = False
    backends: Backends = ()
    activations: str = ""


class PreparePlacement(msgspec.Struct, frozen=True, tag="prepare_placement"):
    """Have the next ranks of a placed model loaded beside those in force; ``by`` sees to it.

    Nothing changes for those who serve.  Another epoch than ``after_epoch`` is a
    :class:`Conflict` (``stale_epoch``), and so is a preparation that is under way
    (``change_in_progress``).
    """

    model: Digest
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    after_epoch: int
    by: PeerId
    backends: Backends = ()


class DropPrepared(msgspec.Struct, frozen=True, tag="drop_prepared"):
    """Give up preparation ``number``; another one, or none, is a Conflict (``not_prepared``)."""

    model: Digest
    number: int


class SetStandbys(msgspec.Struct, frozen=True, tag="set_standbys"):
    """Say who could take over each rank: ``standbys[rank]`` and ``spares[rank]``.

    The epoch stays, because nothing changes for those who serve: sessions go on undisturbed.
    Another epoch than ``epoch`` is a :class:`Conflict` (``stale_epoch``).
    """

    model: Digest
    standbys: tuple[tuple[PeerId, ...], ...]
    spares: tuple[tuple[PeerId, ...], ...]
    epoch: int


class SetDrafting(msgspec.Struct, frozen=True, tag="set_drafting"):
    """Say how the sessions of a placed model guess, and which node drafts for them.

    The epoch stays, as with :class:`SetStandbys`: nothing changes for those who serve, and what
    guesses does not show in any answer.  A later placement of the model keeps it.  Another epoch
    than ``epoch`` is a :class:`Conflict` (``stale_epoch``).
    """

    model: Digest
    drafting: Drafting | None
    epoch: int


class RemovePlacement(msgspec.Struct, frozen=True, tag="remove_placement"):
    """Unload a model everywhere."""

    model: Digest
    after_epoch: int


VotePreference = Literal["auto", "always", "never"]
"""Whether a member may become a voter by itself, must be one, or must not."""


class SetVote(msgspec.Struct, frozen=True, tag="set_vote"):
    """An operator's word on a member's vote; the voters themselves are the engine's business."""

    peer_id: PeerId
    vote: VotePreference


class RemoveMember(msgspec.Struct, frozen=True, tag="remove_member"):
    """The peer left the mesh: certificates issued up to ``at`` (Unix seconds) count no more.

    Unlike a revoked node it may join again with a new ticket.
    """

    peer_id: PeerId
    at: int


class SetDraining(msgspec.Struct, frozen=True, tag="set_draining"):
    """Give the peer no new work (``True``), or let it work again."""

    peer_id: PeerId
    draining: bool


class SetMeshSetting(msgspec.Struct, frozen=True, tag="set_mesh_setting"):
    """Change a setting that holds for the whole mesh; ``None`` returns it to its default."""

    name: str
    value: int | None


class SetBuckets(msgspec.Struct, frozen=True, tag="set_buckets"):
    """Say who owns each LSH bucket: ``owners[bucket]``, first owner first.

    ``after_epoch`` is the bucket epoch the proposer saw (0 for none).
    """

    owners: tuple[tuple[PeerId, ...], ...]
    after_epoch: int


class BlockHolders(msgspec.Struct, frozen=True, array_like=True):
    """Who holds a session's leading KV blocks of the layers ``[first_layer, last_layer)``.

    Each of ``holders`` has ``blocks`` of them at least.
    """

    first_layer: int
    last_layer: int
    blocks: int
    holders: tuple[PeerId, ...]


class Checkpoint(msgspec.Struct, frozen=True):
    """Where a session can be resumed from: never its text, only who holds it.

    ``holders`` keep the session's token journal, of which ``tokens`` are known to be durable
    there; ``blocks`` are the keys of its KV blocks.  ``head`` serves the session; ``claim`` counts
    its heads, from 1.  ``expires`` is in Unix seconds.  ``signer`` is the head that signed the
    holders' copies, so that no holder can make one up: after a claim it still names the head whose
    copies they are, until the new head puts its own.  ``kv`` says where the session's KV is.
    """

    session: SessionId
    model: Digest
    head: PeerId
    tokens: int
    holders: tuple[PeerId, ...]
    expires: int
    blocks: tuple[bytes, ...] = ()
    claim: int = 1
    signer: PeerId | None = None
    kv: tuple[BlockHolders, ...] | msgspec.UnsetType = msgspec.UNSET
    """Not written where nothing is known, so that older programs read what they know."""

    @property
    def block_holders(self) -> tuple[BlockHolders, ...]:
        """Who holds the session's KV blocks."""
        return () if isinstance(self.kv, msgspec.UnsetType) else self.kv


class PutCheckpoints(msgspec.Struct, frozen=True, tag="put_checkpoints"):
    """Record or renew checkpoints; one of another head or ``claim`` than the known is ignored.

    ``at`` is the proposer's clock: checkpoints that expired before it are forgotten.
    """

    checkpoints: tuple[Checkpoint, ...]
    at: int


class DropCheckpoints(msgspec.Struct, frozen=True, tag="drop_checkpoints"):
    """The sessions ended; those that another node than ``head`` serves by now are left alone."""

    sessions: tuple[SessionId, ...]
    head: PeerId


class ClaimSession(msgspec.Struct, frozen=True, tag="claim_session"):
    """``head`` takes the session over from the head of ``after_claim``.

    Another claim in between is a :class:`Conflict` (``session_claimed``), an unknown or expired
    session :class:`NotFound` (``session_not_found``).
    """

    session: SessionId
    head: PeerId
    after_claim: int
    at: int


class CreateContext(msgspec.Struct, frozen=True, tag="create_context"):
    """Make a context known; the same one twice changes nothing.

    Its documents never travel through the log.
    A name that is taken is a :class:`Conflict` (``context_exists``).
    """

    context: ContextInfo


class DropContext(msgspec.Struct, frozen=True, tag="drop_context"):
    """Forget a context and all that lies in it.

    Another one of that name than ``id``, or none, is :class:`NotFound` (``context_not_found``).
    """

    name: str
    id: ContextId


class SpreadContext(msgspec.Struct, frozen=True, tag="spread_context"):
    """Say whether the sketches of a context lie spread over the nodes, or all on every node."""

    name: str
    id: ContextId
    spread: bool


class RaiseContext(msgspec.Struct, frozen=True, tag="raise_context"):
    """Have new versions of a context's documents count from above ``horizon`` on.

    ``at`` is the proposer's clock (Unix seconds).  One that is not higher than the last, or while
    the last is not collected yet, is a :class:`Conflict` (``stale_horizon``).
    """

    name: str
    id: ContextId
    horizon: int
    at: int


class CollectContext(msgspec.Struct, frozen=True, tag="collect_context"):
    """Have all members forget a context's removals up to ``floor``: every one has seen them.

    Another one than the horizon is a :class:`Conflict` (``stale_horizon``).
    """

    name: str
    id: ContextId
    floor: int


Command = (
    AdmitMember
    | RevokeMember
    | BurnTicket
    | RegisterModel
    | ForgetModel
    | SetPlacement
    | PreparePlacement
    | DropPrepared
    | SetStandbys
    | SetDrafting
    | RemovePlacement
    | SetVote
    | RemoveMember
    | SetDraining
    | SetMeshSetting
    | SetBuckets
    | PutCheckpoints
    | DropCheckpoints
    | ClaimSession
    | CreateContext
    | DropContext
    | SpreadContext
    | RaiseContext
    | CollectContext
)

COMMANDS: Codec[Command] = Codec(
    "command",
    AdmitMember,
    RevokeMember,
    BurnTicket,
    RegisterModel,
    ForgetModel,
    SetPlacement,
    PreparePlacement,
    DropPrepared,
    SetStandbys,
    SetDrafting,
    RemovePlacement,
    SetVote,
    RemoveMember,
    SetDraining,
    SetMeshSetting,
    SetBuckets,
    PutCheckpoints,
    DropCheckpoints,
    ClaimSession,
    CreateContext,
    DropContext,
    SpreadContext,
    RaiseContext,
    CollectContext,
)
