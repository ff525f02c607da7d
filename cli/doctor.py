"""``doctor``: check what commonly goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pyagent_node.base.errors import PyAgentError
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import coloured

if TYPE_CHECKING:
    from pyagent_node.node.api.schema import Check, StatusView

MARKS = {"ok": ("ok  ", "32"), "warning": ("warn", "33"), "failed": ("FAIL", "1;31")}
SLOW_PEER_MS = 250.0
FAILED = 1


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Leave out reading the model files.")
@json_option
@pass_app
def doctor_command(app: App, quick: bool) -> int:
    """Check what commonly goes wrong: parts, home, clock, ports, memory, models, peers.

    It names the hardware, the backend that will compute, how fast each was measured to be, what the
    machine runs on, and what would compute better.

    Ends with 0 when nothing has failed, else with 1.
    """
    found: list[Check] = []
    for check in _checks(app, quick):
        found.append(check)
        _show(app, check)
    failures = sum(check.result == "failed" for check in found)
    warnings = sum(check.result == "warning" for check in found)
    app.out.line({"checks": found, "failed": failures, "warnings": warnings})
    if failures:
        app.out.text(f"{failures} failed, {_warnings(warnings)}.")
    else:
        app.out.text(f"All well{f', {_warnings(warnings)}' if warnings else ''}.")
    return FAILED if failures else 0


def _warnings(count: int) -> str:
    return "1 warning" if count == 1 else f"{count} warnings"


def _show(app: App, check: Check) -> None:
    import sys  # noqa: PLC0415

    mark, colour = MARKS[check.result]
    if coloured(sys.stdout):
        mark = f"\033[{colour}m{mark}\033[0m"
    app.out.text(f"{mark}  {check.name}: {check.detail}")
    if check.remedy and check.result != "ok":
        app.out.text(f"      {check.remedy}")


def _checks(app: App, quick: bool) -> Iterator[Check]:
    from pyagent_node.cli import checks  # noqa: PLC0415
    from pyagent_node.node.client import running_daemon  # noqa: PLC0415

    yield from checks.check_parts()
    yield from checks.check_backends()
    yield from checks.check_home(app.home)
    try:
        settings = app.settings()
    except PyAgentError as error:
        yield checks.failed("settings", error.message, error.remedy or "Correct the setting.")
        return
    yield checks.ok("settings", str(app.home.config_path))
    from pyagent_node.cli.compute_checks import check_computing  # noqa: PLC0415

    yield from check_computing(app.home, settings)
    yield from checks.check_identity(app.home, settings, time.time)
    yield from checks.check_clock()
    yield from checks.check_resources(app.home, settings)
    if not quick:
        from pyagent_node.node import offline  # noqa: PLC0415

        if settings.models_dir(app.home).is_dir():
            yield from offline.check_models(offline.open_store(app.home, settings))
    if running_daemon(app.home) is None:
        yield from checks.check_ports(settings)
        yield checks.warning("daemon", "it does not run", "Start it with `pyagent-node up`.")
        return
    try:
        status = app.client().status()
        own = app.client().doctor().checks
    except PyAgentError as error:
        remedy = error.remedy or "See its log, or start it again."
        yield checks.failed("daemon", error.message, remedy)
        return
    yield checks.ok("daemon", f"process {status.node.pid}, version {status.node.version}")
    yield from own
    yield from _peers(status)


def _peers(status: StatusView) -> Iterator[Check]:
    """Judge the round trips to the peers."""
    from pyagent_node.cli import checks  # noqa: PLC0415

    for peer in status.peers:
        name = f"peer {peer.name or peer.peer_id[-8:]}"
        if peer.rtt_ms is None:
            yield checks.warning(name, "connected, not measured yet", "Look again in a moment.")
        elif peer.rtt_ms > SLOW_PEER_MS:
            yield checks.warning(
                name,
                f"a round trip takes {peer.rtt_ms:.0f} ms",
                "Every token of a split model waits for it: keep ranks on closer nodes (--nodes).",
            )
        else:
            yield checks.ok(name, f"a round trip takes {peer.rtt_ms:.1f} ms")
