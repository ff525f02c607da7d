"""The request fields of speculation, and what replies and metrics say of it."""

import json

import pytest

ASK = {"model": "words", "prompt": "once upon", "seed": 5, "max_tokens": 4}


async def ask(api, **changes):
    return await api.http.post("/v1/completions", json={**ASK, **changes})


async def test_the_choice_reaches_the_engine_and_the_default_is_the_engines(api):
    await ask(api)
    await ask(api, speculation="suffix", draft_length=3, draft_depth=2, draft_tree=True, n=2)
    default, *chosen = api.engine.requests
    assert (default.speculation, default.draft_length, default.draft_depth) == (None, None, None)
    assert default.draft_tree is None
    assert len(chosen) == 2
    for request in chosen:
        assert (request.speculation, request.draft_length, request.draft_depth) == ("suffix", 3, 2)
        assert request.draft_tree


async def test_usage_tells_what_guessing_came_to(api):
    assert "completion_tokens_details" not in (await ask(api)).json()["usage"]
    body = (await ask(api, speculation="suffix", n=2, return_token_ids=True)).json()
    assert body["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 12,
        "rejected_prediction_tokens": 8,
    }
    told = body["pyagent"]["speculation"]
    assert (told["drafter"], told["drafted"], told["accepted"]) == ("suffix", 10, 6)
    assert (told["passes"], told["cancelled"], told["length"], told["depth"]) == (4, 1, 3, 2)
    assert (await ask(api, return_token_ids=True)).json()["pyagent"]["speculation"] is None


async def test_a_stream_tells_it_too(api):
    reply = await ask(
        api, speculation="suffix", stream=True, stream_options={"include_usage": True}
    )
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    usage = json.loads(lines[-2])["usage"]
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 6


async def test_metrics_count_guesses(api):
    await ask(api, speculation="suffix")
    text = (await api.http.get("/metrics")).text
    labels = 'drafter="suffix",model="words"'
    assert f'pyagent_speculation_tokens_total{{{labels},verdict="accepted"}} 6.0' in text
    assert f'pyagent_speculation_tokens_total{{{labels},verdict="rejected"}} 4.0' in text
    assert f"pyagent_speculation_passes_total{{{labels}}} 4.0" in text
    assert f"pyagent_speculation_cancelled_total{{{labels}}} 1.0" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"speculation": 3},
        {"speculation": ["suffix"]},
        {"draft_length": "many"},
        {"draft_depth": 1.5},
        {"draft_tree": "wide"},
    ],
)
async def test_fields_of_a_wrong_type_are_refused(api, fields):
    reply = await ask(api, **fields)
    assert reply.status_code == 400
    assert next(iter(fields)) in reply.json()["error"]["message"]
