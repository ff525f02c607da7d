"""Taking over what a covered node has may fail at any point; how far a node is outlives it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import ContextId, PeerId
from pyagent_node.consensus.port import MemberRecord
from pyagent_node.node import context_settling
from pyagent_node.node.context_database import FILE
from pyagent_node.node.context_store import open_context_store
from pyagent_node.sharding.context.collecting import Standing, Told
from pyagent_node.sharding.context.record_codec import encode_record, record_digest
from pyagent_node.sharding.context.records import DocumentRecord, Version
from pyagent_node.simulations.contexts import removal, toy_document
from tests.unit.context.context_pair import SHELF, A, B, C, Pair, pair, state

RAISED = msgspec.structs.replace(SHELF, horizon=5, raised_index=1)


def written(source: str, version: Version) -> DocumentRecord:
    return toy_document(SHELF.id, source, f"Some text of {source}.", version)[0]


async def one_is_covered(it: Pair) -> None:
    """All of them know the horizon, and the third one is covered; what "b" says, A lacks."""
    await trio.testing.wait_all_tasks_blocked()
    members = {each: MemberRecord(each, each, "voter", b"") for each in (A, B, C)}
    it.log.become(state(contexts={"shelf": RAISED}, members=members))
    record = encode_record(written("b.txt", Version(3, B)))
    for store in it.stores[1:]:
        await store.merge([record])
    settler = it.services[0].settler
    await settler.look(RAISED)
    await settler.looked(C, SHELF.id, Told(1))  # it was not covered yet
    await it.stores[2].stand(SHELF.id, Standing(5, 0), {})


@pytest.mark.parametrize("broken", [False, True])
async def test_what_is_put_off_while_another_node_is_taken_over_is_not_lost(autojump_clock, broken):
    """Whom this node looks at meanwhile is no part of its round; and if it fails, it ends."""
    async with pair() as it:
        await one_is_covered(it)
        first, catalog = it.services[0], it.stores[0].catalog(SHELF.id)
        made, begun, go_on = first.client.slots, trio.Event(), trio.Event()

        async def slots(peer: PeerId, context: ContextId) -> list[bytes]:
            if peer == C:
                begun.set()
                await go_on.wait()
                if broken:
                    raise Unavailable("It went away.", code="peer_gone")
            return await made(peer, context)

        first.client.slots = slots  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.sync.look, C)
            await begun.wait()
            await first.sync.look(B)
            assert catalog.get("b.txt") is None
            assert catalog.standing == Standing()
            go_on.set()
        if broken:
            assert catalog.standing == Standing()
            await first.sync.look(B)
        assert catalog.get("b.txt") is not None
        assert catalog.standing == Standing(5, 0)


async def test_no_more_is_taken_over_than_a_context_may_have(autojump_clock, monkeypatch):
    monkeypatch.setattr(context_settling, "MAX_TAKEN", 10)
    async with pair() as it:
        own = written("a.txt", Version(1, A))
        await it.stores[0].merge([encode_record(own)])
        await one_is_covered(it)
        await it.services[0].sync.look(C)
        catalog = it.stores[0].catalog(SHELF.id)
        assert [known.record for known in catalog.everything()] == [own]
        assert catalog.standing == Standing()


async def test_how_far_a_node_is_outlives_it_and_only_grows(tmp_path: Path) -> None:
    gone = removal(SHELF.id, "gone.txt", Version(2, A))
    kept, other = written("kept.txt", Version(3, A)), written("kept.txt", Version(3, B))
    data = [encode_record(each) for each in (gone, kept)]
    digests = {"gone.txt": record_digest(data[0]), "kept.txt": record_digest(data[0])}
    async with open_context_store(tmp_path, limit_bytes=1 << 20) as store:
        assert await store.merge(data) == 2
        await store.stand(SHELF.id, Standing(2, 2), digests)
        await store.stand(SHELF.id, Standing(), {})
    async with open_context_store(tmp_path, limit_bytes=1 << 20) as store:
        catalog = store.catalog(SHELF.id)
        assert catalog.standing == Standing(2, 2)
        assert [known.record for known in catalog.everything()] == [kept]
        assert await store.merge([data[0]]) == 0  # it was collected
        assert catalog.next_version("new.txt", A) == Version(3, A)
        assert await store.adopt(SHELF.id, [encode_record(other), data[0]], 3) == 2
        await store.stand(SHELF.id, Standing(3, 2), {})
    async with open_context_store(tmp_path, limit_bytes=1 << 20) as store:
        catalog = store.catalog(SHELF.id)
        assert catalog.standing == Standing(3, 2)
        assert [known.record for known in catalog.everything()] == [gone, other]


async def test_a_node_with_a_damaged_record_begins_anew(tmp_path: Path) -> None:
    kept, lost = written("kept.txt", Version(1, A)), removal(SHELF.id, "lost.txt", Version(2, A))
    async with open_context_store(tmp_path, limit_bytes=1 << 20) as store:
        await store.merge([encode_record(each) for each in (kept, lost)])
        await store.stand(SHELF.id, Standing(2, 0), {})
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE records SET data = ? WHERE source = 'lost.txt'", (b"damaged",))
    database.close()
    async with open_context_store(tmp_path, limit_bytes=1 << 20) as store:
        catalog = store.catalog(SHELF.id)
        assert [known.record for known in catalog.everything()] == [kept]
        assert catalog.standing == Standing()
        assert await store.merge([encode_record(lost)]) == 1  # others have it
