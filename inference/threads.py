"""How many threads compute in a runner: physical cores, within what the system lets us use.

Threads of a computation wait for each other by spinning: one more than there are processors makes
all of them slow, and two on one core share its arithmetic.  So a runner gets a thread for each
physical core, within a container's quota, and one less where that would leave no processor to the
daemon, to other ranks and to everything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil


class ThreadChoice(NamedTuple):
    """A number of threads, and why, in a few words."""

    threads: int
    why: str


def choose_threads(processors: int, cores: int, quota: float | None) -> ThreadChoice:
    """Return the threads for so many processors on so many cores.

    ``quota`` is how many processors' time a container is given, if it is limited.  Pure.
    """
    processors = max(1, processors)
    cores = min(max(1, cores), processors)
    usable = processors if quota is None else max(1, min(processors, int(quota)))
    why = f"{_count(cores, 'physical core')} of {_count(processors, 'processor')}"
    if quota is not None and usable < processors:
        why += f", a quota of {quota:g}"
    threads = min(cores, usable)
    if threads == usable and threads > 1:
        threads -= 1
        why += ", one left to everything else"
    return ThreadChoice(threads, why)


def best_threads(root: Path = Path("/")) -> ThreadChoice:
    """Return the threads for this machine, or what ``root`` shows of another."""
    if hasattr(os, "sched_getaffinity"):
        allowed: Sequence[int] = sorted(os.sched_getaffinity(0))
    else:
        allowed = range(os.cpu_count() or 1)
    if sys.platform == "darwin":
        # Cores of two kinds, and nothing tells which is which: half are the fast ones or more.
        half = max(1, len(allowed) // 2)
        return ThreadChoice(half, f"half of {_count(len(allowed), 'processor')}")
    return choose_threads(len(allowed), _cores(root, allowed), cpu_quota(root))


def default_threads() -> int:
    """Return how many threads a runner gets where nobody says otherwise."""
    return best_threads().threads


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many processors' time our control group may use; ``None``: no limit."""
    limits: list[float] = []
    base = root / "sys/fs/cgroup"
    for path in (*_groups(root, base), base / "cpu"):
        pair = _read(path / "cpu.max").split()
        if len(pair) != 2:
            pair = [_read(path / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(pair) == 2 and all(each.isdigit() and int(each) > 0 for each in pair):
            limits.append(int(pair[0]) / int(pair[1]))
    return min(limits, default=None)


def _groups(root: Path, base: Path) -> list[Path]:
    """Return our control group and those around it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::/"):
            parts = [part for part in line[4:].strip().split("/") if part not in ("", "..")]
            return [base.joinpath(*parts[:stop]) for stop in range(len(parts), -1, -1)]
    return [base]


def _cores(root: Path, allowed: Sequence[int]) -> int:
    """Return how many cores the processors ``allowed`` are on."""
    found: set[str] = set()
    for number in allowed:
        folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
        siblings = _read(folder / "core_cpus_list") or _read(folder / "thread_siblings_list")
        if not siblings:
            known = psutil.cpu_count(logical=False)
            return known or max(1, len(allowed) // 2)
        found.add(siblings.strip())
    return len(found)


def _read(path: Path) -> str:
    try:
        with path.open("r", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
