"""Who reaches whom, and when: all links of a scenario with its cuts.  Pure.

The router asks it about every packet.  It is *calm* (every packet arrives at once) until
conditions are switched on; the time line has a beginning of its own, that of the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

import msgspec

from pyagent_node.simulations.lab.link import Link, LinkSpec, Loss, Random
from pyagent_node.simulations.lab.scenario import Scenario
from pyagent_node.simulations.lab.timeline import Change, Pair

Drop = Loss | Literal["cut", "stray"]
"""Why a packet goes nowhere; ``stray``: it is for none of the hosts."""


class Traffic(msgspec.Struct):
    """What one direction between two hosts did with packets, under conditions."""

    sent: int = 0
    bytes: int = 0
    lost: int = 0
    queue: int = 0
    cut: int = 0


def address4(index: int) -> str:
    """Return the IPv4 address of the host with this number."""
    return f"10.79.0.{index + 1}"


def address6(index: int) -> str:
    """Return the IPv6 address of the host with this number."""
    return f"fd79::{index + 1:x}"


class Network:
    """The links between the hosts of a scenario; hosts go by their number in it."""

    def __init__(
        self, scenario: Scenario, *, make_rng: Callable[[str], Random] = random.Random
    ) -> None:
        hosts = scenario.hosts
        self._hosts = hosts
        self._specs = scenario.links
        self._pairs: dict[Pair, list[Link]] = {pair: [] for pair in scenario.links}
        self._links: dict[tuple[int, int], Link] = {}
        self.traffic: dict[tuple[int, int], Traffic] = {}
        shared: dict[tuple[str, str], Link] = {}
        for i, one in enumerate(hosts):
            for j, other in enumerate(hosts):
                if i == j:
                    continue
                spec = scenario.between(one, other)
                # Hosts of one site have a wire each; two sites have one between them, for all.
                key = (one.site, other.site) if one.site != other.site else (one.name, other.name)
                if key not in shared:
                    shared[key] = Link(spec, make_rng(f"{scenario.seed}/{key[0]}/{key[1]}"))
                    self._pairs[frozenset((one.site, other.site))].append(shared[key])
                self._links[i, j] = shared[key]
                self.traffic[i, j] = Traffic()
        self._index: dict[bytes, int] = {}
        for i in range(len(hosts)):
            self._index[IPv4Address(address4(i)).packed] = i
            self._index[IPv6Address(address6(i)).packed] = i
        self._timeline = scenario.timeline
        self._ahead: list[Change] = []
        self._calm = True
        self._began: float | None = None
        self.strays: Counter[int] = Counter()

    def set_conditions(self, on: bool) -> None:
        """Let links be as the scenario says, or perfect."""
        self._calm = not on

    def start_timeline(self, now: float) -> None:
        """Begin the scenario's time line."""
        self.stop_timeline(now)
        self._began = now
        self._ahead = list(reversed(self._timeline.changes))

    def stop_timeline(self, now: float) -> None:
        """Let every link be again what it was at the beginning."""
        self._began = None
        self._ahead = []
        for pair, spec in self._specs.items():
            self._set(pair, spec, now)

    def destination(self, packet: bytes | memoryview) -> int | None:
        """Return the host that an IP packet is for; ``None`` when it is for none."""
        version = packet[0] >> 4 if len(packet) >= 20 else 0
        if version == 4:
            return self._index.get(bytes(packet[16:20]))
        if version == 6 and len(packet) >= 40:
            return self._index.get(bytes(packet[24:40]))
        return None

    def route(self, source: int, packet: bytes, now: float) -> tuple[int, float] | Drop:
        """Take a packet from a host; return whom it reaches and when, or why it does not."""
        target = self.destination(packet)
        if target is None or target == source:
            self.strays[source] += 1
            return "stray"
        if self._calm:
            return target, now
        size = len(packet)
        traffic = self.traffic[source, target]
        traffic.sent += 1
        traffic.bytes += size
        if self._began is not None:
            elapsed = now - self._began
            while self._ahead and self._ahead[-1].at <= elapsed:
                change = self._ahead.pop()
                self._set(change.pair, change.spec or self._specs[change.pair], now)
            if self._is_cut(source, target, elapsed):
                traffic.cut += 1
                return "cut"
        arrival = self._links[source, target].send(size, now)
        if isinstance(arrival, str):
            if arrival == "lost":
                traffic.lost += 1
            else:
                traffic.queue += 1
            return arrival
        return target, arrival

    def _set(self, pair: Pair, spec: LinkSpec, now: float) -> None:
        for link in self._pairs[pair]:
            if link.spec != spec:
                link.change(spec, now)

    def _is_cut(self, source: int, target: int, elapsed: float) -> bool:
        one, other = self._hosts[source].name, self._hosts[target].name
        return any(
            cut.severs(one, other) for cut in self._timeline.cuts if cut.start <= elapsed < cut.end
        )
