"""The ``openai`` package as client, synchronous as most of its users have it."""

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import openai
import pytest
import trio
from openai.types.chat import ChatCompletionChunk

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.simulations.api import SimulatedApi, simulated_api

pytestmark = pytest.mark.daemons

MESSAGES = [{"role": "user", "content": "hello there"}]
T = TypeVar("T")


@pytest.fixture
async def api() -> AsyncIterator[SimulatedApi]:
    async with simulated_api() as running:
        yield running


async def use(api: SimulatedApi, function: Callable[[openai.OpenAI], T], retries: int = 0) -> T:
    def run() -> T:
        with openai.OpenAI(
            base_url=api.url + "/v1", api_key="none", max_retries=retries, timeout=20
        ) as client:
            return function(client)

    return await trio.to_thread.run_sync(run)


def ask(client: openai.OpenAI, **changes):
    given = {"model": "words", "messages": MESSAGES, "max_tokens": 8, "seed": 1, **changes}
    return client.chat.completions.create(**given)


def streamed_text(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


async def test_models(api):
    models = await use(api, lambda c: list(c.models.list()))
    assert [m.id for m in models] == ["words"]
    assert (await use(api, lambda c: c.models.retrieve("words"))).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        await use(api, lambda c: c.models.retrieve("other/model"))
    assert caught.value.code == "model_not_found"


async def test_chat_streaming_and_not(api):
    whole = await use(api, ask)
    text = whole.choices[0].message.content
    assert len(text.split()) == 8
    assert whole.usage.completion_tokens == 8
    assert whole.system_fingerprint
    assert await use(api, lambda c: streamed_text(ask(c, stream=True))) == text

    def with_usage(client):
        return list(ask(client, stream=True, stream_options={"include_usage": True}))[-1]

    last = await use(api, with_usage)
    assert last.choices == []
    assert last.usage == whole.usage


async def test_seed_makes_an_answer_repeatable(api):
    def answer(client, seed):
        return ask(client, seed=seed).choices[0].message.content

    first = await use(api, lambda c: answer(c, 5))
    assert await use(api, lambda c: answer(c, 5)) == first
    assert await use(api, lambda c: answer(c, 6)) != first


async def test_stop(api):
    whole = (await use(api, ask)).choices[0].message.content
    word = whole.split()[3]
    cut = await use(api, lambda c: ask(c, stop=[word]))
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == whole[: whole.index(word)]


async def test_several_choices(api):
    answer = await use(api, lambda c: ask(c, n=3))
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) == 3

    def collect(client):
        texts = ["", "", ""]
        for chunk in ask(client, n=3, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    assert await use(api, collect) == [c.message.content for c in answer.choices]


async def test_logprobs(api):
    answer = await use(api, lambda c: ask(c, logprobs=True, top_logprobs=3))
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert [len(entry.top_logprobs) for entry in content] == [3] * 8
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content

    legacy = await use(
        api,
        lambda c: c.completions.create(model="words", prompt="a b", logprobs=2, max_tokens=3),
    )
    assert len(legacy.choices[0].logprobs.tokens) == 3
    assert len(legacy.choices[0].logprobs.top_logprobs[0]) == 2
    assert legacy.choices[0].logprobs.text_offset[0] == 0


async def test_completions_streaming_and_not(api):
    def create(client, **changes):
        return client.completions.create(
            model="words", prompt="once upon", max_tokens=5, seed=2, **changes
        )

    whole = (await use(api, create)).choices[0].text
    streamed = await use(
        api, lambda c: "".join(chunk.choices[0].text for chunk in create(c, stream=True))
    )
    assert streamed == whole


async def test_errors_are_the_clients_own_classes(api):
    long = [{"role": "user", "content": "word " * 80}]
    for error, changes, code, param in (
        (openai.NotFoundError, {"model": "gpt-9"}, "model_not_found", "model"),
        (openai.BadRequestError, {"temperature": -1}, "bad_parameter", "temperature"),
        (openai.BadRequestError, {"temperature": "hot"}, "bad_parameter", "temperature"),
        (openai.BadRequestError, {"n": 0}, "bad_parameter", "n"),
        (openai.BadRequestError, {"messages": []}, "bad_parameter", "messages"),
        (
            openai.BadRequestError,
            {"tools": [{"type": "function"}]},
            "unsupported_parameter",
            "tools",
        ),
        (openai.BadRequestError, {"messages": long}, "context_length_exceeded", "messages"),
    ):
        for stream in (False, True):
            with pytest.raises(error) as caught:
                await use(api, lambda c, ch=changes, s=stream: ask(c, **ch, stream=s))
            assert caught.value.code == code
            assert caught.value.param == param
            assert caught.value.type == "invalid_request_error"
    assert "80" in caught.value.message
    assert "64" in caught.value.message


async def test_bad_json(api):
    def post(client):
        return client.post("/chat/completions", content=b'{"model": ', cast_to=object)

    with pytest.raises(openai.BadRequestError) as caught:
        await use(api, post)
    assert caught.value.code == "invalid_json"


async def test_an_error_in_mid_stream(api):
    api.engine.fail_at = {3: RunnerFailed("Rank 1 died: killed by SIGKILL.", rank=1)}
    with pytest.raises(openai.APIError) as caught:
        await use(api, lambda c: streamed_text(ask(c, stream=True)))
    assert "Rank 1 died" in caught.value.message
    assert caught.value.code == "runner_failed"


async def test_a_busy_node_is_tried_again(api):
    api.engine.limit = 0
    with pytest.raises(openai.RateLimitError):
        await use(api, ask)
    api.engine.limit = 10


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_ends_the_generation(api, stream):
    reached, never = trio.Event(), trio.Event()

    def gate(position: int) -> trio.Event | None:
        if position < 3:
            return None
        reached.set()
        return never

    api.engine.gate = gate

    def leave(client):
        if stream:
            answer = ask(client, stream=True, max_tokens=40)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=0.3), max_tokens=40)

    with trio.fail_after(10):
        await use(api, leave)
        await reached.wait()
        await api.engine.idle.wait()
    assert api.engine.cancelled == 1


async def test_a_lost_stream_goes_on(api):
    def lose_and_go_on(client):
        raw = client.chat.completions.with_raw_response.create(
            model="words",
            messages=MESSAGES,
            max_tokens=8,
            seed=1,
            stream=True,
            extra_body={"resume_seconds": 60},
        )
        session = raw.headers["x-session-id"]
        text, seen = "", 0
        with raw.parse() as stream:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                seen = getattr(chunk.choices[0], "token_count", 0)
                if seen == 3:
                    break
        rest = client.get(
            f"/sessions/{session}/stream?from={seen}",
            cast_to=ChatCompletionChunk,
            stream=True,
            stream_cls=openai.Stream[ChatCompletionChunk],
        )
        return text + streamed_text(rest)

    whole = await use(api, lambda c: ask(c).choices[0].message.content)
    assert await use(api, lose_and_go_on) == whole
    with pytest.raises(openai.NotFoundError) as caught:
        await use(api, lambda c: c.get(f"/sessions/{'0' * 32}/stream", cast_to=object))
    assert caught.value.code == "session_not_found"
