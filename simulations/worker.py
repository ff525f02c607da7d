"""The process that runs one seed: ``python -m pyagent_node.simulations.worker``.

It reads one :class:`Job` as a line of JSON and writes one :class:`Verdict`.  Its life hangs on its
standard input: when that ends it exits at once, so whatever way its parent ends, none is left.
Ctrl-C goes to the parent, which then ends its workers.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading

import msgspec

from pyagent_node.simulations.deterministic import HASH_SEED, fixed_hashing
from pyagent_node.simulations.jobs import Job, do


def _watch() -> None:
    """End the process when the parent lets go of it; blocks without taking part in the run."""
    while os.read(0, 1024):
        pass
    os._exit(1)


def _read_line() -> bytes:
    """Read up to the end of a line, and no byte more: the rest is for :func:`_watch`."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(1)
        line += byte
    return bytes(line)


def main() -> None:
    """Do one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    if not fixed_hashing():
        sys.exit(f"Start this with PYTHONHASHSEED={HASH_SEED}.")
    job = msgspec.json.decode(_read_line(), type=Job)
    threading.Thread(target=_watch, daemon=True, name="stdin").start()
    verdict = msgspec.json.encode(do(job))
    sys.stdout.buffer.write(verdict)
    sys.stdout.buffer.flush()
    # Nothing is left to save; what a run leaves for the collector need not be taken apart.
    os._exit(0)


if __name__ == "__main__":
    main()
