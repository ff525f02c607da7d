"""The judgement of credentials, in private and public meshes."""

from __future__ import annotations

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import Refused
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import (
    AdmitMember,
    Command,
    RemoveMember,
    RevokeMember,
    SetDraining,
)
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.single import open_single
from pyagent_node.node.certificates import CLOCK_SKEW, DAY, Certificate, issue
from pyagent_node.node.genesis import Visibility, new_genesis
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.membership import (
    FAREWELL_SECONDS,
    RECHECK_SECONDS,
    Credentials,
    Membership,
    enforce,
)
from pyagent_node.node.mesh.authoriser import MAX_CREDENTIALS, PeerAdmission
from pyagent_node.node.profiles import MeshProfile
from pyagent_node.simulations.mesh import open_network

NOW = 1_800_000_000
AUTHORITY, ANN, BOB = (NodeKey(bytes([n]) * 32) for n in (1, 2, 3))


def membership(
    key: NodeKey = ANN,
    *,
    visibility: Visibility = "private",
    role: str = "learner",
    certified: bool = True,
    name: str = "ann",
) -> Membership:
    genesis = new_genesis(
        "meadow",
        visibility,
        authority=AUTHORITY.peer_id,
        writer=ANN.peer_id,
        created=NOW,
        nonce=bytes(16),
    )
    certificate = Certificate(genesis.mesh_id, key.peer_id, name, role, NOW, NOW + DAY)  # type: ignore[arg-type]
    profile = MeshProfile(
        genesis,
        name=name,
        role=role,  # type: ignore[arg-type]
        psk=None,
        certificate=issue(AUTHORITY, certificate) if certified else b"",
    )
    return Membership(profile, clock=lambda: NOW)


def refusal(judge: Membership, credentials: bytes, peer: PeerId = BOB.peer_id) -> str:
    with pytest.raises(Refused) as caught:
        judge.judge(peer, credentials)
    assert caught.value.remedy
    return caught.value.code


def shown(of: Membership, **changes: object) -> bytes:
    own = msgspec.msgpack.decode(of.credentials(), type=Credentials)
    return msgspec.msgpack.encode(msgspec.structs.replace(own, **changes))


def test_members_admit_each_other() -> None:
    ann, bob = membership(), membership(BOB, name="bob", role="voter")
    assert ann.judge(BOB.peer_id, bob.credentials()) == PeerAdmission("bob", "voter")
    assert bob.judge(ANN.peer_id, ann.credentials()) == PeerAdmission("ann", "learner")
    assert len(ann.credentials()) < MAX_CREDENTIALS / 8


def test_in_a_private_mesh_only_the_certificate_counts() -> None:
    ann, bob = membership(), membership(BOB, name="bob")
    lying = shown(bob, name="root", role="voter")
    assert ann.judge(BOB.peer_id, lying) == PeerAdmission("bob", "learner")
    assert refusal(ann, b"") == "no_certificate"
    assert refusal(ann, shown(bob, certificate=b"")) == "no_certificate"
    assert refusal(ann, ann.credentials()) == "certificate_forged"
    assert refusal(ann, shown(bob, mesh_id=Digest("0" * 64))) == "wrong_mesh"
    assert refusal(ann, shown(bob, name="\n")) == "certificate_forged"


def test_in_a_public_mesh_anyone_is_what_it_says_but_a_voter() -> None:
    ann = membership(visibility="public")
    for role in ("learner", "client"):
        bob = membership(BOB, visibility="public", certified=False, role=role, name="bob")
        assert ann.judge(BOB.peer_id, bob.credentials()) == PeerAdmission("bob", role)
    usurper = membership(BOB, visibility="public", certified=False, role="voter")
    assert refusal(ann, usurper.credentials()) == "no_certificate"
    voter = membership(BOB, visibility="public", role="voter", name="bob")
    assert ann.judge(BOB.peer_id, voter.credentials()) == PeerAdmission("bob", "voter")
    assert refusal(ann, shown(voter, certificate=b"junk")) == "certificate_forged"
    assert refusal(ann, b"") == "no_certificate"


def test_private_and_public_are_different_meshes() -> None:
    ann, bob = membership(), membership(BOB, visibility="public")
    assert refusal(ann, bob.credentials()) == "wrong_mesh"


@given(data=st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    for visibility in ("private", "public"):
        assert refusal(membership(visibility=visibility), data) in (  # type: ignore[arg-type]
            "no_certificate",
            "certificate_forged",
            "wrong_mesh",
        )


def test_renewed_credentials_are_shown_at_once() -> None:
    ann = membership()
    before = ann.credentials()
    ann.renewed(ann.profile.with_certificate(b"newer", "learner", "ann"))
    assert ann.credentials() != before


async def test_revocations_come_from_the_log(autojump_clock: trio.testing.MockClock) -> None:
    ann, bob = membership(visibility="public"), membership(BOB, visibility="public", name="bob")
    looks: list[float] = []
    async with (
        open_network() as network,
        open_single(network.node(ANN.peer_id), MemoryLog(), leader=ANN.peer_id) as consensus,
        trio.open_nursery() as nursery,
    ):
        ann.bind(consensus)
        await consensus.propose(AdmitMember(BOB.peer_id, "bob", "learner", b"c"))
        assert ann.judge(BOB.peer_id, bob.credentials())
        nursery.start_soon(enforce, consensus, lambda: looks.append(trio.current_time()))
        await trio.sleep(1)
        assert looks == [0.0]
        await consensus.propose(RevokeMember(BOB.peer_id, "stolen"))
        assert refusal(ann, bob.credentials()) == "revoked"
        await trio.sleep(1)
        assert looks == [0.0, 1.0]
        await trio.sleep(RECHECK_SECONDS)
        assert len(looks) == 3
        nursery.cancel_scope.cancel()


def command_refusal(
    judge: Membership, command: Command, proposer: PeerId, role: str | None = "voter"
) -> str | None:
    try:
        judge.authorise(command, proposer, role)
    except Refused as error:
        return error.code
    return None


def test_proposals_need_a_true_certificate_and_an_honest_clock() -> None:
    ann, bob = membership(), membership(BOB, name="bob")
    certificate = bob.profile.certificate
    good = AdmitMember(BOB.peer_id, "bob", "learner", certificate, NOW)
    assert command_refusal(ann, good, ANN.peer_id) is None
    assert command_refusal(ann, good, BOB.peer_id) == "not_authority"
    for changes in ({"name": "eve"}, {"role": "voter"}, {"issued": NOW + 1}):
        changed = msgspec.structs.replace(good, **changes)
        assert command_refusal(ann, changed, ANN.peer_id) == "certificate_forged"
    for forged in (ann.profile.certificate, b"junk", certificate[:-1] + b"\0"):
        changed = msgspec.structs.replace(good, certificate=forged)
        assert command_refusal(ann, changed, ANN.peer_id) == "certificate_forged"
    late = RemoveMember(BOB.peer_id, NOW + CLOCK_SKEW + 1)
    assert command_refusal(ann, late, BOB.peer_id) == "clock_skew"
    assert command_refusal(ann, RemoveMember(BOB.peer_id, NOW), BOB.peer_id) is None


async def test_who_left_is_out_until_it_is_admitted_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ann, bob = membership(), membership(BOB, name="bob")
    old = AdmitMember(BOB.peer_id, "bob", "learner", bob.profile.certificate, NOW)
    looks: list[float] = []
    async with (
        open_network() as network,
        open_single(network.node(ANN.peer_id), MemoryLog(), leader=ANN.peer_id) as consensus,
        trio.open_nursery() as nursery,
    ):
        ann.bind(consensus)
        await consensus.propose(old)
        assert ann.judge(BOB.peer_id, bob.credentials())
        nursery.start_soon(enforce, consensus, lambda: looks.append(trio.current_time()))
        await trio.sleep(1)
        await consensus.propose(RemoveMember(BOB.peer_id, NOW + 5))
        await trio.sleep(FAREWELL_SECONDS / 2)
        assert looks == [0.0]
        await trio.sleep(FAREWELL_SECONDS)
        assert looks == [0.0, 1.0 + FAREWELL_SECONDS]
        assert refusal(ann, bob.credentials()) == "removed"
        assert command_refusal(ann, SetDraining(BOB.peer_id, True), BOB.peer_id) == "removed"
        with pytest.raises(Refused):
            await consensus.propose(old)
        fresh = Certificate(ann.profile.mesh_id, BOB.peer_id, "bob", "voter", NOW + 6, NOW + DAY)
        bob.renewed(bob.profile.with_certificate(issue(AUTHORITY, fresh), "voter", "bob"))
        assert ann.judge(BOB.peer_id, bob.credentials()) == PeerAdmission("bob", "voter")
        await consensus.propose(
            AdmitMember(BOB.peer_id, "bob", "voter", bob.profile.certificate, NOW + 6)
        )
        assert ann.judge(BOB.peer_id, bob.credentials()) == PeerAdmission("bob", "voter")
        await consensus.propose(RevokeMember(BOB.peer_id, "stolen"))
        assert command_refusal(ann, SetDraining(BOB.peer_id, True), BOB.peer_id) == "revoked"
        nursery.cancel_scope.cancel()
