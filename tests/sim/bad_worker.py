"""A worker of the simulator in which something is wrong on purpose: see the first argument.

``dies``, ``hangs`` and ``babbles`` are about the process; ``lives`` adds an invariant that no node
may break which is ever started again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import ClassVar

from pyagent_node.simulations import run, worker
from pyagent_node.simulations.invariants import Invariant, all_invariants
from pyagent_node.simulations.invariants.port import Always
from pyagent_node.simulations.swarm import Swarm


class NobodyComesBack(Always):
    """Broken by the first node that is started a second time."""

    name: ClassVar[str] = "nobody comes back"

    def check(self, swarm: Swarm) -> Iterator[str]:
        for machine in swarm.machines:
            if machine.lives > 1:
                yield f"node {machine.number} came back"


def _more_invariants() -> list[Invariant]:
    return [*all_invariants(), NobodyComesBack()]


def main(how: str) -> None:
    """Do one job, badly."""
    if how == "lives":
        run.all_invariants = _more_invariants  # type: ignore[attr-defined]
    elif how == "dies":
        print("about to die", file=sys.stderr, flush=True)
        os.abort()
    elif how == "hangs":
        while True:
            pass
    elif how == "babbles":
        print('{"outcome": 3}')
        sys.exit(0)
    worker.main()


if __name__ == "__main__":
    main(sys.argv[1])
