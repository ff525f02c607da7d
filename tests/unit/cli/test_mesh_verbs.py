"""``raft``, ``member`` and ``mesh settings``: words for people, JSON for programs."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from functools import partial

import msgspec
import pytest
import trio

from pyagent_node.base.errors import Refused, Unavailable
from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import PeerId
from pyagent_node.node.api.mesh_schema import (
    FollowerView,
    PromoteRequest,
    RemoveMemberRequest,
    RevokeRequest,
    SettingRequest,
    TransferRequest,
    VotersRequest,
)
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api

from .conftest import Outcome, Run


@pytest.fixture
async def api(home: Home) -> AsyncIterator[SimulatedApi]:
    async with simulated_api() as running:
        write_atomic(home.token_path, TOKEN.encode() + b"\n")
        peer = PeerId("12D3KooWTest")
        home.write_state(DaemonState(os.getpid(), running.url, peer, None, "0", time.time()))
        yield running


async def on(run: Run, *arguments: str) -> Outcome:
    return await trio.to_thread.run_sync(partial(run, *arguments))


async def test_status(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "raft", "status", "--json")).json["term"] == 2
    text = (await on(run, "raft", "status")).out
    assert "the leader is ann" in text
    assert "learner" in text
    mesh = api.services.mesh
    trouble = Unavailable("1 of 3 voters can be reached.", code="no_leader").to_info()
    mesh.view = msgspec.structs.replace(mesh.view, missing=1, leader_name=None, problem=trouble)
    text = (await on(run, "raft", "status")).out
    assert "1 voter is missing: nothing can be decided" in text
    mesh.view = msgspec.structs.replace(mesh.view, missing=0, joint=True, commit=12)
    text = (await on(run, "raft", "status")).out
    assert "1 of 3 voters" in text
    assert "entry 9 of 12" in text
    assert "under way" in text


async def test_voters(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "raft", "voters")).out == "ann (leader)\n"
    shown = (await on(run, "raft", "voters", "--json")).json
    assert [v["name"] for v in shown["voters"]] == ["ann"]  # type: ignore[attr-defined]
    outcome = await on(run, "raft", "voters", "--set", "ann, bob,cat")
    assert api.services.mesh.calls[-1] == VotersRequest(nodes=("ann", "bob", "cat"))
    assert "Not all of them vote yet" in outcome.err
    await on(run, "raft", "voters", "--auto")
    assert api.services.mesh.calls[-1] == VotersRequest()
    calls = len(api.services.mesh.calls)
    assert (await on(run, "raft", "voters", "--auto", "--set", "a")).status == 2
    assert (await on(run, "raft", "voters", "--set", " , ")).status == 2
    assert len(api.services.mesh.calls) == calls


async def test_transfer_and_snapshot(api: SimulatedApi, run: Run) -> None:
    assert (await on(run, "raft", "transfer", "bob")).out == "ann leads.\n"
    assert api.services.mesh.calls == [TransferRequest("bob")]
    assert "after entry 9" in (await on(run, "raft", "snapshot")).out
    assert (await on(run, "raft", "snapshot", "--json")).json == {"index": 9}


async def test_verify_tells_by_its_exit_code(api: SimulatedApi, run: Run) -> None:
    outcome = await on(run, "raft", "verify")
    assert outcome.status == 0
    assert "bob  the same log" in outcome.out
    api.services.mesh.same = False
    outcome = await on(run, "raft", "verify")
    assert outcome.status == 1
    assert "bob  ANOTHER LOG" in outcome.out
    outcome = await on(run, "raft", "verify", "--json")
    assert outcome.status == 1
    assert outcome.json["good"] is False


async def test_members(api: SimulatedApi, run: Run) -> None:
    mesh = api.services.mesh
    mesh.member = msgspec.structs.replace(
        mesh.member, vote="never", draining=True, expires=time.time() + 86_400 * 9, authority=True
    )
    text = (await on(run, "member", "list")).out
    assert "authority, vote never, draining" in text
    assert "for 8 d" in text
    mesh.member = msgspec.structs.replace(mesh.member, status="revoked", detail="stolen")
    assert "bob" not in (await on(run, "member", "list")).out
    assert "revoked: stolen" in (await on(run, "member", "list", "--all")).out
    assert (await on(run, "member", "list", "--json")).json == {"members": []}


async def test_changing_members(api: SimulatedApi, run: Run) -> None:
    mesh = api.services.mesh
    assert "is to vote" in (await on(run, "member", "promote", "bob")).out
    assert mesh.calls[-1] == PromoteRequest(node="bob")
    assert "no more" in (await on(run, "member", "promote", "bob", "--vote", "never")).out
    assert (await on(run, "member", "remove", "bob")).out == "bob left the mesh.\n"
    await on(run, "member", "remove", "bob", "--force")
    assert mesh.calls[-1] == RemoveMemberRequest(node="bob", force=True)
    assert "shut out" in (await on(run, "member", "revoke", "bob", "--reason", "stolen")).out
    assert mesh.calls[-1] == RevokeRequest(node="bob", reason="stolen")
    mesh.error = Refused("no", code="not_authority", remedy="Do it on ann.")
    outcome = await on(run, "member", "revoke", "bob", "--json")
    assert outcome.status == Refused.exit_code
    assert outcome.error["code"] == "not_authority"
    assert "Do it on ann." in (await on(run, "member", "remove", "bob")).err


async def test_settings(api: SimulatedApi, run: Run) -> None:
    assert "standbys = 1  (0 to 4, default 1: m)" in (await on(run, "mesh", "settings")).out
    await on(run, "mesh", "settings", "standbys", "3")
    assert SettingRequest(name="standbys", value=3) in api.services.mesh.calls
    await on(run, "mesh", "settings", "standbys", "default")
    assert SettingRequest(name="standbys", value=None) in api.services.mesh.calls
    for wrong in (["standbys", "many"], ["standbys", "1.5"], ["colour"], ["standbys", "9" * 30]):
        outcome = await on(run, "mesh", "settings", *wrong, "--json")
        assert outcome.status == 2
        assert outcome.error["code"] in ("bad_setting", "unknown_setting")


def test_recover_asks_first_and_says_what_is_wrong(run: Run, home: Home) -> None:
    outcome = run("raft", "recover", "--json")
    assert outcome.error["code"] == "not_confirmed"
    outcome = run("raft", "recover", "--yes-this-loses-data", "--json")
    assert outcome.error["code"] == "no_mesh"
    assert run("mesh", "create", "meadow").status == 0
    outcome = run("raft", "recover", "--yes-this-loses-data", "--json")
    assert outcome.error["code"] == "no_log"
    with home.lock():
        outcome = run("raft", "recover", "--yes-this-loses-data", "--json")
        assert outcome.error["code"] == "in_use"
    assert run("mesh", "create", "old", "--engine", "single").status == 0
    outcome = run("raft", "recover", "--mesh", "old", "--yes-this-loses-data", "--json")
    assert outcome.error["code"] == "one_writer"


async def test_a_voter_that_is_away_is_marked(api: SimulatedApi, run: Run) -> None:
    mesh = api.services.mesh
    away = FollowerView(
        peer_id=PeerId("p"), name="dan", voter=True, leader=False, present=False, matched=None
    )
    mesh.view = msgspec.structs.replace(mesh.view, followers=(*mesh.view.followers, away))
    assert (await on(run, "raft", "voters")).out == "ann (leader)\ndan  (away)\n"
