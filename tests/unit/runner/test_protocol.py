"""Runner messages: arrays survive the trip, and lengths that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.backend import KvRange, LayerKv, StepInput, StepOutput
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.inference.runner_packing import (
    pack_kv,
    pack_outputs,
    pack_pieces,
    pack_steps,
    unpack_kv,
    unpack_outputs,
    unpack_pieces,
    unpack_steps,
    unpack_tokens,
)
from pyagent_node.inference.runner_protocol import (
    REPLIES,
    REQUESTS,
    Decode,
    Decoded,
    OutputHeader,
    StepHeader,
)
from pyagent_node.inference.sampling import Sampled

N_EMBD = 3


def step(seq: int, n: int, *, rows: bool) -> StepInput:
    tokens = np.arange(n, dtype=np.int32) + seq
    activations = np.random.default_rng(seq).random((n, N_EMBD), np.float32) if rows else None
    parents = tuple(range(n - 1)) if seq % 3 else ()
    return StepInput(seq, 10 * seq, tokens, activations, seq % 2 == 0, n - 1, parents)


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=6))
def test_steps_survive(shapes: list[tuple[int, bool]]) -> None:
    steps = [step(seq, n, rows=rows) for seq, (n, rows) in enumerate(shapes)]
    headers, tail = pack_steps(steps)
    request = REQUESTS.decode(REQUESTS.encode(Decode(7, headers)))
    assert isinstance(request, Decode)
    for before, after in zip(steps, unpack_steps(request.steps, tail, N_EMBD), strict=True):
        assert (before.seq, before.position, before.sample) == (
            after.seq,
            after.position,
            after.sample,
        )
        assert (before.drafts, before.parents) == (after.drafts, after.parents)
        assert np.array_equal(before.tokens, after.tokens)
        if before.activations is None:
            assert after.activations is None
        else:
            assert after.activations is not None
            assert np.array_equal(before.activations, after.activations)


def test_outputs_survive() -> None:
    rows = np.random.default_rng(0).random((2, N_EMBD), np.float32)
    sampled = Sampled(5, -0.25, ((5, -0.25), (6, -2.0)))
    outputs = [StepOutput(rows), StepOutput(), StepOutput(sampled=(sampled, Sampled(7)))]
    headers, tail = pack_outputs(outputs)
    reply = REPLIES.decode(REPLIES.encode(Decoded(1, headers)))
    assert isinstance(reply, Decoded)
    first, second, third = unpack_outputs(reply.outputs, tail, N_EMBD)
    assert first.activations is not None
    assert np.array_equal(first.activations, rows)
    assert second == StepOutput()
    assert third.sampled == (sampled, Sampled(7))


def test_kv_survives_with_and_without_tokens() -> None:
    layers = (LayerKv(4, b"ab", b"cd"), LayerKv(5, b"", b"xyz"))
    kv = KvRange("codec", 3, 5, layers)
    packed = pack_kv(kv)
    again, tokens = unpack_kv("codec", 3, 5, packed.layers, packed.tail, with_tokens=False)
    assert again == kv
    assert len(tokens) == 0
    packed = pack_kv(kv, np.array([7, 8], np.int32))
    again, tokens = unpack_kv("codec", 3, 5, packed.layers, packed.tail, with_tokens=True)
    assert again == kv
    assert tokens.tolist() == [7, 8]


def test_a_part_of_kv_is_packed_like_the_range_it_is() -> None:
    layers = tuple(LayerKv(i, bytes(range(40)), bytes(range(40, 60))) for i in (4, 5))
    kv, tokens = KvRange("codec", 6, 26, layers), np.arange(20, dtype=np.int32)
    packed = pack_kv(kv, tokens[3:5], start=9, stop=11)
    part, again = unpack_kv("codec", 9, 11, packed.layers, packed.tail, with_tokens=True)
    assert part == part_of(kv, 9, 11)
    assert again.tolist() == [3, 4]
    odd = KvRange("codec", 6, 26, (LayerKv(4, bytes(41), bytes(20)),))
    with pytest.raises(CorruptData):
        pack_kv(odd, tokens[3:5], start=9, stop=11)


@given(st.lists(st.binary(max_size=9), max_size=20))
def test_pieces_survive(pieces: list[bytes]) -> None:
    assert unpack_pieces(len(pieces), pack_pieces(pieces)) == pieces


@pytest.mark.parametrize("change", [-1, 1])
def test_lengths_that_do_not_fit_are_refused(change: int) -> None:
    headers, tail = pack_steps([step(0, 2, rows=True)])
    bent = tail[:change] if change < 0 else tail + b"x"
    with pytest.raises(CorruptData):
        unpack_steps(headers, bent, N_EMBD)
    with pytest.raises(CorruptData):
        unpack_outputs([OutputHeader(2, ())], bent, N_EMBD)
    with pytest.raises(CorruptData):
        unpack_pieces(1, b"\xff\xff\xff\xff" + b"x" * (1 + change))
    with pytest.raises(CorruptData):
        unpack_tokens(b"x" * (4 + change))


def test_negative_and_huge_counts_are_refused() -> None:
    for n in (-1, 2**40):
        with pytest.raises(CorruptData):
            unpack_steps([StepHeader(0, 0, n, activations=True, sample=False)], b"1234", N_EMBD)
        with pytest.raises(CorruptData):
            unpack_outputs([OutputHeader(n, ())], b"1234", N_EMBD)
