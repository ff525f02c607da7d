"""A measurement in a process of its own, so that llama.cpp never runs in the one that asks.

The module that measures is run as a program: it answers one JSON job from stdin with one JSON
result on stdout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec

from pyagent_node.base.errors import RunnerFailed

J = TypeVar("J", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)


def measured_apart(module: str, job: msgspec.Struct, kind: type[R], *, seconds: float) -> R:
    """Have ``module`` answer a job; raises :class:`RunnerFailed` when it dies or takes too long."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=msgspec.json.encode(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RunnerFailed(
            f"The measuring process failed: {type(error).__name__}.",
            code="reference_failed",
            remedy="`pyagent-node doctor` checks llama.cpp.",
        ) from None
    return msgspec.json.decode(done.stdout, type=kind)


def answer(kind: type[J], measure: Callable[[J], msgspec.Struct]) -> None:
    """Answer the job on stdin; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    result = measure(msgspec.json.decode(sys.stdin.buffer.read(), type=kind))
    answers.write(msgspec.json.encode(result))
    answers.flush()
