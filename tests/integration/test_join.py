"""Joining over real libp2p on loopback: tickets redeemed once, meshes kept apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from pyagent_node.base.errors import PyAgentError, Refused, Unavailable
from pyagent_node.consensus.commands import RevokeMember
from pyagent_node.consensus.log import FileLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.single import open_single
from pyagent_node.node.certificates import DEFAULT_LIFETIME, read_certificate
from pyagent_node.node.genesis import Visibility
from pyagent_node.node.home import Home
from pyagent_node.node.joining import join, keep_fresh
from pyagent_node.node.membership import Membership, enforce
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig
from pyagent_node.node.profiles import (
    MeshProfile,
    active_profile,
    create_mesh,
    load_profile,
    mesh_ids,
)
from pyagent_node.node.registrar import Registrar
from pyagent_node.node.tickets import Ticket, make_ticket

pytestmark = pytest.mark.daemons

NOW = 1_800_000_000


class Clock:
    """Unix seconds that the test sets."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


class Running(NamedTuple):
    """One node in this process."""

    home: Home
    mesh: Libp2pMesh
    membership: Membership
    consensus: Consensus
    registrar: Registrar | None

    def ticket(self, role: str = "learner", seconds: float = 3600) -> Ticket:
        return make_ticket(
            self.membership.profile,
            role=role,  # type: ignore[arg-type]
            seconds=seconds,
            addresses=self.mesh.addresses,
            now=NOW,
        )


@asynccontextmanager
async def running(home: Home, profile: MeshProfile, clock: Clock) -> AsyncIterator[Running]:
    key = home.node_key()
    membership = Membership(profile, clock=clock)
    config = MeshConfig(
        key=key,
        membership=membership,
        psk=profile.psk,
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=profile.bootstrap,
    )
    async with (
        open_mesh(config) as mesh,
        open_single(
            mesh,
            FileLog(home.log_dir(profile.mesh_id)),
            leader=profile.genesis.writer,
            role=profile.role,
        ) as consensus,
        trio.open_nursery() as nursery,
    ):
        membership.bind(consensus)
        registrar = None
        if profile.authority_key is not None:
            registrar = Registrar(membership, consensus, mesh.peer_id, clock=clock)
            registrar.attach(mesh)
            await registrar.admit_self()
        nursery.start_soon(enforce, consensus, mesh.recheck)
        yield Running(home, mesh, membership, consensus, registrar)
        nursery.cancel_scope.cancel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def homes(tmp_path: Path) -> Callable[[str], Home]:
    return lambda name: Home(tmp_path / name)


def created(home: Home, clock: Clock, visibility: Visibility = "private") -> MeshProfile:
    return create_mesh(home, "meadow", visibility, node_name="ann", clock=clock)


async def peers_become(mesh: Libp2pMesh, names: list[str]) -> None:
    with trio.fail_after(20):
        async with mesh.events() as events:
            while [peer.name for peer in mesh.peers()] != names:
                await anext(aiter(events))


async def refused(work: Callable[[], object]) -> PyAgentError:
    with pytest.raises(PyAgentError) as caught:
        await work()  # type: ignore[misc]
    return caught.value


async def test_join_then_take_part(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        ticket = first.ticket()
        profile = await join(bob, ticket.text, name="bob", clock=clock)
        assert (profile.name, profile.role) == ("bob", "learner")
        assert active_profile(bob).mesh_id == profile.mesh_id == first.membership.profile.mesh_id
        own = read_certificate(profile.certificate)
        assert own.expires == NOW + DEFAULT_LIFETIME
        async with running(bob, profile, clock) as second:
            await second.consensus.read_barrier()
            members = second.consensus.state.members
            assert {m.name: m.role for m in members.values()} == {"ann": "voter", "bob": "learner"}
            assert list(second.consensus.state.burnt_tickets) == [ticket.id]
            assert [p.name for p in second.mesh.peers()] == ["ann"]
            await peers_become(first.mesh, ["bob"])


async def test_same_peer_again_gets_its_certificate_again(
    homes: Callable[[str], Home], clock: Clock
) -> None:
    """The first answer was lost: nothing was saved, the ticket still works for this peer."""
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        ticket = first.ticket()
        profile = await join(bob, ticket.text, name="bob", clock=clock)
        (bob.mesh_dir(profile.mesh_id) / "mesh.json").unlink()
        again = await join(bob, ticket.text, name="bob", clock=clock)
        assert again.certificate == profile.certificate
        assert await join(bob, ticket.text, name="bob", clock=clock)  # now without a network


async def test_used_ticket(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob, eve = homes("ann"), homes("bob"), homes("eve")
    async with running(ann, created(ann, clock), clock) as first:
        text = first.ticket().text
        await join(bob, text, name="bob", clock=clock)
        error = await refused(lambda: join(eve, text, name="eve", clock=clock))
    assert isinstance(error, Refused)
    assert error.code == "ticket_used"
    assert mesh_ids(eve) == []


async def test_two_at_once_one_wins(homes: Callable[[str], Home], clock: Clock) -> None:
    ann = homes("ann")
    outcomes: list[str] = []
    async with running(ann, created(ann, clock), clock) as first:
        text = first.ticket().text

        async def attempt(name: str) -> None:
            try:
                await join(homes(name), text, name=name, clock=clock)
                outcomes.append("joined")
            except Refused as error:
                outcomes.append(error.code)

        async with trio.open_nursery() as nursery:
            for name in ("bob", "eve", "mallory"):
                nursery.start_soon(attempt, name)
        assert len(first.consensus.state.members) == 2
    assert sorted(outcomes) == ["joined", "ticket_used", "ticket_used"]


async def test_expired_ticket(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob = homes("ann"), homes("bob")
    slow = Clock()
    async with running(ann, created(ann, clock), clock) as first:
        text = first.ticket(seconds=60).text
        clock.now += 60
        for theirs in (clock, slow):  # refused here, and there when our clock is wrong
            error = await refused(lambda: join(bob, text, name="bob", clock=theirs))  # noqa: B023
            assert error.code == "ticket_expired"
        assert not first.consensus.state.burnt_tickets
    assert mesh_ids(bob) == []


async def test_burnt_tickets_survive_a_restart(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob, eve = homes("ann"), homes("bob"), homes("eve")
    async with running(ann, created(ann, clock), clock) as first:
        ticket = first.ticket()
        await join(bob, ticket.text, name="bob", clock=clock)
    async with running(ann, active_profile(ann), clock) as first:
        moved = make_ticket(
            first.membership.profile,
            role="learner",
            seconds=3600,
            addresses=first.mesh.addresses,
            now=NOW,
        )
        assert moved.id != ticket.id
        assert ticket.id in first.consensus.state.burnt_tickets
        assert await join(eve, moved.text, name="bob", clock=clock)
        names = sorted(m.name for m in first.consensus.state.members.values())
        assert names == ["ann", "bob", "bob-2"]


async def test_authority_is_away(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        text = first.ticket().text
    error = await refused(lambda: join(bob, text, name="bob", clock=clock))
    assert isinstance(error, Unavailable)
    assert error.code == "peer_unreachable"
    assert error.remedy
    assert mesh_ids(bob) == []


async def test_ticket_of_another_authority(homes: Callable[[str], Home], clock: Clock) -> None:
    """A ticket that another mesh's authority made, pointing at this node."""
    ann, eve, bob = homes("ann"), homes("eve"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        theirs = created(eve, clock)
        forged = MeshProfile(
            first.membership.profile.genesis,
            name="eve",
            role="voter",
            psk=first.membership.profile.psk,
            certificate=theirs.certificate,
            authority_key=theirs.authority_key,
        )
        error = await refused(
            lambda: join(
                bob,
                make_ticket(
                    forged, role="voter", seconds=60, addresses=first.mesh.addresses, now=NOW
                ).text,
                name="bob",
                clock=clock,
            )
        )
        assert error.code == "ticket_forged"


async def test_no_certificate_and_expired_certificate(
    homes: Callable[[str], Home], clock: Clock
) -> None:
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        profile = await join(bob, first.ticket().text, name="bob", clock=clock)
        address = first.mesh.addresses[0]

        async def dial(certificate: bytes) -> str:
            shown = Membership(profile.with_certificate(certificate, "learner", "bob"), clock=clock)
            config = MeshConfig(key=bob.node_key(), membership=shown, psk=profile.psk)
            async with open_mesh(config) as mesh:
                return (await refused(lambda: mesh.connect(address))).code

        assert await dial(b"") == "no_certificate"
        assert await dial(profile.certificate[:-1] + b"\xff") == "certificate_forged"
        clock.now += DEFAULT_LIFETIME
        assert await dial(profile.certificate) == "certificate_expired"


async def test_revoked_member_is_thrown_out(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        ticket = first.ticket()
        profile = await join(bob, ticket.text, name="bob", clock=clock)
        async with running(bob, profile, clock) as second:
            await second.consensus.read_barrier()
            await first.consensus.propose(RevokeMember(second.mesh.peer_id, "stolen"))
            await peers_become(first.mesh, [])
            error = await refused(lambda: second.mesh.connect(first.mesh.addresses[0]))
            assert error.code == "revoked"
        (bob.mesh_dir(profile.mesh_id) / "mesh.json").unlink()
        error = await refused(lambda: join(bob, ticket.text, name="bob", clock=clock))
        assert error.code == "revoked"
        error = await refused(lambda: join(bob, first.ticket().text, name="bob", clock=clock))
        assert error.code == "revoked"


async def test_public_mesh_needs_no_permission(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob, eve = homes("ann"), homes("bob"), homes("eve")
    async with running(ann, created(ann, clock, "public"), clock) as first:
        ticket = first.ticket("client")
        assert ticket.open
        for home, name in ((bob, "bob"), (eve, "eve")):
            profile = await join(home, ticket.text, name=name, clock=clock)
            assert profile.certificate == b""
            async with running(home, profile, clock) as member:
                await member.consensus.read_barrier()
                (peer,) = [p for p in first.mesh.peers() if p.name == name]
                assert peer.role == "client"
        voter = first.ticket("voter")
        profile = await join(bob, voter.text, name="bob", clock=clock)
        assert profile.role == "voter"
        assert profile.certificate


async def test_certificate_is_renewed(homes: Callable[[str], Home], clock: Clock) -> None:
    ann, bob = homes("ann"), homes("bob")
    async with running(ann, created(ann, clock), clock) as first:
        profile = await join(bob, first.ticket().text, name="bob", clock=clock)
        async with running(bob, profile, clock) as second, trio.open_nursery() as nursery:
            clock.now += DEFAULT_LIFETIME // 2 + 1
            for node in (first, second):
                done = trio.Event()
                nursery.start_soon(
                    lambda node=node, done=done: keep_fresh(
                        node.home,
                        node.membership,
                        node.mesh,
                        node.home.node_key(),
                        clock=clock,
                        registrar=node.registrar,
                        renewed=lambda profile: done.set(),
                    )
                )
                with trio.fail_after(20):
                    await done.wait()
                saved = load_profile(node.home, profile.mesh_id)
                assert saved.certificate == node.membership.profile.certificate
                assert read_certificate(saved.certificate).issued == int(clock.now)
            nursery.cancel_scope.cancel()
