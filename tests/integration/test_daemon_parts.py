"""``run_daemon`` in this process: what happens when a part of it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from pyagent_node.base.errors import NotFound, PyAgentError
from pyagent_node.node import daemon, runtime
from pyagent_node.node.config import Settings, load_settings
from pyagent_node.node.home import Home
from pyagent_node.node.profiles import create_mesh

pytestmark = pytest.mark.daemons

QUIET = {"listen": ["/ip4/127.0.0.1/tcp/0"], "api_port": 0, "mdns": False}


@pytest.fixture
def settings(home: Home) -> Settings:
    create_mesh(home, "m", "private", node_name="n", clock=time.time)
    return load_settings(home, flags=QUIET)


@pytest.fixture(autouse=True)
def same_logging() -> None:
    """Put the loggers' levels back, which the daemon sets for its process."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers = handlers


async def test_a_part_that_fails_ends_the_daemon_by_name(
    home: Home, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    broken = trio.Event()

    async def fail(*_: object) -> None:
        await broken.wait()
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(runtime, "enforce", fail)
    failures: list[PyAgentError] = []

    async def run(*, task_status: trio.TaskStatus[object]) -> None:
        try:
            await daemon.run_daemon(settings, home, task_status=task_status)
        except PyAgentError as error:
            failures.append(error)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            assert home.read_state() is not None
            broken.set()
    [error] = failures
    assert error.code == "subsystem_failed"
    assert error.facts["subsystem"] == "membership"
    assert home.read_state() is None
    assert "the membership failed, the node cannot go on: inside" in caplog.text


async def test_without_a_mesh_there_is_no_daemon(home: Home) -> None:
    home.node_key()
    with pytest.raises(NotFound) as caught:
        await daemon.run_daemon(load_settings(home, flags=QUIET), home)
    assert caught.value.code == "no_mesh"
    assert home.read_state() is None


async def test_cancelling_it_closes_everything(home: Home, settings: Settings) -> None:
    async with trio.open_nursery() as nursery:
        state = await nursery.start(daemon.run_daemon, settings, home)
        async with httpx.AsyncClient(base_url=state.api_url) as http:
            assert (await http.get("/healthz")).status_code == 200
        nursery.cancel_scope.cancel()
    assert home.read_state() is None
    with home.lock():
        pass  # free again


async def test_an_end_that_hangs_is_cut_short(
    home: Home, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def stuck(*args: object) -> AsyncIterator[runtime.Node]:
        async with runtime.open_node(*args) as node:
            yield node
            await trio.sleep_forever()

    monkeypatch.setattr(daemon, "open_node", stuck)
    monkeypatch.setattr(daemon, "HURRY_SECONDS", 0.2)
    ends = []
    real = daemon._End

    def make() -> daemon._End:
        ends.append(real())
        return ends[-1]

    monkeypatch.setattr(daemon, "_End", make)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.run_daemon, settings, home)
            ends[0].ask()
            ends[0].ask()
    assert home.read_state() is None
