"""Joining a mesh by ticket, and keeping the certificate fresh: the joiner's side."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from pyagent_node.base.errors import (
    DeadlineExceeded,
    PyAgentError,
    Refused,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import DIAL_SECONDS, HANDSHAKE_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.node.certificates import Certificate, read_certificate, verify_certificate
from pyagent_node.node.genesis import Genesis, check_name
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.join_messages import (
    PROTOCOL,
    Admitted,
    Ask,
    Challenge,
    JoinMessage,
    NotAdmitted,
    Proof,
    Renew,
    receive,
    send,
    unexpected,
)
from pyagent_node.node.membership import Membership
from pyagent_node.node.profiles import (
    MAX_BOOTSTRAP,
    Clock,
    MeshProfile,
    load_profile,
    mesh_ids,
    save_profile,
    set_active,
)
from pyagent_node.node.registrar import Registrar
from pyagent_node.node.tickets import Ticket, parse_ticket, prove

log = logging.getLogger("pyagent_node.membership")

CHECK_SECONDS = 3600.0
"""Time between two looks at the age of the own certificate."""

Dial = Callable[[MeshProfile, NodeKey, str], AbstractAsyncContextManager[FrameStream]]
"""Opens a join stream to an address, as somebody who is no member yet."""


async def redeem(
    stream: FrameStream, ticket: Ticket, key: NodeKey, *, name: str, clock: Clock
) -> bytes:
    """Trade ``ticket`` for a certificate over a join stream to the node that admits.

    Raises that node's refusal (:class:`Refused`: ``ticket_expired``, ``ticket_used``,
    ``ticket_forged``, ``revoked``), :class:`Unavailable` or :class:`DeadlineExceeded`.
    """
    message = Ask(bytes.fromhex(ticket.id), ticket.role, ticket.expires, name)
    answer = await _converse(stream, message)
    if not isinstance(answer, Challenge):
        raise unexpected(answer)
    proof = prove(
        ticket.secret,
        genesis=ticket.genesis,
        ticket_id=ticket.id,
        joiner=key.peer_id,
        server=stream.peer,
        nonce=answer.nonce,
    )
    return await _certificate(stream, Proof(proof), ticket.genesis, key, clock)


async def renew(stream: FrameStream, profile: MeshProfile, key: NodeKey, *, clock: Clock) -> bytes:
    """Trade a valid certificate for one that lasts longer; raises what :func:`redeem` raises."""
    return await _certificate(stream, Renew(profile.certificate), profile.genesis, key, clock)


async def _converse(stream: FrameStream, message: JoinMessage) -> JoinMessage:
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            await send(stream, message)
            answer = await receive(stream)
    except trio.TooSlowError:
        raise DeadlineExceeded(
            f"The node that admits did not answer within {HANDSHAKE_SECONDS:g} s.",
            code="join_timeout",
            remedy="Try again; a ticket that was taken in the meantime still works here.",
        ) from None
    if isinstance(answer, NotAdmitted):
        raise error_from_info(answer.error)
    return answer


async def _certificate(
    stream: FrameStream, message: Proof | Renew, genesis: Genesis, key: NodeKey, clock: Clock
) -> bytes:
    answer = await _converse(stream, message)
    if not isinstance(answer, Admitted):
        raise unexpected(answer)
    verify_certificate(answer.certificate, genesis, key.peer_id, clock())
    return answer.certificate


async def join(
    home: Home,
    text: str,
    *,
    name: str,
    again: bool = False,
    clock: Clock = time.time,
    dial: Dial | None = None,
) -> MeshProfile:
    """Join the mesh of a ticket, save its profile, make it active, and return it.

    Joining a mesh that this node is in already only makes it active, unless ``again`` says that the
    certificate it has counts no more.  Nothing is written before
    the certificate is there; asking again with the same ticket after a lost answer works.  Raises
    what :func:`parse_ticket` and :func:`redeem` raise, and :class:`Unavailable`
    (``peer_unreachable``) when no address of the ticket answers.
    """
    check_name(name, "a node")
    ticket = parse_ticket(text)
    member = None if again else _present_member(home, ticket, clock())
    if member is not None:
        set_active(home, member.mesh_id)
        return member
    ticket.check_expiry(clock())
    key = home.node_key()
    profile = MeshProfile(
        ticket.genesis,
        name=name,
        role=ticket.role,
        psk=ticket.psk,
        certificate=b"",
        bootstrap=ticket.addresses[:MAX_BOOTSTRAP],
    )
    if not ticket.open:
        encoded = await _redeem_anywhere(
            profile, ticket, key, clock=clock, dial=dial or _dial_libp2p
        )
        issued = read_certificate(encoded)
        profile = profile.with_certificate(encoded, issued.role, issued.name)
    save_profile(home, profile)
    set_active(home, profile.mesh_id)
    return profile


def _present_member(home: Home, ticket: Ticket, now: float) -> MeshProfile | None:
    """Return our profile of the ticket's mesh if the ticket would add nothing to it."""
    if ticket.genesis.mesh_id not in mesh_ids(home):
        return None
    profile = load_profile(home, ticket.genesis.mesh_id)
    if profile.authority_key is not None:
        return profile
    if ticket.open:
        return profile if profile.role in (ticket.role, "voter") else None
    try:
        certificate: Certificate = verify_certificate(
            profile.certificate, profile.genesis, home.node_key().peer_id, now
        )
    except Refused:
        return None
    return profile if certificate.role == ticket.role else None


async def _redeem_anywhere(
    profile: MeshProfile, ticket: Ticket, key: NodeKey, *, clock: Clock, dial: Dial
) -> bytes:
    failures: list[str] = []
    for address in ticket.addresses:
        try:
            with trio.fail_after(DIAL_SECONDS + 2 * HANDSHAKE_SECONDS):
                async with dial(profile, key, address) as stream:
                    return await redeem(stream, ticket, key, name=profile.name, clock=clock)
        except trio.TooSlowError:
            failures.append(f"{address}: no answer")
        except Unavailable as error:
            failures.append(f"{address}: {error.message}")
    raise Unavailable(
        f"The node that admits to {profile.genesis.name} cannot be reached"
        f" ({'; '.join(failures)[:600]}).",
        code="peer_unreachable",
        remedy="Check that its daemon runs and that a firewall lets its port through.",
    )


@asynccontextmanager
async def _dial_libp2p(
    profile: MeshProfile, key: NodeKey, address: str
) -> AsyncIterator[FrameStream]:
    """Open a join stream through a short-lived mesh that listens nowhere."""
    from pyagent_node.node.mesh.service import open_mesh  # noqa: PLC0415 - 0.5 s, 80 MB
    from pyagent_node.node.mesh.settings import MeshConfig  # noqa: PLC0415

    config = MeshConfig(key=key, membership=Membership(profile, clock=time.time), psk=profile.psk)
    async with open_mesh(config) as mesh:
        stream = await mesh.open_join(address)
        try:
            yield stream
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


async def keep_fresh(
    home: Home,
    membership: Membership,
    mesh: Mesh,
    key: NodeKey,
    *,
    clock: Clock,
    registrar: Registrar | None = None,
    rng: random.Random | None = None,
    renewed: Callable[[MeshProfile], None] = lambda profile: None,
) -> None:
    """Renew the own certificate when half of its life is over; runs for ever.

    A member asks the mesh's writer; the writer (with its ``registrar``) issues its own.  Failures
    are logged and tried again: there is plenty of time.
    """
    jitter = rng or random.SystemRandom()
    while True:
        try:
            fresh = await _renew_if_due(membership, mesh, key, clock=clock, registrar=registrar)
            if fresh is not None:
                save_profile(home, fresh)
                membership.renewed(fresh)
                renewed(fresh)
                log.info("the membership certificate was renewed")
        except PyAgentError as error:
            log.warning("the membership certificate could not be renewed: %s", error)
        await trio.sleep(CHECK_SECONDS * jitter.uniform(0.8, 1.2))


async def _renew_if_due(
    membership: Membership,
    mesh: Mesh,
    key: NodeKey,
    *,
    clock: Clock,
    registrar: Registrar | None,
) -> MeshProfile | None:
    profile = membership.profile
    if registrar is not None:
        return await registrar.renew_self()
    if not profile.certificate:
        return None
    own = read_certificate(profile.certificate)
    if clock() < own.issued + (own.expires - own.issued) / 2:
        return None
    stream = await mesh.open(profile.genesis.writer, PROTOCOL)
    try:
        encoded = await renew(stream, profile, key, clock=clock)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await stream.aclose()
    fresh = read_certificate(encoded)
    return profile.with_certificate(encoded, fresh.role, fresh.name)


def merge_bootstrap(profile: MeshProfile, extra: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses to dial: the profile's, then those of the settings, each once."""
    return tuple(dict.fromkeys((*profile.bootstrap, *extra)))
