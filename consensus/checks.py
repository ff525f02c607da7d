"""What a well-formed command looks like, beyond the types of its fields.  Pure.

An engine checks a command with :func:`check_command` before it is appended, so that the state
machine only ever meets commands that pass.
"""

from __future__ import annotations

import re
import struct

from pyagent_node.base.contexts import (
    CONTEXT_ID_BYTES,
    MAX_CENTRE,
    MAX_HORIZON,
    ContextInfo,
    check_context_name,
    check_policy,
)
from pyagent_node.base.errors import InvalidRequest, LimitExceeded
from pyagent_node.base.limits import KIB, MAX_SESSIONS
from pyagent_node.base.types import Backends, Drafting, Rank
from pyagent_node.consensus.commands import (
    COMMANDS,
    AdmitMember,
    BurnTicket,
    Checkpoint,
    ClaimSession,
    CollectContext,
    Command,
    CreateContext,
    DropCheckpoints,
    DropContext,
    DropPrepared,
    ForgetModel,
    ModelRecord,
    PreparePlacement,
    PutCheckpoints,
    RaiseContext,
    RegisterModel,
    RemoveMember,
    RemovePlacement,
    RevokeMember,
    SetBuckets,
    SetDrafting,
    SetDraining,
    SetMeshSetting,
    SetPlacement,
    SetStandbys,
    SetVote,
    SpreadContext,
)
from pyagent_node.consensus.settings import check_setting

ROLES = ("voter", "learner", "client")
MAX_COMMAND = 48 * KIB
"""Bytes of an encoded command; it must fit the header of a frame with room to spare."""
MAX_RANKS = 256
MAX_STANDBYS = 8
MAX_BACKENDS = 256
"""Standbys of one rank, and likewise spares."""
MAX_BUCKETS = 1024
MAX_OWNERS = 8
"""Owners of one bucket."""
MAX_BATCH = 256
"""Checkpoints, or sessions, in one command."""
MAX_HOLDERS = 8
"""Holders of one session's journal."""
MAX_BLOCKS = 256
MAX_BLOCK_KEY = 32
"""Bytes of a KV block's key."""
MAX_KV_PARTS = 64
"""Parts of one session's KV that a checkpoint speaks of."""
MAX_KV_LAYERS = 0x10000
VOTES = ("auto", "always", "never")
MAX_TEXT = 256
MAX_CERTIFICATE = 4 * KIB
MAX_CONTEXT = 1 << 24
MAX_DRAFT_LENGTH = 256
"""Far above what any head sends."""

_BACKEND = re.compile(r"[a-z][a-z0-9._-]{0,31}")
_NUMBERS = re.compile(r"[a-z0-9]{1,16}")
_PEER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TICKET = re.compile(r"[0-9a-f]{32}")
_SESSION = re.compile(r"[0-9a-f]{32}")
_MAX_INT = (1 << 63) - 1


def encode_command(command: Command) -> bytes:
    """Return the encoding of a checked command.

    Raises :class:`InvalidRequest` (``bad_command``) or :class:`LimitExceeded`
    (``command_too_large``).
    """
    check_command(command)
    return _bounded(COMMANDS.encode(command))


def decode_command(data: bytes) -> Command:
    """Return the checked command in ``data``.

    Raises what :meth:`Codec.decode` and :func:`encode_command` raise.
    """
    command = COMMANDS.decode(_bounded(data))
    check_command(command)
    return command


def check_command(command: Command) -> None:
    """Raise :class:`InvalidRequest` naming the first field out of range.

    Its code is ``bad_command``, for a mesh setting what :func:`check_setting` raises, and for a
    context's name or policy what :mod:`~pyagent_node.base.contexts` says.
    """
    _check_members(command)
    _check_models(command)
    _check_sessions(command)
    _check_contexts(command)


def _check_contexts(command: Command) -> None:
    match command:
        case CreateContext():
            _context(command.context)
        case DropContext() | SpreadContext() | RaiseContext() | CollectContext():
            check_context_name(command.name)
            _ensure(len(command.id) == CONTEXT_ID_BYTES, "id", "its length")
            if isinstance(command, RaiseContext):
                _number("horizon", command.horizon, 1, MAX_HORIZON)
                _number("at", command.at, 0)
            elif isinstance(command, CollectContext):
                _number("floor", command.floor, 1, MAX_HORIZON)
        case _:
            pass


def _context(record: ContextInfo) -> None:
    check_context_name(record.name)
    _ensure(len(record.id) == CONTEXT_ID_BYTES, "id", "its length")
    _text("encoder", record.encoder)
    _number("created", record.created, 0)
    check_policy(record.policy)
    size = len(record.centre)
    _ensure(size <= MAX_CENTRE and not size % 2, "centre", "its length")
    numbers = struct.unpack(f"<{size // 2}e", record.centre)
    _ensure(all(-1 <= number <= 1 for number in numbers), "centre", "a number in it")
    later = (record.horizon, record.raised, record.raised_index, record.floor)
    _ensure(not any(later), "horizon", record.horizon)


def _check_members(command: Command) -> None:
    match command:
        case AdmitMember():
            _peer(command.peer_id)
            _text("name", command.name)
            _ensure(command.role in ROLES, "role", command.role)
            _ensure(0 < len(command.certificate) <= MAX_CERTIFICATE, "certificate", "its length")
            _number("issued", command.issued, 0)
        case RevokeMember():
            _peer(command.peer_id)
            _text("reason", command.reason)
        case BurnTicket():
            _peer(command.peer_id)
            _ensure(_TICKET.fullmatch(command.ticket_id) is not None, "ticket_id", "its form")
            _number("expires", command.expires, 0)
            _number("at", command.at, 0)
        case SetVote():
            _peer(command.peer_id)
            _ensure(command.vote in VOTES, "vote", command.vote)
        case RemoveMember():
            _peer(command.peer_id)
            _number("at", command.at, 0)
        case SetDraining():
            _peer(command.peer_id)
        case _:
            pass


def _check_models(command: Command) -> None:
    match command:
        case RegisterModel():
            _model(command.model)
        case ForgetModel():
            _digest("digest", command.digest)
        case SetPlacement():
            _digest("model", command.model)
            _number("n_ctx", command.n_ctx, 1, MAX_CONTEXT)
            _number("n_seq", command.n_seq, 1, MAX_SESSIONS)
            _number("after_epoch", command.after_epoch, 0)
            _ensure(0 < len(command.ranks) <= MAX_RANKS, "ranks", len(command.ranks))
            for rank in command.ranks:
                check_rank(rank)
            for field in ("want_standbys", "want_spares"):
                _number(field, getattr(command, field) or 0, 0, MAX_STANDBYS)
            _number("prepared", command.prepared, 0)
            _backends(command.backends)
            numbers = command.activations
            _ensure(not numbers or _NUMBERS.fullmatch(numbers) is not None, "activations", numbers)
        case PreparePlacement():
            _digest("model", command.model)
            _number("n_ctx", command.n_ctx, 1, MAX_CONTEXT)
            _number("n_seq", command.n_seq, 1, MAX_SESSIONS)
            _number("after_epoch", command.after_epoch, 1)
            _ensure(0 < len(command.ranks) <= MAX_RANKS, "ranks", len(command.ranks))
            for rank in command.ranks:
                check_rank(rank)
            _peer(command.by)
            _backends(command.backends)
        case DropPrepared():
            _digest("model", command.model)
            _number("number", command.number, 1)
        case SetStandbys():
            _digest("model", command.model)
            _number("epoch", command.epoch, 1)
            for field, each in (("standbys", command.standbys), ("spares", command.spares)):
                _ensure(0 < len(each) <= MAX_RANKS, field, len(each))
                for peers in each:
                    _peers(field, peers, MAX_STANDBYS)
        case SetDrafting():
            _digest("model", command.model)
            _number("epoch", command.epoch, 1)
            if command.drafting is not None:
                _drafting(command.drafting)
        case RemovePlacement():
            _digest("model", command.model)
            _number("after_epoch", command.after_epoch, 0)
        case SetBuckets():
            _number("after_epoch", command.after_epoch, 0)
            rows = len(command.owners)
            _ensure(rows <= MAX_BUCKETS and not rows & (rows - 1), "owners", rows)
            for owners in command.owners:
                _ensure(len(owners) > 0, "owners", "a bucket without any")
                _peers("owners", owners, MAX_OWNERS)
        case SetMeshSetting():
            check_setting(command.name, command.value)
        case _:
            pass


def _drafting(drafting: Drafting) -> None:
    """Bounds only: which lengths and depths there are is the head's business."""
    if drafting.speculation is not None:
        _text("speculation", drafting.speculation)
    _number("length", drafting.length or 0, 0, MAX_DRAFT_LENGTH)
    _number("depth", drafting.depth or 0, 0, MAX_DRAFT_LENGTH)
    _ensure((drafting.drafter is None) == (drafting.peer_id is None), "drafter", "half of it")
    if drafting.drafter is not None and drafting.peer_id is not None:
        _digest("drafter", drafting.drafter)
        _peer(drafting.peer_id)


def _check_sessions(command: Command) -> None:
    match command:
        case PutCheckpoints():
            _number("at", command.at, 0)
            _ensure(len(command.checkpoints) <= MAX_BATCH, "checkpoints", "too many")
            for checkpoint in command.checkpoints:
                _checkpoint(checkpoint)
        case DropCheckpoints():
            _peer(command.head)
            _ensure(len(command.sessions) <= MAX_BATCH, "sessions", "too many")
            for session in command.sessions:
                _session(session)
        case ClaimSession():
            _session(command.session)
            _peer(command.head)
            _number("after_claim", command.after_claim, 1)
            _number("at", command.at, 0)
        case _:
            pass


def _checkpoint(checkpoint: Checkpoint) -> None:
    _session(checkpoint.session)
    _digest("model", checkpoint.model)
    _peer(checkpoint.head)
    _number("tokens", checkpoint.tokens, 0)
    _peers("holders", checkpoint.holders, MAX_HOLDERS)
    _number("expires", checkpoint.expires, 0)
    _number("claim", checkpoint.claim, 1)
    if checkpoint.signer is not None:
        _peer(checkpoint.signer)
    _ensure(len(checkpoint.blocks) <= MAX_BLOCKS, "blocks", len(checkpoint.blocks))
    for key in checkpoint.blocks:
        _ensure(0 < len(key) <= MAX_BLOCK_KEY, "blocks", "the length of a key")
    _ensure(len(checkpoint.block_holders) <= MAX_KV_PARTS, "kv", len(checkpoint.block_holders))
    for part in checkpoint.block_holders:
        _number("first_layer", part.first_layer, 0, MAX_KV_LAYERS)
        _number("last_layer", part.last_layer, part.first_layer + 1, MAX_KV_LAYERS)
        _number("blocks", part.blocks, 0)
        _peers("holders", part.holders, MAX_HOLDERS)


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_COMMAND:
        raise LimitExceeded(
            f"A command of {len(data)} bytes is over the limit of {MAX_COMMAND}.",
            code="command_too_large",
            size=len(data),
            limit=MAX_COMMAND,
        )
    return data


def _model(model: ModelRecord) -> None:
    _digest("digest", model.digest)
    _digest("manifest", model.manifest)
    _text("name", model.name)
    _text("architecture", model.architecture)
    for field in ("size", "n_layers", "n_embd", "n_vocab", "n_ctx_train"):
        _number(field, getattr(model, field), 1)
    _number("created", model.created, 0)


def check_rank(rank: Rank) -> None:
    """Raise :class:`InvalidRequest` (``bad_command``) for a rank that is out of bounds."""
    _number("rank", rank.rank, 0)
    _number("first", rank.slice.first, 0)
    _number("last", rank.slice.last, 1)
    _peer(rank.peer_id)
    _peers("standbys", rank.standbys, MAX_STANDBYS)
    _peers("spares", rank.spares, MAX_STANDBYS)
    distinct = {rank.peer_id, *rank.standbys, *rank.spares}
    total = 1 + len(rank.standbys) + len(rank.spares)
    _ensure(len(distinct) == total, "standbys", "a node twice")


def _peers(field: str, peers: tuple[str, ...], most: int) -> None:
    _ensure(len(peers) <= most, field, len(peers))
    for peer in peers:
        _peer(peer)
    _ensure(len(set(peers)) == len(peers), field, "a node twice")


def _backends(backends: Backends) -> None:
    _peers("backends", tuple(peer for peer, _ in backends), MAX_BACKENDS)
    for _, name in backends:
        _ensure(_BACKEND.fullmatch(name) is not None, "backends", name)


def _session(value: str) -> None:
    _ensure(_SESSION.fullmatch(value) is not None, "session", value)


def _peer(value: str) -> None:
    _ensure(_PEER.fullmatch(value) is not None, "peer_id", value)


def _digest(field: str, value: str) -> None:
    _ensure(_DIGEST.fullmatch(value) is not None, field, value)


def _text(field: str, value: str) -> None:
    _ensure(0 < len(value) <= MAX_TEXT and value.isprintable(), field, value)


def _number(field: str, value: int, low: int, high: int = _MAX_INT) -> None:
    _ensure(low <= value <= high, field, value)


def _ensure(good: bool, field: str, value: object) -> None:
    if not good:
        raise InvalidRequest(
            f"A command was refused: {field} is out of range ({str(value)[:64]!r}).",
            code="bad_command",
            field=field,
        )
