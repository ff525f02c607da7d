"""The lab's network from outside: starts the router, tells it what to do, sees that all goes."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Final

import msgspec

from pyagent_node.base.errors import Unavailable, error_from_info
from pyagent_node.simulations.lab import namespaces
from pyagent_node.simulations.lab.network import address4, address6
from pyagent_node.simulations.lab.parts import Host
from pyagent_node.simulations.lab.router import Reply, Stats

REPLY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 20.0


class Machine(msgspec.Struct, frozen=True):
    """A host that is there now: its namespace and its addresses."""

    host: Host
    namespace: str
    address4: str
    address6: str


class LabNetwork:
    """A running network; get one from :func:`open_network`.

    It begins calm: packets arrive at once until :meth:`conditions` are on.
    """

    def __init__(self, process: subprocess.Popen[bytes], machines: tuple[Machine, ...]) -> None:
        self._process = process
        self.machines = machines

    @property
    def pid(self) -> int:
        """The router's process id."""
        return self._process.pid

    def conditions(self, on: bool) -> None:
        """Let links be as the scenario says, or perfect."""
        self._tell(f"conditions {'on' if on else 'off'}")

    def start_timeline(self) -> None:
        """Begin the scenario's time line (what it does to links)."""
        self._tell("timeline start")

    def stop_timeline(self) -> None:
        """Let every link be what it was at the beginning."""
        self._tell("timeline stop")

    def stats(self) -> Stats:
        """Return what the router and the hosts' kernels counted."""
        stats = self._tell("stats").stats
        assert stats is not None
        dropped = sum(namespaces.overruns(machine.namespace) for machine in self.machines)
        return msgspec.structs.replace(stats, overruns=dropped)

    def _tell(self, line: str) -> Reply:
        """Send a line and return the answer; raises what the router says, or that it is gone."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(REPLY_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        if not answer:
            raise Unavailable("The lab's router ended unexpectedly.", code="lab_failed")
        reply = msgspec.json.decode(answer, type=Reply)
        if reply.error is not None:
            raise error_from_info(reply.error)
        return reply


@contextlib.contextmanager
def open_network(text: str, hosts: tuple[Host, ...]) -> Iterator[LabNetwork]:
    """Run the network of a scenario's text while the block lasts.

    Whatever ends the block, the namespaces go; when this process is killed, the router takes them
    down.  Raises :class:`Unsupported` (``no_lab``), :class:`Unavailable` (``lab_failed``).
    """
    namespaces.check()
    token = secrets.token_hex(3)
    names = namespaces.names(token, len(hosts))
    process = subprocess.Popen(
        [sys.executable, "-m", "pyagent_node.simulations.lab.router", token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us
    )
    machines = tuple(
        Machine(host, names[i], address4(i), address6(i)) for i, host in enumerate(hosts)
    )
    network = LabNetwork(process, machines)
    try:
        network._tell(json.dumps(text))
        yield network
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        namespaces.remove(names)
