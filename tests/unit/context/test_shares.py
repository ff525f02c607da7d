"""Sketches that lie spread over nodes: bare records, parts of chunks, and whom a question asks."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.node.context_forms import Size, may_spread, plan_spread
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.probing import (
    Merged,
    Probe,
    chances,
    likely,
    picked,
    steps,
    unsure_of,
)
from pyagent_node.sharding.context.record_codec import (
    bare,
    decode_record,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkId,
    Version,
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
        merged.add(likely(table, question, count=7))
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


def test_a_part_has_the_width_of_all_and_windows_of_its_chunk_only() -> None:
    every = part_of(BODIES[0], toy_axes(), ALL_GROUPS)
    count = len(BODIES[0].spans)
    assert every.fits(count)
    assert not every.fits(count - 1)
    assert Part(1, b"", b"", b"", b"").fits(0)
    own = every.group_of[0]
    narrow = Part(1 << own, b"\0\0", bytes([own]), b"x", b"\0\0")
    assert not narrow.fits(count)
    other = part_of(BODIES[0], toy_axes(), ALL_GROUPS & ~(1 << own))
    for one, two in ((narrow, other), (other, narrow)):
        with pytest.raises(InvalidRequest) as caught:
            one.joined(two)
        assert caught.value.code == "bad_sketches"


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
    # A question needs several lists in turn: each is made once until something changes.
    lists = [(half, True), (ALL_GROUPS, True), (ALL_GROUPS, False)]
    made = [some.lacking(share, groups, bare_only=only) for groups, only in lists]
    for (groups, only), before in zip(lists, made, strict=True):
        assert some.lacking(share, groups, bare_only=only) is before
    for groups in range(100):
        assert some.lacking(share, groups) == []
    assert len(some._lacking) <= 8
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


def test_groups_are_looked_through_in_steps_the_likeliest_first() -> None:
    chance = np.zeros(GROUPS)
    chance[:4] = (0.6, 0.31, 0.05, 0.04)
    assert steps(chance) == [0b11, 0b1111]
    even = steps(np.full(GROUPS, 1 / GROUPS))
    assert [each.bit_count() for each in even] == [58, 64]
    for vector in (toy_vector("the keeper"), toy_vector("what says the lamp")):
        found = steps(chances(toy_axes().buckets, vector))
        assert all(not one & ~other for one, other in pairwise(found))
        assert len(found) == len(set(found))


def test_as_few_nodes_as_will_do_are_asked_and_others_while_it_changes_something() -> None:
    chance = np.zeros(GROUPS)
    chance[:4] = (0.6, 0.31, 0.05, 0.04)
    owners = [(A, B), (B, C), (C, A), (A,)] + [(A, B)] * (GROUPS - 4)
    probe = Probe(chance, owners, owners)
    assert probe.step() == 0b0011
    assert probe.wave() == {B: 0b0011}
    probe.served(0b0011)
    assert probe.wave() == {}
    probe.look(frozenset({BODIES[0].id}))
    assert probe.step() == 0b1100
    assert probe.wave() == {A: 0b1100}
    probe.served(0b1100)
    probe.look(frozenset())
    assert probe.step() == 0
    assert not probe.short


def test_a_step_that_changes_nothing_is_the_last() -> None:
    chance = np.full(GROUPS, 1e-9)
    chance[:20] = [0.9] + [0.1 / 19] * 19
    probe = Probe(chance, [(A,)] * GROUPS, [(A,)] * GROUPS)
    top = frozenset({BODIES[0].id})
    for _ in range(2):
        groups = probe.step()
        assert probe.wave() == {A: groups}
        probe.served(groups)
        probe.look(top)
    assert probe.groups.bit_count() < 20
    assert probe.step() == 0
    assert not probe.short


def test_another_owner_is_asked_for_one_that_is_silent_then_who_owned_before() -> None:
    chance = np.zeros(GROUPS)
    chance[0] = 1.0
    probe = Probe(chance, [(A, B, C)] * GROUPS, [(A, B)] * GROUPS)
    assert probe.step() == 1
    for peer in (A, B, C):
        assert probe.wave() == {peer: 1}
    assert probe.wave() == {}
    probe.look(frozenset())
    assert probe.step() == 0
    assert probe.short


def test_only_windows_in_the_wanted_groups_are_offered() -> None:
    question = toy_vector("what does the miller of the harbour keep")
    table = catalog(whole=False).table(toy_axes().model, ContextPolicy(), 20.0, parts(ALL_GROUPS))
    groups = {int(group) for group in table.groups}
    assert len(groups) > 2
    wanted = 1 << min(groups) | 1 << max(groups)
    offered = {
        (each.id, place) for each in likely(table, question, wanted) for place in each.places
    }
    some = parts(wanted).copy()
    assert offered == {(chunk, int(at)) for chunk, part in some.items() for at in part.at()}
    assert likely(table, question, ALL_GROUPS & ~sum(1 << group for group in groups)) == []
    whole = catalog(whole=True).table(toy_axes().model, ContextPolicy(), 20.0)
    assert likely(whole, question, wanted) == likely(whole, question)


def test_sketches_do_not_depend_on_what_else_an_owner_has() -> None:
    for body in BODIES:
        every = part_of(body, toy_axes(), ALL_GROUPS)
        for group in range(GROUPS):
            assert part_of(body, toy_axes(), 1 << group) == every.within(1 << group)


@given(sets, sets, sets, st.integers(0, 200))
@settings(deadline=None, max_examples=40)
def test_the_candidates_do_not_depend_on_who_asks(a: int, b: int, c: int, word: int) -> None:
    """Three nodes with some groups each, whatever they are: all pick the same windows."""
    vector = toy_vector(f"who keeps {word} lamps for the weaver of the village")
    held = {A: a, B: b | ALL_GROUPS & ~(a | c), C: c}
    owners = [[p for p in held if held[p] >> group & 1] for group in range(GROUPS)]
    tables = {
        peer: catalog(whole=False).table(toy_axes().model, ContextPolicy(), 20.0, parts(groups))
        for peer, groups in held.items()
    }

    def picked_by(asker: PeerId) -> tuple[dict[ChunkId, list[int]], int]:
        merged = Merged()
        others = [[peer for peer in row if peer != asker] for row in owners]
        probe = Probe(chances(toy_axes().buckets, vector), others, owners)
        while groups := probe.step():
            merged.add(likely(tables[asker], vector, groups, 5))
            probe.served(groups & held[asker])
            while wave := probe.wave():
                for peer, wanted in wave.items():
                    merged.add(likely(tables[peer], vector, wanted, 5))
                    probe.served(wanted & held[peer])
            probe.look(merged.top())
        assert not probe.short
        return merged.best(5), probe.groups

    assert picked_by(A) == picked_by(B) == picked_by(C)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans(), st.booleans()), max_size=6),
    st.integers(0, 3000),
    st.integers(0, 5),
)
def test_what_is_spread_comes_to_rest_within_the_limit(
    some: list[tuple[int, bool, bool]], limit: int, owners: int
) -> None:
    sizes = {f"c{at}": Size(f"c{at}", *each) for at, each in enumerate(some)}
    for _ in range(2 * len(sizes) + 1):
        found = plan_spread(sizes.values(), limit, owners=owners, copies=2)
        if found is None:
            break
        sizes[found.name] = found._replace(spread=not found.spread)
    assert plan_spread(sizes.values(), limit, owners=owners, copies=2) is None
    held = sum(size.bytes for size in sizes.values() if not size.spread)
    if owners > 2:
        assert held <= limit or all(each.fixed for each in sizes.values() if not each.spread)
    else:
        assert not any(size.spread for size in sizes.values())
    assert not any(size.spread and size.fixed for size in sizes.values())


def test_a_context_whose_centre_nobody_agreed_on_is_not_spread() -> None:
    gguf = ContextInfo("shelf", CONTEXT, ContextPolicy(), f"gguf/{'0' * 64}/{'1' * 64}", 1)
    assert not may_spread(gguf)
    assert may_spread(msgspec.structs.replace(gguf, centre=bytes(8)))
    assert may_spread(msgspec.structs.replace(gguf, encoder="minilm"))
    sizes = [Size("old", 100, False, True), Size("new", 10, False)]
    assert plan_spread(sizes, 0, owners=3, copies=2) == sizes[1]
    assert plan_spread(sizes[:1], 0, owners=3, copies=2) is None
    spread = Size("old", 100, True, True)  # by an earlier version: there and back again
    assert plan_spread([spread], 0, owners=3, copies=2) == spread
