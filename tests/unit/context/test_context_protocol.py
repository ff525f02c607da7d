"""The protocol of contexts: what peers send is checked, who they are too, and limits hold."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import CorruptData, LimitExceeded, PyAgentError
from pyagent_node.base.types import ContextPolicy
from pyagent_node.consensus.port import MemberRecord
from pyagent_node.node import context_messages, context_server, context_sync
from pyagent_node.node.context_messages import (
    MAX_IDS,
    MAX_LIST_BYTES,
    AskBodies,
    AskHeld,
    AskLikely,
    AskRecords,
    AskScores,
    AskSlots,
    AskSummary,
    Bodies,
    Done,
    Held,
    LikelyWindows,
    PutBodies,
    Records,
    Scores,
    Slots,
    Summary,
    TellRecords,
    TellUses,
    Wanted,
    first_parts,
    pack,
    pack_likely,
    pack_question,
    pack_uses,
    pack_vector,
    unpack,
    unpack_ids,
    unpack_likely,
    unpack_question,
    unpack_scores,
    unpack_uses,
    unpack_vector,
)
from pyagent_node.sharding.context import minilm
from pyagent_node.sharding.context.catalog import SLOTS
from pyagent_node.sharding.context.collecting import Standing
from pyagent_node.sharding.context.defaults import Axes
from pyagent_node.sharding.context.owners import owner_table
from pyagent_node.sharding.context.probing import Likely
from pyagent_node.sharding.context.record_codec import (
    bare,
    encode_body,
    encode_record,
    record_digest,
)
from pyagent_node.sharding.context.records import (
    ChunkId,
    Version,
)
from pyagent_node.sharding.context.shares import ALL_GROUPS, Part, part_of
from pyagent_node.simulations.contexts import (
    DIMENSIONS,
    PACE,
    removal,
    toy_axes,
    toy_document,
    toy_vector,
)
from tests.unit.context.context_pair import OTHER, SHELF, A, B, C, pair, state


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_parts_come_back(parts: list[bytes]) -> None:
    assert unpack(pack(parts)) == parts


@given(st.binary(max_size=200))
def test_garbage_is_refused_by_every_reader(data: bytes) -> None:
    ask = AskScores(SHELF.id, 4, (1,))
    for read in (
        unpack,
        unpack_ids,
        unpack_uses,
        lambda tail: unpack_scores(tail, 1),
        lambda tail: unpack_question(ask, tail),
    ):
        with suppress(CorruptData):  # anything else gets through, and fails
            read(data)


def test_questions_are_within_bounds() -> None:
    vector = np.ones(4, np.float32)
    good = pack_question(vector, [Wanted(bytes(16), (0, 1))])
    assert unpack_question(AskScores(SHELF.id, 4, ()), good)[1] == [Wanted(bytes(16), (0, 1))]
    for ask, tail in (
        (AskScores(SHELF.id, 0, ()), good),
        (AskScores(SHELF.id, 1 << 20, ()), good),
        (AskScores(SHELF.id, 4, tuple(range(100))), good),
        (AskScores(SHELF.id, 4, ()), pack_question(vector * np.nan, [])),
        (AskScores(SHELF.id, 4, ()), pack_question(vector, [Wanted(b"short", ())])),
    ):
        with pytest.raises(CorruptData):
            unpack_question(ask, tail)
    with pytest.raises(CorruptData):
        unpack_ids(bytes(16 * (MAX_IDS + 1)))


def test_likely_windows_are_asked_for_and_told_within_groups() -> None:
    vector = np.ones(4, np.float32)
    tail = pack_vector(vector)
    for groups in (1, ALL_GROUPS):
        assert (unpack_vector(AskLikely(SHELF.id, 4, groups), tail) == vector).all()
    for groups in (0, -1, ALL_GROUPS + 1, 1 << 70):
        with pytest.raises(CorruptData):
            unpack_vector(AskLikely(SHELF.id, 4, groups), tail)
    told = pack_likely([0] * SLOTS, [Likely(bytes(16), (3,), (0.5,))])
    for groups in (0, 0b100, 0b101):
        assert unpack_likely(LikelyWindows(groups), told, 0b101)[1][0].places == (3,)
    for groups in (0b010, 0b111, -1, ALL_GROUPS + 1):
        with pytest.raises(CorruptData):
            unpack_likely(LikelyWindows(groups), told, 0b101)


def test_times_of_use_are_times() -> None:
    assert unpack_uses(pack_uses({"a": 5})) == {"a": 5}
    for uses in ({"a": -1}, {"a": 1 << 50}, {"a": (1 << 64) - 1}):
        with pytest.raises(CorruptData):
            unpack_uses(pack_uses(uses))
    with pytest.raises(CorruptData):  # before anything of it is decoded
        unpack_uses(bytes(MAX_LIST_BYTES + 1))


async def test_a_capacity_that_cannot_be_ends_nobody(autojump_clock):
    async with pair() as two:
        two.stores[1].limit_bytes = -1
        await trio.testing.wait_all_tasks_blocked()
        await two.services[0].sync.look(B)
        assert two.services[0].sync.capacities[B] == 0


def test_replies_end_somewhere() -> None:
    assert first_parts([b"x" * 10] * 5, 25) == ([b"x" * 10] * 2, True)
    assert first_parts([b"x" * 100], 25) == ([b"x" * 100], False)
    assert first_parts([], 25) == ([], False)


async def test_only_members_are_answered_and_clients_change_nothing(autojump_clock):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    put = (PutBodies(), Done, pack([encode_body(bodies[0])]))
    tell = (TellRecords(), Done, pack([encode_record(record)]))
    async with pair("client") as it:
        await it.services[2].rpc.call(A, AskSummary(), Summary)
        assert await it.refusal(*put) == "role_not_allowed"
        assert await it.refusal(*tell) == "role_not_allowed"
        assert not it.stores[0].held()
    async with pair() as it:
        gone = MemberRecord(C, "c", "voter", b"", revoked="stolen")
        it.log.become(state(members={C: gone}))
        for message, reply, tail in (
            (AskSummary(), Summary, b""),
            (AskSlots(SHELF.id), Slots, b""),
            (AskRecords(SHELF.id, (0,)), Records, b""),
            (AskHeld(3, ()), Held, b""),
            (AskBodies(), Bodies, bytes(16)),
            (AskScores(SHELF.id, 1, ()), Scores, bytes(4) + b"\x90"),
            (TellUses(SHELF.id), Done, b"\x80"),
            put,
            tell,
        ):
            assert await it.refusal(message, reply, tail) == "not_member"


async def test_what_is_of_no_context_or_damaged_is_not_taken(autojump_clock):
    record, bodies = toy_document(OTHER, "a.txt", "Some text.", Version(1, C))
    data, body = encode_record(record), encode_body(bodies[0])
    async with pair() as it:
        refusal = it.refusal
        assert await refusal(TellRecords(), Done, pack([data])) == "context_not_found"
        assert await refusal(PutBodies(), Done, pack([body])) == "context_not_found"
        assert await refusal(AskSlots(OTHER), Slots) == "context_not_found"
        assert await refusal(AskSlots(b"x"), Slots) == "bad_context_id"
        torn = pack([data[:-1]])
        assert await refusal(TellRecords(), Done, torn) == "bad_context_record"
        changed = body[:40] + bytes([body[40] ^ 1]) + body[41:]
        assert await refusal(PutBodies(), Done, pack([changed])) == "bad_context_body"
        assert await refusal(PutBodies(), Done, b"garbage") == "bad_context_message"
        assert await refusal(AskRecords(SHELF.id, (999,)), Records) == "bad_context_message"
        assert await refusal(AskBodies(), Bodies) == "bad_context_message"
        assert await refusal(AskHeld(3, (1,)), Held) == "bad_context_message"
        assert not it.stores[0].held()
        assert OTHER not in it.stores[0].known()
        assert sum(it.services[0].rpc.server.refused.values()) == 10


async def test_only_an_owner_that_is_up_to_date_says_that_it_holds_something(autojump_clock):
    _, (body, *_) = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    async with pair() as it:
        await it.stores[0].put_bodies([body])
        ask = it.services[2].client.held

        async def says(epoch: int) -> bool:
            return body.id in await ask(A, [body.id], [7], epoch)

        assert await says(3)
        assert await says(2)
        assert not await says(4)  # it does not know yet who owns what then
        it.services[0].server.leaving.add(body.id)
        assert not await says(3)
        it.services[0].server.leaving.clear()
        it.log.become(state(buckets=owner_table({B: 1.0, C: 1.0}), bucket_epoch=4))
        assert not await says(4)  # it owns the bucket no more
        assert ChunkId(bytes(16)) not in await ask(A, [ChunkId(bytes(16))], [7], 3)


async def test_chunks_of_old_versions_are_not_served(autojump_clock):
    old, (before, *_) = toy_document(SHELF.id, "a.txt", "An old text.", Version(1, C))
    new, (after, *_) = toy_document(SHELF.id, "a.txt", "A new text.", Version(2, C))
    vector = toy_vector("text")
    wanted = [Wanted(body.id, (0,)) for body in (before, after)]
    async with pair() as it:
        await it.stores[0].put_bodies([before, after])
        client = it.services[2].client
        scored, stale = await client.scores(A, SHELF.id, vector, (1, 2), wanted)
        assert {each.id for each in scored} == {before.id, after.id}
        await it.stores[0].merge([encode_record(new), encode_record(old)])
        scored, stale = await client.scores(A, SHELF.id, vector, (1, 2), wanted)
        assert ({each.id for each in scored}, stale) == ({after.id}, {before.id})
        assert await client.bodies(A, [before.id, after.id]) == [after]


async def test_a_peer_that_sends_another_chunk_is_not_believed(autojump_clock):
    _, (body, *_) = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    _, (other, *_) = toy_document(SHELF.id, "b.txt", "Some text.", Version(1, C))
    async with pair() as it:
        it.stores[0]._bodies[body.id] = other
        with pytest.raises(CorruptData) as caught:
            await it.services[2].client.bodies(A, [body.id])
        assert caught.value.code == "bad_context_body"


async def test_bodies_of_a_version_that_came_too_late_are_given_up_soon(autojump_clock):
    """Of two that were added at once the one that lost may come when the other is known."""
    won, kept = toy_document(SHELF.id, "a.txt", "The one that won.", Version(2, C))
    lost, gone = toy_document(SHELF.id, "a.txt", "The one that lost.", Version(1, C))
    async with pair() as it:
        sync, store = it.services[0].sync, it.stores[0]
        assert await sync.merge([encode_record(won)]) == 1
        await store.put_bodies([*kept, *gone])
        assert await sync.merge([encode_record(lost)]) == 0
        assert store.holds(gone[0].id)
        elsewhere, _ = toy_document(SHELF.id, "a.txt", "Not here.", Version(1, B))
        assert await sync.merge([encode_record(elsewhere)]) == 0
        assert set(sync.superseded) == {gone[0].id}  # whoever tells old versions fills no memory
        await trio.sleep(1.5 * PACE.collect)
        assert not store.holds(gone[0].id)
        assert store.holds(kept[0].id)


async def test_a_full_node_says_so_and_another_one_stands_in(autojump_clock):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    async with pair() as it:
        it.stores[0].limit_bytes = 0
        await it.services[2].publish(record, bodies)
        assert not it.stores[0].held()
        assert it.stores[1].holds(bodies[0].id)
        assert it.stores[2].holds(bodies[0].id)  # no owner, but there is no other one
        it.stores[1].limit_bytes = it.stores[2].limit_bytes = 0
        again, others = toy_document(SHELF.id, "b.txt", "Other text.", Version(1, C))
        with pytest.raises(PyAgentError) as caught:
            await it.services[2].publish(again, others)
        assert caught.value.code == "no_owner"
        assert it.services[2].catalog(SHELF.id).get("b.txt") is None


async def test_a_peer_tells_records_within_a_budget(autojump_clock, monkeypatch):
    monkeypatch.setattr(context_server, "RECORD_BURST", 100)
    monkeypatch.setattr(context_server, "RECORD_RATE", 100)
    records = [
        encode_record(toy_document(SHELF.id, f"{n}.txt", "Some text.", Version(1, C))[0])
        for n in range(3)
    ]
    async with pair() as it:
        tell = it.services[2].client.tell_records
        assert await tell(A, records[:1]) == 1
        with pytest.raises(LimitExceeded) as caught:
            await tell(A, records[1:2])
        assert caught.value.code == "context_record_budget"
        await trio.sleep(10)
        assert await tell(A, records[1:2]) == 1


async def test_records_of_a_context_have_a_limit_and_removals_always_room(
    autojump_clock, monkeypatch
):
    record, _ = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    more, _ = toy_document(SHELF.id, "b.txt", "Some text.", Version(1, C))
    size = len(encode_record(record))
    monkeypatch.setattr(context_sync, "MAX_CATALOG", size)
    async with pair() as it:
        tell = it.services[2].client.tell_records
        assert await tell(A, [encode_record(record)]) == 1
        assert it.stores[0].catalog(SHELF.id).size == size
        with pytest.raises(LimitExceeded) as caught:
            await tell(A, [encode_record(more)])
        assert caught.value.code == "context_full"
        gone = encode_record(removal(SHELF.id, "b.txt", Version(2, C)))
        assert await tell(A, [gone]) == 1
        assert await tell(A, [encode_record(removal(SHELF.id, "a.txt", Version(2, C)))]) == 1
        assert it.stores[0].catalog(SHELF.id).size < size + len(gone)


async def test_one_odd_body_takes_no_sketches_from_the_others(autojump_clock):
    _, (good, *_) = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    _, (plain, *_) = toy_document(SHELF.id, "b.txt", "Other text.", Version(1, C))
    huge = np.full(good.dimensions, 2000, "<f2").tobytes()
    far = msgspec.structs.replace(plain, vectors=huge)
    short = msgspec.structs.replace(plain, vectors=plain.vectors[:8])
    async with pair() as it:
        assert await it.refusal(PutBodies(), Done, pack([encode_body(far)])) == "bad_vectors"
        assert not it.stores[0].held()
        bodies = [far, good, short]
        await it.stores[0].put_bodies(bodies)  # an earlier version took such
        ids = [body.id for body in bodies]
        parts = await it.services[2].client.parts(A, SHELF.id, ids, ALL_GROUPS)
        assert {chunk: len(part) for chunk, part in parts.items()} == dict(
            zip(ids, (0, 1, 0), strict=True)
        )
        assert {part.groups for part in parts.values()} == {ALL_GROUPS}


async def test_vectors_of_another_length_make_no_work(autojump_clock):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    learned = ContextInfo("learned", OTHER, ContextPolicy(), minilm.IDENTITY, 1)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": SHELF, "learned": learned}))
        await it.stores[0].merge([encode_record(record)])
        client = it.services[2].client
        await client.likely(A, SHELF.id, toy_vector("text"), ALL_GROUPS)  # nobody knows better here
        await it.stores[0].put_bodies(bodies)
        made = it.services[0].server.models
        asked: list[int] = []

        def models(encoder: str, dimensions: int, centre: bytes) -> Axes:
            asked.append(dimensions)
            return made(encoder, dimensions, centre)

        it.services[0].server.models = models
        for context, length in ((SHELF.id, 4096), (SHELF.id, 4095), (OTHER, 64)):
            with pytest.raises(PyAgentError) as caught:
                await client.likely(A, context, np.ones(length, np.float32), ALL_GROUPS)
            assert caught.value.code == "bad_vectors"
        await client.likely(A, SHELF.id, toy_vector("text"), ALL_GROUPS)
        assert asked == [DIMENSIONS]


async def test_sketches_that_do_not_fit_the_record_are_not_taken(autojump_clock):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    short = encode_record(bare(record, record_digest(encode_record(record))))
    (body,) = bodies
    good = part_of(body, toy_axes(), ALL_GROUPS)
    far = msgspec.structs.replace(good, places=b"\x09\0" * len(good))
    narrow = msgspec.structs.replace(good, packed=b"x" * len(good))
    async with pair() as it:
        given = [far, narrow, good]

        async def parts(info: ContextInfo, chunks: object, groups: int) -> dict[ChunkId, Part]:
            return {body.id: given[0]}

        it.services[1].server.parts = parts  # type: ignore[method-assign]
        store, keeper = it.stores[0], it.services[0].keeper
        await store.merge([short])
        for _ in range(2):
            assert await keeper._get(SHELF, ALL_GROUPS) == 1
            assert not store.share(SHELF.id)
            del given[0]
        store.share(SHELF.id).put({body.id: msgspec.structs.replace(narrow, groups=1)})
        assert await keeper._get(SHELF, ALL_GROUPS) == 0
        assert store.share(SHELF.id).get(body.id) == good


async def test_a_record_that_promises_too_few_windows_leaves_no_chunk_lacking(autojump_clock):
    text = "The first sentence is here. The second one tells something else. And a third one too."
    record, (body, *_) = toy_document(SHELF.id, "a.txt", text, Version(1, C))
    assert len(body.spans) > 1
    size = len(record.sketches) // record.windows
    rows = (msgspec.structs.replace(record.chunks[0], windows=1),)
    short = msgspec.structs.replace(record, chunks=rows, sketches=bytes(size))
    data = encode_record(bare(short, record_digest(encode_record(short))))
    async with pair() as it:
        await it.stores[1].put_bodies([body])
        for at in range(2):
            await it.stores[at].merge([data])
        assert await it.services[0].keeper._get(SHELF, ALL_GROUPS) == 0
        part = it.stores[0].share(SHELF.id).get(body.id)
        assert part is not None
        assert part.at().tolist() == [0]
        assert part.groups == ALL_GROUPS


async def test_what_has_no_room_keeps_nothing_else_out(autojump_clock, monkeypatch):
    def text(source: str, words: str, version: int = 1) -> bytes:
        return encode_record(toy_document(SHELF.id, source, words, Version(version, C))[0])

    old, larger = text("a.txt", "Some text."), text("b.txt", "One text.\n\nTwo texts." * 400)
    gone = encode_record(removal(SHELF.id, "a.txt", Version(2, C)))
    small = text("c.txt", "Some text.")
    monkeypatch.setattr(context_sync, "MAX_CATALOG", len(old) + len(small))
    async with pair() as it:
        sync, catalog = it.services[0].sync, it.stores[0].catalog(SHELF.id)
        assert await sync.merge([old]) == 1
        with pytest.raises(LimitExceeded) as caught:
            await sync.merge([larger, text("a.txt", "Other text", 2), gone, small])
        assert caught.value.code == "context_full"
        held = {known.record.source: known.record.removed for known in catalog.everything()}
        assert held == {"a.txt": True, "c.txt": False}
        # Versions of one document take the room of one.
        again = [text("a.txt", "Some text.", 3 + at) for at in range(3)]
        assert await sync.merge([*again, again[0], old]) == 1
        known = catalog.get("a.txt")
        assert known is not None
        assert known.record.version.counter == 5


async def test_what_has_no_room_is_no_reason_to_stop_asking(autojump_clock, monkeypatch):
    async with pair() as it:
        await trio.testing.wait_all_tasks_blocked()
        for number in range(6):
            words = "Some text." * (900 if number % 2 else 1)
            record, _ = toy_document(SHELF.id, f"{number}.txt", words, Version(1, C))
            await it.stores[1].merge([encode_record(record)])
        monkeypatch.setattr(context_messages.first_parts, "__defaults__", (1,))
        monkeypatch.setattr(context_sync, "MAX_CATALOG", 700)
        await it.services[0].sync.look(B)
        sizes = [known.size for known in it.stores[1].catalog(SHELF.id).everything()]
        assert sum(sizes[::2]) <= 700 < min(sizes[1::2])
        kept = [known.record.source for known in it.stores[0].catalog(SHELF.id).everything()]
        assert kept == ["0.txt", "2.txt", "4.txt"]


async def test_what_a_peer_said_of_its_sketches_before_the_owners_changed_counts_no_more(
    autojump_clock,
):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    spread = msgspec.structs.replace(SHELF, spread=True)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": spread}))
        await it.stores[0].merge([encode_record(record)])
        await it.stores[0].put_bodies(bodies)
        first = it.services[0]
        await first.keeper.once()
        await it.services[1].sync.look(A)
        await it.services[1].keeper.once()
        await trio.testing.wait_all_tasks_blocked()
        await first.sync.look(B)
        assert first.sync.sketched[B, SHELF.id].epoch == 3
        assert first.keeper.settled(spread)
        it.log.become(state(contexts={"shelf": spread}, bucket_epoch=4))
        assert not first.keeper.settled(spread)
        await trio.testing.wait_all_tasks_blocked()
        await first.sync.look(B)
        assert first.keeper.settled(spread)


async def test_a_peer_that_says_what_the_log_never_said_ends_nothing(autojump_clock):
    record, bodies = toy_document(SHELF.id, "a.txt", "Some text.", Version(1, C))
    async with pair() as it:
        await it.stores[0].merge([encode_record(record)])
        await it.stores[0].put_bodies(bodies)
        for covered, settled in ((7, 7), (1 << 52, 1 << 52), ((1 << 64) - 1, (1 << 64) - 1)):
            it.stores[1].catalog(SHELF.id).standing = Standing(covered, settled)
            await trio.testing.wait_all_tasks_blocked()
            await it.services[0].sync.look(B)
        catalog = it.stores[0].catalog(SHELF.id)
        assert catalog.standing == Standing()
        assert catalog.get("a.txt") is not None
        assert catalog.next_version("b.txt", A) == Version(1, A)
