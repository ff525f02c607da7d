"""What the log hears of a session's KV: who holds how much, seldom, and never a key or a byte."""

from __future__ import annotations

import msgspec
import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.checks import check_command
from pyagent_node.consensus.commands import BlockHolders, Checkpoint, PutCheckpoints
from pyagent_node.consensus.state import State, apply, decode_snapshot, encode_snapshot
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.kv_manifest import (
    BLOCKS_SECONDS,
    HOLDERS_SECONDS,
    MAX_HOLDERS,
    MAX_PARTS,
    SessionKv,
)
from pyagent_node.node.kv_messages import SessionHolders
from pyagent_node.simulations.pipeline import peer

from .kv_kit import MODEL

S = SessionId("5" * 32)
HEAD = NodeKey(bytes(31) + b"\1").peer_id
A, B, C = (peer(number) for number in range(3))


def report(first: int, last: int, **held: int) -> SessionHolders:
    names = {"a": A, "b": B, "c": C}
    return SessionHolders(
        S, MODEL, first, last, tuple((names[name], count) for name, count in held.items())
    )


def test_the_log_hears_of_new_holders_soon_and_of_more_blocks_late():
    kv = SessionKv()
    assert not kv.due(0.0)
    kv.learn(report(0, 10, a=3, b=1))
    assert kv.due(0.0)
    kv.registered(0.0)
    assert kv.parts() == (BlockHolders(0, 10, 1, tuple(sorted((A, B)))),)
    kv.learn(report(0, 10, a=4, b=4))
    assert not kv.due(BLOCKS_SECONDS - 1)
    assert kv.due(BLOCKS_SECONDS)
    kv.learn(report(10, 20, a=1))
    assert not kv.due(HOLDERS_SECONDS - 1)
    assert kv.due(HOLDERS_SECONDS)
    kv.registered(20.0)
    kv.learn(report(0, 10, a=5, b=5))
    assert not kv.due(1000.0), "a few blocks more are not worth an entry"
    kv.learn(report(0, 10, a=0, b=5))
    assert kv.parts()[0].holders == (B,)
    assert kv.due(1000.0)


def test_it_stays_small():
    kv = SessionKv()
    for number in range(10 * MAX_PARTS):
        many = tuple((PeerId(f"p{i:02}"), i + 1) for i in range(2 * MAX_HOLDERS))
        kv.learn(SessionHolders(S, MODEL, number, number + 1, many))
    parts = kv.parts()
    assert len(parts) == MAX_PARTS
    assert all(len(part.holders) == MAX_HOLDERS for part in parts)
    assert parts[0].blocks == MAX_HOLDERS + 1, "the fullest holders are named"


def put(*parts: BlockHolders) -> PutCheckpoints:
    return PutCheckpoints((Checkpoint(S, MODEL, HEAD, 3, (A,), 100, kv=parts),), 1)


def test_holders_of_blocks_pass_the_log_and_its_snapshots():
    state, error = apply(State(), put(BlockHolders(0, 10, 4, (A, B))))
    assert error is None
    assert state.checkpoints[S].block_holders == (BlockHolders(0, 10, 4, (A, B)),)
    assert decode_snapshot(encode_snapshot(state)) == state
    plain = Checkpoint(S, MODEL, HEAD, 3, (A,), 100)
    assert b"kv" not in msgspec.msgpack.encode(plain)
    assert plain.block_holders == ()


@pytest.mark.parametrize(
    "parts",
    [
        (BlockHolders(5, 5, 1, (A,)),),
        (BlockHolders(-1, 5, 1, (A,)),),
        (BlockHolders(0, 1 << 20, 1, (A,)),),
        (BlockHolders(0, 5, -1, (A,)),),
        (BlockHolders(0, 5, 1, (A, A)),),
        (BlockHolders(0, 5, 1, tuple(peer(i) for i in range(20))),),
        tuple(BlockHolders(i, i + 1, 1, (A,)) for i in range(100)),
    ],
)
def test_what_is_no_manifest_is_refused(parts):
    with pytest.raises(InvalidRequest):
        check_command(put(*parts))
