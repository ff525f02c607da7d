"""The WAN lab for real: packets over the router, daemons over the packets.  Needs root."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pyagent_node.simulations.lab import namespaces, tun
from pyagent_node.simulations.lab.control import LabNetwork, open_network
from pyagent_node.simulations.lab.scenario import parse_scenario

pytestmark = [
    pytest.mark.alone,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not())),
]

PROGRAM = (sys.executable, "-m", "pyagent_node.cli.main")

PAIR = """
name = "pair"
[[site]]
name = "a"
[[site]]
name = "b"
[wan]
rtt = "40ms"
rate = "50mbit"
[[event]]
do = "partition"
at = "0s"
sides = [["a"], ["b"]]
"""

SWARM = """
name = "three"
seed = 5
[[site]]
name = "a"
[[site]]
name = "b"
[[site]]
name = "c"
[wan]
rtt = "30ms"
jitter = "2ms"
loss = "1%"
rate = "50mbit"
[[event]]
do = "degrade"
at = "200ms"
lasts = "1s"
between = ["a", "b"]
loss = "10%"
[[event]]
do = "kill"
at = "1500ms"
host = "c"
[[event]]
do = "start"
at = "3s"
host = "c"
[model]
source = "MODEL"
ranks = 3
[answer]
prompt = "Tell me about three rivers."
tokens = 48
"""


def leftovers() -> set[str]:
    """Return the lab's namespaces that are there now."""
    folder = Path(tun.RUN_DIR)
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if name.startswith(namespaces.PREFIX)}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = leftovers()
    yield
    others = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    running = {words[-1] for words in others if "pyagent_node.simulations.lab.router" in words}
    left = {name for name in leftovers() - before if name.split("-")[2] not in running}
    assert not left, "namespaces without a router"


class Wire:
    """A socket of one host of a network."""

    def __init__(
        self, network: LabNetwork, index: int, family: socket.AddressFamily, kind: int
    ) -> None:
        machine = network.machines[index]
        self.address = machine.address4 if family == socket.AF_INET else machine.address6
        with tun.inside(machine.namespace):
            self.socket = socket.socket(family, kind)
        self.socket.settimeout(10)
        self.socket.bind((self.address, 0))

    @property
    def name(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return host, port


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_datagrams_and_streams_take_as_long_as_the_way_is(family: socket.AddressFamily) -> None:
    with open_network(PAIR, parse_scenario(PAIR).hosts) as network, ExitStack() as stack:
        ends = [Wire(network, i, family, socket.SOCK_DGRAM) for i in range(2)]
        server, client = (Wire(network, i, family, socket.SOCK_STREAM) for i in range(2))
        for wire in (*ends, server, client):
            stack.callback(wire.socket.close)
        network.conditions(True)
        began = time.monotonic()
        ends[0].socket.sendto(b"ping", ends[1].name)
        data, sender = ends[1].socket.recvfrom(100)
        ends[1].socket.sendto(data, sender)
        assert ends[0].socket.recv(100) == b"ping"
        assert time.monotonic() - began >= 0.04
        server.socket.listen()
        began = time.monotonic()
        client.socket.connect(server.name)
        assert time.monotonic() - began >= 0.04
        there, _ = server.socket.accept()
        with there:
            there.settimeout(10)
            client.socket.sendall(b"x" * 50_000)
            with there.makefile("rb") as received:
                assert len(received.read(50_000)) == 50_000
            network.start_timeline()
            ends[0].socket.sendto(b"lost", ends[1].name)
            ends[1].socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                ends[1].socket.recv(100)
            network.stop_timeline()
            ends[1].socket.settimeout(10)
            ends[0].socket.sendto(b"back", ends[1].name)
            assert ends[1].socket.recv(100) == b"back"
        stats = network.stats()
        flow = next(flow for flow in stats.flows if flow.source == 0)
        assert flow.traffic.cut == 1
        assert (stats.overruns, stats.held_over) == (0, 0)


def test_the_router_takes_everything_down_when_its_owner_is_gone() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyagent_node.simulations.lab.router", "test00"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(PAIR).encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"{}\n"
        assert set(namespaces.names("test00", 2)) <= leftovers()
        process.stdin.write(b"nonsense\n")
        process.stdin.flush()
        assert b"bad_command" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(20) == 0


def lab(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start ``lab run`` with everything temporary in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if name != "PYAGENT_HOME"}
    return subprocess.Popen(
        [*PROGRAM, "--home", str(folder / "home"), "lab", "run", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "TMPDIR": str(folder / "tmp")},
        start_new_session=True,
    )


@pytest.fixture
def scenario(tmp_path: Path, bundled_model: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "three.toml"
    path.write_text(SWARM.replace("MODEL", str(bundled_model)))
    return path


@pytest.mark.model
def test_a_swarm_answers_as_ever_over_a_bad_network_while_a_daemon_dies(
    scenario: Path, tmp_path: Path
) -> None:
    with lab(tmp_path, str(scenario), "--json") as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["identical"] is True
    assert result["disturbed"]["seconds"] > 1.5, (
        "the way alone takes longer: the daemon died before"
    )
    assert len(result["token_ids"]) == 48
    assert set(result["rtt_ms"]) == {"b", "c"}
    assert min(result["rtt_ms"].values()) >= 26
    assert len(result["links"]) == 6
    assert sum(link["lost"] for link in result["links"]) > 0
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.model
def test_ctrl_c_leaves_nothing(scenario: Path, tmp_path: Path) -> None:
    with lab(tmp_path, str(scenario)) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("Starting 3 daemons"), said
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert list((tmp_path / "tmp").iterdir()) == []
