"""``kv status`` and ``kv clear``: words for people, JSON for programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import PeerId
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api

from .conftest import Outcome, Run


@pytest.fixture
async def api(home: Home) -> AsyncIterator[SimulatedApi]:
    async with simulated_api() as running:
        write_atomic(home.token_path, TOKEN.encode() + b"\n")
        peer = PeerId("12D3KooWTest")
        home.write_state(DaemonState(os.getpid(), running.url, peer, None, "0", time.time()))
        yield running


async def ask(run: Run, *arguments: str) -> Outcome:
    return await trio.to_thread.run_sync(partial(run, *arguments))


async def test_status_names_tiers_rates_and_streams(api: SimulatedApi, run: Run) -> None:
    shown = (await ask(run, "kv", "status")).out
    for text in ("memory", "disk_full", "75% of 40 blocks", "9 blocks", "33.6 MB/s", "1 wrong"):
        assert text in shown, shown
    told = json.loads((await ask(run, "--json", "kv", "status")).out)
    assert [tier["name"] for tier in told["tiers"]] == ["memory", "disk"]


async def test_clear_says_how_many(api: SimulatedApi, run: Run) -> None:
    assert "100 blocks" in (await ask(run, "kv", "clear")).out
    api.services.kv.error = Unavailable("The disk is gone.", code="disk_error")
    failed = await ask(run, "kv", "clear")
    assert failed.status == 6
    assert "The disk is gone" in failed.err
