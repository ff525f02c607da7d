"""The shape of an invariant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from pyagent_node.simulations.swarm import Swarm


class Invariant(Protocol):
    """Something that must hold; it may remember what it saw."""

    name: ClassVar[str]
    """A word for reports."""

    def check(self, swarm: Swarm) -> Iterator[str]:
        """Yield what is wrong now, under faults."""
        ...

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Yield what is still wrong although everything was mended and had time."""
        ...


class Always:
    """An invariant that asks for nothing more after healing."""

    def check_healed(self, swarm: Swarm) -> Iterator[str]:
        """Yield nothing."""
        yield from ()
