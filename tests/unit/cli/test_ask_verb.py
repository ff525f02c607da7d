"""``ask``: an answer, then a list of what it is drawn from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from functools import partial

import msgspec
import pytest
import trio

from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import PeerId
from pyagent_node.node.api.context_schema import HitView, QueryReply, QueryRequest
from pyagent_node.node.home import DaemonState, Home
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api

from .conftest import Outcome, Run

EMPTY = QueryReply(
    hits=(),
    windows=0,
    candidates=0,
    candidate_chunks=0,
    nodes=1,
    nodes_asked=0,
    missing=0,
    seconds=0.0,
    embed_seconds=0.0,
)
HIT = HitView(
    source="a\x1b[31m.txt", first_line=3, last_line=9, tokens=4, score=0.5, text="some words here"
)


class Found:
    """Finds one chunk whose name is hostile, or nothing."""

    hits: tuple[HitView, ...] = (HIT,)

    async def query(self, name: str, request: QueryRequest) -> QueryReply:
        """Return it."""
        return msgspec.structs.replace(EMPTY, hits=self.hits)


@pytest.fixture
async def found(home: Home) -> AsyncIterator[tuple[SimulatedApi, Found]]:
    contexts = Found()
    async with simulated_api(contexts=contexts) as running:  # type: ignore[arg-type]
        write_atomic(home.token_path, TOKEN.encode() + b"\n")
        peer = PeerId("12D3KooWTest")
        home.write_state(DaemonState(os.getpid(), running.url, peer, None, "0", time.time()))
        yield running, contexts


async def ask(run: Run, *arguments: str) -> Outcome:
    return await trio.to_thread.run_sync(partial(run, *arguments))


async def test_sources_are_listed_below_the_answer(
    found: tuple[SimulatedApi, Found], run: Run
) -> None:
    api, contexts = found
    told = await ask(run, "ask", "docs", "where is it", "-n", "3", "--system", "x", "--stats")
    assert "\nSources:\n  [1] a?[31m.txt, lines 3-9 (score 0.500)\n" in told.out
    assert "KV of 0 of" in told.err
    assert api.engine.requests[0].tokens is not None
    contexts.hits = ()
    told = await ask(run, "ask", "docs", "where", "-n", "3", "--system", "x", "--exact")
    assert "Nothing was found" in told.out


async def test_json_has_the_citations(found: tuple[SimulatedApi, Found], run: Run) -> None:
    told = await ask(run, "--json", "ask", "docs", "where", "-n", "3", "--system", "x")
    (citation,) = json.loads(told.out)["citations"]
    assert (citation["number"], citation["first_line"], citation["score"]) == (1, 3, 0.5)


async def test_an_empty_question_is_refused(found: tuple[SimulatedApi, Found], run: Run) -> None:
    assert (await ask(run, "ask", "docs", " ")).status != 0
