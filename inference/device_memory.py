"""The memories of this machine that weights can lie in: how much there is and how much is free.

An NVIDIA card's is asked of its driver's own program, ``nvidia-smi``: the daemon loads no backend's
library.  Apple's GPU computes in the machine's memory.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

import psutil

from pyagent_node.base.limits import MIB
from pyagent_node.inference.backend_names import BackendState
from pyagent_node.inference.llama.memory import available_memory
from pyagent_node.inference.machine import DeviceMemory

ASK_SECONDS: Final = 5.0
"""Longest wait for the driver's program."""
_QUERY: Final = ("--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits", "--id=0")


def device_memories(
    states: Sequence[BackendState], ask: Callable[[], str] | None = None
) -> tuple[DeviceMemory, ...]:
    """Return the memories that the backends of this machine compute in; never raises.

    The first NVIDIA card counts: it is the one that torch takes.  ``ask`` returns what its
    driver's program prints.
    """
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    found = [
        DeviceMemory(
            "unified" if apple else "ram", psutil.virtual_memory().total, available_memory()
        )
    ]
    if any(state.device == "cuda" and state.installed for state in states):
        found += parse_cards((ask or _ask_driver)())
    return tuple(found)


def parse_cards(text: str) -> list[DeviceMemory]:
    """Return the card of the first line that makes sense: its MiB in all, and those free."""
    for line in text.splitlines()[:64]:
        numbers = [part.strip() for part in line.split(",")]
        if len(numbers) == 2 and all(each.isdigit() and len(each) < 12 for each in numbers):
            total, free = (int(each) * MIB for each in numbers)
            if total > 0 and free <= total:
                return [DeviceMemory("vram", total, free)]
    return []


def _ask_driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, *_QUERY],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout[:4096] if done.returncode == 0 else ""
