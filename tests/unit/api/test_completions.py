import json

import pytest


async def ask(api, **changes):
    body = {"model": "words", "prompt": "once upon a time", "seed": 5, **changes}
    return await api.http.post("/v1/completions", json=body)


async def test_legacy_shape_and_default_length(api):
    body = (await ask(api)).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    [choice] = body["choices"]
    assert len(choice["text"].split()) == 16
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == 4


async def test_tokens_as_prompt(api):
    body = (await ask(api, prompt=[1, 2, 3], max_tokens=2)).json()
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert api.engine.requests[0].tokens == (1, 2, 3)


async def test_several_prompts(api):
    alone = [
        (await ask(api, prompt=p, max_tokens=3)).json()["choices"][0]["text"]
        for p in ("a b", "c d e")
    ]
    body = (await ask(api, prompt=["a b", "c d e"], max_tokens=3, n=2)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [body["choices"][0]["text"], body["choices"][2]["text"]] == alone
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    body = (await ask(api, prompt=[[1, 2], [3]], max_tokens=1)).json()
    assert len(body["choices"]) == 2


async def test_logprobs_in_the_legacy_shape(api):
    bias = {"100": 50}  # the word with an accent: two bytes in one token
    body = (await ask(api, max_tokens=3, logprobs=2, logit_bias=bias)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["é ", "é ", "é "]
    assert logprobs["token_logprobs"] == [-1.0] * 3
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 3
    assert logprobs["top_logprobs"][0]["é "] == -1.0
    assert logprobs["text_offset"] == [0, 2, 4]
    body = (await ask(api, max_tokens=1, logprobs=0)).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"] is None


async def test_stream(api):
    whole = (await ask(api, max_tokens=6, logprobs=1)).json()["choices"][0]
    reply = await ask(api, max_tokens=6, logprobs=1, stream=True)
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(c["text"] for c in chunks) == whole["text"]
    offsets = [o for c in chunks for o in (c["logprobs"] or {"text_offset": []})["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    assert chunks[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt[0][0]"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a", "b"], "n": 5}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": "word " * 70}, "prompt"),
    ],
)
async def test_bad_parameters(api, change, parameter):
    reply = await ask(api, **change)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == parameter


async def test_harmless_forms(api):
    for change in ({"best_of": 1}, {"echo": False}, {"suffix": None}, {"suffix": ""}):
        assert (await ask(api, max_tokens=1, **change)).status_code == 200
