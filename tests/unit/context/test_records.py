"""Records, bodies and catalogs of contexts: what is decoded is what was encoded, or refused."""

from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.contexts import check_context_name, check_policy
from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError, Unsupported
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.native import blake3
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.freshness import fresh
from pyagent_node.sharding.context.record_codec import (
    decode_body,
    decode_record,
    encode_body,
    encode_record,
)
from pyagent_node.sharding.context.records import (
    ChunkBody,
    ChunkRow,
    DocumentRecord,
    Version,
    content_check,
)

CONTEXT = ContextId(b"c" * 16)
WRITERS = [PeerId("12D3KooWa"), PeerId("12D3KooWb"), PeerId("12D3KooWc")]
BITS = 16


def record_of(
    source: str = "a.txt",
    counter: int = 1,
    writer: PeerId = WRITERS[0],
    *,
    chunks: int = 2,
    added: int = 1000,
    removed: bool = False,
    text: str = "words",
) -> DocumentRecord:
    rows = tuple(
        ChunkRow(i * 10, i * 10 + 9, 1 + i, 5, i % 8, 2, i, content_check(f"{text}{i}", (), b""))
        for i in range(0 if removed else chunks)
    )
    windows = 2 * len(rows)
    sketches = b"\x5a" * (windows * BITS // 8) + np.ones(windows, "<f2").tobytes()
    return DocumentRecord(
        context=CONTEXT,
        source=source,
        version=Version(counter, writer),
        digest=blake3(text.encode()),
        size=100,
        modified=900,
        added=added,
        removed=removed,
        encoder="test/1",
        chunks=rows,
        sketches=sketches,
    )


def body_of(text: str = "some words", ordinal: int = 0) -> ChunkBody:
    vectors = np.ones((1, 8), "<f2").tobytes()
    return ChunkBody(
        context=CONTEXT,
        source="a.txt",
        version=Version(1, WRITERS[0]),
        ordinal=ordinal,
        text=text,
        spans=((0, len(text)),),
        vectors=vectors,
    )


records = st.builds(
    record_of,
    source=st.sampled_from(["a", "b", "c/d"]),
    counter=st.integers(1, 3),
    writer=st.sampled_from(WRITERS),
    chunks=st.integers(0, 3),
    added=st.integers(0, 2000),
    removed=st.booleans(),
    text=st.sampled_from(["x", "y"]),
)


@given(records)
def test_a_record_comes_back_as_it_was(record: DocumentRecord) -> None:
    assert decode_record(encode_record(record)) == record


def test_a_body_comes_back_with_its_id() -> None:
    body = body_of()
    assert decode_body(encode_body(body)) == body
    assert decode_body(encode_body(body)).id == body.id
    assert body.id != body_of("other words").id
    assert body.id != body_of(ordinal=1).id
    assert body.matrix().shape == (1, 8)


def test_a_joined_chunk_has_no_windows() -> None:
    record = record_of()
    row = msgspec.structs.replace(record.chunks[1], same=0, windows=0)
    half = np.ones(2, "<f2").tobytes()
    joined = msgspec.structs.replace(
        record, chunks=(record.chunks[0], row), sketches=b"\x5a" * 4 + half
    )
    assert decode_record(encode_record(joined)) == joined
    for bad in (
        msgspec.structs.replace(row, same=1),
        msgspec.structs.replace(row, same=5),
        msgspec.structs.replace(row, windows=3),
        msgspec.structs.replace(row, start=3),
        msgspec.structs.replace(row, line=0),
        msgspec.structs.replace(row, check=b"x"),
        msgspec.structs.replace(row, tokens=-1),
    ):
        wrong = msgspec.structs.replace(joined, chunks=(record.chunks[0], bad))
        with pytest.raises(InvalidRequest) as caught:
            encode_record(wrong)
        assert caught.value.code == "bad_context_record"


@settings(max_examples=300)
@given(st.data())
def test_changed_bytes_are_refused(data: st.DataObject) -> None:
    encoded = data.draw(st.sampled_from([encode_record(record_of()), encode_body(body_of())]))
    at = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[at] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(changed), encoded[:at]):
        for decode in (decode_record, decode_body):
            with pytest.raises((CorruptData, Unsupported)):
                decode(wrong)


@given(st.binary(max_size=300), st.sampled_from([b"PACR", b"PACB"]))
def test_sealed_nonsense_is_refused(inner: bytes, magic: bytes) -> None:
    data = magic + b"\x01\0\0\0" + inner
    for decode in (decode_record, decode_body):
        with pytest.raises(CorruptData):
            decode(data + blake3(data)[:16])


@pytest.mark.parametrize(
    "changes",
    [
        {"source": ""},
        {"source": "a\x1b[31m"},
        {"source": "x" * 5000},
        {"context": b"short"},
        {"digest": b"x"},
        {"size": -1},
        {"size": 1 << 60},
        {"version": Version(0, WRITERS[0])},
        {"version": Version(1, PeerId(""))},
        {"removed": True},
        {"sketches": b"123"},
        {"sketches": b""},
        {"encoder": "e" * 300},
    ],
)
def test_records_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    wrong = msgspec.structs.replace(record_of(), **changes)
    with pytest.raises(InvalidRequest):
        encode_record(wrong)


def test_a_chunk_lies_in_a_bucket_that_there_is() -> None:
    record = record_of()
    row = msgspec.structs.replace(record.chunks[0], bucket=256)
    with pytest.raises(InvalidRequest):
        encode_record(msgspec.structs.replace(record, chunks=(row, *record.chunks[1:])))


def test_weights_are_numbers() -> None:
    record = record_of()
    bad = record.sketches[:-2] + np.array([np.inf], "<f2").tobytes()
    with pytest.raises(InvalidRequest):
        encode_record(msgspec.structs.replace(record, sketches=bad))


@given(st.lists(records, max_size=8), st.randoms())
def test_merging_does_not_depend_on_the_order(seen: list[DocumentRecord], random: Random) -> None:
    one, two, three = Catalog(CONTEXT), Catalog(CONTEXT), Catalog(CONTEXT)
    for record in seen:
        one.merge(record)
    shuffled = list(seen)
    random.shuffle(shuffled)
    for record in shuffled:
        two.merge(record)
        two.merge(record)
    half = len(seen) // 2  # nodes that met after each had seen a part
    for record in seen[half:]:
        three.merge(record)
    other = Catalog(CONTEXT)
    for record in seen[:half]:
        other.merge(record)
    for known in other.everything():
        three.merge(known.record)
    assert one.everything() == two.everything() == three.everything()
    assert one.slots() == two.slots() == three.slots()
    assert set(one.chunk_ids()) == set(two.chunk_ids()) == set(three.chunk_ids())


@given(st.lists(records, max_size=12), st.integers(0, 3000))
def test_only_chunks_of_the_newest_fresh_versions_are_found(
    seen: list[DocumentRecord], now: int
) -> None:
    catalog = Catalog(CONTEXT)
    newest: dict[str, Version] = {}
    policy = ContextPolicy(max_age_seconds=500, max_tokens=20)
    for record in seen:
        news = catalog.merge(record)
        before = newest.get(record.source)
        assert not news or before is None or record.version >= before
        newest[record.source] = max(newest.get(record.source, record.version), record.version)
        served = catalog.fresh(policy, now)
        for document in served:
            assert document.version == newest[document.source]
            assert not document.removed
            assert now - document.added < 500
        assert sum(document.tokens for document in served) <= 20
        ids = {r.id_of(i) for r in catalog.documents() for i in range(len(r.chunks))}
        assert set(catalog.chunk_ids()) == ids
        for chunk in ids:
            found = catalog.locate(chunk)
            assert found is not None
            assert found[0].version == newest[found[0].source]


def test_a_removal_wins_over_what_it_removed_and_loses_to_what_came_after() -> None:
    catalog = Catalog(CONTEXT)
    assert catalog.merge(record_of(counter=1))
    assert catalog.merge(record_of(counter=2, removed=True))
    assert not catalog.merge(record_of(counter=1))
    assert catalog.documents() == []
    assert catalog.next_version("a.txt", WRITERS[1]) == Version(3, WRITERS[1])
    assert catalog.merge(record_of(counter=3))
    assert len(catalog.documents()) == 1
    catalog.forget("a.txt")
    assert catalog.slots() == Catalog(CONTEXT).slots()
    assert not list(catalog.chunk_ids())


def test_records_of_other_contexts_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        Catalog(ContextId(b"d" * 16)).merge(record_of())


def test_last_use_keeps_a_document() -> None:
    policy = ContextPolicy(unused_seconds=100)
    record = record_of(added=1000)
    assert fresh([record], policy, now=1099)
    assert not fresh([record], policy, now=1100)
    assert fresh([record], policy, now=1150, uses={"a.txt": 1060})
    assert not fresh([record], policy, now=1150, uses={"a.txt": 1 << 39})  # nobody was there yet
    catalog = Catalog(CONTEXT)
    assert not catalog.use({"a.txt": 5})  # not known
    catalog.merge(record)
    assert catalog.use({"a.txt": 5})
    assert not catalog.use({"a.txt": 4})
    assert catalog.uses == {"a.txt": 5}


def test_the_window_over_the_sequence_drops_the_oldest() -> None:
    policy = ContextPolicy(max_tokens=20)  # two documents of ten tokens
    several = [record_of(name, added=when) for name, when in (("a", 3), ("b", 1), ("c", 2))]
    assert [record.source for record in fresh(several, policy, now=10)] == ["a", "c"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "-x", "a\0", "x" * 65, "a b", "é", "a\n"]
)
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_context_name(name)
    assert caught.value.code == "bad_context_name"


def test_policies_have_bounds() -> None:
    check_policy(ContextPolicy(1, 2, 3))
    for policy in (ContextPolicy(-1), ContextPolicy(0, 1 << 50), ContextPolicy(0, 0, 1 << 40)):
        with pytest.raises(PyAgentError):
            check_policy(policy)
