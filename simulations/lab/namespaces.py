"""The lab's namespaces: made, given an address each, and taken down.  Linux and root only."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from pyagent_node.base.errors import Unavailable, Unsupported
from pyagent_node.simulations.lab import tun
from pyagent_node.simulations.lab.network import address4, address6

log = logging.getLogger("pyagent_node.lab")

INTERFACE: Final = "lab0"
PREFIX: Final = "pa-lab-"
MTU: Final = 1500
QUEUE_PACKETS: Final = 2000
"""Packets that a host's kernel keeps while the router is busy; beyond that it drops them itself."""
_IP_SECONDS: Final = 20


def why_not() -> str | None:
    """Return why the lab cannot run here, or ``None`` when it can."""
    if sys.platform != "linux":
        return "the lab needs Linux (network namespaces and TUN devices)"
    if os.geteuid() != 0:
        return "the lab needs root (network namespaces and TUN devices)"
    if shutil.which("ip") is None:
        return "the lab needs iproute2 (the program `ip`)"
    if not Path(tun.DEVICE).exists():
        return f"the lab needs {tun.DEVICE} (the kernel module `tun`)"
    return None


def check() -> None:
    """Raise :class:`Unsupported` (``no_lab``) where the lab cannot run."""
    reason = why_not()
    if reason is not None:
        raise Unsupported(
            f"{reason[0].upper()}{reason[1:]}.",
            code="no_lab",
            remedy='Run it there, or shape links without it: `pyagent-node up --shape "rtt=60ms"`.',
        )


def ip(*arguments: str) -> str:
    """Run ``ip`` and return what it prints.

    Raises :class:`Unavailable` (``lab_failed``) with what it said.
    """
    try:
        done = subprocess.run(
            ["ip", *arguments],
            capture_output=True,
            text=True,
            timeout=_IP_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(arguments, str(error)) from None
    if done.returncode != 0:
        raise _failed(arguments, done.stderr.strip())
    return done.stdout


def _failed(arguments: tuple[str, ...], said: str) -> Unavailable:
    return Unavailable(f"`ip {' '.join(arguments)}` failed: {said[:300]}", code="lab_failed")


def names(token: str, count: int) -> tuple[str, ...]:
    """Return the names of the namespaces of one lab."""
    return tuple(f"{PREFIX}{token}-{i}" for i in range(count))


def make(namespaces: tuple[str, ...]) -> list[int]:
    """Make the namespaces with a TUN device each; return the devices' descriptors.

    On failure nothing is left.
    """
    descriptors: list[int] = []
    try:
        for index, name in enumerate(namespaces):
            ip("netns", "add", name)
            descriptors.append(tun.open_tun(name, INTERFACE))
            settings = ("mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS))
            ip("-n", name, "link", "set", INTERFACE, *settings)
            ip("-n", name, "addr", "add", f"{address4(index)}/24", "dev", INTERFACE)
            ip("-n", name, "addr", "add", f"{address6(index)}/64", "dev", INTERFACE, "nodad")
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        remove(namespaces)
        raise
    return descriptors


def remove(namespaces: tuple[str, ...]) -> None:
    """Take down those of the namespaces that are there; never raises."""
    for name in namespaces:
        if not Path(tun.RUN_DIR, name).exists():
            continue
        try:
            ip("netns", "del", name)
        except Unavailable as error:
            log.warning("%s", error.message)


def overruns(namespace: str) -> int:
    """Return how many packets a host's kernel dropped because the router was too slow."""
    found = json.loads(ip("-n", namespace, "-s", "-j", "link", "show", INTERFACE))
    return int(found[0]["stats64"]["tx"]["dropped"])
