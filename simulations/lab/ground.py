"""What the daemons of a scenario stand on: hosts of their own, or one host with shaped links.

Both give a node for every host, and words with the router where there is one.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from pyagent_node.base.errors import Unsupported
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.node.home import Home
from pyagent_node.simulations.lab import tun
from pyagent_node.simulations.lab.control import LabNetwork, open_network
from pyagent_node.simulations.lab.link import LinkSpec
from pyagent_node.simulations.lab.scenario import Scenario

PORT = 4810


class Ground:
    """The nodes by host name, the asked one first, and how to speak to each."""

    def __init__(
        self,
        nodes: Mapping[str, LocalNode],
        network: LabNetwork | None,
        at: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.nodes = nodes
        self.network = network
        self.at = at
        """A block in which this thread is on the host of that name and its client can be used."""

    def conditions(self, on: bool) -> None:
        """Let links be as the scenario says, or perfect, where that can be changed."""
        if self.network is not None:
            self.network.conditions(on)


@contextlib.contextmanager
def homes(*, keep: bool) -> Iterator[Path]:
    """Give a folder for the homes of the nodes, which goes at the end unless it is to be kept."""
    root = Path(tempfile.mkdtemp(prefix="pyagent-lab-"))
    try:
        yield root
    finally:
        if not keep:
            shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def on_hosts(text: str, scenario: Scenario, root: Path) -> Iterator[Ground]:
    """Stand on namespaces joined by the router; errors as for :func:`open_network`."""
    with open_network(text, scenario.hosts) as network:
        machines = {machine.host.name: machine for machine in network.machines}

        def at(name: str) -> AbstractContextManager[None]:
            return tun.inside(machines[name].namespace)

        nodes = {
            name: LocalNode(
                name,
                Home(root / name),
                listen=f"/ip4/{machines[name].address4}/tcp/{PORT}",
                wrap=("ip", "netns", "exec", machines[name].namespace),
            )
            for name in _asked_first(scenario)
        }
        yield Ground(nodes, network, at)


@contextlib.contextmanager
def on_shaped(scenario: Scenario, root: Path) -> Iterator[Ground]:
    """Stand on this host alone, with links that the daemons themselves make slow.

    Raises :class:`Unsupported` (``not_shapeable``).
    """
    shape = shape_of(scenario)
    flags = ("--shape", shape) if shape else ()
    nodes = {
        name: LocalNode(name, Home(root / name), flags=flags) for name in _asked_first(scenario)
    }
    yield Ground(nodes, None, lambda _: contextlib.nullcontext())


def shape_of(scenario: Scenario) -> str:
    """Return what ``--shape`` must say for the links of a scenario; loss is left out.

    Raises :class:`Unsupported` (``not_shapeable``) where that cannot be.
    """
    timeline = scenario.timeline
    if timeline.cuts or timeline.changes:
        why = "its links change while it runs"
        raise _not_shapeable(scenario, why)
    hosts = scenario.hosts
    links = {scenario.between(a, b) for a in hosts for b in hosts if a is not b}
    if len(links) > 1:
        raise _not_shapeable(scenario, "its links differ, and a daemon has one shape for all")
    return _shape(links.pop())


def _shape(link: LinkSpec) -> str:
    parts = []
    if link.delay:
        parts.append(f"rtt={2000 * link.delay:.6g}ms")
    if link.jitter:
        parts.append(f"jitter={1000 * link.jitter:.6g}ms")
    if link.rate is not None:
        parts.append(f"rate={link.rate / 1000:.9g}kbit")
    return ",".join(parts)


def _not_shapeable(scenario: Scenario, why: str) -> Unsupported:
    return Unsupported(
        f"{scenario.name} cannot run on shaped links: {why}.",
        code="not_shapeable",
        remedy="Run it without --shape (Linux, as root).",
    )


def _asked_first(scenario: Scenario) -> list[str]:
    names = [host.name for host in scenario.hosts]
    return sorted(names, key=lambda name: name != scenario.asked)
