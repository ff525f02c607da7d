"""The routes about the mesh: what they pass on, and what they refuse."""

from __future__ import annotations

import pytest

from pyagent_node.base.errors import Conflict, Refused, Unavailable
from pyagent_node.node.api.mesh_schema import (
    PromoteRequest,
    RemoveMemberRequest,
    RevokeRequest,
    SettingRequest,
    TransferRequest,
    VotersRequest,
)

GETS = ("/raft", "/members", "/settings")
POSTS = (
    ("/raft/voters", {"nodes": ["a", "b", "c"]}, VotersRequest(nodes=("a", "b", "c"))),
    ("/raft/voters", {}, VotersRequest()),
    ("/raft/transfer", {"node": "b"}, TransferRequest("b")),
    ("/raft/snapshot", None, "snapshot"),
    ("/raft/verify", None, "verify"),
    ("/members/promote", {"node": "b"}, PromoteRequest(node="b")),
    ("/members/promote", {"node": "b", "vote": "never"}, PromoteRequest(node="b", vote="never")),
    ("/members/remove", {"node": "b"}, RemoveMemberRequest(node="b")),
    ("/members/remove", {"node": "b", "force": True}, RemoveMemberRequest(node="b", force=True)),
    ("/members/revoke", {"node": "b", "reason": "x"}, RevokeRequest(node="b", reason="x")),
    ("/settings", {"name": "spares", "value": 2}, SettingRequest(name="spares", value=2)),
    ("/settings", {"name": "spares"}, SettingRequest(name="spares")),
)


@pytest.mark.parametrize("path", GETS)
async def test_reading(api, path):
    reply = await api.http.get(f"/api/v1{path}", headers=api.auth)
    assert reply.status_code == 200
    assert reply.json()


@pytest.mark.parametrize(("path", "body", "call"), POSTS)
async def test_changing(api, path, body, call):
    reply = await api.http.post(f"/api/v1{path}", json=body, headers=api.auth)
    assert reply.status_code == 200
    assert api.services.mesh.calls[0] == call


@pytest.mark.parametrize("path", [*GETS, *(path for path, *_ in POSTS)])
async def test_without_the_token_nothing(api, path):
    for method in ("GET", "POST"):
        reply = await api.http.request(method, f"/api/v1{path}", json={})
        assert reply.status_code in (401, 403)
    assert api.services.mesh.calls == []


@pytest.mark.parametrize(
    ("path", "body", "parameter"),
    [
        ("/raft/voters", {"nodes": "abc"}, "nodes"),
        ("/raft/voters", {"nodes": [1]}, "nodes[0]"),
        ("/raft/voters", [], None),
        ("/raft/transfer", {}, None),
        ("/members/promote", {"node": "b", "vote": "maybe"}, "vote"),
        ("/members/promote", {"node": 5}, "node"),
        ("/members/remove", {"node": "b", "force": "yes"}, "force"),
        ("/members/revoke", {"node": "b"}, None),
        ("/settings", {"name": "spares", "value": 1.5}, "value"),
    ],
)
async def test_bad_bodies(api, path, body, parameter):
    reply = await api.http.post(f"/api/v1{path}", json=body, headers=api.auth)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == parameter
    assert api.services.mesh.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refused("no", code="not_authority"), 403),
        (Conflict("no", code="would_lose_quorum"), 409),
        (Unavailable("no", code="no_leader"), 503),
    ],
)
async def test_errors_arrive_as_what_they_were(api, error, status):
    api.services.mesh.error = error
    for path, body, _ in POSTS:
        reply = await api.http.post(f"/api/v1{path}", json=body, headers=api.auth)
        assert reply.status_code == status
        assert reply.json()["error"]["pyagent"]["code"] == error.code
