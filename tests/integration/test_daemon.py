"""The life of a daemon as a process: starting, ending, and what may be wrong with its home."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from pyagent_node.base.errors import Unavailable
from pyagent_node.node.api.schema import InviteRequest
from pyagent_node.node.client import running_daemon
from pyagent_node.node.home import DaemonState, Home
from tests.integration.daemons import Daemon, running

pytestmark = [pytest.mark.daemons, pytest.mark.slow]

MIB = 1024 * 1024


def test_start_and_orderly_end(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with Daemon(home) as daemon:
        state = daemon.up()
        assert home.read_state() == state
        assert state.pid == daemon.process.pid
        assert stat.S_IMODE(home.token_path.stat().st_mode) == 0o600
        assert httpx.get(f"{state.api_url}/healthz").json() == {"alive": True}
        assert httpx.get(f"{state.api_url}/readyz").json()["ready"]
        with daemon.client() as client:
            status = client.status()
            assert status.node.peer_id == state.peer_id
            assert status.mesh is not None
            assert status.mesh.mesh_id == state.mesh_id
            assert status.consensus is not None
            assert status.consensus.role == "leader"
            assert status.placements == ()
            assert {c.name for c in client.doctor().checks} >= {"listening", "agreement", "peers"}
            assert client.models().models == ()
            ticket = client.invite(InviteRequest(ttl_seconds=600)).ticket
            assert ticket.startswith("pyagent1")
        assert daemon.terminate() == 0
        assert home.read_state() is None
        assert "Traceback" not in daemon.log
        for secret in (home.api_token(), ticket):
            assert secret not in daemon.log
        with pytest.raises(Unavailable):
            daemon.client()
    with running(tmp_path) as again:
        assert again.state is not None
        assert again.state.peer_id == state.peer_id
        assert again.state.mesh_id == state.mesh_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_end_it_as_well(tmp_path: Path, number: signal.Signals) -> None:
    with Daemon(Home(tmp_path)) as daemon:
        daemon.up()
        assert daemon.terminate(number) == 0
        assert "Traceback" not in daemon.log


def test_shutdown_through_the_api(tmp_path: Path) -> None:
    with Daemon(Home(tmp_path)) as daemon:
        daemon.up()
        with daemon.client() as client:
            client.shutdown()
        assert daemon.wait() == 0


def test_it_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    with Daemon(Home(tmp_path)) as daemon:
        daemon.up()
        assert daemon.process.stdin is not None
        daemon.process.stdin.close()
        assert daemon.wait() == 0
        assert daemon.home.read_state() is None


def test_an_idle_daemon_is_small(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        with daemon.client() as client:
            for _ in range(20):
                client.status()
        assert daemon.memory() <= 150 * MIB


def test_one_daemon_a_home(tmp_path: Path) -> None:
    with running(tmp_path) as first, Daemon(Home(tmp_path)) as second:
        assert second.wait() == 9
        assert "already_running" in second.log
        with first.client() as client:
            assert client.status().node.pid == first.process.pid


def test_of_two_started_at_once_one_runs(tmp_path: Path) -> None:
    with running(tmp_path):  # so that key and mesh are there
        pass
    with Daemon(Home(tmp_path)) as first, Daemon(Home(tmp_path)) as second:
        started = [first_line(daemon) for daemon in (first, second)]
        assert sorted(map(bool, started)) == [False, True]
        winner, loser = (first, second) if started[0] else (second, first)
        assert loser.wait() == 9
        assert winner.terminate() == 0


def test_a_state_file_of_a_dead_daemon_is_no_obstacle(tmp_path: Path) -> None:
    home = Home(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    home.write_state(DaemonState(dead.pid, "http://127.0.0.1:1", "x", None, "0", 0.0))
    with running(tmp_path) as daemon:
        assert running_daemon(home) == daemon.state


def test_a_killed_daemon_leaves_a_home_that_starts_again(tmp_path: Path) -> None:
    with Daemon(Home(tmp_path)) as daemon:
        daemon.up()
        daemon.process.kill()
        assert daemon.wait() == -signal.SIGKILL
    with running(tmp_path) as again, again.client() as client:
        assert client.status().consensus is not None


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Daemon(Home(tmp_path), "--api", f"127.0.0.1:{port}") as daemon:
            assert daemon.wait() == 9
            assert f"127.0.0.1:{port}" in daemon.log
            assert "api_port" in daemon.log
            assert "Traceback" not in daemon.log
        assert daemon.home.read_state() is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with running(tmp_path / "good"):
        pass
    [log] = (tmp_path / "good").rglob("log")
    segments = sorted(p for p in log.rglob("*") if p.is_file())
    assert segments
    damaged = segments[-1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(bytes(content) + b"\0" * 64)
    with Daemon(Home(tmp_path / "good")) as daemon:
        status = daemon.terminate() if first_line(daemon) else daemon.wait()
        # A torn tail is cut off and reported; anything else stops the node, naming the file.
        assert status in (0, 7), daemon.log
        assert str(log) in daemon.log


def first_line(daemon: Daemon) -> bytes:
    """Return the daemon's first line, which says that it is up; empty when it ended instead."""
    assert daemon.process.stdout is not None
    return daemon.process.stdout.readline()


def test_a_token_readable_by_others_is_refused(tmp_path: Path) -> None:
    with running(tmp_path):
        pass
    os.chmod(Home(tmp_path).token_path, 0o644)
    with Daemon(Home(tmp_path)) as daemon:
        assert daemon.wait() == 4
        assert "chmod 600" in daemon.log


def test_the_api_beyond_loopback_needs_the_token(tmp_path: Path) -> None:
    with running(tmp_path, "--api", "0.0.0.0:0") as daemon:
        assert daemon.state is not None
        url = daemon.state.api_url
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=daemon.home.api_token())
        with client:
            assert list(client.models.list()) == []
        with daemon.client() as own:
            assert own.status().node.pid == daemon.process.pid


def test_logs_as_json(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.config_path.parent.mkdir(parents=True, exist_ok=True)
    home.config_path.write_text('log_format = "json"\nlog_level = "debug"\n')
    with running(tmp_path) as daemon, daemon.client() as client:
        client.status()
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert {"time", "level", "area", "message"} <= set(lines[0])
    assert home.api_token() not in daemon.log
