"""The router: a process that owns the lab's namespaces and carries packets between them.

``python -m pyagent_node.simulations.lab.router TOKEN`` reads the scenario as the first line of its
input (a JSON string), makes everything, and answers one JSON line to that and to each command line:
``conditions on|off``, ``timeline start|stop``, ``stats``.  At the end of its input - also
when whoever started it was killed - it takes everything down.

One thread, one ``select``: its time-outs are exact to tens of microseconds, where ``epoll`` counts
milliseconds.  It runs apart from the daemons' starter so that nothing else delays packets.
"""

from __future__ import annotations

import gc
import heapq
import os
import select
import signal
import sys
import time
from typing import Final

import msgspec

from pyagent_node.base.errors import ErrorInfo, InvalidRequest, PyAgentError
from pyagent_node.simulations.lab import namespaces
from pyagent_node.simulations.lab.network import Network, Traffic
from pyagent_node.simulations.lab.scenario import parse_scenario

READS: Final = 32
"""Packets taken from one host before the others get their turn."""
MAX_PACKET: Final = 65_536
MAX_HELD: Final = 64 * 1024 * 1024
"""Bytes on their way in all; more are dropped, as by a router without memory."""
MAX_COMMAND: Final = 1 << 20
_STEP: Final = 50e-6
_STEPS: Final = 2000


class Lateness:
    """How much later than it should each packet was delivered, in steps of 50 us up to 0.1 s."""

    def __init__(self) -> None:
        self._counts = [0] * _STEPS
        self.packets = 0

    def add(self, seconds: float) -> None:
        """Count one packet."""
        self._counts[min(_STEPS - 1, int(seconds / _STEP))] += 1
        self.packets += 1

    def quantile(self, share: float) -> float:
        """Return the milliseconds within which this share of the packets came."""
        wanted, seen = share * self.packets, 0
        for step, count in enumerate(self._counts):
            seen += count
            if seen >= wanted and seen:
                return (step + 1) * _STEP * 1000
        return 0.0


class Flow(msgspec.Struct, frozen=True):
    """The traffic of one direction between two hosts (their numbers)."""

    source: int
    target: int
    traffic: Traffic


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What the router did so far.  ``late_ms`` are quantiles of delivering late under conditions.

    ``overruns`` are packets that kernels dropped before the router saw them, ``held_over`` those
    dropped because too many were on their way: both should be 0, or the lab was too slow.
    """

    packets: int
    bytes: int
    late_ms_p50: float
    late_ms_p99: float
    overruns: int
    held_over: int
    flows: tuple[Flow, ...]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a line: how it went, and what was asked for."""

    error: ErrorInfo | None = None
    stats: Stats | None = None


class Router:
    """The loop; ``devices`` are the TUN descriptors in the order of the hosts."""

    def __init__(self, network: Network, devices: list[int]) -> None:
        self._network = network
        self._devices = devices
        self._number = {descriptor: i for i, descriptor in enumerate(devices)}
        self._due: list[tuple[float, int, int, bytes]] = []
        self._order = 0
        self._held = 0
        self._lateness = Lateness()
        self._packets = 0
        self._bytes = 0
        self._held_over = 0

    def run(self, control: int) -> None:
        """Carry packets and obey the lines on ``control`` until it ends."""
        rest = b""
        watched = [*self._devices, control]
        while True:
            self._deliver()
            pause = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            ready, _, _ = select.select(watched, (), (), pause)
            for descriptor in ready:
                if descriptor != control:
                    self._take(descriptor)
                    continue
                data = os.read(control, 4096)
                rest += data
                if not data or len(rest) > MAX_COMMAND:
                    return
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    _answer(self._obey(line.decode("utf-8", "replace")))

    def _take(self, descriptor: int) -> None:
        source = self._number[descriptor]
        for _ in range(READS):
            try:
                packet = os.read(descriptor, MAX_PACKET)
            except BlockingIOError:
                return
            self._packets += 1
            self._bytes += len(packet)
            now = time.monotonic()
            where = self._network.route(source, packet, now)
            if isinstance(where, str):
                continue
            target, arrival = where
            if arrival <= now:
                self._write(target, packet)
            elif self._held + len(packet) > MAX_HELD:
                self._held_over += 1
            else:
                self._order += 1
                self._held += len(packet)
                heapq.heappush(self._due, (arrival, self._order, target, packet))

    def _deliver(self) -> None:
        due, now = self._due, time.monotonic()
        while due and due[0][0] <= now:
            arrival, _, target, packet = heapq.heappop(due)
            self._held -= len(packet)
            self._lateness.add(now - arrival)
            self._write(target, packet)

    def _write(self, target: int, packet: bytes) -> None:
        try:
            os.write(self._devices[target], packet)
        except OSError:
            # The host's device is down or has no room: a packet lost, as with any other network.
            self._held_over += 1

    def _obey(self, line: str) -> Reply:
        match line.split():
            case ["conditions", "on" | "off" as value]:
                self._network.set_conditions(value == "on")
            case ["timeline", "start"]:
                self._network.start_timeline(time.monotonic())
            case ["timeline", "stop"]:
                self._network.stop_timeline(time.monotonic())
            case ["stats"]:
                return Reply(stats=self._stats())
            case _:
                error = InvalidRequest("The router knows no such command.", code="bad_command")
                return Reply(error=error.to_info())
        return Reply()

    def _stats(self) -> Stats:
        return Stats(
            packets=self._packets,
            bytes=self._bytes,
            late_ms_p50=self._lateness.quantile(0.5),
            late_ms_p99=self._lateness.quantile(0.99),
            overruns=0,
            held_over=self._held_over,
            flows=tuple(Flow(i, j, t) for (i, j), t in self._network.traffic.items()),
        )


def _answer(reply: Reply) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Make the lab that the first line describes, run it, take it down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    control = sys.stdin.fileno()
    first = b""
    while not first.endswith(b"\n"):  # byte by byte: what follows belongs to the loop
        byte = os.read(control, 1)
        if not byte or len(first) > MAX_COMMAND:
            return
        first += byte
    names: tuple[str, ...] = ()
    try:
        scenario = parse_scenario(msgspec.json.decode(first, type=str))
        network = Network(scenario)
        names = namespaces.names(sys.argv[1], len(scenario.hosts))
        router = Router(network, namespaces.make(names))
    except (PyAgentError, OSError) as error:
        info = error.to_info() if isinstance(error, PyAgentError) else None
        _answer(Reply(error=info or ErrorInfo("unavailable", "lab_failed", str(error))))
        return
    try:
        gc.freeze()
        gc.disable()  # packets make no cycles, and a collection would delay them
        _answer(Reply())
        router.run(control)
    except BrokenPipeError:
        pass  # whoever started us is gone
    finally:
        namespaces.remove(names)


if __name__ == "__main__":
    main()
