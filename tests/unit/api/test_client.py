"""The client against a served API, in a thread as the command line would use it."""

import os
import subprocess
import sys

import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    RunnerFailed,
    Unavailable,
)
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask, Piece
from pyagent_node.node.api.schema import InviteRequest, LoadRequest, PullRequest
from pyagent_node.node.client import Client, process_exists, running_daemon
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN


async def using(api, function, token=TOKEN):
    """Run ``function(client)`` in a thread."""

    def run():
        with Client(api.url, token) as client:
            return function(client)

    return await trio.to_thread.run_sync(run)


async def test_typed_results(api):
    status = await using(api, lambda c: c.status())
    assert status.node.peer_id == "12D3KooWTest"
    assert (await using(api, lambda c: c.peers())).peers == ()
    assert (await using(api, lambda c: c.models())).models[0].name == "words"
    assert (await using(api, lambda c: c.loaded()))[0].id == "words"
    assert (await using(api, lambda c: c.doctor())).checks[0].result == "ok"
    assert (await using(api, lambda c: c.connect("/ip4/1.2.3.4"))).peer_id == "12D3KooWTest"
    invite = await using(api, lambda c: c.invite(InviteRequest(ttl_seconds=60)))
    assert invite.ticket == "pyagent1secret"
    assert "secret" not in repr(invite)
    await using(api, lambda c: c.unload("words"))
    await using(api, lambda c: c.remove("ab" * 32))
    api.services.reasons = ("no mesh",)
    assert (await using(api, lambda c: c.ready())).reasons == ("no mesh",)
    await using(api, lambda c: c.shutdown())
    assert api.services.stopped


async def test_progress(api):
    seen = []
    model = await using(api, lambda c: c.pull(PullRequest(source="s"), seen.append))
    assert model.name == "s"
    assert seen[-1].done == 2
    placement = await using(api, lambda c: c.load(LoadRequest(model="words")))
    assert placement.epoch == 7
    api.services.load_error = LimitExceeded("no room", code="no_memory", bytes=5)
    with pytest.raises(LimitExceeded) as caught:
        await using(api, lambda c: c.load(LoadRequest(model="words")))
    assert caught.value.code == "no_memory"
    assert caught.value.facts == {"bytes": 5}


async def test_events(api):
    def two(client):
        events = client.events(0.1)
        seen = [next(events), next(events)]
        events.close()
        return seen

    assert [s.time for s in await using(api, two)] == [1.0, 1.0]
    with pytest.raises(InvalidRequest):
        await using(api, lambda c: next(c.events(0.001)))


@pytest.mark.parametrize(
    "what", [{"prompt": "a b"}, {"messages": (ChatMessage("user", "a b"),)}], ids=["prompt", "chat"]
)
async def test_generate(api, what):
    ask = Ask(model="words", max_tokens=5, seed=9, **what)
    *pieces, answer = await using(api, lambda c: list(c.generate(ask)))
    assert isinstance(answer, Answer)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert tuple(t for piece in pieces for t in piece.token_ids) == answer.token_ids
    assert len(answer.token_ids) == answer.completion_tokens == 5
    assert (answer.prompt_tokens, answer.finish_reason, answer.seed) == (2, "length", 9)
    assert answer.placement.epoch == 7
    unbounded = Ask(model="words", **what)
    *_, answer = await using(api, lambda c: list(c.generate(unbounded)))
    assert answer.completion_tokens == 62


async def test_generation_errors(api):
    with pytest.raises(NotFound) as missing:
        await using(api, lambda c: list(c.generate(Ask(model="other", prompt="a"))))
    assert missing.value.code == "model_not_found"
    api.engine.fail_at = {2: RunnerFailed("Rank 1 died.", rank=1)}
    with pytest.raises(RunnerFailed) as failed:
        await using(api, lambda c: list(c.generate(Ask(model="words", prompt="a"))))
    assert failed.value.facts == {"rank": 1}


async def test_closing_the_iterator_cancels(api):
    reached, never = trio.Event(), trio.Event()

    def gate(at):
        if at < 3:
            return None
        reached.set()
        return never

    api.engine.gate = gate

    def first(client):
        events = client.generate(Ask(model="words", prompt="a"))
        piece = next(events)
        events.close()
        return piece

    assert (await using(api, first)).text
    with trio.fail_after(20):
        await api.engine.idle.wait()
    assert api.engine.cancelled == 1


async def test_wrong_token(api):
    with pytest.raises(Refused) as caught:
        await using(api, lambda c: c.status(), token="wrong")
    assert caught.value.code == "unauthorized"


def test_no_daemon(tmp_path):
    home = Home(tmp_path)
    with pytest.raises(Unavailable) as caught:
        Client.from_home(home)
    assert caught.value.code == "daemon_not_running"
    assert "pyagent-node up" in str(caught.value)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    state = DaemonState(child.pid, "http://127.0.0.1:1", "p", None, "0", 0.0)
    home.write_state(state)
    assert running_daemon(home) is None
    with pytest.raises(Unavailable):
        Client.from_home(home)
    # A live process with that number, and nobody at the address.
    home.write_state(DaemonState(os.getpid(), "http://127.0.0.1:1", "p", None, "0", 0.0))
    with Client.from_home(home) as client, pytest.raises(Unavailable) as caught:
        client.status()
    assert caught.value.code == "daemon_not_running"


def test_process_exists():
    assert process_exists(os.getpid())
    assert not process_exists(0)
    assert not process_exists(-1)


async def raw_server(reply: bytes, task_status=trio.TASK_STATUS_IGNORED):
    async def handle(stream):
        await stream.receive_some()
        await stream.send_all(reply)
        await stream.aclose()

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(listener.socket.getsockname()[1])
    await trio.serve_listeners(handle, [listener])


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (b"", Unavailable, "daemon_connection_lost"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{", Unavailable, "daemon_connection_lost"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", CorruptData, "bad_answer"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops", PyAgentError, "api_error"),
        (b"garbage\r\n\r\n", Unavailable, "daemon_connection_lost"),
    ],
)
async def test_strange_answers(nursery, reply, kind, code):
    port = await nursery.start(raw_server, reply)

    def run():
        with Client(f"http://127.0.0.1:{port}", TOKEN) as client:
            client.status()

    with pytest.raises(kind) as caught:
        await trio.to_thread.run_sync(run)
    assert caught.value.code == code
    nursery.cancel_scope.cancel()


async def test_a_stream_cut_off(nursery):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    line = b'{"progress":{"step":"x"}}\n'
    reply = head + f"{len(line):x}\r\n".encode() + line + b"\r\n0\r\n\r\n"
    port = await nursery.start(raw_server, reply)

    def run():
        with Client(f"http://127.0.0.1:{port}", TOKEN) as client:
            client.pull(PullRequest(source="s"))

    with pytest.raises(Unavailable) as caught:
        await trio.to_thread.run_sync(run)
    assert caught.value.code == "daemon_connection_lost"
    nursery.cancel_scope.cancel()


def test_the_client_is_light():
    heavy = "fastapi, hypercorn, libp2p, llama_cpp, numpy, trio, prometheus_client, psutil"
    code = "import sys, pyagent_node.node.client; print([m for m in {!r} if m in sys.modules])"
    code = code.format(heavy.split(", "))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
