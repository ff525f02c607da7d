"""The rows of the bench of a far node."""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Placement
from pyagent_node.benchmarks.context_far import row_of
from pyagent_node.node.answers import Answer

PLAIN = Answer(
    text="x",
    token_ids=(1,),
    finish_reason="stop",
    prompt_tokens=100,
    completion_tokens=1,
    seed=1,
    ttft_seconds=3.0,
    seconds=4.0,
    tokens_per_second=1.0,
    placement=Placement("a" * 64, 1, (), 64, 1),  # type: ignore[arg-type]
    joined_tokens=80,
)


def test_a_row_has_medians_and_sums() -> None:
    other = msgspec.structs.replace(PLAIN, ttft_seconds=1.0, joined_landmarks=80)
    row = row_of("lossy", [PLAIN, other])
    assert (row.way, row.ttft, row.prompt_tokens) == ("lossy", 2.0, 200)
    assert (row.joined_tokens, row.joined_landmarks) == (160, 80)
