"""What must hold of a swarm at every moment, whatever fails: one file each.

An invariant is a class with a ``name`` and a :meth:`~Invariant.check` that is called at every look
and yields what is wrong.  Those that can only be told after healing have ``check_healed``.
"""

from __future__ import annotations

from pyagent_node.simulations.invariants.bounded import Bounded
from pyagent_node.simulations.invariants.committed import CommittedNeverChanges
from pyagent_node.simulations.invariants.contexts import ContextsStay
from pyagent_node.simulations.invariants.durable import AppliedStays
from pyagent_node.simulations.invariants.epochs import (
    OnePlacementAnEpoch,
    SessionsOfTheirEpoch,
    StaleStagesStop,
)
from pyagent_node.simulations.invariants.guessed import GuessersAreTold
from pyagent_node.simulations.invariants.leaders import OneLeaderATerm
from pyagent_node.simulations.invariants.monotonic import NothingGoesBack
from pyagent_node.simulations.invariants.moved import RanksMove
from pyagent_node.simulations.invariants.outsiders import OutsidersStayOut
from pyagent_node.simulations.invariants.port import Invariant
from pyagent_node.simulations.invariants.prepared import PreparedDisturbsNothing
from pyagent_node.simulations.invariants.restored import Restored
from pyagent_node.simulations.invariants.runners import RunnersAreAsked
from pyagent_node.simulations.invariants.secrets import NoSecrets
from pyagent_node.simulations.invariants.sessions import OneHeadASession, SessionsStayKnown

__all__ = ["Invariant", "all_invariants"]


def all_invariants() -> list[Invariant]:
    """Return fresh instances of every invariant, for one run."""
    return [
        OneLeaderATerm(),
        CommittedNeverChanges(),
        NothingGoesBack(),
        AppliedStays(),
        OnePlacementAnEpoch(),
        StaleStagesStop(),
        SessionsOfTheirEpoch(),
        OneHeadASession(),
        SessionsStayKnown(),
        RanksMove(),
        PreparedDisturbsNothing(),
        OutsidersStayOut(),
        Bounded(),
        GuessersAreTold(),
        RunnersAreAsked(),
        NoSecrets(),
        ContextsStay(),
        Restored(),
    ]
