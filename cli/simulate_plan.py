"""What ``simulate`` is asked to run: seeds, and the faults of each."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import read_limited

if TYPE_CHECKING:
    from pyagent_node.simulations.faults import Schedule

NODES, DURATION, FAULTS = 7, 30.0, "standard"
MAX_SEED: Final = (1 << 63) - 1
MAX_SEEDS: Final = 100_000
MAX_FILE: Final = 4 << 20
"""Bytes of a schedule of faults."""
FRESH_BITS: Final = 32


@dataclass(frozen=True)
class Plan:
    """What is to be run, and how a person asks for one seed of it again."""

    nodes: int
    duration: float
    faults: str
    file: Schedule | None

    def schedule(self, seed: int) -> Schedule:
        """Return the schedule of a seed."""
        from pyagent_node.simulations.faults import draw_schedule  # noqa: PLC0415

        if self.file is not None:
            return self.file
        return draw_schedule(seed, nodes=self.nodes, duration=self.duration, mix=self.faults)

    def replay(self, seed: int) -> str:
        """Return the command that runs one seed again."""
        parts = ["pyagent-node simulate", f"--seed {seed}"]
        if self.file is None:
            parts += [f"--nodes {self.nodes}"] if self.nodes != NODES else []
            parts += [f"--duration {self.duration:g}"] if self.duration != DURATION else []
        if self.file is not None or self.faults != FAULTS:
            parts.append(f"--faults {shlex.quote(self.faults)}")
        return " ".join(parts)


def usage(message: str, remedy: str) -> InvalidRequest:
    """Return the error for options that make no sense."""
    return InvalidRequest(message, code="usage", remedy=remedy)


def chosen_seeds(seed: int | None, seeds: str | None, fresh: int | None) -> list[int]:
    """Return the seeds to run."""
    if sum(given is not None for given in (seed, seeds, fresh)) > 1:
        raise usage("--seed, --seeds and --fresh exclude each other.", "Give one of them.")
    if seed is not None:
        return [seed]
    if seeds is None:
        return [secrets.randbits(FRESH_BITS) for _ in range(fresh or 1)]
    first, dots, last = seeds.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and seeds.isascii()):
        raise usage(f"--seeds is {seeds[:80]!r}.", "Write two numbers: 0..99.")
    if len(first) > 20 or len(last) > 20 or int(last) > MAX_SEED:
        raise usage("A seed of --seeds is too large.", f"The largest is {MAX_SEED}.")
    low, high = int(first), int(last)
    if low > high:
        raise usage(f"--seeds {low}..{high} holds no seed.", f"Write {high}..{low}.")
    if high - low >= MAX_SEEDS:
        raise usage(f"--seeds {low}..{high} are too many.", f"Take at most {MAX_SEEDS} at a time.")
    return list(range(low, high + 1))


def check_writable(path: str | None) -> None:
    """Refuse a file that cannot be written before any time is spent on what goes into it."""
    if path is None:
        return
    parent = Path(path).absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise usage(f"{path[:200]} cannot be written.", f"See whether {parent} is there and yours.")


def chosen_plan(nodes: int | None, duration: float | None, faults: str) -> Plan:
    """Return what ``--nodes``, ``--duration`` and ``--faults`` ask for."""
    from pyagent_node.simulations.draws import MIXES  # noqa: PLC0415
    from pyagent_node.simulations.faults import decode_schedule  # noqa: PLC0415

    if faults in MIXES:
        return Plan(nodes or NODES, duration or DURATION, faults, None)
    path = Path(faults)
    if path.is_dir():
        raise usage(f"{faults[:200]} is a directory.", "Name a file, or a mix of faults.")
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise InvalidRequest(
            f"There is no mix of faults, and no file, called {faults[:80]!r}.",
            code="bad_schedule",
            remedy=f"Choose one of {', '.join(MIXES)}, or name a file.",
        )
    if nodes is not None or duration is not None:
        raise usage(
            "A file of faults says how many nodes there are, and for how long.",
            "Leave --nodes and --duration out, or change the file.",
        )
    schedule = decode_schedule(read_limited(path, MAX_FILE))
    return Plan(schedule.nodes, schedule.duration, faults, schedule)
