import json

import httpx
import pytest
import trio

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.node.api.openai_requests import choice_seed

HELLO = [{"role": "user", "content": "hello there"}]


async def test_whole_answer(api):
    reply = await api.http.post(
        "/v1/chat/completions",
        json={"model": "words", "messages": HELLO, "max_tokens": 5, "seed": 7},
    )
    assert reply.status_code == 200
    body = reply.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["created"] == 17
    assert body["system_fingerprint"] == "ab" * 32 + "-e7"
    [choice] = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 5
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def events(text: str) -> list[dict[str, object]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_stream_equals_whole(api):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 9, "seed": 3, "n": 3}
    whole = (await api.http.post("/v1/chat/completions", json=ask)).json()
    reply = await api.http.post(
        "/v1/chat/completions",
        json={**ask, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.text)
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in whole["choices"]]
    assert len(set(texts)) == 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 27,
        "total_tokens": 29,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_choices_have_documented_seeds(api):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 4, "seed": 3}
    three = (await api.http.post("/v1/chat/completions", json={**ask, "n": 3})).json()
    for index, choice in enumerate(three["choices"]):
        one = await api.http.post(
            "/v1/chat/completions", json={**ask, "seed": choice_seed(3, index)}
        )
        assert one.json()["choices"][0]["message"] == choice["message"]
    assert choice_seed(3, 0) == 3


async def test_random_seed_comes_from_the_injected_source(api):
    await api.http.post("/v1/chat/completions", json={"model": "words", "messages": HELLO})
    [request] = api.engine.requests
    assert request.sampling.seed == 42
    assert request.sampling.temperature == 1.0
    assert request.max_tokens is None


async def test_all_parameters_arrive(api):
    ask = {
        "model": "words",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        "max_tokens": 9,
        "max_completion_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.3,
        "logit_bias": {"5": 10},
        "stop": ["x", "y"],
        "seed": -1,
        "ignore_eos": True,
        "user": "somebody",
        "unheard_of": {"is": "ignored"},
    }
    reply = await api.http.post("/v1/chat/completions", json=ask)
    assert reply.status_code == 200, reply.text
    [request] = api.engine.requests
    assert [(m.role, m.content) for m in request.messages] == [
        ("system", "be brief"),
        ("user", "ab"),
    ]
    sampling = request.sampling
    assert request.max_tokens == 3
    assert request.stop == ("x", "y")
    assert request.ignore_eos
    assert sampling.seed == 2**64 - 1
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        5,
        0.1,
    )
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.1, 0.2)
    assert sampling.presence_penalty == -0.3
    assert sampling.logit_bias == {5: 10}


async def test_logprobs(api):
    ask = {
        "model": "words",
        "messages": HELLO,
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = (await api.http.post("/v1/chat/completions", json=ask)).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == -1.0
        assert len(entry["top_logprobs"]) == 2
    reply = await api.http.post("/v1/chat/completions", json={**ask, "stream": True})
    streamed = [
        entry
        for chunk in events(reply.text)
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_return_token_ids(api):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 4, "return_token_ids": True}
    whole = (await api.http.post("/v1/chat/completions", json=ask)).json()
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == 4
    assert whole["pyagent"]["placement"]["epoch"] == 7
    assert whole["pyagent"]["seed"] == 42
    reply = await api.http.post("/v1/chat/completions", json={**ask, "stream": True})
    chunks = events(reply.text)
    streamed = [t for chunk in chunks for c in chunk["choices"] for t in c.get("token_ids", [])]
    assert streamed == ids
    assert chunks[-1]["pyagent"]["placement"]["model"] == "ab" * 32


async def test_stop(api):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 30, "seed": 1}
    text = (await api.http.post("/v1/chat/completions", json=ask)).json()["choices"][0]["message"][
        "content"
    ]
    third = text.split()[2]
    for stop in (third, [third, "never"]):
        cut = (await api.http.post("/v1/chat/completions", json={**ask, "stop": stop})).json()
        assert cut["choices"][0]["finish_reason"] == "stop"
        assert cut["choices"][0]["message"]["content"] == text[: text.index(third)]


BAD = [
    ({"model": ""}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
    ),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": -2}, "max_completion_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"logit_bias": {"one": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("change", "parameter"), BAD, ids=[str(b[0])[:50] for b in BAD])
async def test_bad_parameters(api, change, parameter):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 2, **change}
    for stream in (False, True):
        if "stream_options" in ask and stream:
            continue
        reply = await api.http.post("/v1/chat/completions", json={**ask, "stream": stream})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == parameter
        assert error["code"] in ("bad_parameter", "unsupported_parameter")
        assert parameter.split("[")[0] in error["message"]


async def test_harmless_forms_are_accepted(api):
    for change in (
        {"stop": None, "seed": None, "temperature": None, "n": None, "logprobs": None},
        {"stop": []},
        {"tools": []},
        {"tools": [{}], "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"temperature": 0, "top_k": -1},
        {"model": "ab" * 32},
    ):
        ask = {"model": "words", "messages": HELLO, "max_tokens": 2, **change}
        reply = await api.http.post("/v1/chat/completions", json=ask)
        assert reply.status_code == 200, (change, reply.text)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "empty_body"),
        (b"  \n", "empty_body"),
        (b"{", "invalid_json"),
        (b'{"model": "words"', "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_json"),
        (b'{"model": NaN}', "invalid_json"),
        (b"[" * 200_000, "bad_parameter"),
        (b'{"metadata": ' + b"[" * 200_000, "invalid_json"),
        (b"[]", "bad_parameter"),
        (b'"text"', "bad_parameter"),
        (b"null", "bad_parameter"),
    ],
)
async def test_bad_json(api, body, code):
    for path in ("/v1/chat/completions", "/v1/completions"):
        reply = await api.http.post(path, content=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == code


async def test_unknown_model(api):
    for stream in (False, True):
        reply = await api.http.post(
            "/v1/chat/completions", json={"model": "gpt-9", "messages": HELLO, "stream": stream}
        )
        assert reply.status_code == 404
        error = reply.json()["error"]
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert "words" in error["message"]


async def test_not_ready_says_when_to_try_again(api):
    api.engine.loaded = False
    api.services.reasons = ("the mesh is not joined",)
    reply = await api.http.post("/v1/chat/completions", json={"model": "words", "messages": HELLO})
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    assert "the mesh is not joined" in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == "not_ready"


async def test_over_long_prompt_names_both_lengths(api):
    messages = [{"role": "user", "content": "word " * 80}]
    for stream in (False, True):
        reply = await api.http.post(
            "/v1/chat/completions", json={"model": "words", "messages": messages, "stream": stream}
        )
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"
        assert "80" in error["message"]
        assert "64" in error["message"]


async def test_error_in_mid_stream_ends_the_stream_with_an_event(api):
    api.engine.fail_at = {3: RunnerFailed("Rank 1 died.", rank=1, reason="killed by SIGKILL")}
    ask = {"model": "words", "messages": HELLO, "max_tokens": 9}
    reply = await api.http.post("/v1/chat/completions", json={**ask, "stream": True})
    assert reply.status_code == 200
    lines = [line for line in reply.text.split("\n\n") if line]
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "runner_failed"
    assert error["pyagent"]["facts"] == {"rank": 1, "reason": "killed by SIGKILL"}
    whole = await api.http.post("/v1/chat/completions", json=ask)
    assert whole.status_code == 503
    assert whole.json()["error"]["type"] == "server_error"
    assert api.engine.running == 0


async def test_an_unexpected_error_tells_nothing_of_the_inside(api, caplog):
    api.engine.fail_at = {0: ZeroDivisionError("secret inside")}
    reply = await api.http.post("/v1/chat/completions", json={"model": "words", "messages": HELLO})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert "secret inside" in caplog.text


async def test_one_failing_choice_cancels_the_others(api):
    api.engine.limit = 2
    reply = await api.http.post(
        "/v1/chat/completions", json={"model": "words", "messages": HELLO, "n": 3}
    )
    assert reply.status_code == 429
    assert reply.headers["retry-after"]
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert api.engine.running == 0


async def test_requests_are_answered_side_by_side(api):
    ask = {"model": "words", "messages": HELLO, "max_tokens": 20, "seed": 1}
    alone = (await api.http.post("/v1/chat/completions", json=ask)).json()["choices"]
    results = []

    async def one() -> None:
        async with httpx.AsyncClient(base_url=api.url) as http:
            results.append((await http.post("/v1/chat/completions", json=ask)).json()["choices"])

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert results == [alone] * 20
