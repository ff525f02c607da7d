"""Hosts on one machine: network namespaces with links between them.  Needs root and iproute2."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path


def why_not() -> str | None:
    """Return why namespaces cannot be made here, or ``None`` when they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@dataclass(frozen=True)
class Host:
    """One namespace with its address on the shared link and the home of its node."""

    namespace: str
    address: str
    home: Path

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs ``pyagent-node`` with ``arguments`` in here."""
        program = [sys.executable, "-m", "pyagent_node.cli.main", "--home", str(self.home)]
        return ["ip", "netns", "exec", self.namespace, *program, *arguments]

    def run(self, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a verb with ``--json`` to its end."""
        return subprocess.run(
            self.command("--json", *arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def ask(self, *arguments: str, timeout: float = 100) -> dict[str, object]:
        """Run a verb that must succeed and return the object on its last line."""
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        value: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return value

    def refused(self, *arguments: str) -> tuple[int, dict[str, object]]:
        """Run a verb that must fail and return its exit status and error."""
        done = self.run(*arguments)
        assert done.returncode != 0, f"{arguments} succeeded: {done.stdout}"
        error: dict[str, object] = json.loads(done.stderr.splitlines()[-1])["error"]
        return done.returncode, error

    @contextmanager
    def daemon(self, *flags: str) -> Iterator[dict[str, object]]:
        """Run the daemon here, listening on this host's address; yields its state once it is up."""
        with (self.home.parent / f"{self.namespace}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(
                    "--json",
                    "up",
                    "--with-parent",
                    "--listen",
                    f"/ip4/{self.address}/tcp/4810",
                    "--api",
                    "127.0.0.1:0",
                    "--no-mdns",
                    *flags,
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, f"the daemon did not start: {Path(log.name).read_text()}"
                yield json.loads(line)
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make two joined namespaces, and take them down afterwards whatever happened."""
    token = secrets.token_hex(3)
    names = (f"pa-{token}-a", f"pa-{token}-b")
    links = (f"pa{token}a", f"pa{token}b")
    hosts = []
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1])
        _ip("link", "set", links[1], "netns", names[1])
        for index, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            _ip("-n", name, "addr", "add", f"10.77.0.{index}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            home = folder / f"host{index}"
            hosts.append(Host(name, f"10.77.0.{index}", home))
        yield hosts[0], hosts[1]


class Halves:
    """Hosts on two switches with one cable between them."""

    def __init__(self, hosts: list[Host], switch: str, cable: str) -> None:
        self.hosts = hosts
        self._switch = switch
        self._cable = cable

    def cut(self) -> None:
        """Pull the cable: frames are lost, nobody is told."""
        _ip("-n", self._switch, "link", "set", self._cable, "down")

    def heal(self) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", self._cable, "up")


@contextmanager
def two_halves(folder: Path, left: int, right: int) -> Iterator[Halves]:
    """Make ``left + right`` hosts on one network that can be cut between the two groups."""
    token = secrets.token_hex(2)
    switch = f"pa-{token}-sw"
    with ExitStack() as stack:
        _ip("netns", "add", switch)
        stack.callback(_ip, "netns", "del", switch)
        for bridge in ("left", "right"):
            _ip("-n", switch, "link", "add", bridge, "type", "bridge")
            _ip("-n", switch, "link", "set", bridge, "up")
        _ip("-n", switch, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        _ip("-n", switch, "link", "set", "cable0", "master", "left", "up")
        _ip("-n", switch, "link", "set", "cable1", "master", "right", "up")
        hosts = []
        for index in range(left + right):
            name, port = f"pa-{token}-{index}", f"port{index}"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip(
                "-n",
                switch,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "up0",
                "netns",
                name,
            )
            _ip(
                "-n",
                switch,
                "link",
                "set",
                port,
                "master",
                "left" if index < left else "right",
                "up",
            )
            address = f"10.78.0.{index + 1}"
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "up0")
            _ip("-n", name, "link", "set", "up0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            hosts.append(Host(name, address, folder / f"host{index}"))
        yield Halves(hosts, switch, "cable0")
