"""The commands that change the replicated state.

They carry decisions, digests and pointers only: never a prompt, KV or weights.  Each is a tagged
struct with a schema; an engine refuses an unknown or malformed one before it is appended.
"""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Digest, PeerId, Rank
from pyagent_node.base.wire import Codec


class AdmitMember(msgspec.Struct, frozen=True, tag="admit_member"):
    """A certificate was issued: ``certificate`` is its signed encoding."""

    peer_id: PeerId
    name: str
    role: str
    certificate: bytes


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
    :class:`Conflict` (``stale_epoch``).
    """

    model: Digest
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    after_epoch: int


class RemovePlacement(msgspec.Struct, frozen=True, tag="remove_placement"):
    """Unload a model everywhere."""

    model: Digest
    after_epoch: int


Command = (
    AdmitMember
    | RevokeMember
    | BurnTicket
    | RegisterModel
    | ForgetModel
    | SetPlacement
    | RemovePlacement
)

COMMANDS: Codec[Command] = Codec(
    "command",
    AdmitMember,
    RevokeMember,
    BurnTicket,
    RegisterModel,
    ForgetModel,
    SetPlacement,
    RemovePlacement,
)
