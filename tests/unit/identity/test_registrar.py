"""The node that admits, facing honest, hostile and slow strangers on a simulated network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Refused, Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import BurnTicket, RemoveMember, RevokeMember
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.single import SingleEngine, open_single
from pyagent_node.node.certificates import DAY, DEFAULT_LIFETIME, Certificate, issue
from pyagent_node.node.certificates import verify_certificate as verify
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.join_messages import (
    Admitted,
    Ask,
    Challenge,
    JoinMessage,
    NotAdmitted,
    Proof,
    Renew,
    receive,
    send,
)
from pyagent_node.node.joining import redeem, renew
from pyagent_node.node.membership import Membership
from pyagent_node.node.profiles import MeshProfile, create_mesh
from pyagent_node.node.registrar import MAX_AT_ONCE, MAX_SECONDS, Registrar
from pyagent_node.node.tickets import Ticket, issue_ticket, prove
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network

NOW = 1_800_000_000


class Meadow:
    """A mesh of one node that admits, and strangers around it."""

    def __init__(
        self, network: SimulatedNetwork, profile: MeshProfile, mesh: SimulatedMesh
    ) -> None:
        self.network = network
        self.profile = profile
        self.mesh = mesh
        self.now = float(NOW)
        self.consensus: SingleEngine
        self.registrar: Registrar

    def clock(self) -> float:
        return self.now

    def ticket(self, role: str = "learner") -> Ticket:
        return issue_ticket(
            self.profile,
            role=role,
            seconds=3600,
            addresses=self.mesh.addresses,
            now=self.now,  # type: ignore[arg-type]
        )

    async def stream(self, key: NodeKey) -> FrameStream:
        return await self.network.node(key.peer_id).open_join(self.mesh.addresses[0])

    async def join(self, key: NodeKey, ticket: Ticket, name: str = "bob") -> Certificate:
        stream = await self.stream(key)
        try:
            encoded = await redeem(stream, ticket, key, name=name, clock=self.clock)
        finally:
            self.network.crash(key.peer_id)
        return verify(encoded, self.profile.genesis, key.peer_id, self.now)


@pytest.fixture
async def meadow(tmp_path: Path) -> AsyncIterator[Meadow]:
    home = Home(tmp_path)
    profile = create_mesh(home, "meadow", "private", node_name="ann", clock=lambda: NOW)
    async with open_network(latency=0.01) as network:
        mesh = network.node(profile.genesis.writer)
        async with open_single(mesh, MemoryLog(), leader=mesh.peer_id) as consensus:
            it = Meadow(network, profile, mesh)
            it.consensus = consensus
            membership = Membership(profile, clock=it.clock)
            membership.bind(consensus)
            it.registrar = Registrar(membership, consensus, mesh.peer_id, clock=it.clock)
            it.registrar.attach(mesh)
            await it.registrar.admit_self()
            yield it


async def refusal(stream: FrameStream, *messages: JoinMessage | Frame) -> str:
    """Send ``messages``, skip challenges, and return the code of the refusal."""
    for message in messages:
        await (stream.send(message) if isinstance(message, Frame) else send(stream, message))
    while isinstance(answer := await receive(stream), Challenge):
        pass
    assert isinstance(answer, NotAdmitted)
    return answer.error.code


async def test_admission(autojump_clock: MockClock, meadow: Meadow) -> None:
    bob = NodeKey.generate()
    ticket = meadow.ticket()
    certificate = await meadow.join(bob, ticket)
    assert (certificate.name, certificate.role) == ("bob", "learner")
    member = meadow.consensus.state.members[bob.peer_id]
    assert (member.name, member.role) == ("bob", "learner")
    assert meadow.consensus.state.burnt_tickets == {ticket.id: bob.peer_id}


async def test_names_are_made_distinct(autojump_clock: MockClock, meadow: Meadow) -> None:
    names = [
        (await meadow.join(NodeKey.generate(), meadow.ticket(), name)).name
        for name in ("ann", "bob", "bob", "bob", "x" * 63, "x" * 63)
    ]
    assert names == ["ann-2", "bob", "bob-2", "bob-3", "x" * 63, "x" * 61 + "-2"]


async def test_another_ticket_can_change_the_role(
    autojump_clock: MockClock, meadow: Meadow
) -> None:
    bob = NodeKey.generate()
    first = await meadow.join(bob, meadow.ticket())
    second = await meadow.join(bob, meadow.ticket("voter"))
    assert (first.role, second.role) == ("learner", "voter")
    assert meadow.consensus.state.members[bob.peer_id].role == "voter"
    assert second.name == "bob"


async def test_withdrawn_ticket(autojump_clock: MockClock, meadow: Meadow) -> None:
    """The authority burns a ticket that it does not want used any more."""
    ticket = meadow.ticket()
    await meadow.consensus.propose(
        BurnTicket(ticket.id, meadow.mesh.peer_id, ticket.expires, at=NOW)
    )
    with pytest.raises(Refused) as caught:
        await meadow.join(NodeKey.generate(), ticket)
    assert caught.value.code == "ticket_used"


async def test_a_proof_is_of_use_to_its_peer_alone(
    autojump_clock: MockClock, meadow: Meadow
) -> None:
    """A ticket's public facts and somebody else's proof do not help."""
    ticket = meadow.ticket()
    eve = NodeKey.generate()
    ask = Ask(bytes.fromhex(ticket.id), ticket.role, ticket.expires, "eve")
    for secret, joiner in ((bytes(16), eve), (ticket.secret, NodeKey.generate())):
        stream = await meadow.stream(eve)
        await send(stream, ask)
        challenge = await receive(stream)
        assert isinstance(challenge, Challenge)
        proof = prove(
            secret,
            genesis=meadow.profile.genesis,
            ticket_id=ticket.id,
            joiner=joiner.peer_id,
            server=meadow.mesh.peer_id,
            nonce=challenge.nonce,
        )
        assert await refusal(stream, Proof(proof)) == "ticket_forged"
        meadow.network.crash(eve.peer_id)
    assert not meadow.consensus.state.burnt_tickets
    assert await meadow.join(NodeKey.generate(), ticket)


@pytest.mark.parametrize("change", ["role", "expires", "id"])
async def test_changed_facts_need_another_secret(
    autojump_clock: MockClock, meadow: Meadow, change: str
) -> None:
    ticket, eve = meadow.ticket(), NodeKey.generate()
    facts = {
        "id": bytes.fromhex(ticket.id),
        "role": str(ticket.role),
        "expires": ticket.expires,
    }
    facts[change] = {"id": bytes(16), "role": "voter", "expires": ticket.expires + 1}[change]  # type: ignore[assignment]
    stream = await meadow.stream(eve)
    await send(stream, Ask(name="eve", **facts))  # type: ignore[arg-type]
    challenge = await receive(stream)
    assert isinstance(challenge, Challenge)
    proof = prove(
        ticket.secret,
        genesis=meadow.profile.genesis,
        ticket_id=bytes(facts["id"]).hex(),  # type: ignore[arg-type]
        joiner=eve.peer_id,
        server=meadow.mesh.peer_id,
        nonce=challenge.nonce,
    )
    assert await refusal(stream, Proof(proof)) == "ticket_forged"


GARBAGE: list[tuple[list[JoinMessage | Frame], str]] = [
    ([Frame(b"")], "malformed_message"),
    ([Frame(b"\xc1" * 1000)], "malformed_message"),
    ([Frame(b"\x81\xa4type\xa5sneak")], "unknown_message"),
    ([Proof(b"")], "protocol_error"),
    ([Admitted(b"")], "protocol_error"),
    ([Ask(b"short", "learner", NOW + 60, "eve")], "malformed_message"),
    ([Ask(bytes(16), "king", NOW + 60, "eve")], "malformed_message"),
    ([Ask(bytes(16), "learner", -1, "eve")], "malformed_message"),
    ([Ask(bytes(16), "learner", 1 << 60, "eve")], "malformed_message"),
    ([Ask(bytes(16), "learner", NOW + 60, "e v e")], "bad_name"),
    ([Ask(bytes(16), "learner", NOW + 60, "eve"), Renew(b"")], "protocol_error"),
    ([Ask(bytes(16), "learner", NOW + 60, "eve"), Proof(b"")], "ticket_forged"),
    ([Renew(b"")], "no_certificate"),
    ([Renew(b"x" * 5000)], "certificate_forged"),
]


@pytest.mark.parametrize(("messages", "code"), GARBAGE)
async def test_garbage_is_refused_and_the_next_one_is_served(
    autojump_clock: MockClock, meadow: Meadow, messages: list[JoinMessage | Frame], code: str
) -> None:
    assert await refusal(await meadow.stream(NodeKey.generate()), *messages) == code
    assert await meadow.join(NodeKey.generate(), meadow.ticket())


async def test_a_stranger_that_says_nothing_is_let_go(
    autojump_clock: MockClock, meadow: Meadow
) -> None:
    stream = await meadow.stream(NodeKey.generate())
    begun = trio.current_time()
    assert await stream.receive() is None
    assert trio.current_time() - begun <= MAX_SECONDS + 1


async def test_only_so_many_at_once(autojump_clock: MockClock, meadow: Meadow) -> None:
    for _ in range(MAX_AT_ONCE):
        await meadow.stream(NodeKey.generate())
    await trio.sleep(0.1)
    ticket = meadow.ticket()
    with pytest.raises(LimitExceeded) as caught:
        await meadow.join(NodeKey.generate(), ticket)
    assert caught.value.code == "too_many_joins"
    await trio.sleep(MAX_SECONDS)
    assert await meadow.join(NodeKey.generate(), ticket)


async def test_renewal(autojump_clock: MockClock, meadow: Meadow) -> None:
    bob = NodeKey.generate()
    encoded = await redeem(
        await meadow.stream(bob), meadow.ticket(), bob, name="bob", clock=meadow.clock
    )
    profile = MeshProfile(
        meadow.profile.genesis, name="bob", role="learner", psk=b"", certificate=encoded
    )
    address = meadow.mesh.addresses[0]
    node = meadow.network.find(meadow.mesh.peer_id, bob.peer_id)

    async def again() -> Certificate:
        stream = await node.open_join(address)
        data = await renew(stream, profile, bob, clock=meadow.clock)
        return verify(data, profile.genesis, bob.peer_id, meadow.now)

    assert (await again()).issued == NOW
    meadow.now += DEFAULT_LIFETIME / 2 + 1
    fresh = await again()
    assert fresh.issued == int(meadow.now)
    assert (fresh.name, fresh.role) == ("bob", "learner")
    assert await meadow.registrar.renew_self() is not None
    meadow.now = NOW + DEFAULT_LIFETIME
    with pytest.raises(Refused) as caught:
        await again()
    assert caught.value.code == "certificate_expired"
    await meadow.consensus.propose(RevokeMember(bob.peer_id, "lost"))
    with pytest.raises(Refused) as caught:
        await again()
    assert caught.value.code == "revoked"


async def test_certificate_of_a_mesh_authority_that_is_not_ours_is_not_renewed(
    autojump_clock: MockClock,
    meadow: Meadow,
) -> None:
    eve = NodeKey.generate()
    theirs = issue(
        NodeKey.generate(),
        Certificate(meadow.profile.mesh_id, eve.peer_id, "eve", "voter", NOW, NOW + DAY),
    )
    assert await refusal(await meadow.stream(eve), Renew(theirs)) == "certificate_forged"


async def test_joiner_refuses_what_a_false_node_sends(
    autojump_clock: MockClock, meadow: Meadow
) -> None:
    """A node that is not the authority answers the joiner with whatever it likes."""
    bob, liar, ticket = NodeKey.generate(), NodeKey.generate(), meadow.ticket()
    false = issue(
        liar,
        Certificate(meadow.profile.mesh_id, bob.peer_id, "bob", "voter", NOW, NOW + DAY),
    )
    scripts: list[tuple[list[JoinMessage], str]] = [
        ([Admitted(false)], "protocol_error"),
        ([Challenge(b"n"), Admitted(false)], "certificate_forged"),
        ([Challenge(b"n"), Admitted(b"")], "no_certificate"),
        ([Challenge(b"n"), Challenge(b"n")], "protocol_error"),
        ([], "stream_closed"),
    ]
    answers: list[JoinMessage] = []

    async def lie(stream: FrameStream) -> None:
        for answer in answers:
            await receive(stream)
            await send(stream, answer)

    mesh = meadow.network.node(liar.peer_id)
    mesh.handle("/pyagent/join/1", lie)
    node = meadow.network.node(bob.peer_id)
    for script, code in scripts:
        answers[:] = script
        with pytest.raises(PyAgentError) as caught:
            await redeem(
                await node.open_join(mesh.addresses[0]),
                ticket,
                bob,
                name="bob",
                clock=meadow.clock,
            )
        assert caught.value.code == code


async def test_a_silent_node_meets_the_deadline(autojump_clock: MockClock, meadow: Meadow) -> None:
    async def mute(stream: FrameStream) -> None:
        await trio.sleep_forever()

    bob, other = NodeKey.generate(), NodeKey.generate()
    mesh = meadow.network.node(other.peer_id)
    mesh.handle("/pyagent/join/1", mute)
    stream = await meadow.network.node(bob.peer_id).open_join(mesh.addresses[0])
    with pytest.raises(Unavailable) as caught:
        await redeem(stream, meadow.ticket(), bob, name="bob", clock=meadow.clock)
    assert caught.value.code == "join_timeout"


async def test_who_left_comes_back_with_another_ticket_only(
    autojump_clock: MockClock, meadow: Meadow
) -> None:
    bob = NodeKey.generate()
    first = meadow.ticket()
    old = await meadow.join(bob, first)
    await meadow.consensus.propose(RemoveMember(bob.peer_id, NOW))
    encoded = meadow.consensus.state.members[bob.peer_id].certificate
    stream = await meadow.stream(bob)
    assert await refusal(stream, Renew(encoded)) == "removed"
    meadow.network.crash(bob.peer_id)
    with pytest.raises(Refused) as caught:
        await meadow.join(bob, first)
    assert caught.value.code == "ticket_used"
    again = await meadow.join(bob, meadow.ticket())
    assert again.issued > old.issued
    record = meadow.consensus.state.members[bob.peer_id]
    assert record.removed_at is None
    assert record.certificate != encoded
