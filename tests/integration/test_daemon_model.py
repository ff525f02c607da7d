"""Three real daemons with the real model, through the API as clients use it."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import openai
import psutil
import pytest

from pyagent_node.base.errors import Unavailable
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask, Piece
from pyagent_node.node.api.schema import LoadRequest, PullRequest, RankView

from .waiting import until

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]

QUESTION = "Name three rivers."
MESSAGES = [{"role": "user", "content": QUESTION}]
ENDLESS = {"ignore_eos": True}
WITHIN = 1.0
"""Seconds in which a session that nobody wants any more must be gone from every rank."""


class Swarm:
    """The nodes, and the model that is loaded over all of them."""

    def __init__(self, nodes: list[LocalNode], model: str) -> None:
        self.nodes = nodes
        self.model = model

    def openai(self, node: int = 0) -> openai.OpenAI:
        state = self.nodes[node].state
        assert state is not None
        return openai.OpenAI(
            base_url=state.api_url + "/v1", api_key="none", max_retries=0, timeout=60
        )

    def url(self, node: int = 0) -> str:
        state = self.nodes[node].state
        assert state is not None
        return state.api_url

    def sessions(self) -> int:
        """Return the sessions of all nodes, as heads or ranks."""
        return sum(len(node.client.status().sessions) for node in self.nodes)

    def until(self, sessions: int, seconds: float) -> float:
        """Wait for a number of sessions; return how long it took."""
        began = time.monotonic()
        while self.sessions() != sessions:
            assert time.monotonic() - began < seconds, self.sessions()
        return time.monotonic() - began


@pytest.fixture(scope="module")
def swarm(bundled_model: Path) -> Iterator[Swarm]:
    with local_swarm(3) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{bundled_model}"))
        placed = client.load(LoadRequest(model=model.name, layers=(10, 20), standbys=0, spares=0))
        assert len({rank.peer_id for rank in placed.ranks}) == 3
        yield Swarm(nodes, model.name)


def ask(client: openai.OpenAI, model: str, **changes):
    given = {"model": model, "messages": MESSAGES, "max_tokens": 12, "seed": 7, **changes}
    return client.chat.completions.create(**given)


def test_every_node_gives_the_same_answer(swarm: Swarm) -> None:
    answers = []
    for node in swarm.nodes:
        asked = Ask(
            model=swarm.model,
            messages=(ChatMessage("user", QUESTION),),
            max_tokens=16,
            seed=7,
            temperature=0.8,
        )
        *pieces, answer = node.client.generate(asked)
        assert isinstance(answer, Answer)
        assert "".join(p.text for p in pieces if isinstance(p, Piece)) == answer.text
        answers.append(answer.token_ids)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 16


def test_guesses_are_asked_for_over_the_api_and_change_no_token(swarm: Swarm) -> None:
    asked = Ask(
        model=swarm.model,
        prompt="a b c d e f g h\n" * 6 + "a b c",
        max_tokens=24,
        seed=7,
        temperature=0.0,
        ignore_eos=True,
    )
    *_, unsaid = swarm.nodes[1].client.generate(asked)
    assert isinstance(unsaid, Answer)
    assert unsaid.speculation is not None, "whoever says nothing is guessed for"
    *_, plain = swarm.nodes[1].client.generate(msgspec.structs.replace(asked, speculation="none"))
    assert isinstance(plain, Answer)
    assert plain.speculation is None
    assert plain.token_ids == unsaid.token_ids
    guessed = msgspec.structs.replace(asked, speculation="suffix", draft_length=6)
    *_, answer = swarm.nodes[1].client.generate(guessed)
    assert isinstance(answer, Answer)
    assert answer.token_ids == plain.token_ids
    usage = answer.speculation
    assert usage is not None
    assert usage.drafter == "suffix"
    assert 0 < usage.accepted <= usage.drafted
    with swarm.openai(1) as client, pytest.raises(openai.BadRequestError, match="suffix"):
        ask(client, swarm.model, extra_body={"speculation": "crystal ball"})


def test_every_rank_gives_cells_up_while_the_prompt_is_read(swarm: Swarm) -> None:
    asked = Ask(
        model=swarm.model,
        prompt=" ".join(f"Day {day}: {day * 13 % 90} miles, {day % 7} fish." for day in range(55)),
        max_tokens=16,
        seed=7,
        ignore_eos=True,
        prompt_cache=False,
    )

    def resident() -> list[int]:
        """Return what the processes of each node hold of the machine's memory."""
        return [
            sum(child.memory_info().rss for child in psutil.Process(node.pid).children())
            for node in swarm.nodes
        ]

    *_, whole = swarm.nodes[0].client.generate(asked)  # has touched all that it needs
    assert isinstance(whole, Answer)
    assert whole.kv is None
    before = resident()
    rolling = msgspec.structs.replace(asked, kv_budget="rolling:256")
    *_, answer = swarm.nodes[0].client.generate(rolling)
    assert isinstance(answer, Answer)
    assert len(answer.token_ids) == 16
    assert answer.kv is not None
    assert answer.prompt_tokens > 700
    assert answer.kv.held_cells < 3 * (256 + 64 + 64)
    assert answer.kv.evicted_cells > 3 * (answer.prompt_tokens - 384)
    cells = answer.kv.evicted_bytes / answer.kv.evicted_cells
    if sys.platform == "linux":
        for held, now in zip(before, resident(), strict=True):
            # the 4,096 cells of a slot are in memory from the start; what measuring took is less
            assert now < held - 1000 * cells, (before, resident())
    told = answer.kv.evicted_cells
    until(
        swarm.nodes[1].client,
        lambda: sum(rank.evicted_cells or 0 for rank in _ranks(swarm)) >= told,
        "ranks that say what they gave up",
    )
    for rank in _ranks(swarm):
        assert rank.evicted_cells
        assert rank.evicted_bytes == rank.evicted_cells * cells
    with swarm.openai(1) as client, pytest.raises(openai.BadRequestError, match="kv_budget"):
        ask(client, swarm.model, extra_body={"kv_budget": "rolling:9"})


def _ranks(swarm: Swarm) -> tuple[RankView, ...]:
    return swarm.nodes[1].client.status().placements[0].ranks


def test_the_openai_client(swarm: Swarm) -> None:
    with swarm.openai(1) as client:
        assert [m.id for m in client.models.list()] == [swarm.model]
        whole = ask(client, swarm.model)
        text = whole.choices[0].message.content
        assert text
        assert whole.usage.completion_tokens == 12
        stream = ask(client, swarm.model, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == text
        stop = text.split()[2]
        cut = ask(client, swarm.model, stop=stop)
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].message.content == text[: text.index(stop)]
        probable = ask(client, swarm.model, logprobs=True, top_logprobs=3, temperature=0)
        content = probable.choices[0].logprobs.content
        assert len(content) == 12
        for entry in content:
            assert entry.logprob <= 0
            assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob
            assert entry.token == entry.top_logprobs[0].token
        several = ask(client, swarm.model, n=3)
        assert several.choices[0].message.content == text
        assert len({c.message.content for c in several.choices}) > 1
        legacy = client.completions.create(
            model=swarm.model, prompt="Once upon a time", max_tokens=6, seed=1, logprobs=1
        )
        assert len(legacy.choices[0].logprobs.tokens) == 6


def test_errors(swarm: Swarm) -> None:
    with swarm.openai() as client:
        with pytest.raises(openai.NotFoundError):
            ask(client, "gpt-9")
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, swarm.model, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, swarm.model, logit_bias={"49152": 1})
        assert caught.value.param == "logit_bias"
        long = [{"role": "user", "content": "river " * 3000}]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, swarm.model, messages=long, stream=stream)
            assert caught.value.code == "context_length_exceeded"
            assert "2048" in caught.value.message
            assert "30" in caught.value.message  # three thousand and some
    bad = httpx.post(f"{swarm.url()}/v1/chat/completions", content=b'{"model":')
    assert bad.status_code == 400
    assert bad.json()["error"]["code"] == "invalid_json"


def test_many_at_once(swarm: Swarm) -> None:
    with swarm.openai() as client:
        alone = [ask(client, swarm.model, seed=s).choices[0].message.content for s in range(8)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(ask, client, swarm.model, seed=s) for s in range(8)]
            together = [f.result().choices[0].message.content for f in futures]
    assert together == alone


def test_hanging_up_in_mid_stream_ends_the_session_on_every_rank(swarm: Swarm) -> None:
    for node in range(3):
        with swarm.openai(node) as client:
            stream = ask(client, swarm.model, max_tokens=1500, stream=True, extra_body=ENDLESS)
            chunks = iter(stream)
            for _ in range(5):
                next(chunks)
            assert swarm.sessions() == 3
            stream.close()
        swarm.until(0, WITHIN)


def test_hanging_up_on_a_whole_answer_ends_the_session_too(swarm: Swarm) -> None:
    with swarm.openai() as client:
        with pytest.raises(openai.APITimeoutError):
            ask(
                client.with_options(timeout=0.5),
                swarm.model,
                max_tokens=1500,
                extra_body=ENDLESS,
            )
        swarm.until(0, WITHIN)


def runners(node: LocalNode) -> list[psutil.Process]:
    """Return the processes that compute slices on a node, the largest first."""
    found = psutil.Process(node.pid).children(recursive=True)
    return sorted(found, key=lambda p: p.memory_info().rss, reverse=True)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_answer_outlives_a_killed_runner_which_comes_back(swarm: Swarm, victim: int) -> None:
    placement = swarm.nodes[0].client.status().placements[0]
    node = next(n for n in swarm.nodes if n.peer_id == placement.ranks[victim].peer_id)
    asked = Ask(
        model=swarm.model,
        messages=(ChatMessage("user", QUESTION),),
        max_tokens=40,
        seed=1,
        ignore_eos=True,
    )
    *_, undisturbed = swarm.nodes[0].client.generate(asked)
    assert isinstance(undisturbed, Answer)
    pieces = swarm.nodes[0].client.generate(asked)
    for _ in range(5):
        next(pieces)
    runners(node)[0].kill()
    *_, answer = pieces
    assert isinstance(answer, Answer)
    assert answer.token_ids == undisturbed.token_ids
    swarm.until(0, WITHIN)
    # The rank's new process serves it under the same epoch; the metrics tell of the old one.
    assert swarm.nodes[0].client.status().placements[0].epoch == placement.epoch
    metrics = httpx.get(f"{swarm.url(swarm.nodes.index(node))}/metrics").text
    assert "pyagent_part_failures_total" in metrics


@contextmanager
def one_node(bundled_model: Path) -> Iterator[tuple[LocalNode, str]]:
    with local_swarm(1) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{bundled_model}"))
        client.load(LoadRequest(model=model.name))
        yield nodes[0], model.name


def endless(node: LocalNode, model: str, tokens: int) -> Iterator[Piece | Answer]:
    return node.client.generate(
        Ask(model=model, prompt="Once", max_tokens=tokens, seed=1, ignore_eos=True)
    )


def twice(node: LocalNode) -> None:
    """Send the second termination signal when the first one has arrived."""
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while node.home.read_state() is not None:
        assert time.monotonic() < deadline, "the first signal was not heard"
        os.sched_yield()
    node.process.send_signal(signal.SIGTERM)


def test_a_termination_lets_a_stream_finish(bundled_model: Path) -> None:
    with one_node(bundled_model) as (node, model):
        children = runners(node)
        assert children
        answer = endless(node, model, 200)
        next(answer)
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        *_, last = answer
        assert isinstance(last, Answer)
        assert last.completion_tokens == 200
        assert node.process.wait(20) == 0
        assert not psutil.wait_procs(children, 0)[1]


def test_a_second_termination_ends_a_stream_with_an_error(bundled_model: Path) -> None:
    with one_node(bundled_model) as (node, model):
        children = runners(node)
        answer = endless(node, model, 2000)
        next(answer)
        twice(node)
        with pytest.raises(Unavailable) as caught:
            for _ in answer:
                pass
        assert caught.value.code == "shutting_down"
        assert node.process is not None
        assert node.process.wait(20) == 0
        assert not psutil.wait_procs(children, 0)[1]


def test_a_client_that_does_not_read_does_not_hold_up_the_end(bundled_model: Path) -> None:
    with one_node(bundled_model) as (node, model):
        assert node.state is not None
        port = int(node.state.api_url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = (
                f'{{"model":"{model}","prompt":"a","stream":true,"max_tokens":2000,'
                '"ignore_eos":true,"logprobs":20}'
            ).encode()
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            client.recv(100)
            twice(node)
            assert node.process is not None
            assert node.process.wait(20) == 0
