"""The ``context`` verbs: folders are added, found in and kept up to date; bad files do no harm."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import Conflict, LimitExceeded
from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import PeerId
from pyagent_node.cli import context_files
from pyagent_node.cli.context_files import find, read, source_of
from pyagent_node.node.api.guard import GuardOptions
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api

from ..context.context_world import World, one_node
from .conftest import Outcome, Run


@pytest.fixture
async def world(home: Home, tmp_path: Path) -> AsyncIterator[World]:
    async with one_node(tmp_path / "store") as here, simulated_api(contexts=here.contexts) as api:
        running(api, home)
        yield here


def running(api: SimulatedApi, home: Home) -> None:
    write_atomic(home.token_path, TOKEN.encode() + b"\n")
    state = DaemonState(os.getpid(), api.url, PeerId("12D3KooWTest"), None, "0", time.time())
    home.write_state(state)


async def ask(run: Run, *arguments: str) -> Outcome:
    return await trio.to_thread.run_sync(partial(run, *arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shelf"
    for name, data in {
        "whales.txt": b"Whales sleep upright in the sea.\n",
        "code/bridge.py": b"# The bridge was painted green after the storm.\nx = 1\n",
        "code/build/out.py": b"left out\n",
        "code/.hidden/x.txt": b"left out\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0",
        "empty.txt": b"",
        "notes.log": b"left out\n",
        ".gitignore": b"*.log\nbuild/\n!keep.log\n",
        "keep.log": b"Copper conducts heat better than iron.\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


async def test_a_folder_is_added_found_and_kept_up_to_date(
    world: World, run: Run, folder: Path
) -> None:
    assert "is there" in (await ask(run, "context", "create", "docs")).out
    added = await ask(run, "context", "add", "docs", str(folder), "--as", "shelf")
    assert added.status == 0
    assert "4 added, 2 no text" in added.out, added
    listed = [row.source for row in (await world.contexts.show("docs")).documents]
    assert listed == [
        "shelf/.gitignore",
        "shelf/code/bridge.py",
        "shelf/keep.log",
        "shelf/whales.txt",
    ]
    found = await ask(run, "context", "query", "docs", "green", "bridge", "--why", "--count", "1")
    assert "1. shelf/code/bridge.py:1-2" in found.out
    assert "by meaning #1" in found.out
    again = await ask(run, "context", "add", "docs", str(folder), "--as", "shelf")
    assert "4 unchanged" in again.out
    assert world.encoder.embedded == 6
    (folder / "whales.txt").unlink()
    (folder / "code/bridge.py").write_text("# The bridge is blue now.\n")
    third = await ask(run, "context", "add", "docs", str(folder), "--as", "shelf")
    assert "1 changed" in third.out
    assert "--prune removes them" in third.err
    pruned = await ask(run, "context", "add", "docs", str(folder), "--as", "shelf", "--prune")
    assert "1 removed" in pruned.out
    assert "green" not in (await ask(run, "context", "query", "docs", "green bridge")).out


async def test_json_has_a_line_for_each_document_and_a_summary(
    world: World, run: Run, folder: Path
) -> None:
    await ask(run, "context", "create", "docs", "--max-age", "7d", "--unused", "12h")
    told = await ask(run, "--json", "context", "add", "docs", str(folder))
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert sum("document" in line for line in lines) == 4
    assert lines[-1]["summary"]["added"] == 4
    shown = (await ask(run, "--json", "context", "list")).json
    policy = shown["contexts"][0]["policy"]  # type: ignore[index]
    assert policy == {"max_age_seconds": 604_800, "unused_seconds": 43_200}
    assert "up to 7 d 0 h old" in (await ask(run, "context", "list")).out


async def test_stdin_is_a_document_with_a_name(
    world: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(run, "context", "create", "docs")
    refused = await ask(run, "context", "add", "docs", "-")
    assert refused.status == 2
    assert "--as" in refused.err

    class Stdin:
        buffer = io.BytesIO(b"Whales sleep upright.")

    def with_stdin() -> Outcome:
        from pyagent_node.cli import main

        sys.stdin = Stdin()  # type: ignore[assignment]
        return Outcome(main.run(["context", "add", "docs", "-", "--as", "note.md"]), "", "")

    monkeypatch.setattr(sys, "stdin", sys.stdin)
    assert (await trio.to_thread.run_sync(with_stdin)).status == 0
    assert [row.source for row in (await world.contexts.show("docs")).documents] == ["note.md"]


async def test_a_bad_file_by_itself_is_an_error_and_among_others_a_note(
    world: World, run: Run, folder: Path
) -> None:
    await ask(run, "context", "create", "docs")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7\nno PDF at all")
    alone = await ask(run, "context", "add", "docs", str(folder / "picture.png"))
    assert alone.status == 8
    assert "is not text" in alone.err
    together = await ask(run, "context", "add", "docs", str(folder))
    assert together.status == 7
    assert "4 added" in together.out
    assert "broken.pdf" in together.err
    assert "1 file could not be added" in together.err


async def test_a_name_cannot_leave_its_folder(world: World, run: Run, folder: Path) -> None:
    for verb in (["create"], ["show"], ["rm", "--yes"], ["query"], ["add"]):
        more = {"query": ["x"], "add": [str(folder)]}.get(verb[0], [])
        failed = await ask(run, "context", *verb, "../../etc", *more)
        assert failed.status == 2, verb
        assert "cannot be the name of a context" in failed.err


async def test_documents_and_contexts_are_removed(world: World, run: Run, folder: Path) -> None:
    await ask(run, "context", "create", "docs")
    await ask(run, "context", "add", "docs", str(folder), "--as", "s")
    gone = await ask(run, "context", "rm", "docs", "s/code/*", "s/whales.txt")
    assert gone.out.count("is removed") == 2
    missing = await ask(run, "context", "rm", "docs", "s/nothing")
    assert missing.status == 3
    unsure = await ask(run, "context", "rm", "docs")
    assert unsure.status == 2
    assert "--yes" in unsure.err
    assert (await ask(run, "context", "rm", "docs", "--yes")).status == 0
    assert "There is no context" in (await ask(run, "context", "list")).err
    assert (await ask(run, "context", "show", "docs")).status == 3


async def test_what_the_api_refuses(home: Home, tmp_path: Path) -> None:
    async with one_node(tmp_path) as here, simulated_api(contexts=here.contexts) as api:
        await here.create()
        path = "/v1/contexts/docs/documents"
        for url, body, code in (
            (path, b"text", "bad_parameter"),
            (f"{path}?source=a&source=b", b"text", "bad_parameter"),
            (f"{path}?source=a&modified=soon", b"text", "bad_parameter"),
            (f"{path}?source=a%0Ab", b"text", "bad_context_source"),
            (f"{path}?source=a", b"\0\0", "binary_file"),
            ("/v1/contexts/other/documents?source=a", b"text", "context_not_found"),
            ("/v1/contexts/..%00/documents?source=a", b"text", "bad_context_name"),
            ("/v1/contexts", b'{"name": "a/b"}', "bad_context_name"),
            ("/v1/contexts", b'{"name": 5}', "bad_parameter"),
            ("/v1/contexts", b'{"name": "x", "policy": {"max_tokens": -1}}', "bad_context_policy"),
            ("/v1/contexts/docs/query", b'{"question": ""}', "bad_question"),
            ("/v1/contexts/docs/query", b'{"question": "x", "count": 0}', "bad_count"),
        ):
            reply = await api.http.post(url, content=body)
            assert reply.status_code in (400, 404), url
            assert reply.json()["error"]["code"] == code, (url, reply.text)
        plain = await api.http.post(f"{path}?source=a.txt", content=b"some words")
        assert plain.json()["status"] == "added"
        gone = await api.http.delete(f"{path}?source=a.txt")
        assert gone.json() == {"removed": "a.txt"}


async def test_documents_have_a_limit_of_their_own(home: Home, tmp_path: Path) -> None:
    guard = GuardOptions(token=TOKEN, body_bytes=100, document_bytes=1000)
    async with (
        one_node(tmp_path) as here,
        simulated_api(contexts=here.contexts, guard_options=guard) as api,
    ):
        await here.create()
        path = "/v1/contexts/docs/documents?source=a.txt"
        assert (await api.http.post(path, content=b"word " * 100)).json()["status"] == "added"
        for url in (path, "/v1/contexts/docs/query"):
            refused = await api.http.post(url, content=b"word " * 201)
            assert refused.json()["error"]["code"] == "request_too_large"


# Files -----------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.txt"
    path.write_text("one\n")
    (file,) = find(path, None)
    original, changes = os.fstat, iter([True, False])

    def grows(fd: int) -> os.stat_result:
        found = original(fd)
        if next(changes, False):
            with path.open("a") as more:
                more.write("two\n")
        return found

    monkeypatch.setattr(context_files.os, "fstat", grows)
    assert read(file).data == b"one\ntwo\n"  # the second attempt
    changes = iter([True] * 10)
    with pytest.raises(Conflict) as caught:
        read(file)
    assert caught.value.code == "file_changing"


def test_a_file_of_200_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(LimitExceeded) as caught:
        read(find(path, None)[0])
    assert caught.value.code == "document_too_large"


def test_sources_are_called_as_their_paths_without_what_leads_outside(tmp_path: Path) -> None:
    assert source_of(Path("docs/a.md")) == "docs/a.md"
    assert source_of(Path("../x/./a.md")) == "x/a.md"
    assert source_of(Path("/srv/data")) == "srv/data"
    assert source_of(Path()) == Path.cwd().name
    (tmp_path / "a\nb.txt").write_text("x")
    assert [file.source for file in find(tmp_path, "p")] == ["p/a?b.txt"]


def test_links_and_other_things_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("x")
    try:
        (tmp_path / "loop").symlink_to(tmp_path)
        (tmp_path / "secret.txt").symlink_to(tmp_path / "in/a.txt")
        (tmp_path / "self").symlink_to(tmp_path / "self")
        os.mkfifo(tmp_path / "pipe")
    except (OSError, AttributeError):
        pytest.skip("this system has no links or pipes")
    assert [file.source for file in find(tmp_path, "p")] == ["p/in/a.txt"]
