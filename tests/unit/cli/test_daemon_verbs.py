"""The verbs that ask a daemon, against a served API with a simulated node behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import trio

from pyagent_node.base.errors import RunnerFailed, Unavailable
from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import PeerId
from pyagent_node.node.api.placement_schema import DrainRequest
from pyagent_node.node.api.schema import InviteRequest, LoadRequest, PullRequest, StatusView
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api

from .conftest import Outcome, Run

Threaded = Callable[..., "trio.abc.Awaitable[Outcome]"]


@pytest.fixture
async def api(home: Home) -> SimulatedApi:  # type: ignore[misc]  # an async generator fixture
    async with simulated_api() as running:
        write_atomic(home.token_path, TOKEN.encode() + b"\n")
        peer = PeerId("12D3KooWTest")
        home.write_state(DaemonState(os.getpid(), running.url, peer, None, "0", time.time()))
        yield running  # type: ignore[misc]


async def on(run: Run, *arguments: str, stdin: str = "") -> Outcome:
    """Run a command line in a thread, so that the API can answer it."""
    return await trio.to_thread.run_sync(partial(run, *arguments, stdin=stdin))


async def test_status_and_peers(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "status", "--json")).json["node"]
    text = (await on(run, "status")).out
    assert "No model is loaded" in text
    assert "none connected" in text
    assert (await on(run, "peers", "--json")).json == {"peers": []}


async def test_watch_prints_json_lines_until_the_end(
    api: SimulatedApi, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = await api.services.status()
    answers = [good, good]

    async def status() -> StatusView:
        if not answers:
            raise Unavailable("The node is ending.", code="shutting_down")
        return answers.pop()

    monkeypatch.setattr(api.services, "status", status)
    outcome = await on(run, "status", "--watch", "--interval", "0.1", "--json")
    assert len(outcome.out.splitlines()) == 2
    assert outcome.status == Unavailable.exit_code
    assert outcome.error["code"] == "shutting_down"


async def test_generate_streams(api: SimulatedApi, run: Run) -> None:
    outcome = await on(run, "generate", "hello", "--max-tokens", "5", "--seed", "3")
    assert outcome.status == 0
    assert len(outcome.out.split()) == 5
    assert outcome.out.endswith("\n")
    assert outcome.err == ""
    request = api.engine.requests[-1]
    assert (request.max_tokens, request.sampling.seed, request.model) == (5, 3, "words")
    assert request.messages is not None
    assert request.messages[0].content == "hello"


async def test_generate_json_and_stats(api: SimulatedApi, run: Run) -> None:
    answer = (await on(run, "generate", "hi", "-n", "4", "--json")).json
    token_ids = answer["token_ids"]
    assert isinstance(token_ids, list)
    assert len(token_ids) == 4
    assert answer["finish_reason"] == "length"
    assert "tokens/s" in (await on(run, "generate", "hi", "-n", "4", "--stats")).err


async def test_generate_from_stdin_raw_and_system(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "generate", "-", "-n", "1", stdin="a\nb\n")).status == 0
    messages = api.engine.requests[-1].messages
    assert messages is not None
    assert messages[0].content == "a\nb\n"
    assert (await on(run, "generate", "x", "--raw", "-n", "2")).status == 0
    assert api.engine.requests[-1].prompt == "x"
    assert (await on(run, "generate", "x", "--system", "s", "-n", "1")).status == 0
    messages = api.engine.requests[-1].messages
    assert messages is not None
    assert [m.role for m in messages] == ["system", "user"]
    assert (await on(run, "generate", "x", "--raw", "--system", "s")).status == 2


async def test_generate_errors(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "generate", "  ", "--json")).error["code"] == "bad_parameter"
    missing = await on(run, "generate", "x", "--model", "nothing", "--json")
    assert (missing.status, missing.error["code"]) == (3, "model_not_found")
    bad = await on(run, "generate", "x", "--temperature", "-1", "--json")
    assert bad.status == 2
    api.engine.fail_at[2] = RunnerFailed("rank 1 died", code="runner_died", rank=1)
    died = await on(run, "generate", "x", "-n", "5", "--json")
    assert died.status == RunnerFailed.exit_code
    assert died.error["facts"] == {"rank": 1}
    cut = await on(run, "generate", "x", "-n", "5")
    assert cut.out.endswith("\n")
    assert cut.err.startswith("error: rank 1 died")


async def test_no_model_loaded(api: SimulatedApi, run: Run) -> None:
    api.engine.loaded = False
    outcome = await on(run, "generate", "x", "--json")
    assert outcome.status == 3
    assert "model load" in str(outcome.error["remedy"])


async def test_chat_remembers_resets_saves(api: SimulatedApi, run: Run, home: Home) -> None:
    path = home.root / "talk.json"
    lines = f"one\ntwo \\\nmore\n/save {path}\n/reset\nthree\n/nonsense\n/help\n/exit\nfour\n"
    outcome = await on(run, "chat", "-n", "2", stdin=lines)
    assert outcome.status == 0
    asked = [[m.content for m in r.messages or ()] for r in api.engine.requests]
    assert [len(messages) for messages in asked] == [1, 3, 1]
    assert asked[1][2] == "two \nmore"
    assert asked[2] == ["three"]
    assert path.read_text().count('"role"') == 4
    assert "/reset" in outcome.err
    assert "There is no /nonsense" in outcome.err


async def test_chat_survives_an_error_and_takes_the_turn_back(api: SimulatedApi, run: Run) -> None:
    api.engine.fail_at[0] = RunnerFailed("rank 0 died", code="runner_died", rank=0)

    def heal(position: int) -> None:
        if len(api.engine.requests) == 2:
            api.engine.fail_at.clear()

    api.engine.gate = heal
    outcome = await on(run, "chat", "-n", "1", stdin="one\ntwo\n/save\n")
    assert outcome.status == 0
    assert "rank 0 died" in outcome.err
    assert "/save needs" in outcome.err
    messages = api.engine.requests[1].messages
    assert messages is not None
    assert [m.content for m in messages] == ["two"]


async def test_invite_connect(api: SimulatedApi, run: Run) -> None:
    outcome = await on(run, "invite", "--role", "learner", "--expires", "90m")
    assert outcome.status == 0, outcome
    assert outcome.out == "pyagent1secret\n"
    assert api.services.calls[-1] == InviteRequest(role="learner", ttl_seconds=5400)
    assert (await on(run, "invite", "--json")).json["ticket"] == "pyagent1secret"
    for bad in ("0", "-1h", "soon", "9" * 20):
        assert (await on(run, "invite", "--expires", bad)).status == 2, bad
    connected = await on(run, "connect", "/ip4/127.0.0.1/tcp/1/p2p/x", "--json")
    assert connected.json == {"peer_id": "12D3KooWTest"}


async def test_model_verbs(api: SimulatedApi, run: Run) -> None:
    assert "words" in (await on(run, "model", "list")).out
    pulled = await on(run, "model", "pull", "hf:a/b/c.gguf", "--sha256", "ab")
    assert pulled.status == 0
    assert api.services.calls[-1] == PullRequest(source="hf:a/b/c.gguf", sha256="ab")
    assert "download" in pulled.err
    lines = (await on(run, "model", "pull", "x", "--json")).out.splitlines()
    assert len(lines) >= 2
    loaded = await on(
        run, "model", "load", "words", "--layers", "10,20", "--nodes", "a,b,c", "--json"
    )
    assert loaded.status == 0
    assert api.services.calls[-1] == LoadRequest(
        model="words", layers=(10, 20), nodes=("a", "b", "c")
    )
    guessing = ("--speculation", "auto", "--draft-length", "4", "--drafter", "small@bob")
    await on(run, "model", "load", "words", *guessing, "--draft-depth", "2", "--json")
    assert api.services.calls[-1] == LoadRequest(
        model="words", speculation="auto", draft_length=4, draft_depth=2, drafter="small@bob"
    )
    assert (await on(run, "model", "load", "words", "--draft-length", "-1")).status == 2
    assert (await on(run, "model", "load", "words", "--layers", "x")).status == 2
    assert (await on(run, "model", "unload", "words")).status == 0
    assert (await on(run, "model", "unload", "nothing", "--json")).status == 3
    assert (await on(run, "model", "rm", "words")).status == 0
    assert (await on(run, "model", "rm", "nothing", "--json")).error["code"] == "model_not_found"


async def test_placement_verbs(api: SimulatedApi, run: Run) -> None:
    assert "No model is loaded" in (await on(run, "placement", "show")).err
    assert (await on(run, "placement", "show", "--json")).json == {"placements": []}
    missing = await on(run, "placement", "show", "nothing", "--json")
    assert (missing.status, missing.error["code"]) == (3, "placement_not_found")
    flags = ("--ranks", "2", "--standbys", "2", "--spares", "0")
    planned = await on(run, "placement", "plan", "words", *flags)
    assert planned.status == 0, planned
    assert "nothing is better" in planned.out
    assert "Nothing would change." in planned.out
    assert "GB/s" not in planned.out
    explained = await on(run, "placement", "plan", "words", "--explain", *flags)
    assert explained.status == 0, explained
    words = " ".join(explained.out.split())
    assert "measured in sessions" in words
    assert "ann: a layer more would cost +0.10 ms" in words
    planned = await on(run, "placement", "plan", "words", "--json", *flags)
    (node,) = planned.json["plan"]["nodes"]
    assert (node["backend"], node["source"], node["share"]) == ("llama.cpp", "sessions", 0.5)
    wanted = LoadRequest(model="words", ranks=2, standbys=2, spares=0)
    assert api.services.calls[-1] == wanted
    assert (await on(run, "placement", "apply", "words", *flags, "--json")).status == 0
    assert api.services.calls[-1] == wanted
    assert (await on(run, "placement", "apply", "words", "--standbys", "5")).status == 2
    drained = await on(run, "placement", "drain", "bob")
    assert drained.status == 0
    assert api.services.calls[-1] == DrainRequest(node="bob")
    assert "holds nothing any more" in drained.out
    undone = await on(run, "placement", "drain", "bob", "--undo", "--json")
    assert undone.json["draining"] is False
    assert (await on(run, "placement", "drain")).status == 2


async def test_a_failing_load_is_told(api: SimulatedApi, run: Run) -> None:
    api.services.load_error = RunnerFailed("rank 2 ran out of memory", code="out_of_memory")
    outcome = await on(run, "model", "load", "words", "--json")
    assert outcome.status == RunnerFailed.exit_code
    assert outcome.error["code"] == "out_of_memory"


async def test_doctor_with_a_daemon(api: SimulatedApi, run: Run) -> None:
    checks = (await on(run, "doctor", "--quick", "--json")).json["checks"]
    assert isinstance(checks, list)
    assert {"daemon", "clock"} <= {c["name"] for c in checks}


async def test_up_refuses_a_second_daemon(api: SimulatedApi, run: Run) -> None:
    outcome = await on(run, "up", "--json")
    assert outcome.status == 9
    assert outcome.error["code"] == "already_running"


async def test_a_wrong_token_is_refused(api: SimulatedApi, run: Run, home: Home) -> None:
    home.token_path.unlink()
    outcome = await on(run, "status", "--json")
    assert outcome.status == 4
