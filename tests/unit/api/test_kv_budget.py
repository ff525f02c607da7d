"""The request field ``kv_budget``, and what replies say of it."""

import pytest

from pyagent_node.inference.kv.budgets import Pruning

ASK = {"model": "words", "prompt": "once upon a time", "seed": 5, "max_tokens": 4}


async def ask(api, **changes):
    return await api.http.post("/v1/completions", json={**ASK, **changes})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, None),
        ("off", None),
        ("auto", Pruning()),
        ("512", Pruning(512)),
        (512, Pruning(512)),
        ("rolling", Pruning(rolling=True)),
        ("rolling:512", Pruning(512, rolling=True)),
    ],
)
async def test_the_field_reaches_the_engine(api, value, told):
    assert (await ask(api, kv_budget=value)).status_code == 200
    assert [request.pruning for request in api.engine.requests] == [told]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "some",
        "12",
        255,
        -1,
        1.5,
        True,
        ["auto"],
        "9" * 100,
        "rolling:",
        "rolling:12",
        "rolling:auto",
        "512:rolling",
    ],
)
async def test_bad_values_are_refused_by_name(api, value):
    reply = await ask(api, kv_budget=value)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "kv_budget"
    assert not api.engine.requests


async def test_an_answer_that_nobody_pruned_says_nothing_of_it(api):
    assert "kv" not in (await ask(api, kv_budget="auto")).json()["usage"]
