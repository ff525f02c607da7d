"""Who belongs to the mesh: this node's credentials, and the judgement of others'.

Implements the ``Authoriser`` port.  In a private mesh a peer needs a certificate of the mesh's
authority.  In a public one anybody takes part as learner or client, as it states itself; a
certificate, if shown, must be good, and only a certificate makes a voter.  A revoked peer is
refused in both, and so is a certificate from before its holder left the mesh.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, Refused
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    ClaimSession,
    Command,
    PutCheckpoints,
    RemoveMember,
    RevokeMember,
)
from pyagent_node.consensus.policy import check_proposal
from pyagent_node.consensus.port import Consensus, MemberRecord
from pyagent_node.node.certificates import CLOCK_SKEW, Certificate, verify_certificate
from pyagent_node.node.genesis import Role, check_name
from pyagent_node.node.mesh.authoriser import PeerAdmission
from pyagent_node.node.profiles import Clock, MeshProfile

RECHECK_SECONDS = 60.0
FAREWELL_SECONDS = 1.0
"""How long a member that leaves stays connected, so that it hears that it may go."""


class Credentials(msgspec.Struct, frozen=True, array_like=True):
    """What a node shows: its mesh, its name, the role it wants, its certificate or nothing."""

    mesh_id: Digest
    name: str
    role: Role
    certificate: bytes


class Membership:
    """This node's side of one mesh; implements ``Authoriser``."""

    def __init__(self, profile: MeshProfile, *, clock: Clock) -> None:
        self._profile = profile
        self._clock = clock
        self._consensus: Consensus | None = None

    @property
    def profile(self) -> MeshProfile:
        """The profile in use; :meth:`renewed` replaces it."""
        return self._profile

    def bind(self, consensus: Consensus) -> None:
        """Take revocations from ``consensus`` from now on."""
        self._consensus = consensus

    def renewed(self, profile: MeshProfile) -> None:
        """Use a profile with a newer certificate from now on."""
        assert profile.mesh_id == self._profile.mesh_id
        self._profile = profile

    def credentials(self) -> bytes:
        """See ``Authoriser.credentials``."""
        own = self._profile
        return msgspec.msgpack.encode(Credentials(own.mesh_id, own.name, own.role, own.certificate))

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        """See ``Authoriser.judge``."""
        self.check_not_revoked(peer)
        genesis = self._profile.genesis
        if not credentials:
            verify_certificate(b"", genesis, peer, self._clock())
        try:
            shown = msgspec.msgpack.decode(credentials, type=Credentials)
            check_name(shown.name, "a node")
        except (msgspec.DecodeError, ValueError, RecursionError, InvalidRequest):
            raise Refused(
                f"The credentials of {peer} are malformed.",
                code="certificate_forged",
                remedy="It may run another version of pyagent-node.",
            ) from None
        if shown.mesh_id != genesis.mesh_id:
            raise Refused(
                f"{peer} is in another mesh than {genesis.name}.",
                code="wrong_mesh",
                remedy="Choose the same mesh on both nodes (setting `mesh`).",
            )
        if genesis.private or shown.certificate or shown.role == "voter":
            certificate = self._verify(peer, shown.certificate)
            return PeerAdmission(certificate.name, certificate.role)
        return PeerAdmission(shown.name, shown.role)

    def authorise(self, command: Command, proposer: PeerId, role: str | None) -> None:
        """Raise :class:`Refused` unless the authorised peer ``proposer`` may propose ``command``.

        Beyond :func:`check_proposal`: it must be in the mesh, a certificate must be what the
        command says and the authority's, and a date must not lie in the future.
        """
        self.check_not_revoked(proposer)
        known = self._record(proposer)
        if known is not None and known.removed_at is not None:
            raise _removed(proposer)
        check_proposal(command, proposer=proposer, role=role, authority=self._authority)
        match command:
            case AdmitMember():
                self._check_admission(command)
            case BurnTicket() | RemoveMember() | PutCheckpoints() | ClaimSession():
                if command.at > self._clock() + CLOCK_SKEW:
                    raise Refused(
                        f"{proposer} dates its proposal in the future.",
                        code="clock_skew",
                        remedy="Set the clock of that machine, or of this one.",
                        at=command.at,
                    )
            case _:
                pass

    @property
    def _authority(self) -> PeerId:
        return self._profile.genesis.writer

    def _check_admission(self, command: AdmitMember) -> None:
        shown = verify_certificate(
            command.certificate, self._profile.genesis, command.peer_id, self._clock()
        )
        if (shown.name, shown.role) != (command.name, command.role) or (
            command.issued not in (0, shown.issued)
        ):
            raise Refused(
                "A certificate says something else than its announcement.",
                code="certificate_forged",
            )

    def _verify(self, peer: PeerId, data: bytes) -> Certificate:
        certificate = verify_certificate(data, self._profile.genesis, peer, self._clock())
        known = self._record(peer)
        if (
            known is not None
            and known.removed_at is not None
            and certificate.issued <= known.removed_at
        ):
            raise _removed(peer)
        return certificate

    def _record(self, peer: PeerId) -> MemberRecord | None:
        return self._consensus.state.members.get(peer) if self._consensus is not None else None

    def check_not_revoked(self, peer: PeerId) -> None:
        """Raise :class:`Refused` (``revoked``) if the log says so."""
        member = self._record(peer)
        if member is not None and member.revoked is not None:
            raise Refused(
                f"The membership of {peer} was revoked.",
                code="revoked",
                remedy="Ask whoever runs the mesh; a new identity and ticket are needed.",
            )


def _removed(peer: PeerId) -> Refused:
    return Refused(
        f"{peer} left the mesh.",
        code="removed",
        remedy="To come back: pyagent-node join --again, with a new ticket.",
    )


async def enforce(
    consensus: Consensus, recheck: Callable[[], None], *, seconds: float = RECHECK_SECONDS
) -> None:
    """Have every connected peer judged again after each one that goes, and now and then; for ever.

    ``recheck`` is the mesh adapter's: it disconnects who is refused.  The regular look catches
    certificates that have expired since.
    """
    while True:
        recheck()
        with trio.move_on_after(seconds):
            await _departure(consensus)


async def _departure(consensus: Consensus) -> None:
    """Return after the next revocation or removal, or when the log cannot be followed."""
    try:
        async with consensus.applied(consensus.state.index) as entries:
            async for entry in entries:
                if isinstance(entry.command, RevokeMember) and entry.error is None:
                    return
                if isinstance(entry.command, RemoveMember) and entry.error is None:
                    await trio.sleep(FAREWELL_SECONDS)
                    return
    except LimitExceeded:  # fell behind: the recheck looks at the whole state anyway
        return
