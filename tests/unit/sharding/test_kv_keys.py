"""Names of KV blocks, and where a session may begin from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Digest
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_keys import (
    BLOCK_TOKENS,
    PREFILL_PIECE,
    BlockKey,
    block_chain,
    cache_root,
    reusable,
)

MODEL = Digest("ab" * 32)
ROOT = cache_root(MODEL, "")
journals = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300)
cuts = st.sampled_from((BLOCK_TOKENS, PREFILL_PIECE))


def links_one_by_one(root: bytes, tokens: list[int], prompt: int, cut: int) -> tuple[bytes, ...]:
    """The definition, written out."""
    links, parent = [], root
    for at in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        body = np.array(tokens[at : at + BLOCK_TOKENS], "<i4").tobytes()
        beyond = at + BLOCK_TOKENS > prompt // cut * cut
        parent = blake3(parent + body + (prompt.to_bytes(8, "little") if beyond else b""))
        links.append(parent)
    return tuple(links)


@given(journals, st.integers(0, 700), cuts, st.integers(0, 5))
def test_a_chain_is_what_it_is_defined_to_be(
    tokens: list[int], prompt: int, cut: int, known: int
) -> None:
    chain = block_chain(ROOT, tokens, prompt, prefill_cut=cut)
    assert chain == links_one_by_one(ROOT, tokens, prompt, cut)
    assert chain == block_chain(ROOT, tokens, prompt, prefill_cut=cut, known=chain[:known])
    assert chain == block_chain(ROOT, np.array(tokens, np.int32), prompt, prefill_cut=cut)


@given(journals, journals, st.integers(0, 64))
def test_two_journals_have_as_many_names_in_common_as_tokens(
    first: list[int], second: list[int], shared: int
) -> None:
    second = first[: shared * 5] + second
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    one, two = (block_chain(ROOT, journal, 10**6) for journal in (first, second))
    common = sum(a == b for a, b in zip(one, two, strict=False))
    assert common == same // BLOCK_TOKENS
    assert len(set(one) | set(two)) == len(one) + len(two) - common


@given(st.integers(0, 2000), st.integers(0, 2000), cuts)
def test_blocks_inside_both_prompts_are_shared_and_no_others(one: int, two: int, cut: int) -> None:
    tokens = list(range(2000))
    a = block_chain(ROOT, tokens, one, prefill_cut=cut)
    b = block_chain(ROOT, tokens, two, prefill_cut=cut)
    inside = min(one, two) // cut * cut // BLOCK_TOKENS
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        assert (x == y) == (one == two or index < inside)


def test_models_and_salts_have_no_name_in_common() -> None:
    other = Digest("cd" * 32)
    roots = {cache_root(m, s) for m in (MODEL, other) for s in ("", "a", "b", "\0")}
    assert len(roots) == 8
    tokens = list(range(64))
    assert len({block_chain(root, tokens, 64) for root in roots}) == 8


def test_no_root_no_names() -> None:
    assert block_chain(b"", list(range(640)), 640) == ()
    assert block_chain(ROOT, [], 0) == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda: block_chain(b"short", [1] * 64, 64),
        lambda: block_chain(ROOT, [2**31] * 64, 64),
        lambda: block_chain(ROOT, [1] * 64, -1),
        lambda: block_chain(ROOT, [1] * 64, 64, prefill_cut=0),
        lambda: block_chain(ROOT, [1] * 64, 64, prefill_cut=100),
        lambda: cache_root(Digest("AB" * 32), ""),
        lambda: cache_root(Digest(""), ""),
        lambda: cache_root(MODEL, "x" * 1025),
        lambda: cache_root(MODEL, "\ud800"),
        lambda: reusable(prompt_tokens=2, journal_tokens=1, blocks=0, prefill_cut=64),
        lambda: reusable(prompt_tokens=2, journal_tokens=2, blocks=-1, prefill_cut=64),
        lambda: reusable(prompt_tokens=2, journal_tokens=2, blocks=1, prefill_cut=63),
        lambda: BlockKey(Digest("x"), 0, bytes(32), "f16").check(),
        lambda: BlockKey(MODEL, -1, bytes(32), "f16").check(),
        lambda: BlockKey(MODEL, 65536, bytes(32), "f16").check(),
        lambda: BlockKey(MODEL, 0, bytes(31), "f16").check(),
        lambda: BlockKey(MODEL, 0, bytes(32), "").check(),
        lambda: BlockKey(MODEL, 0, bytes(32), "f 16").check(),
        lambda: BlockKey(MODEL, 0, bytes(32), "f" * 65).check(),
        lambda: BlockKey(MODEL, 0, bytes(32), "f\u0661").check(),
        lambda: BlockKey(MODEL, 0, bytes(32), "f\0").check(),
    ],
)
def test_what_cannot_be_a_name_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.code in ("bad_block_key", "bad_cache_salt")


def test_a_good_key_passes() -> None:
    BlockKey(MODEL, 0, bytes(32), "f16").check()
    BlockKey(MODEL, 65535, bytes(32), "llama.cpp/0.3.36/f16+int4").check()


@pytest.mark.parametrize(
    ("prompt", "journal", "blocks", "expected"),
    [
        (0, 0, 0, 0),
        (64, 64, 1, 0),  # the last token must be computed, and so with 64 rows: from 0
        (65, 65, 1, 0),  # one row alone would go another way
        (127, 127, 1, 0),
        (128, 128, 2, 1),
        (512, 512, 8, 7),
        (513, 513, 8, 8),  # a piece begins there anyway
        (560, 560, 8, 8),
        (600, 600, 9, 8),  # 24 rows from 576 on, where a plain process has 88 from 512 on
        (640, 640, 10, 9),
        (640, 641, 10, 10),  # all of the prompt, and one token beyond
        (600, 641, 10, 10),
        (600, 640, 10, 8),  # 576 is inside the prompt, 24 rows before its end
        (600, 640, 9, 8),
        (1030, 1030, 15, 15),
        (1030, 1030, 16, 16),
    ],
)
def test_where_a_session_may_begin(prompt: int, journal: int, blocks: int, expected: int) -> None:
    found = reusable(prompt_tokens=prompt, journal_tokens=journal, blocks=blocks, prefill_cut=64)
    assert found == expected


def pieces(start: int, prompt: int) -> list[tuple[int, int]]:
    """How a prompt is fed from ``start``: pieces that end at multiples of 512."""
    found = []
    while start < prompt:
        stop = min(prompt, start - start % PREFILL_PIECE + PREFILL_PIECE)
        found.append((start, stop))
        start = stop
    return found


@given(st.integers(0, 3000), st.integers(0, 600), st.integers(0, 60), cuts)
def test_the_rest_is_computed_in_shapes_with_the_bits_of_the_first_time(
    prompt: int, more: int, blocks: int, cut: int
) -> None:
    journal = prompt + more
    count = reusable(prompt_tokens=prompt, journal_tokens=journal, blocks=blocks, prefill_cut=cut)
    assert 0 <= count <= blocks
    at = count * BLOCK_TOKENS
    assert at < journal or at == 0
    whole = pieces(0, prompt)
    for start, stop in pieces(at, prompt):
        if (start, stop) in whole:
            continue
        assert cut == BLOCK_TOKENS  # the backend said that cuts change nothing...
        assert stop - start >= BLOCK_TOKENS  # ...between pieces of at least so many rows
        assert any(a < start and stop == b for a, b in whole)
    # No boundary further on, among the offered ones, would do.
    for further in range(count + 1, blocks + 1):
        later = further * BLOCK_TOKENS
        fits = later < journal and all(
            piece in whole or (cut == BLOCK_TOKENS and piece[1] - piece[0] >= BLOCK_TOKENS)
            for piece in pieces(later, prompt)
        )
        assert not fits
