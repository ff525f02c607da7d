"""The frames that a malicious member composes from what it knows.  Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import (
    COMMANDS,
    AdmitMember,
    BurnTicket,
    Checkpoint,
    ClaimSession,
    Command,
    DropCheckpoints,
    PutCheckpoints,
    RemoveMember,
    RevokeMember,
    SetVote,
)
from pyagent_node.consensus.raft_messages import PROTOCOL as RAFT_PROTOCOL
from pyagent_node.consensus.raft_messages import Hello, Piece, Propose, Stop, frame
from pyagent_node.consensus.replica import REQUEST_BYTES
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    PIPE_PROTOCOL,
    CloseSession,
    OpenSession,
    PipeMessage,
    Result,
    Step,
)
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.journal_messages import PROTOCOL as JOURNAL_PROTOCOL
from pyagent_node.node.journal_messages import TO_HOLDER, Append, Begin, End, ToHolder, pack
from pyagent_node.node.rpc import PROTOCOL as RPC_PROTOCOL
from pyagent_node.simulations.backend import N_EMBD
from pyagent_node.simulations.fault_kinds import Malice
from pyagent_node.simulations.pipeline import MODEL

PROTOCOLS: Final = (RAFT_PROTOCOL, PIPE_PROTOCOL, RPC_PROTOCOL, JOURNAL_PROTOCOL)
FLOOD: Final = 48
"""Steps of a session that are sent at once, far more than may wait."""
FLOOD_SESSIONS: Final = 6
UNKNOWN: Final = SessionId("0" * 32)
COMPOSED: Final[tuple[Malice, ...]] = (
    "stale_epoch",
    "flood",
    "false_result",
    "false_close",
    "false_raft",
    "false_proposal",
    "false_journal",
)
_REQUESTS: Final = ("ask_facts", "ask_placements", "ask_chain", "fetch_journal", "nonsense")


class Sight(NamedTuple):
    """What is known of the swarm; ``sessions`` are secret, but let it have guessed them."""

    me: PeerId
    victim: PeerId
    now: int
    hello: Hello
    victim_hello: Hello
    epoch: int
    ranks: int
    sessions: Sequence[SessionId]
    checkpoints: Sequence[Checkpoint]


def compose(how: Malice | None, sight: Sight, rng: random.Random) -> tuple[str, list[Frame]]:
    """Return a protocol and frames of a kind of malice; ``None``: of any."""
    match how if how is not None else rng.choice(COMPOSED):
        case "false_raft":
            return RAFT_PROTOCOL, _raft(sight, rng)
        case "false_proposal":
            return RAFT_PROTOCOL, _proposals(sight, rng)
        case "false_journal" | "false_claim":
            return JOURNAL_PROTOCOL, _journal(sight, rng)
        case "false_facts" | "replay":
            return RPC_PROTOCOL, _calls(sight, rng)
        case kind:
            return PIPE_PROTOCOL, _pipe(kind, sight, rng)


def mutated(whole: Frame, rng: random.Random) -> Frame:
    """Return a frame with some bytes of its header changed, or without its end."""
    header = bytearray(whole.header)
    for _ in range(rng.randint(1, 3)):
        if header:
            header[rng.randrange(len(header))] = rng.randrange(256)
    if rng.random() < 0.3:
        del header[rng.randrange(len(header) + 1) :]
    return Frame(bytes(header), whole.tail)


def _pipe(kind: str, sight: Sight, rng: random.Random) -> list[Frame]:
    session = rng.choice(sight.sessions) if sight.sessions else UNKNOWN
    rank, epoch = rng.randrange(sight.ranks), sight.epoch
    messages: list[PipeMessage]
    match kind:
        case "stale_epoch":
            stale = max(0, epoch - 1)
            messages = [
                Step(session, MODEL, stale, rank, 0, 0, 1, True),
                _opening(sight, stale, rng),
            ]
        case "flood":
            return _flood(sight, rng)
        case "false_result":
            messages = [
                Result(session, MODEL, epoch, rank, step, 0.0, (Sampled(65),)) for step in range(4)
            ]
        case _:
            messages = [
                Step(session, MODEL, epoch, rank, 1, 1, 1, True),
                CloseSession(session, MODEL, epoch, rank),
            ]
    return [Frame(PIPE_CODEC.encode(message), bytes(4)) for message in messages]


def _opening(sight: Sight, epoch: int, rng: random.Random) -> OpenSession:
    """Return what opens a session of this member's own at the first rank."""
    session = SessionId(rng.randbytes(16).hex())
    return OpenSession(session, MODEL, epoch, 0, sight.me, FLOOD, 1, SamplingParams())


def _flood(sight: Sight, rng: random.Random) -> list[Frame]:
    """Return sessions with more steps than may wait, each one well formed."""
    frames = []
    for _ in range(FLOOD_SESSIONS):
        opening = _opening(sight, sight.epoch, rng)
        frames.append(Frame(PIPE_CODEC.encode(opening), b""))
        for at in range(FLOOD):
            step = Step(opening.session, MODEL, sight.epoch, 0, at, at, 1, False)
            rows = 0 if sight.ranks == 1 else N_EMBD
            frames.append(Frame(PIPE_CODEC.encode(step), bytes(4 * (1 + rows))))
    return frames


def _raft(sight: Sight, rng: random.Random) -> list[Frame]:
    """Return a stream under another one's id, or noise under its own."""
    noise = Frame(frame(Piece(sight.victim_hello.raft_id, True)).header, rng.randbytes(40))
    match rng.randrange(4):
        case 0:
            return [frame(sight.victim_hello), noise]
        case 1:
            forged = msgspec.structs.replace(sight.hello, raft_id=rng.randrange(1, 1 << 63))
            return [frame(forged), noise]
        case 2:
            return [frame(sight.hello), frame(sight.victim_hello), noise]
        case _:
            wrong = rng.choice((noise, frame(Piece(1, False)), Frame(b"", b"")))
            return [frame(sight.hello), wrong, noise]


def _proposals(sight: Sight, rng: random.Random) -> list[Frame]:
    """Return proposals that are not this member's to make, and some that are none."""
    me, victim, now = sight.me, sight.victim, sight.now
    known = rng.choice(sight.checkpoints) if sight.checkpoints else None
    session = known.session if known is not None else UNKNOWN
    commands: list[Command] = [
        AdmitMember(me, "evil", "voter", b"certificate"),
        BurnTicket("00" * 16, me, now + 60, now),
        RevokeMember(victim, "evil"),
        RemoveMember(victim, now),
        SetVote(victim, "never"),
        DropCheckpoints((session,), victim),
        ClaimSession(session, victim, known.claim if known is not None else 1, now),
        PutCheckpoints((Checkpoint(session, MODEL, victim, 0, (me,), now + 600),), now),
        PutCheckpoints((Checkpoint(session, MODEL, me, 0, (me,), now + 600),), now + (1 << 40)),
    ]
    frames = [
        frame(Propose(rng.randbytes(REQUEST_BYTES), COMMANDS.encode(command), 0))
        for command in rng.sample(commands, 3)
    ]
    frames.append(frame(Propose(rng.randbytes(REQUEST_BYTES), rng.randbytes(30), 0)))
    frames.append(
        rng.choice(
            (
                frame(Stop(ErrorInfo("Unavailable", "evil", "Stop."))),
                frame(Propose(b"", b"", 1 << 60)),
            )
        )
    )
    return [frame(sight.hello), *frames]


def _journal(sight: Sight, rng: random.Random) -> list[Frame]:
    """Return copies of sessions that others head, or that there are not."""
    known = rng.choice(sight.checkpoints) if sight.checkpoints else None
    session = known.session if known is not None else UNKNOWN
    claim = known.claim if known is not None else 1
    signature = rng.randbytes(64)
    messages: list[ToHolder] = [
        Begin(session, claim, signature),
        Begin(session, claim + 1, signature),
        Begin(SessionId(rng.randbytes(16).hex()), 1, signature),
        Append(session, 0, signature, True),
        Append(session, 1 << 40, signature, True),
        End(session),
    ]
    tail = rng.choice((b"", pack([b"\x81"]), pack([rng.randbytes(9)] * 3), rng.randbytes(20)))
    return [Frame(TO_HOLDER.encode(message), tail) for message in rng.sample(messages, 3)]


def _calls(sight: Sight, rng: random.Random) -> list[Frame]:
    """Return requests with numbers twice, deadlines of every kind, and bodies that are none."""
    frames = []
    for number in (1, 1, -5, 1 << 62):
        body = {"type": rng.choice(_REQUESTS), "session": "", "index": -(1 << 60), "model": ""}
        call = {
            "type": "call",
            "id": number,
            "seconds": rng.choice((0.0, -1.0, 1e300, float("nan"))),
            "body": body,
        }
        frames.append(Frame(msgspec.msgpack.encode(call), rng.randbytes(rng.randrange(30))))
    return rng.sample(frames, 3)
