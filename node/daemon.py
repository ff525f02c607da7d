"""The daemon: one node of one mesh, from its start to its orderly end.

Start: the home's lock, the key, the mesh profile, the mesh, the log, the pipeline, the API, and
last the state file that tells the command line where to find it.  The end takes the same way back.

``SIGTERM``, ``SIGINT`` (or ``POST /api/v1/shutdown``) begin the end: new requests are refused,
running answers get :attr:`Settings.drain_seconds` to finish, then they end with an error of their
own.  A second signal ends them at once.  What a peer does never ends the daemon; a part of the
node itself that fails for good does, with its reason as the error of :func:`run_daemon`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.node.api.app import ApiOptions, create_app
from pyagent_node.node.api.exchange import Drain
from pyagent_node.node.api.guard import GuardOptions
from pyagent_node.node.api.server import ApiServer, ServerOptions, open_api
from pyagent_node.node.config import Settings
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.node.logs import Redactor, set_up_logging
from pyagent_node.node.nurseries import background
from pyagent_node.node.runtime import Node, open_node
from pyagent_node.node.services import NodeServices
from pyagent_node.node.version import VERSION

log = logging.getLogger("pyagent_node.daemon")

HURRY_SECONDS: Final = 8.0
"""Time for an orderly end after the second signal."""

_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)


class _End:
    """The wish to end: the first begins the drain, the second cuts it short."""

    def __init__(self) -> None:
        self._asked = trio.Event()
        self._hurried = trio.Event()

    def ask(self) -> None:
        if self._asked.is_set():
            self._hurried.set()
        self._asked.set()

    def ask_once(self) -> None:
        self._asked.set()

    async def asked(self) -> None:
        await self._asked.wait()

    async def hurried(self) -> None:
        await self._hurried.wait()


async def run_daemon(
    settings: Settings,
    home: Home,
    *,
    signals: bool = True,
    task_status: trio.TaskStatus[DaemonState] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the daemon of ``home`` until it is told to end; returns after an orderly end.

    ``task_status.started`` gets the state once the API answers.  ``signals`` must be off outside
    of the main thread.  Raises :class:`Conflict` (``in_use``, ``address_in_use``),
    :class:`NotFound` (``no_mesh``) and what the parts raise when they cannot start or fail.
    """
    redactor = Redactor()
    end = _End()
    with _logging(settings, redactor), home.lock():
        home.clear_state()  # of a daemon that was killed: the lock says that none runs
        try:
            async with background() as nursery:
                if signals:
                    await nursery.start(_watch_signals, end)
                nursery.start_soon(_cut_short, end, nursery.cancel_scope)
                await _run(settings, home, redactor, end, task_status)
        except Exception as error:
            cause = _cause(error)
            if not isinstance(cause, PyAgentError):
                log.critical("the daemon failed", exc_info=error)
            elif home.read_state() is not None:  # it was up; before that, the caller tells
                log.critical("the daemon failed: %s", cause)
            raise cause from None
        finally:
            home.clear_state()
            log.info("the daemon has ended")


async def _run(
    settings: Settings,
    home: Home,
    redactor: Redactor,
    end: _End,
    task_status: trio.TaskStatus[DaemonState],
) -> None:
    token = home.api_token()
    redactor.hide(token)
    async with (
        open_node(settings, home, redactor) as node,
        _serve_api(settings, node, token, end) as (server, services, drain),
    ):
        state = DaemonState(
            pid=os.getpid(),
            api_url=services.api_url,
            peer_id=node.mesh.peer_id,
            mesh_id=node.membership.profile.mesh_id,
            version=VERSION,
            started=time.time(),
        )
        home.write_state(state)
        log.info("node %s is up, API at %s", node.mesh.peer_id, ", ".join(server.urls))
        task_status.started(state)
        await end.asked()
        home.clear_state()
        await _drain(node, drain, settings.drain_seconds, end)


@asynccontextmanager
async def _serve_api(
    settings: Settings, node: Node, token: str, end: _End
) -> AsyncIterator[tuple[ApiServer, NodeServices, Drain]]:
    drain = Drain()
    services = NodeServices(node, shutdown=end.ask_once)
    guard = GuardOptions(
        token=token,
        token_for_all=settings.api_needs_token,
        hosts=settings.api_allowed_hosts,
        origins=settings.api_allowed_origins,
    )
    app = create_app(services, ApiOptions(guard=guard), drain)
    options = ServerOptions(host=settings.api_host, port=settings.api_port)
    async with open_api(app, options, drain) as server:
        services.api_url = server.local_url
        yield server, services, drain


async def _drain(node: Node, drain: Drain, seconds: float, end: _End) -> None:
    """Let running answers finish, those that this node computes for other heads included."""
    log.info("ending; running answers get %g seconds", seconds)
    drain.begin()
    async with trio.open_nursery() as nursery:

        async def until_hurried() -> None:
            await end.hurried()
            log.warning("asked again: ending at once")
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_hurried)
        with trio.move_on_after(seconds) as grace:
            await node.idle()
        if grace.cancelled_caught:
            log.warning("%d answers had not finished in time", len(node.engine.sessions()))
        nursery.cancel_scope.cancel()
    node.journals.stop()
    drain.expire()


async def _cut_short(end: _End, scope: trio.CancelScope) -> None:
    """Cancel everything some time after the second signal, in case the orderly end hangs."""
    await end.hurried()
    await trio.sleep(HURRY_SECONDS)
    log.error("the orderly end took too long; what is left is cut off")
    scope.cancel()


async def _watch_signals(
    end: _End, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(*_SIGNALS) as arriving:
        task_status.started()
        async for number in arriving:
            log.info("received %s", signal.Signals(number).name)
            end.ask()


@contextmanager
def _logging(settings: Settings, redactor: Redactor) -> Iterator[None]:
    handler = set_up_logging(settings.log_level, settings.log_format, redactor)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _cause(error: Exception) -> Exception:
    """Return what made the daemon fail: an error of ours if one is inside, else the first."""
    leaves: list[Exception] = []
    pending: list[Exception] = [error]
    while pending:
        each = pending.pop(0)
        if isinstance(each, ExceptionGroup):
            pending.extend(each.exceptions)
        else:
            leaves.append(each)
    return next((leaf for leaf in leaves if isinstance(leaf, PyAgentError)), leaves[0])
