"""A reply says which exactness classes computed it."""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Digest, Placement
from pyagent_node.inference.generation import Finished, Usage
from pyagent_node.node.api.openai_replies import Writer
from pyagent_node.node.api.openai_requests import Shape

PLACED = Placement(Digest("a" * 64), 3, (), 64, 1)


def ended(*classes: str) -> Finished:
    return Finished("stop", "", Usage(1, 1, 0.1, 0.2, classes=classes), PLACED)


def written(shape: Shape, *finished: Finished) -> tuple[dict[str, object], dict[str, object]]:
    """Return the last chunk of a stream, and the whole answer."""
    writer = Writer(shape, "f", 1, 2)
    chunk = b""
    for index, each in enumerate(finished):
        chunk = writer.add(index, each) or b""
    last = msgspec.json.decode(chunk.removeprefix(b"data: "))
    return last, msgspec.json.decode(writer.whole())


def shape(choices: int) -> Shape:
    return Shape(
        kind="chat",
        model="m",
        include_usage=False,
        logprobs=False,
        top_logprobs=0,
        token_ids=False,
        seed=1,
        prompts=1,
        choices=choices,
    )


def test_a_whole_answer_and_the_last_chunk_of_a_stream_say_it() -> None:
    last, whole = written(shape(1), ended("llama.cpp/1/cpu", "mlx/1/cpu/f32"))
    assert last["served_by"] == whole["served_by"] == ["llama.cpp/1/cpu", "mlx/1/cpu/f32"]


def test_choices_that_were_served_by_others_are_told_together() -> None:
    last, whole = written(shape(2), ended("a", "b"), ended("b", "c"))
    assert last["served_by"] == ["b", "c"]
    assert whole["served_by"] == ["a", "b", "c"]


def test_ranks_that_do_not_say_are_not_made_up() -> None:
    last, whole = written(shape(1), ended())
    assert "served_by" not in last
    assert "served_by" not in whole
