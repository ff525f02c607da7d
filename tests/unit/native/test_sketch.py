"""Sketches and probes against plain NumPy, and what is refused."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node.native import lsh_probes, sketch_pack, sketch_scan

seeds = st.integers(0, 2**32)


def numbers(seed: int, *shape: int) -> NDArray[np.float32]:
    """Small whole numbers: their sums are exact in any order, and often equal."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)


@given(seeds, st.integers(0, 20), st.integers(1, 40))
def test_packing_is_that_of_numpy(seed: int, rows: int, bytes_: int) -> None:
    values = numbers(seed, rows, bytes_ * 8)
    packed = sketch_pack(values.reshape(-1), bytes_ * 8)
    assert packed.tobytes() == np.packbits(values > 0, axis=1, bitorder="little").tobytes()


@given(seeds, st.integers(0, 60), st.integers(1, 40), st.integers(0, 70), st.booleans())
def test_a_scan_is_a_full_sort(
    seed: int, rows: int, bytes_: int, count: int, weighted: bool
) -> None:
    values, query = numbers(seed, rows, bytes_ * 8), numbers(seed + 1, bytes_ * 8)
    weights = numbers(seed + 2, rows) if weighted else None
    found, scores = sketch_scan(
        sketch_pack(values.reshape(-1), bytes_ * 8), query, count, weights=weights
    )
    expected = np.where(values > 0, 1.0, -1.0) @ query
    expected = expected * (weights if weights is not None else 1) + 0.0
    order = np.lexsort((np.arange(rows), -expected))[:count]
    assert found.tolist() == order.tolist()
    assert scores.tolist() == expected[order].tolist()


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), st.integers(0, 600))
def test_probes_are_all_flips_by_cost(query: list[float], count: int) -> None:
    buckets, costs = lsh_probes(np.array(query, np.float32), count)
    own = sum(1 << i for i, value in enumerate(query) if value > 0)
    every = {
        own ^ sum(1 << i for i in flips): sum(query[i] ** 2 for i in flips)
        for size in range(len(query) + 1)
        for flips in itertools.combinations(range(len(query)), size)
    }
    assert len(set(buckets.tolist())) == len(buckets) == min(count, len(every))
    assert costs.tolist() == pytest.approx([every[b] for b in buckets.tolist()])
    assert costs.tolist() == pytest.approx(sorted(every.values())[:count])
    if count:
        assert buckets[0] == own


def test_the_first_probes_of_many_bits_are_found_without_listing_all() -> None:
    buckets, costs = lsh_probes(np.linspace(1, 2, 30, dtype=np.float32), 50)
    assert len(set(buckets.tolist())) == 50
    assert (np.diff(costs) >= 0).all()


def test_other_threads_run_meanwhile() -> None:
    packed = np.zeros(32 * 300_000, np.uint8)
    seen = threading.Event()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sketch_scan(packed, np.ones(256, np.float32), 5)
            seen.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert seen.wait(60)
    stop.set()
    worker.join(60)
    assert not worker.is_alive()


F = np.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sketch_pack(np.zeros(16, F), 12), "multiple of 8"),
        (lambda: sketch_pack(np.zeros(16, F), 0), "multiple of 8"),
        (lambda: sketch_pack(np.zeros(16, F), 1 << 13), "up to 4096"),
        (lambda: sketch_pack(np.zeros(12, F), 8), "not a multiple"),
        (lambda: sketch_pack(np.full(8, np.nan, F), 8), r"values\[0\] is NaN"),
        (lambda: sketch_scan(np.zeros(3, np.uint8), np.zeros(16, F), 1), "whole sketches"),
        (lambda: sketch_scan(np.zeros(2, np.uint8), np.zeros(15, F), 1), "multiple of 8"),
        (lambda: sketch_scan(np.zeros(2, np.uint8), np.zeros(0, F), 1), "multiple of 8"),
        (lambda: sketch_scan(np.zeros(1, np.uint8), np.full(8, np.inf, F), 1), "finite"),
        (lambda: sketch_scan(np.zeros(1, np.uint8), np.zeros(8, F), -1), "between 0"),
        (
            lambda: sketch_scan(np.zeros(2, np.uint8), np.zeros(8, F), 1, weights=np.zeros(3, F)),
            "3 entries for 2",
        ),
        (
            lambda: sketch_scan(
                np.zeros(1, np.uint8), np.zeros(8, F), 1, weights=np.full(1, np.nan, F)
            ),
            "weights",
        ),
        (lambda: lsh_probes(np.zeros(0, F), 1), "1 to 30"),
        (lambda: lsh_probes(np.zeros(31, F), 1), "1 to 30"),
        (lambda: lsh_probes(np.full(4, np.nan, F), 1), "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, text: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("wrong", [np.zeros(8), [0.0] * 8, np.zeros((1, 8), F), None])
def test_another_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="1-dimensional"):
        sketch_pack(wrong, 8)  # type: ignore[arg-type]


def test_the_largest_scores_stay_numbers() -> None:
    found, scores = sketch_scan(
        np.array([0, 255] * 512, np.uint8)[:1024], np.full(4096, 1e15, F), 2, np.full(2, 1e15, F)
    )
    assert len(found) == 2
    assert np.isfinite(scores).all()
    with pytest.raises(ValueError, match="at most 1e15"):
        sketch_scan(np.zeros(1, np.uint8), np.full(8, 2e15, F), 1)
