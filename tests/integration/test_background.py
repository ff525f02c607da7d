"""``up --detach``, ``down`` and what a user meets between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pyagent_node.node.home import Home

pytestmark = [pytest.mark.daemons, pytest.mark.slow]

Do = Callable[..., "subprocess.CompletedProcess[str]"]
QUIET = ("--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0")


@pytest.fixture
def do(tmp_path: Path) -> Iterator[Do]:
    """Run command lines on one home; a daemon that is left is ended."""
    environment = {**os.environ, "PYAGENT_HOME": str(tmp_path)}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pyagent_node.cli.main", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    yield call
    assert call("down", "--timeout", "10", "--force").returncode == 0


def _ended(pid: int) -> bool:
    """Whether a process is gone; the test process, which adopts orphans, may not have reaped it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_in_the_background_and_down_again(do: Do, tmp_path: Path) -> None:
    up = do("up", "--detach", "--api", "127.0.0.1:0", "--name", "one", *QUIET, "--json")
    assert up.returncode == 0, up.stderr
    state = json.loads(up.stdout.splitlines()[-1])
    status = json.loads(do("status", "--json").stdout)
    assert status["node"]["pid"] == state["pid"]
    assert status["node"]["name"] == "one"
    assert status["mesh"]["name"] == "home"
    again = do("up", "--detach", "--json")
    assert again.returncode == 9
    assert json.loads(again.stderr.splitlines()[-1])["error"]["code"] == "already_running"
    assert do("mesh", "create", "other").stderr.count("A daemon runs") == 1
    log = tmp_path / "daemon.log"
    assert log.stat().st_mode & 0o077 == 0
    token = (tmp_path / "api.token").read_text().strip()
    assert token not in log.read_text()
    down = do("down", "--json")
    assert json.loads(down.stdout)["stopped"] is True
    assert _ended(state["pid"])
    assert do("status").returncode == 6


def test_a_daemon_that_cannot_start_says_why(do: Do) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = do("up", "--detach", "--api", f"127.0.0.1:{port}", *QUIET, "--json")
        doctor = do("doctor", "--quick", "--json")
    assert up.returncode == 9  # as in the foreground: another program has the port
    error = json.loads(up.stderr.splitlines()[-1])["error"]
    assert error["code"] == "daemon_not_started"
    assert str(port) in error["message"]
    assert doctor.returncode in (0, 1)


def test_a_daemon_that_hangs_is_killed_on_request(do: Do, tmp_path: Path) -> None:
    up = do("up", "--detach", "--api", "127.0.0.1:0", *QUIET, "--json")
    pid = json.loads(up.stdout.splitlines()[-1])["pid"]
    os.kill(pid, signal.SIGSTOP)
    patient = do("down", "--timeout", "0.2", "--json")
    assert patient.returncode == 6
    assert not _ended(pid)
    forced = do("down", "--timeout", "0.2", "--force", "--json")
    assert json.loads(forced.stdout)["forced"] is True
    assert Home(tmp_path).read_state() is None
    assert do("up", "--detach", "--api", "127.0.0.1:0", *QUIET).returncode == 0
