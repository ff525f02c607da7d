"""Joining the simulated mesh as strangers do: with a ticket, which somebody else then tries too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from pyagent_node.base.errors import PyAgentError, Refused
from pyagent_node.node.joining import redeem
from pyagent_node.node.tickets import ID_BYTES, Ticket, issue_ticket

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

JOIN_SECONDS: Final = 120.0
TICKET_SECONDS: Final = 3600.0
RETRY_SECONDS: Final = 0.5
ONE_ONLY: Final = "a ticket admits one"
"""The invariant's name."""


async def join(swarm: Swarm, machine: Machine) -> None:
    """Have ``machine`` redeem a ticket until that works; then let another member show it again."""
    admitted = False
    with trio.move_on_after(JOIN_SECONDS):
        ticket = await _ticket(swarm)
        try:
            while not await _show(swarm, machine, ticket):  # noqa: ASYNC110 - of two nodes
                await trio.sleep(RETRY_SECONDS)
            admitted = True
        except Refused as error:
            swarm.trace.add(machine.number, "joining", error.code)
        others = [each for each in swarm.up() if each.number and each is not machine]
        if admitted and others:
            await _steal(swarm, swarm.rng.choice(others), machine, ticket)


async def _ticket(swarm: Swarm) -> Ticket:
    """Return a fresh ticket of the node that admits, once it runs."""
    while True:
        issuer = swarm.machines[0]
        if issuer.parts is not None:
            return issue_ticket(
                issuer.membership.profile,
                role="voter",
                seconds=TICKET_SECONDS,
                addresses=issuer.parts.mesh.addresses,
                now=issuer.wall(),
                ticket_id=swarm.rng.randbytes(ID_BYTES),
            )
        await trio.sleep(RETRY_SECONDS)


async def _show(swarm: Swarm, machine: Machine, ticket: Ticket) -> bool:
    """Show a ticket to the node that admits; say whether it took it, raise if it never will."""
    if machine.parts is None:
        return False
    try:
        stream = await machine.parts.mesh.open_join(ticket.addresses[0])
        try:
            name = f"n{machine.number}"
            await redeem(stream, ticket, machine.key, name=name, clock=swarm.machines[0].wall)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()
    except Refused:
        raise
    except PyAgentError as error:
        swarm.trace.add(machine.number, "joining", error.code)
        return False
    return True


async def _steal(swarm: Swarm, thief: Machine, owner: Machine, ticket: Ticket) -> None:
    try:
        if await _show(swarm, thief, ticket):
            swarm.violation(ONE_ONLY, f"nodes {owner.number} and {thief.number} used the same one")
    except Refused as error:
        swarm.trace.add(thief.number, "evil", f"a used ticket: {error.code}")
