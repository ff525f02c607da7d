"""Words, fusion, duplicates, sketches, the index over them, and its bytes."""

from __future__ import annotations

import builtins
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unavailable, Unsupported
from pyagent_node.sharding.context.duplicates import near_texts, same_texts
from pyagent_node.sharding.context.fusion import fuse
from pyagent_node.sharding.context.index import Index
from pyagent_node.sharding.context.index_codec import StoredIndex, decode_index, encode_index
from pyagent_node.sharding.context.lexical import K1, B, Lexical, term_hash, terms
from pyagent_node.sharding.context.sketches import Buckets, Sketches, SketchModel

Vectors = NDArray[np.float32]


def unit(rows: int, dimensions: int, seed: int = 0) -> Vectors:
    """Vectors with neighbours: a few directions and noise."""
    generator = np.random.default_rng(seed)
    middle = generator.standard_normal((max(1, rows // 6), dimensions))
    found = middle[generator.integers(0, len(middle), rows)]
    found = found + 0.4 * generator.standard_normal((rows, dimensions)) + 0.3
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def code(error: pytest.ExceptionInfo[InvalidRequest]) -> str:
    return error.value.code


# --- words


def test_terms_hold_an_identifier_and_its_parts() -> None:
    assert list(terms("ModelStore.read_limited HTTPServer2 x über")) == [
        *("modelstore", "model", "store", "read_limited", "read", "limited"),
        *("httpserver2", "http", "server", "2", "x", "über"),
    ]


simple = st.lists(st.text("abc d", max_size=20), max_size=8)


@given(simple, st.text("abcd ", max_size=8))
def test_bm25_is_that_of_the_formula(texts: list[str], question: str) -> None:
    split = [Counter(terms(text)) for text in texts]
    mean = sum(c.total() for c in split) / len(split) if split else 0
    expected = []
    for counts in split:
        score = 0.0
        for term in set(terms(question)):
            n = sum(term in c for c in split)
            if term in counts:
                damped = counts[term] + K1 * (1 - B + B * counts.total() / mean)
                rarity = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
                score += rarity * counts[term] * (K1 + 1) / damped
        expected.append(score)
    index = Lexical(texts)
    assert index.scores(question).tolist() == pytest.approx(expected)
    found = index.nearest(question, 3)
    assert [row for row, _ in found] == [
        row for row in np.argsort(-index.scores(question), kind="stable")[:3] if expected[row] > 0
    ]


def test_words_of_hostile_texts() -> None:
    index = Lexical(["\ud800 a", "x" * 100_000, "", "a " * 1000])
    assert [row for row, _ in index.nearest("\ud800 a", 9)] == [0, 3] or len(index) == 4
    assert index.nearest("z " * 100_000, 2) == []
    assert len({term_hash(str(i)) for i in range(1000)}) == 1000
    with pytest.raises(InvalidRequest):
        index.nearest("a", 0)


# --- fusion


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([[5, 1], [1, 9]], smoothing=1) == [
        (1, pytest.approx(1 / 3 + 1 / 2)),
        (5, 0.5),
        (9, pytest.approx(1 / 3)),
    ]
    assert fuse([[1], [2]], weights=(1, 2))[0][0] == 2
    assert fuse([[3], [2]])[0][0] == 2  # equal scores: the lower number
    assert fuse([]) == []


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_fusion_refuses_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(InvalidRequest):
        fuse([[1], [2]], weights=weights)


def test_fusion_refuses_an_item_twice() -> None:
    with pytest.raises(InvalidRequest):
        fuse([[1, 1]])


# --- duplicates


def test_the_same_words_are_one_text() -> None:
    assert same_texts(["a b", "b a", "A  b!", "", ".", "b a"]) == [0, 1, 0, 3, 3, 1]


def test_near_texts_are_joined_and_others_are_not() -> None:
    pytest.importorskip("datasketch", reason="needs pyagent-node[context]")
    text = " ".join(f"word{i}" for i in range(200))
    texts = [
        text,
        text.replace("word7 ", "other "),
        text + " more",
        " ".join(f"term{i}" for i in range(200)),
        text.upper(),
        " ".join(f"word{i}" for i in range(100)),
    ]
    assert near_texts(texts) == [0, 0, 0, 3, 0, 5]
    assert near_texts(texts, likeness=1.0) == [0, 1, 2, 3, 0, 5]
    assert near_texts(["", "?", "a", "a"]) == [0, 0, 2, 2]
    with pytest.raises(InvalidRequest):
        near_texts([], likeness=0.1)


def test_joining_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **named: object) -> object:
        if name.startswith("datasketch"):
            raise ImportError(name)
        return real(name, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match=r"pyagent-node\[context\]") as caught:
        near_texts(["a"])
    assert caught.value.code == "context_extra_missing"


# --- sketches


def test_training_follows_from_the_seed() -> None:
    vectors = unit(300, 40)
    one, two, other = (SketchModel.train(vectors, bits=32, seed=s) for s in (1, 1, 2))
    assert (one.steps == two.steps).all()
    assert not (one.steps == other.steps).all()
    axes = one.steps * one.scales[:, None]
    assert np.abs(axes @ axes.T - np.eye(32)).max() < 0.05


def test_the_nearest_survive_the_sketches() -> None:
    vectors = unit(3000, 64)
    model = SketchModel.train(vectors, bits=64)
    sketches = Sketches.of(model, vectors)
    kept = []
    for query in unit(20, 64, seed=0) + 0.05:
        rows, scores = sketches.nearest(query, 300)
        assert (np.diff(scores) <= 0).all()
        best = np.argsort(-(vectors @ query))[:10]
        kept.append(np.isin(best, rows).mean())
    assert np.mean(kept) > 0.9


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_few_or_equal_vectors_can_be_sketched(rows: int) -> None:
    vectors = np.repeat(unit(1, 16), rows, axis=0)
    sketches = Sketches.of(SketchModel.train(vectors, bits=16), vectors)
    assert len(sketches.nearest(vectors[0], 5)[0]) == min(5, rows)


def test_bad_vectors_are_refused() -> None:
    good = unit(5, 16)
    model = SketchModel.train(good, bits=8)
    for bad in (good[0], good[:, :8], np.full((2, 16), np.nan, np.float32)):
        with pytest.raises(InvalidRequest) as caught:
            model.sketch(bad)
        assert code(caught) == "bad_vectors"
    for bits in (0, 12, 24, 8192):
        with pytest.raises(InvalidRequest) as caught:
            SketchModel.train(good, bits=bits)
        assert code(caught) == "bad_sketch_bits"
    with pytest.raises(InvalidRequest):
        SketchModel.train(good[:0], bits=8)
    with pytest.raises(InvalidRequest):
        Sketches(model, np.zeros((3, 2), np.uint8), np.zeros(3, np.float16))
    with pytest.raises(InvalidRequest):
        Sketches.of(model, good).nearest(good[0], 0)


def test_buckets_of_neighbours_are_probed_first() -> None:
    vectors = unit(2000, 32)
    buckets = Buckets.train(vectors, 6)
    of = buckets.of(vectors)
    assert of.max() < 64
    for row in (0, 7, 99):
        order = buckets.probe(vectors[row], 64)
        assert order[0] == of[row]
        assert sorted(order.tolist()) == list(range(64))
        best = np.argsort(-(vectors @ vectors[row]))[:20]
        assert np.isin(of[best], order[:32]).mean() >= 0.7
    with pytest.raises(InvalidRequest):
        Buckets.train(vectors, 31)
    with pytest.raises(InvalidRequest):
        Buckets.train(vectors[:0], 2)
    with pytest.raises(InvalidRequest):
        Buckets(buckets.centre[1:], buckets.axes)
    with pytest.raises(InvalidRequest):
        buckets.of(vectors[:, 1:])
    with pytest.raises(InvalidRequest):
        buckets.probe(vectors[0], 0)


# --- the index


def small() -> tuple[Index, Vectors, NDArray[np.uint32], Lexical]:
    vectors = unit(60, 32)
    chunk_of = np.repeat(np.arange(20, dtype=np.uint32), 3)
    words = Lexical([f"chunk number{i} {'rare_one' if i == 13 else 'plain'}" for i in range(20)])
    sketches = Sketches.of(SketchModel.train(vectors, bits=32), vectors)
    return Index(sketches, chunk_of, vectors.__getitem__, words), vectors, chunk_of, words


def test_meaning_with_all_reranked_is_exact_search() -> None:
    index, vectors, chunk_of, _ = small()
    query = unit(1, 32, seed=9)[0]
    hits = index.search("", query, count=20, way="meaning", reranked=60)
    best = [(vectors @ query)[chunk_of == chunk].max() for chunk in range(20)]
    assert [hit.chunk for hit in hits] == np.argsort(-np.array(best), kind="stable").tolist()
    assert [hit.likeness for hit in hits] == pytest.approx(sorted(best, reverse=True))
    assert [hit.meaning_rank for hit in hits] == list(range(1, 21))
    assert all(chunk_of[hit.window] == hit.chunk for hit in hits)


def test_words_and_both() -> None:
    index, vectors, _, _ = small()
    assert [hit.chunk for hit in index.search("rare", vectors[0], way="words")] == [13]
    assert index.search("rare_one", vectors[0], count=3)[0].chunk == 13  # in both rankings
    assert index.search("rare_one", vectors[0], count=3)[1].chunk == 0
    assert index.search("rare", vectors[0], count=3)[0].chunk == 0  # a plain word counts for less
    found = index.search("rare", vectors[0], count=20)
    (rare,) = [hit for hit in found if hit.chunk == 13]
    assert rare.words_rank == 1
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_an_index_refuses_what_does_not_fit() -> None:
    index, vectors, chunk_of, words = small()
    sketches = Sketches.of(SketchModel.train(vectors, bits=32), vectors)
    with pytest.raises(InvalidRequest):
        Index(sketches, chunk_of[1:], vectors.__getitem__)
    with pytest.raises(InvalidRequest):
        Index(sketches, chunk_of + 1, vectors.__getitem__, words)
    with pytest.raises(InvalidRequest):
        index.search("a", vectors[0], count=0)
    with pytest.raises(InvalidRequest):
        index.search("a", vectors[0][:5])
    with pytest.raises(InvalidRequest):
        Index(sketches, chunk_of, vectors.__getitem__).search("a", vectors[0], way="words")
    with pytest.raises(InvalidRequest):
        Index(sketches, chunk_of, lambda rows: vectors[rows][1:]).search("a", vectors[0])


def test_an_empty_index_finds_nothing() -> None:
    model = SketchModel.train(unit(5, 16), bits=8)
    empty = Sketches.of(model, np.zeros((0, 16), np.float32))
    index = Index(empty, np.zeros(0, np.uint32), lambda rows: np.zeros((0, 16), np.float32))
    assert index.search("a", unit(1, 16)[0]) == []


# --- its bytes


@given(st.integers(0, 30), st.integers(0, 2**32))
def test_an_index_comes_back_from_its_bytes(windows: int, seed: int) -> None:
    vectors = unit(40, 24, seed)
    sketches = Sketches.of(SketchModel.train(vectors, bits=16), vectors[:windows])
    steps = np.random.default_rng(seed).integers(0, 2, windows)
    steps[:1] = 0
    chunk_of = np.cumsum(steps).astype(np.uint32)
    data = encode_index(StoredIndex(sketches, chunk_of, "encodér"))
    back = decode_index(data)
    assert back.identity == "encodér"
    assert back.chunk_of.tolist() == chunk_of.tolist()
    assert encode_index(back) == data
    found = [s.nearest(vectors[0], 9) for s in (sketches, back.sketches)] if windows else []
    assert not found or found[0][0].tolist() == found[1][0].tolist()


def stored() -> StoredIndex:
    vectors = unit(20, 16)
    sketches = Sketches.of(SketchModel.train(vectors, bits=8), vectors)
    return StoredIndex(sketches, np.arange(20, dtype=np.uint32) // 2, "e")


def test_every_changed_or_missing_byte_is_noticed() -> None:
    data = encode_index(stored())
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises((CorruptData, Unsupported)):
            decode_index(bytes(changed))
    for length in (0, 1, 30, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptData):
            decode_index(data[:length])
    with pytest.raises(CorruptData):
        decode_index(data + b"\0")


@given(st.binary(max_size=200))
def test_hostile_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b"PASX\1\0\0\0", b"PASX\1\0\0\0" + b"\xff" * 12):
        with pytest.raises((CorruptData, Unsupported)):
            decode_index(prefix + data)


def test_windows_out_of_order_are_not_encoded() -> None:
    good = stored()
    for wrong in (good.chunk_of[::-1], good.chunk_of + 1, good.chunk_of * 2, good.chunk_of[1:]):
        with pytest.raises(InvalidRequest):
            encode_index(good._replace(chunk_of=wrong))
    for name in ("", "x" * 300):
        with pytest.raises(InvalidRequest):
            encode_index(good._replace(identity=name))
