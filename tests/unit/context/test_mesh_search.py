"""A question over several nodes: what owners say, put in order, does not depend on who they are."""

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkId,
    ChunkRow,
    DocumentRecord,
    Version,
    content_check,
)
from pyagent_node.sharding.context.search import (
    Scored,
    candidates,
    check_question,
    found,
    question_terms,
    rank,
    score,
    score_all,
)
from pyagent_node.sharding.context.sketches import SketchModel

CONTEXT = ContextId(b"c" * 16)
WRITER = PeerId("12D3KooWa")
DIMENSIONS = 32


def unit(seed: int) -> np.ndarray:
    vector = np.random.Generator(np.random.PCG64(seed)).standard_normal(DIMENSIONS)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


MODEL = SketchModel.train(np.stack([unit(seed) for seed in range(64)]), bits=32)


def document(
    source: str, texts: list[str], vectors: list[np.ndarray]
) -> tuple[DocumentRecord, list[ChunkBody]]:
    version = Version(1, WRITER)
    bodies, rows, at = [], [], 0
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
        exact = vector.astype("<f2").tobytes()
        spans = ((0, len(text)),)
        bodies.append(
            ChunkBody(
                context=CONTEXT,
                source=source,
                version=version,
                ordinal=i,
                text=text,
                spans=spans,
                vectors=exact,
            )
        )
        check = content_check(text, spans, exact)
        rows.append(ChunkRow(at, at + len(text), 1 + 3 * i, 5, 0, 1, i, check))
        at += len(text)
    packed, weights = MODEL.sketch(np.stack(vectors))
    record = DocumentRecord(
        context=CONTEXT,
        source=source,
        version=version,
        digest=blake3(source.encode()),
        size=at,
        modified=1,
        added=1,
        encoder="test",
        chunks=tuple(rows),
        sketches=packed.tobytes() + weights.astype("<f2").tobytes(),
    )
    return record, bodies


def test_a_question_finds_its_chunk_and_the_citation() -> None:
    catalog = Catalog(CONTEXT)
    held: dict[ChunkId, ChunkBody] = {}
    for source in ("a.py", "b.py"):
        texts = [f"{source} text number {i}\nand more of it\n" for i in range(4)]
        vectors = [unit(ord(source[0]) * 10 + i) for i in range(4)]
        record, bodies = document(source, texts, vectors)
        catalog.merge(record)
        held |= {body.id: body for body in bodies}
    assert set(held) == set(catalog.chunk_ids())
    question = unit(ord("b") * 10 + 2)
    table = catalog.table(MODEL, ContextPolicy(), 5)
    picked = candidates(table, question, 5)
    assert len(picked) == 5
    words = question_terms("which is number 2 of b.py")
    scored = [score(held[each.id], each.windows, question, words) for each in picked]
    hits = found(rank(scored, count=6), held, catalog.locate, count=3)
    assert (hits[0].source, hits[0].first_line, hits[0].last_line) == ("b.py", 7, 8)
    assert hits[0].likeness == pytest.approx(1, abs=1e-3)
    assert hits[0].meaning_rank == 1
    assert hits[0].words_rank == 1
    # The same table serves again, until something changes.
    assert catalog.table(MODEL, ContextPolicy(), 6) is table
    catalog.merge(msgspec.structs.replace(catalog.documents()[0], version=Version(2, WRITER)))
    assert catalog.table(MODEL, ContextPolicy(), 6) is not table


def test_a_record_that_promises_windows_silences_nobody_else() -> None:
    record, (good, bad) = document("a.py", ["one\n", "two\n"], [unit(1), unit(2)])
    catalog = Catalog(CONTEXT)
    catalog.merge(record)
    said = score_all([bad, good], {bad.id: (0, 7), good.id: (0,)}, unit(1), ())
    assert [each.id for each in said] == [good.id]
    lied = msgspec.structs.replace(said[0], id=bad.id, window=7)
    ranked = rank([lied, *said], count=4)
    hits = found(ranked, {body.id: body for body in (good, bad)}, catalog.locate, count=2)
    assert [hit.id for hit in hits] == [good.id]


scores = st.lists(
    st.builds(
        Scored,
        id=st.binary(min_size=16, max_size=16).map(ChunkId),
        likeness=st.sampled_from([0.1, 0.5, 0.9]),
        window=st.just(0),
        length=st.integers(1, 9),
        counts=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    ),
    max_size=20,
    unique_by=lambda each: each.id,
)


@given(scores, st.randoms(), st.sampled_from(["both", "meaning", "words"]))
def test_the_order_is_that_of_the_set(said: list[Scored], random: Random, way: str) -> None:
    shuffled = [*said, *said[:2]]
    random.shuffle(shuffled)
    assert rank(said, count=8, way=way) == rank(shuffled, count=8, way=way)  # type: ignore[arg-type]
    assert len(rank(said, count=4)) <= 4


def test_texts_that_say_the_same_are_one_hit() -> None:
    text = "the very same words stand in both of these documents, all of them\n"
    catalog = Catalog(CONTEXT)
    held: dict[ChunkId, ChunkBody] = {}
    for source in ("a.txt", "b.txt"):
        record, bodies = document(source, [text], [unit(1)])
        catalog.merge(record)
        held |= {body.id: body for body in bodies}
    said = [score(body, (0,), unit(1), ()) for body in held.values()]
    (hit,) = found(rank(said, count=8), held, catalog.locate, count=8)
    assert {hit.source, hit.same[0].source} == {"a.txt", "b.txt"}


def test_what_is_not_of_the_newest_version_is_no_hit() -> None:
    record, (body,) = document("a.txt", ["some text"], [unit(1)])
    catalog = Catalog(CONTEXT)
    catalog.merge(record)
    ranked = rank([score(body, (0,), unit(1), ())], count=1)
    assert found(ranked, {body.id: body}, catalog.locate, count=1)
    assert not found(ranked, {}, catalog.locate, count=1)
    gone = msgspec.structs.replace(
        record, version=Version(2, WRITER), removed=True, chunks=(), sketches=b""
    )
    catalog.merge(gone)
    assert not found(ranked, {body.id: body}, catalog.locate, count=1)


def test_what_cannot_be_asked_is_refused() -> None:
    _, (body,) = document("a.txt", ["some text"], [unit(1)])
    for windows, vector in (((1,), unit(1)), ((-1,), unit(1)), ((), unit(1)), ((0,), unit(1)[:8])):
        with pytest.raises(InvalidRequest):
            score(body, windows, vector, ())
    for question, count in (("", 1), (" \n", 1), ("x" * 9000, 1), ("x", 0), ("x", 1 << 20)):
        with pytest.raises(InvalidRequest):
            check_question(question, count)
    assert question_terms("a b a " * 100) == question_terms("a b")
    assert len(question_terms(" ".join(map(str, range(500))))) == 64
