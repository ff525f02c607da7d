"""Contexts of one node: documents come, change, go and are found, through crashes and bad input."""

import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node import context_drafts as drafts
from pyagent_node.node import context_encoder
from pyagent_node.node import contexts as contexts_module
from pyagent_node.node.api.context_schema import CreateContextRequest, QueryRequest
from pyagent_node.node.context_database import FILE
from pyagent_node.node.context_encoder import Encoders
from pyagent_node.node.context_store import open_context_store
from pyagent_node.node.contexts import Contexts

from .context_world import World, one_node

PARTS = [
    "Whales sleep upright in the sea near the surface.\n",
    "The bridge was painted green after the storm of nineteen ninety.\n",
    "Copper conducts heat better than iron does.\n",
]


async def test_a_document_is_added_found_changed_and_removed(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        reply = await world.add("a.txt", PARTS[0])
        assert (reply.status, reply.chunks, reply.windows, reply.embedded) == ("added", 1, 1, 1)
        await world.add("b/c.txt", PARTS[1])
        assert (await world.ask("whales in the sea"))[0] == "a.txt"
        assert (await world.add("a.txt", PARTS[0])).status == "unchanged"
        assert world.encoder.embedded == 3  # two documents and a question
        changed = await world.add("a.txt", PARTS[2])
        assert changed.status == "changed"
        hits = (await world.contexts.query("docs", QueryRequest(question="whales in the sea"))).hits
        assert all("Whales" not in hit.text for hit in hits)
        (shown,) = [d for d in (await world.contexts.show("docs")).documents if d.source == "a.txt"]
        assert shown.counter == 2
        await world.contexts.remove("docs", "a.txt")
        assert "a.txt" not in await world.ask("copper heat iron")
        with pytest.raises(NotFound) as caught:
            await world.contexts.remove("docs", "a.txt")
        assert caught.value.code == "source_not_found"
        assert (await world.add("a.txt", PARTS[0])).status == "added"


async def test_what_was_added_is_there_after_a_restart(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        for number, text in enumerate(PARTS):
            await world.add(f"{number}.txt", text)
        before = await world.contexts.query("docs", QueryRequest(question="green bridge"))
    async with one_node(tmp_path, known=world) as again:
        after = await again.contexts.query("docs", QueryRequest(question="green bridge"))
        assert after.hits == before.hits
        assert (await again.contexts.list()).contexts == (await world.contexts.list()).contexts
        for number, text in enumerate(PARTS):
            assert (await again.add(f"{number}.txt", text)).status == "unchanged"


async def test_only_what_changed_in_a_document_is_embedded(tmp_path: Path) -> None:
    lines = [f"def function_{i}(): return value_{i} + other_{i} * {i}\n\n" for i in range(200)]
    async with one_node(tmp_path) as world:
        await world.create()
        first = await world.add("code.py", "".join(lines))
        lines[100] = "def something_new(): return nothing of what was there\n\n"
        second = await world.add("code.py", "".join(lines))
        assert first.embedded == first.windows
        assert second.embedded < first.windows / 4
        assert (await world.ask("something new nothing"))[0] == "code.py"


async def test_texts_that_say_the_same_are_joined(tmp_path: Path) -> None:
    paragraph = "".join(f"word{i} " for i in range(230)) + "\n\n"
    async with one_node(tmp_path) as world:
        await world.create()
        other = "".join(f"other{i} " for i in range(230)) + "\n\n"
        reply = await world.add("a.txt", paragraph + other + paragraph)
        assert reply.joined == 1
        query = QueryRequest(question="word1 word2 word3", count=1)
        (hit,) = (await world.contexts.query("docs", query)).hits
        assert [(place.source, place.first_line) for place in hit.also] == [("a.txt", 5)]


async def test_the_other_places_of_a_text_are_told_once(tmp_path: Path) -> None:
    """All chunks of an endless line are on line 1: that is one place, and the hit's own."""
    paragraph = "".join(f"word{i} " for i in range(230))
    async with one_node(tmp_path) as world:
        await world.create()
        await world.add("a.txt", paragraph * 20)
        await world.add("b.txt", paragraph * 20)
        query = QueryRequest(question="word1 word2 word3", count=1)
        (hit,) = (await world.contexts.query("docs", query)).hits
        places = [(place.source, place.first_line) for place in hit.also]
        assert len(places) == len(set(places))
        assert (hit.source, hit.first_line) not in places


@pytest.mark.parametrize("stop", range(0, 5))
async def test_after_a_crash_only_the_missing_is_done(tmp_path: Path, stop: int) -> None:
    texts = {f"{i}.txt": f"sentence number {i} about subject {i}\n" for i in range(5)}
    async with one_node(tmp_path) as world:
        await world.create()
        world.encoder.stop_after = stop
        with suppress(RuntimeError):  # the encoder stands for a process that dies
            for source, text in texts.items():
                await world.add(source, text)
        assert world.encoder.embedded == stop
    async with one_node(tmp_path, known=world) as again:
        states = [(await again.add(source, text)).status for source, text in texts.items()]
        assert states == ["unchanged"] * stop + ["added"] * (5 - stop)
        assert again.encoder.embedded == 5 - stop


@pytest.mark.slow
async def test_a_long_document_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    text = "\n".join(" ".join(f"w{i}x{j}" for j in range(25)) for i in range(700))
    async with one_node(tmp_path) as world:
        await world.create()
        world.encoder.stop_after = 400
        with suppress(RuntimeError):
            await world.add("long.txt", text)
        done = world.encoder.embedded
        assert 300 < done < 700
    async with one_node(tmp_path, known=world) as again:
        reply = await again.add("long.txt", text)
        assert reply.windows == 700
        assert reply.embedded == again.encoder.embedded == 700 - done
        assert (await again.ask("w300x1 w300x2 w300x3"))[0] == "long.txt"
    async with one_node(tmp_path / "other", known=None) as fresh:
        await fresh.create()
        whole = await fresh.add("long.txt", text)
        assert whole.embedded == 700
    with sqlite3.connect(tmp_path / drafts.FILE) as connection:
        assert connection.execute("SELECT count(*) FROM drafts").fetchone() == (0,)
    connection.close()


async def test_damaged_drafts_cost_time_only(tmp_path: Path) -> None:
    text = "\n".join(" ".join(f"w{i}x{j}" for j in range(25)) for i in range(300))
    async with one_node(tmp_path) as world:
        await world.create()
        (tmp_path / drafts.FILE).write_bytes(b"no database" * 500)
        assert (await world.add("long.txt", text)).embedded == 300


async def test_a_crash_between_bodies_and_record_leaves_no_document(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()

        async def broken(records: object) -> int:
            raise PyAgentError("the process died here")

        merge, world.store.merge = world.store.merge, broken  # type: ignore[method-assign]
        with pytest.raises(PyAgentError):
            await world.add("a.txt", PARTS[0])
        world.store.merge = merge  # type: ignore[method-assign]
        assert await world.ask("whales") == []
        assert (await world.add("a.txt", PARTS[0])).status == "added"
        assert await world.ask("whales") == ["a.txt"]


async def test_a_source_added_twice_at_once_is_one_document(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        states: list[str] = []

        async def add(text: str) -> None:
            states.append((await world.add("a.txt", text)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(add, PARTS[0])
        assert sorted(states) == ["added", "unchanged", "unchanged"]
        assert world.encoder.embedded == 1


async def test_too_many_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "WAITING", 3)
    async with one_node(tmp_path) as world:
        await world.create()
        codes: list[str] = []

        async def add(number: int) -> None:
            try:
                await world.add(f"{number}.txt", PARTS[0])
            except LimitExceeded as error:
                codes.append(error.code)

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(add, number)
        assert codes == ["too_many_uploads"] * 2


async def test_old_documents_are_no_answer(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(max_age_seconds=100)
        await world.add("a.txt", PARTS[0])
        world.clock[0] += 99
        assert await world.ask("whales") == ["a.txt"]
        (row,) = (await world.contexts.show("docs")).documents
        assert (row.fresh, row.current) == (True, False)  # soon it will not be
        world.clock[0] += 1
        assert await world.ask("whales") == []
        assert (await world.add("a.txt", PARTS[0])).status == "changed"
        assert await world.ask("whales") == ["a.txt"]


async def test_what_nobody_asks_for_is_no_answer_after_a_time(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(unused_seconds=100)
        await world.add("a.txt", PARTS[0])
        world.clock[0] += 90
        assert await world.ask("whales") == ["a.txt"]  # that is a use
        world.clock[0] += 90
        assert await world.ask("whales") == ["a.txt"]
    async with one_node(tmp_path, known=world) as again:
        again.clock[0] += 90
        assert await again.ask("whales") == ["a.txt"]
        again.clock[0] += 100
        assert await again.ask("whales") == []


async def test_the_window_over_the_sequence(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(max_tokens=20)
        for number, text in enumerate(PARTS):
            world.clock[0] += 1
            await world.add(f"{number}.txt", text)
        assert set(await world.ask("whales bridge copper")) == {"1.txt", "2.txt"}
        with pytest.raises(LimitExceeded) as caught:
            await world.add("big.txt", " ".join(map(str, range(50))))
        assert caught.value.code == "document_too_large"


async def test_contexts_are_made_and_removed(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        with pytest.raises(Conflict):
            await world.create()
        await world.create("other")
        await world.add("a.txt", PARTS[0])
        await world.add("a.txt", PARTS[0], "other")
        await world.contexts.drop("docs")
        with pytest.raises(NotFound):
            await world.add("a.txt", PARTS[0])
        (left,) = (await world.contexts.list()).contexts
        assert (left.name, left.documents, left.bodies_here) == ("other", 1, 1)
        await world.create()  # it is another one
        assert await world.ask("whales") == []


async def test_a_context_that_is_removed_while_a_document_is_added(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        embed = world.encoder.embed

        def slow(texts: list[str]) -> object:
            trio.from_thread.run(world.contexts.drop, "docs")
            return embed(texts)

        world.encoder.embed = slow  # type: ignore[method-assign, assignment]
        with pytest.raises(NotFound):
            await world.add("a.txt", PARTS[0])
        assert not world.store.held()


BAD_NAMES = ["", "..", "../../etc", "a/b", "a\\b", "/etc/passwd", "a\0b", "x" * 65, ".hidden"]


@pytest.mark.parametrize("name", BAD_NAMES)
async def test_a_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    async with one_node(tmp_path) as world:
        for work in (world.create(name), world.add("a", "text", name), world.ask("x", name)):
            with pytest.raises(InvalidRequest) as caught:
                await work
            assert caught.value.code == "bad_context_name"


@pytest.mark.parametrize("source", ["", "a\nb", "\x1b[31mred", "x" * 5000, "\ud800"])
async def test_sources_have_names_that_can_be_shown(tmp_path: Path, source: str) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        with pytest.raises(InvalidRequest) as caught:
            await world.add(source, "text")
        assert caught.value.code == "bad_context_source"


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (b"\x7fELF\x02\x01\x01\0\0\0", Unsupported, "binary_file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", Unsupported, "binary_file"),
        (bytes(range(128, 256)) * 20, Unsupported, "binary_file"),
        (b"", InvalidRequest, "no_text"),
        (b" \n\t\n", InvalidRequest, "no_text"),
        (b"%PDF-1.4\nthis is no PDF", CorruptData, "broken_document"),
    ],
)
async def test_bad_files_are_refused_and_nothing_is_lost(
    tmp_path: Path, data: bytes, kind: type[PyAgentError], code: str
) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        await world.add("good.txt", PARTS[0])
        for source in ("bad.bin", "good.txt"):
            with pytest.raises(kind) as caught:
                await world.add(source, data)
            assert caught.value.code == code
            assert source in str(caught.value)
        assert await world.ask("whales") == ["good.txt"]


async def test_a_text_without_words_is_a_document_without_chunks(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        reply = await world.add("signs.txt", "--- *** ---\n")
        assert (reply.status, reply.chunks) == ("added", 0)
        assert await world.ask("anything") == []


@pytest.mark.slow
async def test_one_long_line_is_cut_and_found(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(20_000))
    async with one_node(tmp_path) as world:
        await world.create()
        reply = await world.add("line.txt", words)
        assert reply.chunks > 70
        assert (await world.ask("w15000 w15001 w15002"))[0] == "line.txt"


async def test_one_word_of_a_megabyte_is_cut(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        reply = await world.add("base64.txt", "QUJD" * 250_000)
        assert reply.chunks > 50
        for known in world.mesh.catalog(world.mesh.find("docs").id).everything():
            assert max(row.end - row.start for row in known.record.chunks) <= 64 * 300


@pytest.mark.slow
async def test_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        with pytest.raises(LimitExceeded) as caught:
            await world.add("line.txt", bytes(65 << 20))
        assert caught.value.code == "document_too_large"
        with pytest.raises(LimitExceeded):
            await world.add("line.txt", b"x" * (34 << 20))


async def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    async with one_node(tmp_path, limit_bytes=2000) as world:
        await world.create()
        await world.add("a.txt", PARTS[0])
        with pytest.raises(LimitExceeded) as caught:
            await world.add("b.txt", " ".join(f"w{i}" for i in range(2000)))
        assert caught.value.code == "context_store_full"
        assert await world.ask("whales w5") == ["a.txt"]


@pytest.mark.parametrize(
    "request_", [QueryRequest(question=" "), QueryRequest(question="x", count=0)]
)
async def test_bad_questions(tmp_path: Path, request_: QueryRequest) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        with pytest.raises(InvalidRequest):
            await world.contexts.query("docs", request_)


async def test_another_encoder_is_refused(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create()
        world.contexts._encoder.identity = "another"  # type: ignore[misc]
        with pytest.raises(Conflict) as caught:
            await world.add("a.txt", "text")
        assert caught.value.code == "context_encoder_differs"


async def test_a_missing_extra_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_encoder, "find_spec", lambda name: None)
    source = Encoders(ModelStore(tmp_path / "models"))
    async with one_node(tmp_path) as world:
        contexts = Contexts(world.mesh, source, held=world.store.held)
        with pytest.raises(Unavailable) as caught:
            await contexts.create(CreateContextRequest("docs"))
    assert caught.value.code == "context_extra_missing"
    assert "pip install 'pyagent-node[context]'" in str(caught.value)


# The store -------------------------------------------------------------------------------------


async def filled(world: World) -> None:
    await world.create()
    await world.add("a.txt", PARTS[0])
    await world.add("b.txt", PARTS[1])


async def test_a_damaged_body_is_given_up(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await filled(world)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE bodies SET data = x'00' WHERE rowid = 1")
    connection.close()
    async with one_node(tmp_path, known=world) as again:
        reply = await again.contexts.query("docs", QueryRequest(question="whales bridge"))
        assert len(reply.hits) == 1
        assert reply.missing == 1
        assert len(again.store.held()) == 1


async def test_a_damaged_record_is_given_up(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await filled(world)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE records SET data = x'00' WHERE source = 'a.txt'")
    connection.close()
    async with one_node(tmp_path, known=world) as again:
        assert await again.ask("whales") == ["b.txt"]
        assert (await again.add("a.txt", PARTS[0])).status == "added"


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await filled(world)
    path = tmp_path / FILE
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(CorruptData) as caught:
        async with open_context_store(tmp_path, limit_bytes=1):
            pass
    assert caught.value.code == "context_store_corrupt"
    assert str(path) in str(caught.value)


async def test_a_store_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    async with one_node(tmp_path):
        pass
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(CorruptData) as caught:
        async with open_context_store(tmp_path, limit_bytes=1):
            pass
    assert caught.value.code == "context_store_version"


async def test_removed_contexts_give_their_bytes_back(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await filled(world)
        assert world.store.used_bytes > 0
        ids = list(world.store.held())
        await world.store.forget([*ids[:1], b"nothing" * 2])  # type: ignore[list-item]
        assert len(world.store.held()) == 1
        await world.contexts.drop("docs")
        assert world.store.used_bytes == 0
        assert not world.store.known()
