"""A swarm on this machine whose links can be made slow, and slow in another way, as it goes.

The daemons are started again with another ``--shape``, on the ports and the homes that they had:
what they hold and how the model is placed stays.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pyagent_node.base.errors import DeadlineExceeded, InvalidRequest, PyAgentError
from pyagent_node.benchmarks.swarm import (
    START_SECONDS,
    LocalNode,
    Say,
    await_up,
    interruptible,
    running,
    start_process,
    stop_all,
    uninterrupted,
)
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.config import change_setting
from pyagent_node.node.home import Home

READY_SECONDS = 180.0
POLL_SECONDS = 0.1


@contextlib.contextmanager
def shaped_swarm(
    count: int, *, threads: int = 0, flags: tuple[str, ...] = (), say: Say
) -> Iterator[list[LocalNode]]:
    """Run ``count`` daemons as one private mesh, with fast links to begin with.

    ``threads`` compute in each slice, 0 for the default; ``flags`` are for each ``up``.  Errors as
    for ``local_swarm``.
    """
    with (
        interruptible(),
        tempfile.TemporaryDirectory(prefix="pyagent-swarm-", ignore_cleanup_errors=True) as root,
    ):
        nodes = [
            LocalNode(
                f"node-{i}",
                Home(Path(root, f"node-{i}")),
                listen=f"/ip4/127.0.0.1/tcp/{port}",
                flags=(*flags, *(("--threads", str(threads)) if threads else ())),
            )
            for i, port in enumerate(_free_ports(count))
        ]
        with running(nodes, say=say):
            yield nodes


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def draft_with(node: LocalNode, model: str) -> None:
    """Let a node draft with a model of its store, once it is started again."""
    change_setting(node.home, "drafter", model)


def reshape(nodes: list[LocalNode], rtt_ms: float, model: str) -> None:
    """Start all daemons again with round trips of ``rtt_ms``, and wait until ``model`` is ready.

    Errors as for :func:`reshape_to`.
    """
    reshape_to(nodes, f"rtt={rtt_ms:g}ms" if rtt_ms else "", model)


def reshape_to(nodes: list[LocalNode], shape: str, model: str) -> None:
    """Start all daemons again with links of a shape ("" for none); wait until ``model`` is ready.

    Raises :class:`Unavailable` (``daemon_not_started``) and :class:`DeadlineExceeded`
    (``swarm_not_connected``).
    """
    with uninterrupted():
        stop_all(nodes)
    for node in nodes:
        kept = node.flags[: node.flags.index("--shape")] if "--shape" in node.flags else node.flags
        node.flags = (*kept, "--shape", shape) if shape else kept
        start_process(node)
    deadline = time.monotonic() + START_SECONDS
    for node in nodes:
        await_up(node, deadline)
    await_answers(nodes[0], Ask(model=model, prompt="One, two,", max_tokens=2, ignore_eos=True))


def await_answers(node: LocalNode, ask: Ask) -> Answer:
    """Ask until there is an answer; what is missing may still be coming.

    Raises :class:`DeadlineExceeded` (``swarm_not_connected``) with the last error.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return answer(node, ask)
        except InvalidRequest as error:
            if error.code != "bad_parameter":  # a drafter that is not loaded yet
                raise
            last: PyAgentError = error
        except PyAgentError as error:
            last = error
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"The swarm could not answer within {READY_SECONDS:.0f} s: {last}",
                code="swarm_not_connected",
            )
        time.sleep(POLL_SECONDS)


def answer(node: LocalNode, ask: Ask) -> Answer:
    """Ask a node and wait for the whole of its answer."""
    with contextlib.closing(node.client.generate(ask)) as pieces:
        for piece in pieces:
            if isinstance(piece, Answer):
                return piece
    raise AssertionError("the client raises unless an answer came")
