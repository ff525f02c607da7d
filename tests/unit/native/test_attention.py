"""Attention of rows over cached keys, the queries that the tap takes, and pages given back."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from pyagent_node import native
from tests.unit.native.test_tap import ADDRESSES, Tensor, address, ask, show, tensor

SIZE = 24
REFUSED = "must|are not|is no |cannot|sees|is in no"


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Tensor))
def get_data(of: Any) -> int | None:
    value: int | None = of.contents.data
    return value


@ctypes.CFUNCTYPE(None, ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
def tensor_set(of: Any, data: int, offset: int, size: int) -> None:
    ctypes.memmove(of.contents.data + offset, data, size)


def make(**more: int) -> native.TensorTap:
    return native.TensorTap("l_out-9", 100, **ADDRESSES, **more)


def held(*contents: bytes, **more: int) -> tuple[list[native.HeldTensor], list[Tensor]]:
    tap = make(**more)
    tap.watch("cache_", tensor_bytes=SIZE)
    seen = [tensor(f"cache_k_l{i:02}", data) for i, data in enumerate(contents)]
    for each in seen:
        ask(tap, each)
    return tap.found(), seen


def reference(
    keys: NDArray[np.float16], queries: NDArray[np.float32], limits: list[int], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Plain softmax over the cells that each row sees; keys (layers, cells, kv heads, width)."""
    layers, rows, heads, _ = queries.shape
    n = max(limits)
    mass, peak, entropy = np.zeros((layers, n)), np.zeros((rows, n)), np.zeros(layers)
    for layer in range(layers):
        for row, limit in enumerate(limits):
            for head in range(heads):
                shared = keys[layer, :limit, head * keys.shape[2] // heads].astype(np.float64)
                scores = shared @ queries[layer, row, head].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mass[layer, :limit] += weights / heads
                peak[row, :limit] = np.maximum(peak[row, :limit], weights)
                some = weights[weights > 0]
                entropy[layer] -= (some * np.log(some)).sum() / heads
    return mass, peak.sum(axis=0), entropy


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_it_agrees_with_numpy(data: st.DataObject) -> None:
    draw = data.draw
    layers, kv_heads, group, width = (draw(st.integers(1, n)) for n in (3, 3, 3, 20))
    cells, first = draw(st.integers(1, 30)), draw(st.integers(0, 5))
    limits = draw(st.lists(st.integers(1, cells), min_size=1, max_size=4))
    numbers = st.floats(-4, 4, width=16)
    shape = (layers, first + cells, kv_heads, width)
    keys = draw(arrays.arrays(np.float16, shape, elements=numbers))
    shape = (layers, len(limits), kv_heads * group, width)
    queries = draw(arrays.arrays(np.float32, shape, elements=st.floats(-4, 4, width=32)))
    tensors, kept = held(*(layer.tobytes() for layer in keys))
    found = native.attention_rows(
        tensors,
        first,
        queries.reshape(-1),
        np.array(limits, np.int32),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        width=width,
        scale=0.5,
    )
    assert len(kept) == layers
    mass, peak, entropy = reference(keys[:, first:], queries, limits, 0.5)
    assert np.abs(found[0].reshape(mass.shape) - mass).max() < 1e-4
    assert np.abs(found[1] - peak).max() < 1e-4
    assert np.abs(found[2] - entropy).max() < 1e-3


@pytest.mark.parametrize(
    ("first", "floats", "limits", "heads", "kv_heads", "scale"),
    [
        (0, 8, [5], 2, 1, 1.0),  # more cells than there are
        (2**60, 8, [1], 2, 1, 1.0),
        (2**63, 8, [1], 2, 1, 1.0),
        (1, 8, [4], 2, 1, 1.0),
        (0, 7, [4], 2, 1, 1.0),
        (0, 8, [0], 2, 1, 1.0),
        (0, 8, [-3], 2, 1, 1.0),
        (0, 0, [], 2, 1, 1.0),
        (0, 8, [4], 2, 0, 1.0),
        (0, 12, [4], 3, 2, 1.0),
        (0, 8, [4], 2**40, 1, 1.0),
        (0, 8, [4], 2, 1, float("nan")),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    first: int, floats: int, limits: list[int], heads: int, kv_heads: int, scale: float
) -> None:
    (key,), _kept = held(bytes(4 * 8))
    with pytest.raises(ValueError, match=REFUSED):
        native.attention_rows(
            [key],
            first,
            np.zeros(floats, np.float32),
            np.array(limits, np.int32),
            heads=heads,
            kv_heads=kv_heads,
            width=4,
            scale=scale,
        )


def rows(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, np.int32)


def test_the_last_form_of_the_wanted_rows_counts() -> None:
    tap, out = make(), np.full((2, 2, 3), np.nan, np.float32)
    tap.query("Qcur-", out, rows(1, 3), layers=2, call_rows=4)
    for layer in (1, 0):
        for form in range(3):
            values = [100.0 * layer + 1000 * form + i for i in range(12)]
            seen = tensor(f"Qcur-{layer}", values)
            assert ask(tap, seen)
            assert show(tap, seen)
    others = [tensor(name, [1.0] * 12) for name in ("Qcur-2", "Qcur-0 (view)", "Kcur-0", "Qcur-")]
    assert [ask(tap, each) for each in others] == [False] * 4
    assert tap.queried()
    assert out[0].tolist() == [[2003, 2004, 2005], [2009, 2010, 2011]]
    assert out[1].tolist() == [[2103, 2104, 2105], [2109, 2110, 2111]]
    assert not ask(tap, tensor("Qcur-0", [1.0] * 12))
    with pytest.raises(ValueError, match="takes no queries"):
        tap.queried()


def test_it_goes_on_beside_the_armed_tensor() -> None:
    tap, out, queries = make(), np.zeros(2, np.float32), np.zeros((1, 1, 2), np.float32)
    tap.arm(out)
    tap.query("Qcur-", queries, rows(0), layers=1, call_rows=1)
    for name, values in (("Qcur-0", [1.0, 2.0]), ("l_out-9", [3.0, 4.0])):
        assert ask(tap, tensor(name, values))
        assert show(tap, tensor(name, values))
    assert (tap.collect(), tap.queried()) == (2, True)
    assert (out.tolist(), queries.tolist()) == ([3, 4], [[[1, 2]]])


@pytest.mark.parametrize("sizes", [(), (8,), (8, 7), (8, 16), (9, 8)])
def test_layers_that_are_missing_or_of_another_size_are_told(sizes: tuple[int, ...]) -> None:
    tap, out = make(), np.zeros((2, 1, 2), np.float32)
    tap.query("Qcur-", out, rows(3), layers=2, call_rows=4)
    for layer, size in enumerate(sizes):
        show(tap, tensor(f"Qcur-{layer}", [0.0] * size))
    assert not tap.queried()


@pytest.mark.parametrize(
    ("shape", "wanted", "layers", "call_rows"),
    [
        ((1, 1, 2), (1,), 1, 1),
        ((1, 1, 2), (-1,), 1, 1),
        ((1, 0, 2), (), 1, 1),
        ((1, 1, 3), (0,), 2, 1),
        ((1, 1, 2), (0,), 0, 1),
        ((0,), (0,), 1, 1),
        ((1, 1, 2), (0,), 2**63, 1),
    ],
)
def test_rows_that_there_are_not_are_refused(
    shape: tuple[int, ...], wanted: tuple[int, ...], layers: int, call_rows: int
) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        make().query(
            "Qcur-", np.zeros(shape, np.float32), rows(*wanted), layers=layers, call_rows=call_rows
        )


def test_pages_go_back_and_come_as_zeros() -> None:
    more = {"tensor_set": address(tensor_set), "get_data": address(get_data)}
    n = 1 << 20
    (key,), _kept = held(b"x" * n, **more)
    gone = key.release(1000, n - 2000)
    if sys.platform != "linux":
        assert gone is None
        assert key.resident(0, n) is None
        return
    assert gone is not None
    assert n - 2000 - 2 * 65536 < gone <= n - 2000
    assert key.resident(0, n) == n - gone
    data = key.read(0, n)
    assert data.count(b"x") == n - gone
    assert data[:1000] == b"x" * 1000
    assert data[-1000:] == b"x" * 1000
    assert key.release(0, 10) == 0
    assert key.resident(5, 0) == 0
    key.write(0, b"y" * n)
    assert key.resident(0, n) == n


def test_only_what_may_be_written_is_given_back() -> None:
    both = {"tensor_set": address(tensor_set), "get_data": address(get_data)}
    for missing in both:
        (key,), _kept = held(b"x" * 9, **{k: v for k, v in both.items() if k != missing})
        with pytest.raises(ValueError, match=missing):
            key.release(0, 9)
    (key,), _kept = held(b"x" * 9, **both)
    for offset, size in ((0, 10), (10, 0), (2**63, 1), (5, 2**63)):
        with pytest.raises(ValueError, match=REFUSED):
            key.release(offset, size)
        with pytest.raises(ValueError, match=REFUSED):
            key.resident(offset, size)
