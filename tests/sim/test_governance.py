"""Operators' verbs over real Raft engines and stewards on a simulated network."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest, PeerId, Rank, Slice
from pyagent_node.consensus.commands import (
    AdmitMember,
    ModelRecord,
    RegisterModel,
    SetPlacement,
)
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.raft import RaftEngine, open_raft
from pyagent_node.consensus.single import open_single
from pyagent_node.consensus.state import is_member
from pyagent_node.consensus.voters import DOWN_SECONDS
from pyagent_node.node.api.mesh_schema import (
    PromoteRequest,
    RemoveMemberRequest,
    RevokeRequest,
    SettingRequest,
    SettingsReply,
    TransferRequest,
    VotersRequest,
)
from pyagent_node.node.certificates import DAY, Certificate, issue
from pyagent_node.node.genesis import Genesis, Role, new_genesis
from pyagent_node.node.governance import Governance
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.log_check import AskChain, Chain, LogCheck
from pyagent_node.node.membership import Membership, enforce
from pyagent_node.node.profiles import MeshProfile
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.node.steward import Steward
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network

NOW = 1_800_000_000
MODEL = Digest("1" * 64)


def key(name: str) -> NodeKey:
    return NodeKey(hashlib.sha256(name.encode()).digest())


def peer(name: str) -> PeerId:
    return key(name).peer_id


AUTHORITY = key("authority")
GENESIS: Genesis = new_genesis(
    "meadow",
    "private",
    authority=AUTHORITY.peer_id,
    writer=peer("a"),
    created=NOW,
    nonce=bytes(16),
    engine="raft-rs",
)


def certificate(name: str, role: Role) -> bytes:
    shown = Certificate(GENESIS.mesh_id, peer(name), name, role, NOW, NOW + DAY)
    return issue(AUTHORITY, shown)


class Life:
    """A running node: its parts, and what ends it."""

    engine: RaftEngine
    governance: Governance
    rpc: Rpc

    def __init__(self, mesh: SimulatedMesh) -> None:
        self.mesh = mesh
        self.scope = trio.CancelScope()
        self.over = trio.Event()


class Town:
    """Nodes of a private mesh; ``a`` creates it and holds its authority key."""

    def __init__(self, network: SimulatedNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.rng = random.Random(1)
        self.lives: dict[str, Life] = {}
        self.stores: dict[str, MemoryLog] = {}

    async def start(self, name: str, role: Role = "voter") -> Life:
        life: Life = await self.nursery.start(self._live, name, role)
        return life

    async def _live(self, name: str, role: Role, task_status: trio.TaskStatus[Life]) -> None:
        profile = MeshProfile(
            GENESIS, name=name, role=role, psk=None, certificate=certificate(name, role)
        )
        founder = name not in self.stores and name == "a"
        membership = Membership(profile, clock=lambda: NOW)
        mesh = self.network.node(peer(name), name=name, role=role, authoriser=membership)
        life = Life(mesh)
        try:
            for other in self.lives.values():
                await mesh.connect(other.mesh.addresses[0])
            async with AsyncExitStack() as stack:
                life.engine = await stack.enter_async_context(
                    open_raft(
                        mesh,
                        self.stores.setdefault(name, MemoryLog()),
                        founder=founder,
                        role=role,
                        authorise=membership.authorise,
                        rng=self.rng,
                        new_request=lambda: self.rng.randbytes(16),
                    )
                )
                membership.bind(life.engine)
                life.rpc = await stack.enter_async_context(open_rpc(mesh))
                check = LogCheck(mesh, life.engine, life.rpc)
                life.governance = Governance(
                    mesh, life.engine, membership, check, clock=lambda: NOW
                )
                nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(nursery.cancel_scope.cancel)
                steward = Steward(mesh, life.engine, clock=lambda: NOW)
                nursery.start_soon(steward.run)
                nursery.start_soon(enforce, life.engine, lambda: self._recheck(life))
                self.lives[name] = life
                task_status.started(life)
                with life.scope:
                    await trio.sleep_forever()
        finally:
            self.lives.pop(name, None)
            self.network.crash(peer(name))
            life.over.set()

    def _recheck(self, life: Life) -> None:
        """Cut off who is out, as the real adapter does."""
        for other in life.mesh.peers():
            record = life.engine.state.members.get(other.peer_id)
            if record is not None and not is_member(record):
                self.network.cut(life.mesh.peer_id, other.peer_id)

    async def stop(self, *names: str) -> None:
        for name in names:
            life = self.lives[name]
            life.scope.cancel()
            await life.over.wait()

    async def found(self, others: str) -> Governance:
        life = await self.start("a")
        await self.admit("a")
        for name in others:
            await self.admit(name)
            await self.start(name)
        size = 3 if len(others) in (2, 3) else 1
        await self.until(lambda: len(self.voters()) == size)
        return life.governance

    async def admit(self, name: str, role: Role = "voter") -> None:
        await self.lives["a"].engine.propose(
            AdmitMember(peer(name), name, role, certificate(name, role), NOW)
        )

    def voters(self, at: str = "a") -> str:
        names = {peer(name): name for name in "abcdefg"}
        return "".join(sorted(names[p] for p in self.lives[at].engine.status().voters))

    async def until(self, what: object, seconds: float = 120.0) -> None:
        assert callable(what)
        with trio.fail_after(seconds):
            while not what():  # noqa: ASYNC110 - no one event tells
                await trio.sleep(0.05)


@asynccontextmanager
async def open_town() -> AsyncIterator[Town]:
    async with open_network(latency=0.002) as network, trio.open_nursery() as nursery:
        town = Town(network, nursery)
        yield town
        await town.stop(*list(town.lives))


async def refused(work: object) -> PyAgentError:
    assert hasattr(work, "__await__")
    with pytest.raises(PyAgentError) as caught:
        await work
    assert caught.value.message
    return caught.value


def names(views: Iterable[object]) -> list[str]:
    return [str(view.name) for view in views if getattr(view, "voter", True)]  # type: ignore[attr-defined]


def value(reply: SettingsReply, name: str) -> int:
    (setting,) = [each for each in reply.settings if each.name == name]
    return setting.value


async def test_the_voters_are_shown_and_chosen(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("bcd")
        view = await ann.raft()
        assert (view.leader_name, view.missing, view.engine) == ("a", 0, "raft-rs")
        assert view.chain
        assert [f.matched is not None for f in view.followers] == [True] * 4
        view = await ann.set_voters(VotersRequest(nodes=("a", "c", peer("d"))))
        assert names(view.followers) == ["a", "c", "d"]
        members = (await ann.members()).members
        assert {m.name: (m.duty, m.vote) for m in members} == {
            "a": ("leader", "always"),
            "b": ("learner", "auto"),
            "c": ("voter", "always"),
            "d": ("voter", "always"),
        }
        assert value(await ann.settings(), "voters_max") == 3
        await ann.set_voters(VotersRequest())
        assert value(await ann.settings(), "voters_max") == 7
        assert (await ann.transfer(TransferRequest("c"))).leader_name == "c"
        assert (await town.lives["b"].governance.raft()).leader_name == "c"
        for wrong, code in (
            (("a", "b"), "bad_voters"),
            (("zoe",), "node_not_found"),
            (("",), "node_not_found"),
            (("x" * 5000,), "node_not_found"),
        ):
            assert (await refused(ann.set_voters(VotersRequest(nodes=wrong)))).code == code
        assert (await refused(ann.transfer(TransferRequest("d" * 99)))).code == "node_not_found"
        bob = town.lives["b"].governance
        error = await refused(bob.set_voters(VotersRequest(nodes=("a",))))
        assert error.code == "not_authority"
        assert "Do it on a (" in str(error)


async def test_a_member_leaves_and_is_out(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("bcd")
        leaving = next(n for n in "bcd" if n in town.voters() and n != "a")
        gone = await ann.remove(RemoveMemberRequest(node=leaving))
        assert gone.status == "removed"
        await town.until(lambda: leaving not in town.voters() and len(town.voters()) == 3)
        await town.until(lambda: leaving not in {p.name for p in town.lives["a"].mesh.peers()}, 5.0)
        assert (await refused(ann.remove(RemoveMemberRequest(node=leaving)))).code == (
            "member_not_found"
        )
        shut = await ann.revoke(RevokeRequest(node=leaving, reason="and for ever"))
        assert (shut.status, shut.detail) == ("revoked", "and for ever")
        error = await refused(ann.remove(RemoveMemberRequest(node="a")))
        assert error.code == "cannot_remove_authority"
        error = await refused(ann.revoke(RevokeRequest(node="a", reason="x")))
        assert error.code == "cannot_revoke_writer"
        error = await refused(ann.promote(PromoteRequest(node=leaving)))
        assert error.code == "member_not_found"


async def test_any_member_may_leave_by_itself(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("b")
        bob = town.lives["b"].governance
        await town.until(lambda: len(town.lives["b"].engine.state.members) == 2)
        assert (await refused(bob.remove(RemoveMemberRequest(node="a")))).code == (
            "cannot_remove_authority"
        )
        await bob.remove(RemoveMemberRequest(node="b"))
        await town.until(lambda: not town.lives["a"].mesh.peers())
        members = {m.name: m.status for m in (await ann.members()).members}
        assert members == {"a": "member", "b": "removed"}


async def test_of_two_left_of_three_one_may_go_all_the_same(autojump_clock: MockClock) -> None:
    """Its vote is needed until others decide, so it gives it up first."""
    async with open_town() as town:
        ann = await town.found("bc")
        await town.stop("c")
        await trio.sleep(DOWN_SECONDS + 5)
        assert town.voters() == "abc"
        await ann.remove(RemoveMemberRequest(node="b"))
        assert town.voters() == "a"
        await ann.change_setting(SettingRequest(name="spares", value=2))


async def test_who_is_shut_out_at_once_takes_no_majority_along(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("bcd")
        rest = [name for name in town.voters() if name != "a"]
        spare = next(name for name in "bcd" if name not in rest)
        await town.stop(rest[0], spare)
        began = trio.current_time()
        await ann.revoke(RevokeRequest(node=rest[1], reason="x"))
        assert trio.current_time() - began < 10
        assert town.voters() == "a"
        await ann.change_setting(SettingRequest(name="spares", value=2))


async def test_without_a_majority_nobody_goes(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("bc")
        await town.stop("b", "c")
        await trio.sleep(10)
        assert (await ann.raft()).missing == 1
        for work in (
            ann.revoke(RevokeRequest(node="b", reason="x")),
            ann.remove(RemoveMemberRequest(node="c")),
            ann.set_voters(VotersRequest(nodes=("a",))),
            ann.change_setting(SettingRequest(name="spares", value=2)),
        ):
            error = await refused(work)
            assert error.code == "no_leader"
            assert "1 of 3 voters can be reached and 2 are needed" in str(error)
        assert (await ann.members()).members[1].status == "member"


async def test_a_rank_is_not_taken_away_by_accident(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("b")
        record = ModelRecord(MODEL, "m", 1, "llama", 4, 1, 1, 1, MODEL, 1)
        await town.lives["a"].engine.propose(RegisterModel(record))
        ranks = (Rank(0, Slice(0, 4, True), peer("b")),)
        await town.lives["a"].engine.propose(SetPlacement(MODEL, ranks, 64, 1, 0))
        error = await refused(ann.remove(RemoveMemberRequest(node="b")))
        assert error.code == "member_in_use"
        assert "drain b" in str(error)
        assert (await ann.remove(RemoveMemberRequest(node="b", force=True))).status == "removed"


async def test_settings_are_checked_before_they_travel(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("")
        for name, value, code in (
            ("colour", 1, "unknown_setting"),
            ("", 1, "unknown_setting"),
            ("spares", -1, "bad_setting"),
            ("spares", 1 << 70, "bad_setting"),
        ):
            request = SettingRequest(name=name, value=value)
            assert (await refused(ann.change_setting(request))).code == code
        reply = await ann.change_setting(SettingRequest(name="session_ttl", value=99))
        assert next(s.value for s in reply.settings if s.name == "session_ttl") == 99


async def test_logs_are_compared(autojump_clock: MockClock) -> None:
    async with open_town() as town:
        ann = await town.found("bc")
        await trio.sleep(1)
        reply = await ann.verify()
        assert reply.good
        assert {n.name: n.verdict for n in reply.nodes} == {"b": "same", "c": "same"}
        assert (await ann.snapshot()).index == reply.index
        assert (await ann.verify()).good
        await town.stop("c")
        reply = await ann.verify()
        assert {n.name: n.verdict for n in reply.nodes} == {"b": "same", "c": "unreachable"}
        assert reply.good


@pytest.mark.parametrize(
    ("applied", "chain", "verdict"),
    [
        (None, b"\0" * 32, "different"),
        (3, b"\0" * 32, "different"),
        (None, None, "not_kept"),
        (-5, b"\0" * 32, "not_kept"),
        (1 << 60, b"\0" * 32, "different"),
        (0, b"", "different"),
    ],
)
async def test_a_liar_is_told_apart(
    autojump_clock: MockClock, applied: int | None, chain: bytes | None, verdict: str
) -> None:
    async with open_network(latency=0.001) as network:
        mesh, liar = network.node(peer("a")), network.node(peer("b"), name="b")
        async with (
            open_single(mesh, MemoryLog(), leader=peer("a")) as engine,
            open_rpc(mesh) as rpc,
            open_rpc(liar) as theirs,
        ):

            async def lie(who: PeerId, ask: AskChain, tail: bytes) -> tuple[Chain, bytes]:
                await trio.lowlevel.checkpoint()
                return Chain(ask.index, ask.index if applied is None else applied, chain), b""

            theirs.register(AskChain, lie)
            await mesh.connect(liar.addresses[0])
            for n in range(5):
                await engine.propose(AdmitMember(peer(f"p{n}"), f"p{n}", "voter", b"c", 1))
            reply = await LogCheck(mesh, engine, rpc).compare({})
            assert [node.verdict for node in reply.nodes] == [verdict]
            assert reply.good is (verdict != "different")


async def test_an_engine_of_one_writer_has_no_voters(autojump_clock: MockClock) -> None:
    profile = MeshProfile(
        GENESIS, name="a", role="voter", psk=None, certificate=certificate("a", "voter")
    )
    async with (
        open_network() as network,
        open_single(mesh := network.node(peer("a")), MemoryLog(), leader=peer("a")) as engine,
        open_rpc(mesh) as rpc,
    ):
        check = LogCheck(mesh, engine, rpc)
        membership = Membership(profile, clock=lambda: NOW)
        it = Governance(mesh, engine, membership, check, clock=lambda: NOW)
        view = await it.raft()
        assert (view.leader_name, view.missing, len(view.followers)) == ("a", 0, 1)
        assert (await refused(it.set_voters(VotersRequest(nodes=("a",))))).code == "one_writer"
        assert (await refused(it.transfer(TransferRequest("a")))).code == "one_writer"
        assert (await it.verify()).good
        await engine.propose(AdmitMember(peer("b"), "b", "voter", certificate("b", "voter"), NOW))
        assert (await it.remove(RemoveMemberRequest(node="b"))).status == "removed"
