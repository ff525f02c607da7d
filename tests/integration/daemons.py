"""Real daemons as child processes, started as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil

from pyagent_node.node.client import Client
from pyagent_node.node.home import DaemonState, Home

START_SECONDS = 60.0
STOP_SECONDS = 30.0


class Daemon:
    """One daemon: ``state`` is what it said when it was up, ``log`` all that it wrote.

    Its standard input is a pipe of ours, so that it ends with this process at the latest.
    """

    def __init__(self, home: Home, *flags: str) -> None:
        self.home = home
        home.root.mkdir(parents=True, exist_ok=True)
        self.log_path = home.root / "test.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYAGENT_")}
        base = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0", "--api", "127.0.0.1:0")
        command = [sys.executable, "-m", "pyagent_node.cli.main", "--json", "up", "--with-parent"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *base, *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, "PYAGENT_HOME": str(home.root)},
                start_new_session=True,
            )
        self.state: DaemonState | None = None

    def __enter__(self) -> Daemon:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    @property
    def log(self) -> str:
        """What it wrote to its log."""
        return self.log_path.read_text(errors="replace")

    def up(self) -> DaemonState:
        """Wait until it is up and return what it says of itself."""
        assert self.process.stdout is not None
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, f"The daemon did not start: {self.log}"
        self.state = DaemonState(**json.loads(line))
        return self.state

    def client(self) -> Client:
        """Return a client of it."""
        return Client.from_home(self.home)

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        return self.process.wait(STOP_SECONDS)

    def memory(self) -> int:
        """Return its resident memory in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def children(self) -> list[psutil.Process]:
        """Return its runner processes."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def running(root: Path, *flags: str) -> Iterator[Daemon]:
    """Run one daemon on a new home below ``root`` and end it in good order."""
    with Daemon(Home(root), *flags) as daemon:
        daemon.up()
        yield daemon
        if daemon.process.poll() is None:
            assert daemon.terminate() == 0, daemon.log
