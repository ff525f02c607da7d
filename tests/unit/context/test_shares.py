"""Sketches that lie spread over nodes: bare records, parts of chunks, and whom a question asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.node.context_steward import Size, plan_spread
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.probing import (
    Merged,
    Probe,
    chances,
    likely,
    picked,
    unsure_of,
)
from pyagent_node.sharding.context.records import (
    Version,
    bare,
    decode_record,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.search import candidates
from pyagent_node.sharding.context.shares import (
    ALL_GROUPS,
    GROUPS,
    Part,
    Share,
    decode_part,
    encode_part,
    part_of,
)
from pyagent_node.simulations.contexts import toy_axes, toy_document, toy_vector

CONTEXT = ContextId(b"s" * 16)
A, B, C = PeerId("12D3KooWa"), PeerId("12D3KooWb"), PeerId("12D3KooWc")
TEXT = "\n\n".join(
    f"The {a} of the {b} keeps {c} under the stairs, and nobody asks."
    for a in ("keeper", "baker", "miller", "weaver")
    for b in ("tower", "harbour", "village")
    for c in ("lamps", "bread")
)
RECORD, BODIES = toy_document(CONTEXT, "a.txt", TEXT, Version(1, A), now=10.0)
DIGEST = record_digest(encode_record(RECORD))
sets = st.integers(0, ALL_GROUPS)


def parts(groups: int) -> Share:
    share = Share()
    share.put({body.id: part_of(body, toy_axes(), groups) for body in BODIES})
    return share


def catalog(*, whole: bool) -> Catalog:
    found = Catalog(CONTEXT)
    found.merge(RECORD if whole else bare(RECORD, DIGEST))
    return found


def test_a_bare_record_is_the_same_document() -> None:
    short = bare(RECORD, DIGEST)
    data = encode_record(short)
    assert decode_record(data) == short
    assert record_digest(data) == DIGEST
    assert len(data) < len(encode_record(RECORD)) / 2
    assert bare(short, b"") is short
    assert catalog(whole=True).slots() == catalog(whole=False).slots()
    assert catalog(whole=True).marks() == catalog(whole=False).marks()
    assert not catalog(whole=True).merge(short)
    stripped = catalog(whole=True)
    assert stripped.make_bare("a.txt") == short
    assert stripped.make_bare("a.txt") is None
    assert stripped.everything() == catalog(whole=False).everything()


def test_half_a_bare_record_is_refused() -> None:
    data = encode_record(bare(RECORD, DIGEST))
    for at in range(len(data)):
        with pytest.raises(PyAgentError):
            decode_record(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    for wrong in ({"whole": b"short"}, {"sketches": RECORD.sketches}):
        with pytest.raises(InvalidRequest):
            encode_record(_with(bare(RECORD, DIGEST), **wrong))


def _with(record: object, **changes: object) -> object:
    import msgspec

    return msgspec.structs.replace(record, **changes)  # type: ignore[type-var]


def test_all_parts_together_answer_as_the_whole_record_does() -> None:
    question = toy_vector("what does the miller of the harbour keep")
    model, policy = toy_axes().model, ContextPolicy()
    whole = catalog(whole=True).table(model, policy, 20.0)
    spread = catalog(whole=False).table(model, policy, 20.0, parts(ALL_GROUPS))
    assert len(spread.sketches) == len(whole.sketches) == RECORD.windows
    assert len(catalog(whole=False).table(model, policy, 20.0).sketches) == 0
    expected = {c.id: set(c.windows) for c in candidates(whole, question, 7)}
    merged = Merged()
    half = ALL_GROUPS // 3
    for groups in (half, ALL_GROUPS & ~half, half):  # two owners may say the same
        table = catalog(whole=False).table(model, policy, 20.0, parts(groups))
        merged.add(likely(table, question, 7))
    assert {chunk: set(own) for chunk, own in merged.best(7).items()} == expected


@given(sets, sets)
@settings(deadline=None, max_examples=30)
def test_parts_are_cut_and_joined_without_loss(one: int, other: int) -> None:
    body = BODIES[0]

    def windows(part: Part) -> dict[int, bytes]:
        rows = part.rows() if len(part) else []
        return {int(at): bytes(row) for at, row in zip(part.at(), rows, strict=True)}

    every = part_of(body, toy_axes(), ALL_GROUPS)
    left, right = part_of(body, toy_axes(), one), part_of(body, toy_axes(), other)
    assert decode_part(encode_part(left)) == left
    assert windows(every.within(one)) == windows(left)
    both = left.joined(right)
    assert both.groups == one | other
    assert windows(both) == windows(left) | windows(right)
    assert len(both) == len(windows(both))
    assert windows(part_of(body, toy_axes(), one | other)) == windows(both)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_hostile_parts_are_refused_or_sound(data: st.DataObject) -> None:
    good = encode_part(part_of(BODIES[0], toy_axes(), ALL_GROUPS))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 3)) :]
    try:
        part = decode_part(bad)
    except CorruptData:
        return
    assert len(part.at()) == len(part.scales()) == len(part)


def test_what_is_lacking_is_known() -> None:
    some = catalog(whole=False)
    half = (1 << GROUPS // 2) - 1
    share = parts(half)
    assert some.lacking(share, half) == []
    assert len(some.lacking(share, ALL_GROUPS)) == some.chunks == len(BODIES)
    assert some.ready(share) == half
    assert some.covered(share, half) == some.marks()
    assert catalog(whole=True).lacking(Share(), ALL_GROUPS) == []
    assert len(catalog(whole=True).lacking(Share(), half, bare_only=False)) == len(BODIES)
    share.drop([BODIES[0].id])
    assert some.lacking(share, half) == [BODIES[0].id]
    assert BODIES[0].id in unsure_of(some, some.covered(share, half), lambda _: True)
    unsure = [BODIES[0].id]
    (found,), strange = picked({}, unsure, some, {"a.txt"})
    assert found.windows == tuple(range(len(BODIES[0].spans)))
    assert not strange
    assert picked({}, unsure, some, set()) == ([], set())
    assert picked({}, unsure, Catalog(CONTEXT), {"a.txt"}) == ([], set(unsure))
    assert share.size == sum(part.size for part in share.copy().values())


def test_chances_are_those_of_the_signs() -> None:
    vector = toy_vector("the keeper of the tower")
    found = chances(toy_axes().buckets, vector)
    assert found.shape == (GROUPS,)
    assert abs(float(found.sum()) - 1) < 1e-9
    (bucket,) = toy_axes().buckets.of(vector[None])
    assert int(found.argmax()) == int(bucket) % GROUPS


def test_the_likeliest_nodes_are_asked_first_and_others_while_it_changes_something() -> None:
    chance = np.zeros(GROUPS)
    chance[:4] = (0.6, 0.31, 0.05, 0.04)
    owners = [(A, B), (B, C), (C, A), (A,)] + [(A, B)] * (GROUPS - 4)
    probe = Probe(chance, owners, owners)
    assert probe.wave() == [B]  # 0.91
    probe.served(B, 0b0011)
    probe.look(frozenset({BODIES[0].id}))
    assert probe.wave() == [A]  # has both of the rest
    probe.served(A, 0b1101)
    probe.look(frozenset())
    assert probe.wave() == []
    assert not probe.short


def test_another_owner_is_asked_for_one_that_is_silent_then_who_owned_before() -> None:
    chance = np.zeros(GROUPS)
    chance[0] = 1.0
    probe = Probe(chance, [(A, B, C)] * GROUPS, [(A, B)] * GROUPS)
    assert probe.wave() == [A]
    probe.served(A, 0)
    probe.look(frozenset())
    assert probe.wave() == [B]
    probe.served(B, 0)
    probe.look(frozenset())
    assert probe.wave() == [C]
    probe.served(C, 0)
    probe.look(frozenset())
    assert probe.wave() == []
    assert probe.short


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=6),
    st.integers(0, 3000),
    st.integers(0, 5),
)
def test_what_is_spread_comes_to_rest_within_the_limit(
    some: list[tuple[int, bool]], limit: int, owners: int
) -> None:
    sizes = {f"c{at}": Size(f"c{at}", size, spread) for at, (size, spread) in enumerate(some)}
    for _ in range(2 * len(sizes) + 1):
        found = plan_spread(sizes.values(), limit, owners=owners, copies=2)
        if found is None:
            break
        sizes[found.name] = found._replace(spread=not found.spread)
    assert plan_spread(sizes.values(), limit, owners=owners, copies=2) is None
    held = sum(size.bytes for size in sizes.values() if not size.spread)
    if owners > 2:
        assert held <= limit
    else:
        assert not any(size.spread for size in sizes.values())
