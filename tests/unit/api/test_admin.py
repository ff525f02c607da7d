import json

import pytest
import trio

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.node.api.schema import InviteRequest, LoadRequest, PullRequest
from pyagent_node.node.telemetry import Sample


async def test_simple_routes(api):
    get = api.http.get
    assert (await get("/api/v1/status", headers=api.auth)).json()["node"][
        "peer_id"
    ] == "12D3KooWTest"
    assert (await get("/api/v1/peers", headers=api.auth)).json() == {"peers": []}
    assert (await get("/api/v1/models", headers=api.auth)).json()["models"][0]["name"] == "words"
    assert (await get("/api/v1/doctor", headers=api.auth)).json()["checks"][0]["name"] == "clock"


async def test_changing_routes(api):
    async def post(path, body):
        return await api.http.post(f"/api/v1{path}", json=body, headers=api.auth)

    assert (await post("/peers/connect", {"address": "/ip4/1.2.3.4"})).json()["peer_id"]
    reply = await post("/invites", {"role": "client", "ttl_seconds": 60})
    assert reply.json() == {"ticket": "pyagent1secret", "expires": 2.0}
    assert (await post("/models/unload", {"model": "words"})).json() == {"done": True}
    missing = await post("/models/unload", {"model": "other"})
    assert missing.status_code == 404
    assert missing.json()["error"]["pyagent"]["kind"] == "not_found"
    gone = await api.http.delete("/api/v1/models/" + "ab" * 32, headers=api.auth)
    assert gone.json() == {"done": True}
    assert api.services.calls == [
        "/ip4/1.2.3.4",
        InviteRequest(role="client", ttl_seconds=60),
        "ab" * 32,
    ]


async def test_bad_bodies(api):
    for path, body, parameter in (
        ("/peers/connect", {}, None),
        ("/peers/connect", {"address": 5}, "address"),
        ("/invites", {"ttl_seconds": "x"}, "ttl_seconds"),
        ("/models/load", {"model": "m", "ranks": "three"}, "ranks"),
        ("/models/load", {"model": "m", "layers": [1, "x"]}, "layers[1]"),
        ("/models/pull", [], None),
    ):
        reply = await api.http.post(f"/api/v1{path}", json=body, headers=api.auth)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == parameter


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


async def test_pull_reports_progress(api):
    reply = await api.http.post("/api/v1/models/pull", json={"source": "s"}, headers=api.auth)
    assert reply.headers["content-type"] == "application/x-ndjson"
    *progress, last = lines(reply.text)
    assert progress[-1] == {"progress": {"step": "download", "done": 2, "total": 2}}
    assert last["done"]["name"] == "s"
    assert api.services.calls == [PullRequest(source="s")]


async def test_load(api):
    body = {
        "model": "words",
        "ranks": 2,
        "layers": [10],
        "nodes": ["a", "b"],
        "n_ctx": 64,
        "n_seq": 2,
    }
    reply = await api.http.post("/api/v1/models/load", json=body, headers=api.auth)
    first, last = lines(reply.text)
    assert first["progress"]["text"] == "planning"
    assert last["done"]["epoch"] == 7
    assert api.services.calls == [
        LoadRequest(model="words", ranks=2, layers=(10,), nodes=("a", "b"), n_ctx=64, n_seq=2)
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LimitExceeded("no room", code="no_memory"), "no_memory"),
        (ZeroDivisionError(), "internal_error"),
    ],
)
async def test_a_failing_load_ends_with_an_error_line(api, error, code):
    api.services.load_error = error
    reply = await api.http.post("/api/v1/models/load", json={"model": "words"}, headers=api.auth)
    *_, last = lines(reply.text)
    assert last["error"]["code"] == code


async def test_events(api):
    stream = await trio.open_tcp_stream("127.0.0.1", api.server.port)
    head = "\r\n".join(f"{k}: {v}" for k, v in {"Host": "localhost", **api.auth}.items())
    async with stream:
        await stream.send_all(
            f"GET /api/v1/events?interval=0.1 HTTP/1.1\r\n{head}\r\n\r\n".encode()
        )
        seen = b""
        with trio.fail_after(20):
            while seen.count(b'{"status":{"time":1.0') < 2:
                seen += await stream.receive_some()
    for interval in ("0", "nan", "x", "1e9", "inf"):
        reply = await api.http.get(f"/api/v1/events?interval={interval}", headers=api.auth)
        assert reply.status_code == 400


async def test_leaving_cancels_a_long_operation(api):
    cancelled = trio.Event()

    async def pull(request, report):
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    api.services.pull = pull
    async with api.http.stream(
        "POST", "/api/v1/models/pull", json={"source": "s"}, headers=api.auth
    ) as reply:
        assert reply.status_code == 200
    with trio.fail_after(20):
        await cancelled.wait()


async def test_shutdown(api):
    reply = await api.http.post("/api/v1/shutdown", headers=api.auth)
    assert reply.json() == {"done": True}
    assert api.services.stopped


async def test_health_and_readiness(api):
    assert (await api.http.get("/healthz")).json() == {"alive": True}
    assert (await api.http.get("/readyz")).json() == {"ready": True, "reasons": []}
    api.services.reasons = ("no mesh",)
    reply = await api.http.get("/readyz")
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert reply.json() == {"ready": False, "reasons": ["no mesh"]}


async def test_metrics(api):
    api.services.telemetry.bridge(
        lambda: [
            Sample("mesh_refused", "Refused.", 2, labels={"code": "a"}),
            Sample("mesh_refused", "Refused.", 3, labels={"code": "b"}),
            Sample("peers", "Peers.", 4, "gauge"),
        ]
    )
    await api.http.post("/v1/completions", json={"model": "words", "prompt": "a b"})
    await api.http.get("/whatever/" + "x" * 50)
    text = (await api.http.get("/metrics")).text
    for line in (
        'pyagent_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
        'pyagent_http_requests_total{method="GET",route="other",status="404"} 1.0',
        'pyagent_prompt_tokens_total{model="words"} 2.0',
        'pyagent_completion_tokens_total{model="words"} 16.0',
        'pyagent_generations_total{model="words",outcome="length"} 1.0',
        'pyagent_ttft_seconds_count{model="words"} 1.0',
        'pyagent_mesh_refused_total{code="b"} 3.0',
        "pyagent_peers 4.0",
        "pyagent_process_resident_bytes",
    ):
        assert line in text, text
    assert "xxxx" not in text


async def test_placements(api):
    shown = await api.http.get("/api/v1/placements", headers=api.auth)
    assert shown.json() == {"placements": []}
    body = {"model": "words", "ranks": 2, "standbys": 1, "spares": 0}
    wanted = LoadRequest(model="words", ranks=2, standbys=1, spares=0)
    for verb in ("plan", "apply"):
        reply = await api.http.post(f"/api/v1/placements/{verb}", json=body, headers=api.auth)
        first, last = lines(reply.text)
        assert first["progress"]["text"] == "planning"
        assert last["done"]["epoch"] == 7
        assert api.services.calls[-1] == wanted
    drained = await api.http.post(
        "/api/v1/placements/drain", json={"node": "bob"}, headers=api.auth
    )
    *_, last = lines(drained.text)
    assert last["done"] == {"peer_id": "12D3KooWTest", "name": "bob", "draining": True}
    for path, bad, parameter in (
        ("plan", {"model": "m", "standbys": "x"}, "standbys"),
        ("apply", {"ranks": 2}, None),
        ("drain", {"node": 5}, "node"),
        ("drain", {"node": "a", "undo": "no"}, "undo"),
    ):
        reply = await api.http.post(f"/api/v1/placements/{path}", json=bad, headers=api.auth)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == parameter
    denied = await api.http.post("/api/v1/placements/drain", json={"node": "bob"})
    assert denied.status_code == 401
