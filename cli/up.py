"""``up`` and ``down``: start and stop the daemon of this home."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.files import OWNER_ONLY, make_private_dir
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.exits import kind_of

if TYPE_CHECKING:
    import psutil

    from pyagent_node.node.config import Settings
    from pyagent_node.node.home import DaemonState, Home

START_SECONDS = 60.0
"""How long ``up --detach`` waits for the daemon to answer."""
POLL_SECONDS = 0.05
KILL_SECONDS = 10.0
LOG_TAIL = 4000
FIRST_MESH = "home"

F = TypeVar("F", bound=Callable[..., object])


def daemon_process(home: Home) -> tuple[DaemonState, psutil.Process] | None:
    """Return the running daemon of a home; ``None`` when it is gone or its pid is another's."""
    import psutil  # noqa: PLC0415

    state = home.read_state()
    if state is None:
        return None
    try:
        process = psutil.Process(state.pid)
        # A process younger than the state file only happens to have the same number.
        if process.create_time() > state.started + 60 or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.Error:
        return None
    return state, process


def ensure_mesh(app: App, settings: Settings) -> None:
    """Give a node that is in no mesh a private one of its own, and say so."""
    from pyagent_node.node.profiles import active_profile, create_mesh  # noqa: PLC0415

    try:
        active_profile(app.home, settings.mesh)
    except NotFound as error:
        if error.code != "no_mesh":
            raise
        profile = create_mesh(
            app.home, FIRST_MESH, "private", node_name=settings.node_name, clock=time.time
        )
        app.out.note(
            f"This node was in no mesh: created the private mesh {profile.genesis.name!r}."
            " (To join another one instead: `pyagent-node join TICKET`.)"
        )


def _flags(command: F) -> F:
    for option in reversed(
        (
            click.option("--name", metavar="NAME", help="This node's name in the mesh."),
            click.option("--mesh", metavar="MESH", help="The mesh to run (name or id)."),
            click.option(
                "--listen",
                multiple=True,
                metavar="ADDRESS",
                help="Accept peers here, as /ip4/0.0.0.0/tcp/4810; repeatable.",
            ),
            click.option(
                "--announce",
                multiple=True,
                metavar="ADDRESS",
                help="Where peers reach this node, if elsewhere; repeatable.",
            ),
            click.option(
                "--bootstrap",
                multiple=True,
                metavar="ADDRESS",
                help="A peer to dial besides the mesh's own; repeatable.",
            ),
            click.option("--api", metavar="[HOST:]PORT", help="Where the HTTP API listens."),
            click.option("--mdns/--no-mdns", default=None, help="Find peers on the local network."),
            click.option("--memory", metavar="SIZE", help="Memory that models may use (4GiB)."),
            click.option(
                "--kv-memory", metavar="SIZE", help="Memory for KV blocks (512MiB; 0: none)."
            ),
            click.option("--kv-disk", metavar="SIZE", help="Disk for KV blocks (2GiB; 0: none)."),
            click.option(
                "--kv-stream",
                metavar="SIZE",
                help="Bytes a second of KV to standbys (32MiB; 0: none).",
            ),
            click.option(
                "--kv-level",
                metavar="LEVEL",
                help="f16 (exact), or smaller and nearly exact: int8, int4, int3.",
            ),
            click.option("--threads", metavar="N", help="Threads that compute."),
            click.option(
                "--shape",
                metavar="SHAPE",
                help='Make links slow, for trying out: "rtt=80ms,rate=50mbit,jitter=5ms".',
            ),
            click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
        )
    ):
        command = option(command)
    return command


def settings_flags(given: dict[str, object]) -> dict[str, object]:
    """Turn the options of ``up`` into settings; what was not given is ``None``."""
    flags: dict[str, object] = {
        "name": given["name"],
        "mesh": given["mesh"],
        "listen": given["listen"] or None,
        "announce": given["announce"] or None,
        "bootstrap": given["bootstrap"] or None,
        "mdns": given["mdns"],
        "memory_limit": given["memory"],
        "kv_memory_bytes": given["kv_memory"],
        "kv_disk_bytes": given["kv_disk"],
        "kv_stream_bytes_per_second": given["kv_stream"],
        "kv_level": given["kv_level"],
        "threads": given["threads"],
        "shape": given["shape"],
        "log_level": given["log_level"],
    }
    api = given["api"]
    if isinstance(api, str):
        host, colon, port = api.rpartition(":")
        if colon and not host.strip("[]"):
            raise InvalidRequest(
                f"--api {api!r} names no host.", code="usage", remedy="Write HOST:PORT or PORT."
            )
        flags["api_port"] = port
        flags["api_host"] = host.strip("[]") if colon else None
    return flags


@click.command("up")
@_flags
@click.option("--detach", "-d", is_flag=True, help="Run in the background.")
@click.option("--with-parent", is_flag=True, hidden=True, help="Stop when stdin ends.")
@json_option
@pass_app
def up_command(app: App, /, *, detach: bool, with_parent: bool, **given: object) -> None:
    """Start the daemon.

    It runs until Ctrl-C, or in the background with --detach.  A node that is in no mesh yet gets a
    private one of its own.
    """
    settings = app.settings(**settings_flags(given))
    running = daemon_process(app.home)
    if running is not None:
        raise Conflict(
            f"A daemon runs on this home already (process {running[0].pid}, {running[0].api_url}).",
            code="already_running",
            remedy="Stop it with `pyagent-node down`.",
            pid=running[0].pid,
        )
    ensure_mesh(app, settings)
    if detach:
        _detach(app)
    else:
        _foreground(app, settings, with_parent)


def _foreground(app: App, settings: Settings, with_parent: bool) -> None:
    import trio  # noqa: PLC0415

    from pyagent_node.node.daemon import run_daemon  # noqa: PLC0415

    async def stop_with_stdin() -> None:
        while await trio.to_thread.run_sync(os.read, 0, 4096, abandon_on_cancel=True):
            pass
        signal.raise_signal(signal.SIGTERM)

    async def run() -> None:
        async with trio.open_nursery() as nursery:

            async def daemon(
                *, task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED
            ) -> None:
                await run_daemon(settings, app.home, task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(daemon)
            if with_parent:
                nursery.start_soon(stop_with_stdin)
            _banner(app, hint="Ctrl-C stops it.")

    try:
        trio.run(run)
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a nursery wrapped: one of ours where there is one."""
    ours = group.subgroup(PyAgentError)
    error: BaseException = ours or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _banner(app: App, hint: str) -> None:
    """Say what runs and what to do next."""
    from pyagent_node.node.profiles import active_profile  # noqa: PLC0415

    state = app.home.read_state()
    if state is None:
        raise Unavailable("The daemon went away at once.", code="daemon_not_running")

    def show() -> None:
        profile = active_profile(app.home, state.mesh_id or "")
        out = app.out
        out.text(f"pyagent-node {state.version} is up")
        out.text(f"  node  {profile.name}  {state.peer_id}")
        out.text(
            f"  mesh  {profile.genesis.name} ({profile.genesis.visibility}), {profile.role}"
            f"  {profile.mesh_id[:12]}"
        )
        out.text(f"  API   {state.api_url}/v1  (OpenAI-compatible)")
        out.text("Next, in another terminal:")
        out.text("  pyagent-node model load smollm2-135m    split the default model over the mesh")
        out.text("  pyagent-node chat                       talk to it")
        out.text("  pyagent-node invite                     let another machine join")
        out.text(hint)

    app.out.result(state, show)


def _detach(app: App) -> None:
    """Start the daemon in the background and wait until it answers."""
    log = app.home.log_path
    make_private_dir(log.parent)
    begin = log.stat().st_size if log.exists() else 0
    arguments = [a for a in sys.argv[1:] if a not in ("--detach", "-d", "--json")]
    command = [sys.executable, "-m", "pyagent_node.cli.main", *arguments]
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, OWNER_ONLY)) as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env=dict(os.environ),
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        state = app.home.read_state()
        if state is not None and state.pid == process.pid:
            _banner(app, hint=f"Log: {log}.  `pyagent-node down` stops it.")
            return
        if process.poll() is not None:
            raise _failed(log, begin, process.returncode)
        time.sleep(POLL_SECONDS)
    process.terminate()
    raise DeadlineExceeded(
        f"The daemon did not answer within {START_SECONDS:.0f} s.", remedy=f"See {log}."
    )


def _failed(log: Path, begin: int, status: int) -> PyAgentError:
    """Return the error of a daemon that ended while starting: its own, from its log."""
    with log.open("rb") as stream:
        stream.seek(max(begin, log.stat().st_size - LOG_TAIL))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return kind_of(status)(
        reasons[-1] if reasons else f"The daemon ended while starting (status {status}).",
        code="daemon_not_started",
        remedy=f"Its log is {log}.",
        status=status,
    )


def _gone(process: psutil.Process, seconds: float) -> bool:
    """Wait until a process has ended; a zombie that nobody collects counts as ended."""
    import psutil  # noqa: PLC0415

    deadline = time.monotonic() + seconds
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
    except psutil.NoSuchProcess:
        pass
    return True


@click.command("down")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds to wait.")
@click.option("--force", is_flag=True, help="Kill it when it has not stopped by then.")
@json_option
@pass_app
def down_command(app: App, timeout: float, force: bool) -> None:
    """Stop the daemon and wait until it has: answers in progress may finish first."""
    running = daemon_process(app.home)
    if running is None:
        app.out.result({"stopped": False}, lambda: app.out.text("No daemon runs."))
        return
    state, process = running
    if os.name == "posix":
        process.terminate()
    else:  # there, ending a process is killing it: ask through the API
        app.client().shutdown()
    forced = not _gone(process, timeout)
    if forced:
        if not force:
            raise DeadlineExceeded(
                f"The daemon (process {state.pid}) has not stopped within {timeout:g} s.",
                remedy="Wait longer (--timeout), or end it with --force.",
                pid=state.pid,
            )
        process.kill()
        _gone(process, KILL_SECONDS)
        app.home.clear_state()
    value = {"stopped": True, "forced": forced, "pid": state.pid}
    app.out.result(value, lambda: app.out.text("Killed." if forced else "Stopped."))
