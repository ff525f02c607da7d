"""A swarm of real daemons on this machine: temporary homes, one private mesh, loopback only.

Each daemon is a process of its own, started as a user would start it, with mDNS off and free ports.
Whatever ends the block - success, an error, Ctrl-C, a termination signal - ends every daemon and
removes every file; a daemon also ends by itself when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError, Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.node.api.schema import InviteRequest
from pyagent_node.node.client import Client
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.node.profiles import create_mesh

START_SECONDS = 120.0
STOP_SECONDS = 20.0
TICKET_SECONDS = 600
POLL_SECONDS = 0.05
LOG_TAIL = 1500

Say = Callable[[str], None]


@dataclass
class LocalNode:
    """One daemon of the swarm; ``state`` and ``client`` are there once it is up.

    ``wrap`` stands before its command lines (what puts it on another host), ``flags`` after ``up``.
    """

    name: str
    home: Home
    listen: str = "/ip4/127.0.0.1/tcp/0"
    wrap: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    state: DaemonState | None = None
    _client: Client | None = field(default=None, repr=False)

    @property
    def peer_id(self) -> PeerId:
        """The node's peer id."""
        return self.home.node_key().peer_id

    @property
    def client(self) -> Client:
        """A client of the daemon."""
        if self._client is None:
            self._client = Client.from_home(self.home)
        return self._client

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the daemon's process runs."""
        return self.process is not None and self.process.poll() is None

    def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def kill(self) -> None:
        """End the daemon as a power cut would; its runners end with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.close()
        _close_pipes(self.process)

    def start(self) -> None:
        """Start the daemon of a node that is a member already, and wait until it is up.

        It listens on other ports than before.  Raises :class:`Unavailable`
        (``daemon_not_started``).
        """
        start_process(self)
        await_up(self, time.monotonic() + START_SECONDS)


class Interrupted(KeyboardInterrupt):
    """A termination signal came; it ends the program as Ctrl-C would."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn termination signals into exceptions, so that what was started is cleaned up."""

    def raise_interrupted(number: int, _: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    names = ("SIGTERM", "SIGHUP")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        getattr(signal, name): signal.signal(getattr(signal, name), raise_interrupted)
        for name in names
        if hasattr(signal, name)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C and termination from ending a clean-up half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Hold Ctrl-C and termination back until the block is done, for what must not be half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for held in came:
        signal.raise_signal(held)


@contextlib.contextmanager
def local_swarm(count: int, *, say: Say = lambda _: None) -> Iterator[list[LocalNode]]:
    """Run ``count`` daemons as one private mesh, every one connected to the first.

    ``say`` gets lines for the user.  Raises :class:`Unavailable` (``daemon_not_started``) with the
    end of the log of a daemon that did not come up.
    """
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="pyagent-swarm-", ignore_cleanup_errors=True) as root,
    ):
        nodes = [LocalNode(f"node-{i}", Home(Path(root, f"node-{i}"))) for i in range(count)]
        with running(nodes, say=say):
            yield nodes


@contextlib.contextmanager
def running(nodes: list[LocalNode], *, say: Say = lambda _: None) -> Iterator[None]:
    """Run the daemons of empty homes as one private mesh; errors as for :func:`local_swarm`."""
    try:
        _start_all(nodes, say)
        yield
    finally:
        with uninterrupted():
            stop_all(nodes)


def _start_all(nodes: list[LocalNode], say: Say) -> None:
    first, others = nodes[0], nodes[1:]
    create_mesh(first.home, "local", "private", node_name=first.name, clock=time.time)
    deadline = time.monotonic() + START_SECONDS
    say(f"Starting {len(nodes)} daemon{'s' if len(nodes) > 1 else ''} ...")
    start_process(first)
    await_up(first, deadline)
    joins = [(node, begin_join(first, node)) for node in others]
    for node, process in joins:
        finish_join(node, process, deadline)
    for node in others:
        start_process(node)
    for node in others:
        await_up(node, deadline)
    wanted = {node.peer_id for node in others}
    while not wanted <= {peer.peer_id for peer in first.client.peers().peers}:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"The daemons did not find each other within {START_SECONDS:.0f} s.",
                code="swarm_not_connected",
            )
        time.sleep(POLL_SECONDS)


def _environment(home: Home) -> dict[str, str]:
    """Return this process's environment without its own node settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYAGENT_")}
    return {**kept, "PYAGENT_HOME": str(home.root), "PYTHONUNBUFFERED": "1"}


def _command(node: LocalNode, *arguments: str) -> list[str]:
    return [*node.wrap, sys.executable, "-m", "pyagent_node.cli.main", "--json", *arguments]


def _open_log(node: LocalNode) -> IO[bytes]:
    node.home.root.mkdir(parents=True, exist_ok=True)
    return (node.home.root / "stderr.log").open("ab")


def start_process(node: LocalNode) -> None:
    """Start a daemon; it prints its state as JSON when it is up."""
    flags = ("--no-mdns", "--listen", node.listen, "--api", "127.0.0.1:0")
    command = _command(node, "up", "--with-parent", "--name", node.name, *flags, *node.flags)
    with _open_log(node) as log, undivided():
        node.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(node.home),
            # Ctrl-C on the terminal is for us; we end the daemons in order.
            start_new_session=True,
        )


def await_up(node: LocalNode, deadline: float) -> None:
    """Wait for the line that a daemon prints when it is up."""
    process = node.process
    assert process is not None
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    try:
        node.state = msgspec.json.decode(line, type=DaemonState)
    except msgspec.DecodeError:
        process.wait(STOP_SECONDS)
        raise _not_started(node, f"did not start (status {process.returncode})") from None


def begin_join(first: LocalNode, node: LocalNode) -> subprocess.Popen[bytes]:
    """Let a node redeem a fresh ticket, given through stdin, where no one else sees it."""
    invitation = first.client.invite(InviteRequest(role="voter", ttl_seconds=TICKET_SECONDS))
    with _open_log(node) as log, undivided():
        process = subprocess.Popen(
            _command(node, "join", "--name", node.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=_environment(node.home),
            start_new_session=True,
        )
        node.process = process
    assert process.stdin is not None
    process.stdin.write(invitation.ticket.encode() + b"\n")
    process.stdin.close()
    return process


def finish_join(node: LocalNode, process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait until a join that was begun is done; raises :class:`Unavailable` when it failed."""
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise _not_started(node, "could not join in time") from None
    if status != 0:
        raise _not_started(node, f"could not join (status {status})")


def _not_started(node: LocalNode, what: str) -> PyAgentError:
    """Return an error with what the daemon said last."""
    text = (node.home.root / "stderr.log").read_text(errors="replace").strip()
    said = " ".join(text[-LOG_TAIL:].split())
    return Unavailable(
        f"{node.name} {what}. It said: {said or 'nothing'}",
        code="daemon_not_started",
        remedy="See `pyagent-node doctor`.",
    )


def stop_all(nodes: list[LocalNode]) -> None:
    """Ask every process to end, and kill what has not ended in time."""
    for node in nodes:
        node.close()
        if node.process is not None and node.process.poll() is None:
            node.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for node in nodes:
        process = node.process
        if process is None:
            continue
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close_pipes(process)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
