"""The node that admits: redeems tickets, issues and renews certificates.

It runs where the authority key is.  The point at which a ticket is spent is the committed
``BurnTicket``: of two peers with the same ticket the log takes one.  The same peer asking again
(its first answer was lost) gets its certificate again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from pyagent_node.base.errors import (
    CorruptData,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.limits import HANDSHAKE_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import AdmitMember, BurnTicket
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.node.certificates import (
    DEFAULT_LIFETIME,
    Certificate,
    issue,
    read_certificate,
    verify_certificate,
)
from pyagent_node.node.genesis import MAX_NAME, ROLES, Role, check_name
from pyagent_node.node.join_messages import (
    NONCE_BYTES,
    PROTOCOL,
    Admitted,
    Ask,
    Challenge,
    NotAdmitted,
    Proof,
    Renew,
    receive,
    send,
    unexpected,
)
from pyagent_node.node.membership import Membership
from pyagent_node.node.profiles import Clock, MeshProfile
from pyagent_node.node.tickets import ID_BYTES, check_proof, expired, prove, secret_of

log = logging.getLogger("pyagent_node.membership")

MAX_AT_ONCE = 32
"""Conversations with strangers at the same time."""
MAX_SECONDS = 30.0
"""Longest conversation."""
RETRY_SECONDS = 1.0
"""Pause before the log is asked again whether it knows this node."""


class Registrar:
    """Serves ``/pyagent/join/1`` on the node that holds the authority key."""

    def __init__(
        self,
        membership: Membership,
        consensus: Consensus,
        server: PeerId,
        *,
        clock: Clock,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._membership = membership
        self._consensus = consensus
        self._server = server
        self._clock = clock
        self._random_bytes = random_bytes
        self._authority = membership.profile.authority()
        self._room = trio.Semaphore(MAX_AT_ONCE)
        self._admitting = trio.Lock()

    def attach(self, mesh: Mesh) -> None:
        """Begin to serve."""
        mesh.handle(PROTOCOL, self.serve)

    @property
    def _profile(self) -> MeshProfile:
        return self._membership.profile

    async def admit_self(self) -> None:
        """See that the log knows this node itself as a member, under its name.

        Waits for the log as long as it takes: a mesh may start without a quorum.
        """
        while True:
            try:
                await self._consensus.read_barrier()
                await self._announce()
                return
            except Unavailable as error:
                log.info("the log does not know this node yet: %s", error)
                await trio.sleep(RETRY_SECONDS)

    async def _announce(self) -> None:
        own = self._profile
        known = self._consensus.state.members.get(self._server)
        if known is None or known.certificate != own.certificate:
            await self._consensus.propose(
                AdmitMember(
                    self._server,
                    own.name,
                    own.role,
                    own.certificate,
                    read_certificate(own.certificate).issued,
                )
            )

    async def serve(self, stream: FrameStream) -> None:
        """Talk to one stranger; the handler of ``/pyagent/join/1``."""
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            await self._refuse(
                stream,
                LimitExceeded(
                    "Too many nodes are joining at this moment.",
                    code="too_many_joins",
                    remedy="Try again in a minute.",
                ),
            )
            return
        try:
            with trio.move_on_after(MAX_SECONDS) as scope:
                await self._converse(stream)
            if scope.cancelled_caught:
                log.info("%s did not finish joining in time", stream.peer)
        finally:
            self._room.release()

    async def _converse(self, stream: FrameStream) -> None:
        try:
            message = await receive(stream)
            self._membership.check_not_revoked(stream.peer)
            match message:
                case Ask():
                    certificate = await self._redeem(stream, message)
                case Renew():
                    certificate = await self._renew(stream.peer, message)
                case _:
                    raise unexpected(message)
            await send(stream, Admitted(certificate))
        except PyAgentError as error:
            log.warning("%s was not admitted: %s (%s)", stream.peer, error.message, error.code)
            await self._refuse(stream, error)

    async def _refuse(self, stream: FrameStream, error: PyAgentError) -> None:
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                await send(stream, NotAdmitted(error.to_info()))
        except (PyAgentError, trio.TooSlowError):
            log.debug("%s did not hear why", stream.peer)

    async def _redeem(self, stream: FrameStream, ask: Ask) -> bytes:
        role = self._check_ask(ask)
        nonce = self._random_bytes(NONCE_BYTES)
        await send(stream, Challenge(nonce))
        answer = await receive(stream)
        if not isinstance(answer, Proof):
            raise unexpected(answer)
        expected = prove(
            secret_of(self._authority, ask.id, role, ask.expires),
            genesis=self._profile.genesis,
            ticket_id=ask.id.hex(),
            joiner=stream.peer,
            server=self._server,
            nonce=nonce,
        )
        check_proof(answer.proof, expected)
        if self._clock() >= ask.expires:
            raise expired(ask.expires, self._clock())
        self._check_not_spent(ask.id.hex(), stream.peer)
        now = int(self._clock())
        await self._consensus.propose(
            BurnTicket(ask.id.hex(), stream.peer, expires=ask.expires, at=now)
        )
        return await self._admit(stream.peer, ask.name, role)

    def _check_not_spent(self, ticket: str, peer: PeerId) -> None:
        """Refuse the ticket with which a peer came that has left since.

        Otherwise a peer may show its ticket again: its first answer may have been lost.
        """
        state = self._consensus.state
        known = state.members.get(peer)
        if known is None or is_member(known) or state.burnt_tickets.get(ticket) != peer:
            return
        raise Refused(
            "The ticket was used already, before this node left the mesh.",
            code="ticket_used",
            remedy="A ticket admits once: ask for another one.",
        )

    def _check_ask(self, ask: Ask) -> Role:
        check_name(ask.name, "a node")
        for role in ROLES:
            if role == ask.role and len(ask.id) == ID_BYTES and 0 <= ask.expires < 1 << 40:
                return role
        raise CorruptData("The request to join is malformed.", code="malformed_message")

    async def _admit(self, peer: PeerId, wanted: str, role: Role) -> bytes:
        async with self._admitting:
            known = self._consensus.state.members.get(peer)
            if (
                known is not None
                and is_member(known)
                and known.role == role
                and self._lasts(peer, known.certificate)
            ):
                return known.certificate
            return await self._issue(peer, self._free_name(wanted, peer), role)

    def _lasts(self, peer: PeerId, certificate: bytes) -> bool:
        """Say whether a certificate is valid and has most of its life before it."""
        now = self._clock()
        try:
            good = verify_certificate(certificate, self._profile.genesis, peer, now)
        except Refused:
            return False
        return now < good.issued + (good.expires - good.issued) / 2

    async def _issue(self, peer: PeerId, name: str, role: Role) -> bytes:
        now = int(self._clock())
        known = self._consensus.state.members.get(peer)
        if known is not None and known.removed_at is not None:
            now = max(now, known.removed_at + 1)  # what is older counts no more
        certificate = issue(
            self._authority,
            Certificate(
                mesh_id=self._profile.mesh_id,
                peer_id=peer,
                name=name,
                role=role,
                issued=now,
                expires=now + DEFAULT_LIFETIME,
            ),
        )
        await self._consensus.propose(AdmitMember(peer, name, role, certificate, now))
        log.info("%s was admitted as %s (%s)", peer, name, role)
        return certificate

    def _free_name(self, wanted: str, peer: PeerId) -> str:
        """Return ``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that nobody has."""
        taken = {
            m.name
            for m in self._consensus.state.members.values()
            if is_member(m) and m.peer_id != peer
        }
        name, number = wanted, 1
        while name in taken:
            number += 1
            suffix = f"-{number}"
            name = wanted[: MAX_NAME - len(suffix)] + suffix
        return name

    async def _renew(self, peer: PeerId, message: Renew) -> bytes:
        genesis = self._profile.genesis
        old = verify_certificate(message.certificate, genesis, peer, self._clock())
        known = self._consensus.state.members.get(peer)
        if known is not None and known.removed_at is not None:
            raise Refused(
                f"{peer} left the mesh.",
                code="removed",
                remedy="To come back: pyagent-node join --again, with a new ticket.",
            )
        async with self._admitting:
            if self._lasts(peer, message.certificate):
                return message.certificate
            return await self._issue(peer, self._free_name(old.name, peer), old.role)

    async def renew_self(self) -> MeshProfile | None:
        """Return the own profile with a fresh certificate if it is due, else ``None``."""
        own = self._profile
        if self._lasts(self._server, own.certificate):
            return None
        certificate = await self._issue(self._server, own.name, own.role)
        return own.with_certificate(certificate, own.role, own.name)
