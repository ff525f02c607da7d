"""The request fields of the prompt cache, and what replies and metrics say of it."""

import json

import pytest

ASK = {"model": "words", "prompt": "once upon a time", "seed": 5, "max_tokens": 4}


async def ask(api, **changes):
    api.engine.caches = True
    return await api.http.post("/v1/completions", json={**ASK, **changes})


async def cached(api, **changes):
    usage = (await ask(api, **changes)).json()["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"]


async def test_the_fields_reach_the_engine(api):
    await ask(api)
    await ask(api, cache_salt="ours", prompt_cache=True, n=2)
    await ask(api, prompt_cache=False, cache_salt=None)
    told = [(request.cache_salt, request.prompt_cache) for request in api.engine.requests]
    assert told == [("", True), ("ours", True), ("ours", True), ("", False)]


async def test_usage_tells_what_was_cached(api):
    assert await cached(api) == 0
    assert await cached(api) == 3
    assert await cached(api, cache_salt="another") == 0
    assert await cached(api, prompt_cache=False) == 0
    # what is asked for several times at once is one prompt
    assert await cached(api, n=2) == 3


async def test_a_stream_tells_it_too(api):
    await ask(api)
    reply = await ask(api, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert json.loads(lines[-2])["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_metrics_count_it(api):
    await ask(api)
    await ask(api)
    text = (await api.http.get("/metrics")).text
    assert 'pyagent_cached_tokens_total{model="words"} 3.0' in text
    assert 'pyagent_recomputed_tokens_total{model="words"} 0.0' in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_salt", 5),
        ("cache_salt", ["a"]),
        ("cache_salt", "x" * 1025),
        ("cache_salt", "é" * 513),
        ("prompt_cache", "yes"),
        ("prompt_cache", 1),
    ],
)
async def test_bad_values_are_refused_by_name(api, field, value):
    reply = await ask(api, **{field: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field
    assert not api.engine.requests


async def test_the_longest_salt_is_taken(api):
    assert (await ask(api, cache_salt="é" * 512)).status_code == 200
