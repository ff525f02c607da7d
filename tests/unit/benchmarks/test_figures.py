"""The arithmetic of the benchmarks, and the reference's choice of tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
from pyagent_node.benchmarks.pipeline import Report, _Run, quantiles, summarise
from pyagent_node.benchmarks.reference import choose
from pyagent_node.benchmarks.single import SingleAnswer
from pyagent_node.cli.demo import even_cuts
from pyagent_node.native import gumbel
from pyagent_node.node.answers import Answer

PEER = PeerId("12D3KooWTest")


def run(speed: float, tokens: tuple[int, ...], step: float, compute: float) -> _Run:
    n = len(tokens)
    placement = Placement(
        Digest("0" * 64),
        1,
        (Rank(0, Slice(0, 15, False), PEER), Rank(1, Slice(15, 30, True), PEER)),
        n_ctx=64,
        n_seq=1,
    )
    answer = Answer(
        text="",
        token_ids=tokens,
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=n,
        seed=0,
        ttft_seconds=0.5,
        seconds=0.5 + (n - 1) / speed,
        tokens_per_second=speed,
        placement=placement,
    )
    return _Run(answer, (step,) * (n - 1), (compute,) * (n - 1))


def alone(speed: float, tokens: tuple[int, ...]) -> SingleAnswer:
    return SingleAnswer(
        prompt_tokens=1, token_ids=tokens, text="", ttft_seconds=0.1, tokens_per_second=speed
    )


def test_an_arm_adds_up() -> None:
    tokens = (1, 2, 3, 4, 5)
    arm = summarise(
        2,
        [run(100.0, tokens, 0.009, 0.006), run(50.0, tokens, 0.018, 0.006)],
        [alone(200.0, tokens), alone(100.0, tokens)],
    )
    assert arm.ratio == 0.5
    assert arm.tokens_per_second == 75.0
    assert arm.layers == ((0, 15), (15, 30))
    assert arm.identical
    assert (arm.hop_ms.p50, arm.hop_ms.p99) == (1.5, 6.0)
    assert arm.compute_ms.mean == 6.0
    # (10 + 20) / 2 ms a token in all, (9 + 18) / 2 of it in steps
    assert arm.head_ms == pytest.approx(1.5)


def test_a_busy_machine_shows_in_the_spread_of_the_baseline() -> None:
    tokens = (1, 2)
    runs = [run(1.0, tokens, 1.0, 1.0)] * 2
    report = Report(
        bench="pipeline",
        time=0.0,
        machine={},
        model="m",
        tokens=2,
        rounds=2,
        idle_daemon_bytes=1,
        baseline_threads=0,
        arms=(summarise(1, runs, [alone(100.0, tokens), alone(20.0, tokens)]),),
    )
    assert report.baseline_spread == 5.0


def test_different_tokens_are_told() -> None:
    arm = summarise(1, [run(1.0, (1, 2), 1.0, 1.0)], [alone(1.0, (1, 3))])
    assert not arm.identical


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300))
def test_quantiles_are_members_in_order(values: list[float]) -> None:
    found = quantiles(values)
    milliseconds = {round(1000 * v, 4) for v in values}
    assert {found.p50, found.p99} <= milliseconds
    assert min(milliseconds) <= found.p50 <= found.p99 <= max(milliseconds)


def test_quantiles_of_nothing() -> None:
    assert quantiles([]).p99 == 0.0


def test_the_reference_samples_by_the_definition() -> None:
    logits = np.linspace(-3, 3, 101, dtype=np.float32)
    assert choose(logits, 0.0, 9, 4) == 100
    noise = gumbel(9, 4, 101)
    expected = int(np.argmax(logits.astype(np.float64) / 0.7 + noise))
    assert choose(logits, 0.7, 9, 4) == expected


@given(st.integers(1, 200), st.integers(1, 16))
def test_even_cuts_cover_all_layers(n_layers: int, ranks: int) -> None:
    edges = [0, *even_cuts(n_layers, ranks), n_layers]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    assert sum(sizes) == n_layers
    assert max(sizes) - min(sizes) <= 1
