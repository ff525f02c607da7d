"""Contexts whose sketches lie spread over nodes: what nodes make of one context is the same."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import InvalidRequest, Unavailable
from pyagent_node.base.types import ContextId, ContextPolicy, PeerId
from pyagent_node.node import context_search
from pyagent_node.node.context_messages import Wanted
from pyagent_node.node.context_probe import Picked
from pyagent_node.sharding.context import search
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.defaults import (
    decode_centre,
    default_model,
    encode_centre,
)
from pyagent_node.sharding.context.lexical import Lexical
from pyagent_node.sharding.context.owners import BUCKETS
from pyagent_node.sharding.context.probing import Likely, Merged, Probe, chances, likely
from pyagent_node.sharding.context.record_codec import bare, encode_record, record_digest
from pyagent_node.sharding.context.records import ChunkBody, ChunkId, Version
from pyagent_node.sharding.context.search import Scored
from pyagent_node.sharding.context.shares import ALL_GROUPS, GROUPS, Part, Share, part_of
from pyagent_node.simulations.contexts import (
    DIMENSIONS,
    ENCODER,
    toy_axes,
    toy_document,
    toy_vector,
)
from tests.unit.context.context_pair import SHELF, A, B, C, Pair, pair, state

SPREAD = msgspec.structs.replace(SHELF, spread=True)
LINES = [f"The {a} of the {b} sleeps." for a in ("cat", "dog", "owl") for b in ("baker", "king")]
CENTRE = encode_centre(np.mean([toy_vector(line) for line in LINES], axis=0))


async def test_sketches_of_both_forms_stand_around_the_context_s_centre(autojump_clock):
    """What the writer put into the record is what any holder of the body makes of it."""
    info = msgspec.structs.replace(SHELF, centre=CENTRE)
    text = "\n\n".join(LINES)
    record, bodies = toy_document(SHELF.id, "a.txt", text, Version(1, C), centre=CENTRE)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": info}))
        await it.stores[0].put_bodies(bodies)
        ids = [body.id for body in bodies]
        parts = await it.services[1].client.parts(A, SHELF.id, ids, ALL_GROUPS)
    packed, weights = record.packed()
    row = 0
    for chunk in record.chunks:
        part = parts[record.id_of(chunk.same)]
        own = slice(row, row + chunk.windows)
        order = np.argsort(part.at())
        # Bodies have vectors in float16, so a sign right at its border may be the other one.
        assert np.unpackbits(part.rows()[order] ^ packed[own]).mean() < 0.01
        assert np.allclose(part.scales()[order], weights[own], rtol=2e-3)
        row += chunk.windows
    (body, *_) = bodies
    plain = part_of(body, default_model(ENCODER, DIMENSIONS), ALL_GROUPS)
    order = np.argsort(plain.at())  # so the centre does say something
    assert np.unpackbits(plain.rows()[order] ^ packed[: len(plain)]).mean() > 0.05


def test_a_centre_fits_its_vectors_and_its_axes_are_made_once() -> None:
    axes = default_model(ENCODER, DIMENSIONS, CENTRE)
    assert np.array_equal(axes.model.centre, decode_centre(CENTRE, DIMENSIONS))
    assert np.array_equal(axes.buckets.centre, axes.model.centre)
    assert default_model(ENCODER, DIMENSIONS, CENTRE) is axes
    assert default_model(ENCODER, DIMENSIONS).model.centre.any() == 0
    assert encode_centre(None) == b""
    for data in (CENTRE[:-2], CENTRE + b"\0\0", b"\0"):
        with pytest.raises(InvalidRequest) as caught:
            default_model(ENCODER, DIMENSIONS, data)
        assert caught.value.code == "bad_vectors"


async def test_a_question_of_another_length_than_the_centre_is_refused(autojump_clock):
    info = msgspec.structs.replace(SHELF, centre=CENTRE)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": info}))
        client = it.services[1].client
        assert (await client.likely(A, SHELF.id, toy_vector("cat"), ALL_GROUPS))[2] == []
        with pytest.raises(InvalidRequest) as caught:
            await client.likely(A, SHELF.id, np.ones(8, np.float32), ALL_GROUPS)
        assert caught.value.code == "bad_vectors"
        assert it.services[0].peer_id == A
        assert it.services[1].peer_id == B


WHO = ("keeper", "baker", "miller", "weaver", "king", "nun", "smith", "cook")
WHERE = ("tower", "harbour", "village", "forest", "abbey", "mill", "island", "pass", "inn")


def shelf_of(stories: int) -> list[tuple[bytes, list[ChunkBody]]]:
    """Return bare records and bodies: more windows than a question compares."""
    found = []
    for number in range(stories):
        rng = random.Random(number)
        lines = [
            f"The {rng.choice(WHO)} of the {rng.choice(WHERE)} has {rng.randrange(99)} lamps."
            for _ in range(12)
        ]
        text = "\n\n".join(lines)
        record, bodies = toy_document(SHELF.id, f"{number}.txt", text, Version(1, C))
        short = encode_record(bare(record, record_digest(encode_record(record))))
        found.append((short, bodies))
    return found


STORIES = shelf_of(26)
BODIES = [body for _, bodies in STORIES for body in bodies]


@lru_cache(maxsize=1)
def parts() -> dict[ChunkId, Part]:
    return {body.id: part_of(body, toy_axes(), ALL_GROUPS) for body in BODIES}


def whole_share(groups: int = ALL_GROUPS) -> Share:
    share = Share()
    share.put({chunk: part.within(groups) for chunk, part in parts().items()})
    return share


@asynccontextmanager
async def spread_out(owners: list[tuple[PeerId, ...]]) -> AsyncIterator[Pair]:
    """Three nodes with the groups that they own, by ``owners`` of each group."""
    async with pair() as it:
        table = tuple(owners[bucket % GROUPS] for bucket in range(BUCKETS))
        it.log.become(state(contexts={"shelf": SPREAD}, buckets=table, bucket_epoch=4))
        for service, store in zip(it.services, it.stores, strict=True):
            own = sum(1 << g for g in range(GROUPS) if service.peer_id in owners[g])
            assert own == service.keeper.own_groups()
            await store.merge([record for record, _ in STORIES])
            await store.put_parts(SHELF.id, whole_share(own).copy())
        yield it


def some_owners(seed: int) -> list[tuple[PeerId, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.sample((A, B, C), rng.choice((1, 2)))) for _ in range(GROUPS)]


def as_one(catalog: Catalog, vector: NDArray[np.float32]) -> list[tuple[ChunkId, tuple[int, ...]]]:
    """Return what the groups that a question looks through have, by a node that has everything."""
    table = catalog.table(toy_axes().model, ContextPolicy(), 0.0, whole_share())
    probe = Probe(chances(toy_axes().buckets, vector), [()] * GROUPS, [()] * GROUPS)
    merged = Merged()
    while groups := probe.step():
        merged.add(likely(table, vector, groups))
        probe.served(groups)
        probe.look(merged.top())
    assert probe.groups != ALL_GROUPS  # else it would not matter what counts
    return [(chunk, tuple(places)) for chunk, places in merged.best().items()]


def windows_of(picked: Picked) -> list[tuple[ChunkId, tuple[int, ...]]]:
    assert picked.unseen == 0
    return [(each.id, each.windows) for each in picked.candidates]


QUESTIONS = ("who has the lamps of the abbey", "has the king a lamp", "the cook of the inn")


@pytest.mark.parametrize("seed", range(3))
async def test_who_asks_makes_no_difference(autojump_clock, seed):
    """Each of three nodes, whatever groups it owns, picks the windows of the same groups."""
    async with spread_out(some_owners(seed)) as it:
        for question in QUESTIONS:
            vector = toy_vector(question)
            expected = as_one(it.stores[0].catalog(SHELF.id), vector)
            assert len({chunk for chunk, _ in expected}) > 16
            for service in it.services:
                picked = await service.searcher.prober.pick(SPREAD, vector)
                assert windows_of(picked) == expected


async def test_what_an_asker_gives_up_meanwhile_it_asks_others_for(autojump_clock):
    """The keeper may cut the share down between looking what is here and looking it through."""
    owners: list[tuple[PeerId, ...]] = [(B,)] * GROUPS
    vector = toy_vector(QUESTIONS[0])
    async with spread_out(owners) as it:
        first, share = it.services[0], it.stores[0].share(SHELF.id)
        await it.stores[0].put_parts(SHELF.id, whole_share(ALL_GROUPS >> 1).copy())
        expected = as_one(it.stores[0].catalog(SHELF.id), vector)
        made = first.server.likely
        looked: list[int] = []

        async def after_a_cut(
            info: ContextInfo, vector: NDArray[np.float32], asked: int
        ) -> tuple[int, tuple[int, ...], list[Likely]]:
            looked.append(asked)
            await it.stores[0].put_parts(SHELF.id, share.beyond(0))
            return await made(info, vector, asked)

        first.server.likely = after_a_cut  # type: ignore[method-assign]
        picked = await first.searcher.prober.pick(SPREAD, vector)
        assert windows_of(picked) == expected
        assert picked.asked == {B}
        assert looked


async def test_a_peer_that_gave_its_groups_up_is_passed_over(autojump_clock):
    """It says which of them it looked through; for the others another one is asked."""
    owners: list[tuple[PeerId, ...]] = [(B, C)] * GROUPS
    vector = toy_vector(QUESTIONS[1])
    async with spread_out(owners) as it:
        expected = as_one(it.stores[0].catalog(SHELF.id), vector)
        for number, groups in ((1, (1 << 32) - 1), (2, ALL_GROUPS & ~((1 << 32) - 1))):
            cut = whole_share(groups)
            await it.stores[number].put_parts(SHELF.id, cut.copy())
        picked = await it.services[0].searcher.prober.pick(SPREAD, vector)
        assert windows_of(picked) == expected
        assert picked.asked == {B, C}
        # Nobody has a group any more: what it has is compared as a whole, or said to be unseen.
        await it.stores[2].put_parts(SHELF.id, whole_share((1 << 32) - 1).copy())
        picked = await it.services[0].searcher.prober.pick(SPREAD, vector)
        seen = {each.id for each in picked.candidates}
        assert len(seen) + picked.unseen >= len(BODIES)


async def test_nodes_at_both_ends_of_the_way_find_the_same_best(autojump_clock):
    """One node has whole records still, the log says spread already, others hold parts only."""
    owners = some_owners(7)
    vector = toy_vector(QUESTIONS[2])
    async with spread_out(owners) as it:
        whole = whole_share()
        await it.stores[1].put_parts(SHELF.id, whole.copy())
        best = []
        for service in it.services:
            picked = await service.searcher.prober.pick(SPREAD, vector)
            assert picked.unseen == 0
            best.append([each.id for each in picked.candidates][:8])
        assert best[0] == best[1] == best[2]
        assert not (await it.services[1].searcher.prober.pick(SPREAD, vector)).asked


@pytest.mark.parametrize("spread", [False, True])
async def test_by_words_alone_all_chunks_are_compared(autojump_clock, spread, monkeypatch):
    """In either form the order is that of BM25 over all texts, wherever these lie."""
    text = "The zebra of the abbey sleeps."
    record, bodies = toy_document(SHELF.id, "z.txt", text, Version(1, C))
    away = -toy_vector(text)  # sketches see nothing of it
    question = "zebra lamps of the abbey"
    async with spread_out(some_owners(3)) as it:
        if not spread:
            it.log.become(msgspec.structs.replace(it.log.state, contexts={"shelf": SHELF}))
        for service, store in zip(it.services, it.stores, strict=True):
            if not spread:
                await store.put_parts(SHELF.id, whole_share().copy())
            await store.merge([encode_record(record)])
            rows = {
                known.id_of(at): row.bucket
                for known in store.catalog(SHELF.id).documents()
                for at, row in enumerate(known.chunks)
            }
            own = [body for body in (*BODIES, *bodies) if service.reach.owns(rows[body.id])]
            await store.put_bodies(own)
        texts = [body.text for body in (*BODIES, *bodies)]
        scores = sorted(Lexical(texts).scores(question), reverse=True)
        for service in it.services:
            info = service.find("shelf")
            answer = await service.search(info, question, away, count=8, way="words")
            assert answer.hits[0].source == "z.txt"
            assert [hit.score for hit in answer.hits] == pytest.approx(scores[:8], abs=1e-5)
            assert answer.candidate_chunks == answer.chunks == len(texts)
            assert answer.missing == answer.probed == 0
            near = await service.search(info, question, away, count=8)
            assert near.candidate_chunks < near.chunks == len(texts)
        monkeypatch.setattr(search, "WORDS_CHUNKS", len(texts) - 1)
        answer = await it.services[0].search(info, question, away, count=8, way="words")
        assert answer.candidate_chunks < answer.chunks == len(texts)  # which is said


async def test_what_a_node_scored_before_it_went_away_counts(autojump_clock, monkeypatch):
    """Where all chunks are compared a node is asked in parts; one that fails is only one part."""
    vector = toy_vector(QUESTIONS[0])
    monkeypatch.setattr(context_search, "SCORED_AT_ONCE", 8)
    async with spread_out([(B,)] * GROUPS) as it:
        await it.stores[1].put_bodies(BODIES)
        first, asked = it.services[0], [0]
        made = first.client.scores

        async def scores(
            peer: PeerId,
            context: ContextId,
            vector: NDArray[np.float32],
            terms: tuple[int, ...],
            wanted: Sequence[Wanted],
        ) -> tuple[list[Scored], set[ChunkId]]:
            asked[0] += peer == B
            if peer == B and asked[0] > 2:
                raise Unavailable("It went away.", code="peer_gone")
            return await made(peer, context, vector, terms, wanted)

        first.client.scores = scores  # type: ignore[method-assign]
        answer = await first.search(SPREAD, QUESTIONS[0], vector, way="words")
        assert asked[0] == 3
        assert answer.hits
        assert answer.missing == len(BODIES) - 16
