"""Tails of steps, and the cuts of a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, ErrorInfo, Unsupported
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import PREFILL_CHUNK
from pyagent_node.inference.kv.pieces import Piece
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    CloseSession,
    Join,
    Joined,
    Keep,
    OpenSession,
    PipeMessage,
    Restore,
    Restored,
    Result,
    StageError,
    Step,
    chunk_end,
    pack_tail,
    unpack_tail,
    unpack_tokens,
)
from pyagent_node.inference.sampling import Sampled, SamplingParams

S, M = SessionId("5" * 32), Digest("a" * 64)

MESSAGES: list[PipeMessage] = [
    OpenSession(S, M, 3, 1, PeerId("head"), 100, 7, SamplingParams(seed=2**64 - 1)),
    Step(S, M, 3, 1, 5, 512, 17, True, 0.25),
    OpenSession(S, M, 3, 1, PeerId("head"), 100, 7, SamplingParams(), bytes(32), 512),
    Step(S, M, 3, 1, 5, 512, 2, True, 0.25, 1, 4, (), 512),
    CloseSession(S, M, 3, 0),
    Restore(S, M, 3, 1, 128, (PeerId("a"), PeerId("b"))),
    Restored(S, M, 3, 1, 2, 64),
    Join(S, M, 3, 1, bytes(32), 16, (Piece(3, 60), Piece(60, 99)), (PeerId("a"),)),
    Joined(S, M, 3, 1, (0, 1)),
    Keep(S, M, 3, 1),
    Result(S, M, 3, 2, 5, 0.5, (Sampled(7, -0.5, ((7, -0.5), (9, -2.0))), Sampled(3))),
    Result(S, M, 3, 2, 4, 0.5),
    StageError(S, M, 3, 1, PeerId("x"), ErrorInfo("conflict", "stale_epoch", "old")),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_survive_the_wire(message: PipeMessage) -> None:
    assert PIPE_CODEC.decode(PIPE_CODEC.encode(message)) == message


def test_an_unknown_message_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'draft' is not part of pipe"):
        PIPE_CODEC.decode(b"\x81\xa4type\xa5draft")


@given(st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_a_tail_holds_tokens_and_rows(n: int, n_embd: int, with_rows: bool) -> None:
    tokens = np.arange(n, dtype=np.int32) * 70_000
    rows = np.random.default_rng(n).random((n, n_embd), dtype=np.float32) if with_rows else None
    got_tokens, got_rows = unpack_tail(pack_tail(tokens, rows), n, n_embd)
    assert got_tokens.tolist() == tokens.tolist()
    if rows is None:
        assert got_rows is None
    else:
        assert got_rows is not None
        assert got_rows.tobytes() == rows.tobytes()
        assert got_rows.shape == (n, n_embd)


@pytest.mark.parametrize(("n", "size"), [(0, 0), (-1, 4), (1, 0), (2, 4), (2, 23), (2, 25), (1, 5)])
def test_a_tail_of_another_size_is_refused(n: int, size: int) -> None:
    with pytest.raises(CorruptData) as caught:
        unpack_tail(bytes(size), n, 2)
    assert caught.value.code == "malformed_step"


def test_the_tokens_of_whole_blocks_are_restored() -> None:
    tokens = np.arange(128, dtype=np.int32)
    assert unpack_tokens(pack_tail(tokens, None), 128).tolist() == tokens.tolist()
    for n, size in ((128, 511), (128, 516), (0, 0), (-64, 256), (63, 252), (2**62, 0)):
        with pytest.raises(CorruptData) as caught:
            unpack_tokens(bytes(size), n)
        assert caught.value.code == "malformed_restore"


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_chunks_end_at_multiples_whatever_the_start(start: int, length: int) -> None:
    stop, at, cuts = start + length, start, []
    while at < stop:
        end = chunk_end(at, stop)
        assert at < end <= at + PREFILL_CHUNK
        cuts.append(end)
        at = end
    assert cuts[-1] == stop
    assert all(c % PREFILL_CHUNK == 0 for c in cuts[:-1])
