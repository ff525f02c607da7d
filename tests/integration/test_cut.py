"""The network between hosts is cut in the middle of an answer: silence, not an error."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from tests.integration.namespaces import Halves, Host, two_halves, why_not

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

SETTLE_SECONDS = 60.0
TEXT = ("generate", "Tell me about three rivers.", "--max-tokens", "300", "--seed", "7")
BEGINNING = 60
"""Bytes of an answer that show it is well under way."""


class Mesh(NamedTuple):
    """Three hosts on one side of the cable and two on the other, one mesh."""

    halves: Halves
    peers: list[str]
    model: str


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("hosts")
    with two_halves(folder, left=3, right=2) as halves, ExitStack() as stack:
        first, *others = halves.hosts
        first.ask("mesh", "create", "five")
        peers = [str(stack.enter_context(first.daemon())["peer_id"])]
        for number, host in enumerate(others, start=1):
            host.ask("join", str(first.ask("invite")["ticket"]), "--name", f"host{number}")
            peers.append(str(stack.enter_context(host.daemon())["peer_id"]))
        pulled = first.ask("model", "pull", str(bundled_model))["model"]
        assert isinstance(pulled, dict)
        yield Mesh(halves, peers, str(pulled["digest"]))


@pytest.fixture
def halves(mesh: Mesh) -> Iterator[Halves]:
    """The mesh in good order, with ranks on both sides."""
    first = mesh.halves.hosts[0]
    settle(first, mesh.peers)
    nodes = ",".join(mesh.peers[i] for i in (1, 3, 2))
    first.ask("model", "load", mesh.model, "--layers", "10,20", "--nodes", nodes, timeout=200)
    yield mesh.halves
    mesh.halves.heal()


def settle(first: Host, peers: list[str]) -> None:
    """Wait until all five hosts are there and vote, and the first, on the larger side, leads."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        status = first.ask("status")
        consensus, others = status["consensus"], status["peers"]
        assert isinstance(consensus, dict)
        assert isinstance(others, list)
        whole = len(others) == 4 and len(consensus["voters"]) == 5 and not consensus["joint"]
        if whole and consensus["leader"] == peers[0]:
            return
        if whole and consensus["leader"]:
            first.ask("raft", "transfer", peers[0])
        assert time.monotonic() < deadline, status


def answer(host: Host) -> str:
    """Return the text of an undisturbed answer."""
    return subprocess.run(
        host.command(*TEXT), check=True, capture_output=True, timeout=200
    ).stdout.decode()


def begin(host: Host) -> tuple[subprocess.Popen[bytes], bytes]:
    """Ask, and return once the answer is under way, with its beginning."""
    # Without a buffer, or what it read ahead would be lost to finish().
    asking = subprocess.Popen(
        host.command(*TEXT), bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert asking.stdout is not None
    beginning = b""
    while len(beginning) < BEGINNING and (more := asking.stdout.read(BEGINNING)):
        beginning += more
    return asking, beginning


def finish(asking: subprocess.Popen[bytes], beginning: bytes) -> str:
    """Wait for the rest of an answer and return all of it."""
    out, err = asking.communicate(timeout=200)
    assert asking.returncode == 0, err.decode()
    return (beginning + out).decode()


def test_the_side_with_a_quorum_goes_on_alone(halves: Halves) -> None:
    head = halves.hosts[0]
    expected = answer(head)
    asking, beginning = begin(head)
    halves.cut()
    assert finish(asking, beginning) == expected


def test_the_side_without_one_waits_for_the_other(halves: Halves) -> None:
    head = halves.hosts[4]
    expected = answer(head)
    asking, beginning = begin(head)
    halves.cut()
    (placement,) = cast("list[dict[str, str]]", head.ask("status")["placements"])
    _, error = head.refused("model", "unload", placement["model"])
    assert error["code"] == "no_leader", error
    assert asking.poll() is None, asking.communicate()
    halves.heal()
    assert finish(asking, beginning) == expected
