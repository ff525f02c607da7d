"""Tensors that the tap holds on to, and the graph that it leaves early."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from pyagent_node import native
from tests.unit.native.test_tap import (
    ADDRESSES,
    Tensor,
    address,
    ask,
    make,
    room,
    show,
    tensor,
)

SIZE = 24
"""What the make-believe tensor takes."""


def watching(prefix: str = "cache_") -> native.TensorTap:
    tap = make()
    tap.watch(prefix, tensor_bytes=SIZE)
    return tap


def test_views_are_held_under_the_name_of_what_they_show_the_largest_of_each() -> None:
    tap = watching()
    whole = tensor("cache_k_l1 (reshaped)", b"0123456789")
    for seen in (
        tensor("cache_k_l1 (view)", b"0123"),
        whole,
        tensor("cache_k_l1 (reshaped) (view)", b"012"),
        tensor("cache_v_l1", b"xyz"),
        tensor("Kcur-1", b"not this one"),
    ):
        assert not ask(tap, seen)
    held = tap.found()
    assert [(each.name, each.nbytes) for each in held] == [("cache_k_l1", 10), ("cache_v_l1", 3)]
    assert held[0].read(0, 10) == b"0123456789"
    assert held[0].read(3, 4) == b"3456"
    assert held[0].read(10, 0) == b""


def test_what_is_held_is_read_as_it_is_now() -> None:
    tap = watching()
    seen = tensor("cache_v_l0", bytes(100_000))
    ask(tap, seen)
    (held,) = tap.found()
    data = np.random.default_rng(1).bytes(100_000)
    seen.buffer[:100_000] = data
    seen.name = b"another"  # the node of the graph is gone, its memory is not
    assert held.read(0, 100_000) == data


@pytest.mark.parametrize("place", [(0, 5), (4, 1), (5, 0), (2**63, 1), (1, 2**64 - 1), (-1, 1)])
def test_nothing_outside_a_tensor_is_read(place: tuple[int, int]) -> None:
    tap = watching()
    seen = tensor("cache_k_l0", b"abcd")
    ask(tap, seen)
    (held,) = tap.found()
    with pytest.raises(ValueError, match=r"tensor|between"):
        held.read(*place)


def test_a_tap_watches_from_one_call_to_the_other() -> None:
    tap = make()
    assert tap.found() == []
    ask(tap, tensor("cache_k_l0", b"abcd"))
    tap.watch("cache_", tensor_bytes=SIZE)
    assert tap.found() == []
    ask(tap, tensor("cache_k_l0", b"abcd"))
    assert tap.found() == []


def test_tensors_without_a_name_are_let_through() -> None:
    tap = watching()
    assert not ask(tap, Tensor(None, None, 0))
    assert tap.found() == []


@pytest.mark.parametrize(
    ("prefix", "size"), [("", SIZE), ("x" * 64, SIZE), ("a\0b", SIZE), ("x", 0), ("x", 12)]
)
def test_what_cannot_be_watched_for_is_refused(prefix: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"prefix|tensor_bytes"):
        make().watch(prefix, tensor_bytes=size)


def test_a_graph_is_left_after_the_early_tensor_and_only_then() -> None:
    tap = native.TensorTap("l_out-9", 100, early="l_out-1", **ADDRESSES)
    early, late, out = tensor("l_out-1", [1.0, 2.0]), tensor("l_out-9", [3.0]), room()
    tap.arm(out, early=True)
    assert ask(tap, early)
    assert not ask(tap, late)
    assert not show(tap, early)
    assert tap.collect() == 2
    assert out[:2].tolist() == [1, 2]
    tap.arm(out)
    assert not ask(tap, early)
    assert ask(tap, late)
    assert show(tap, late)
    assert tap.collect() == 1


def test_a_tap_without_an_early_tensor_says_so() -> None:
    with pytest.raises(ValueError, match="early"):
        make().arm(room(), early=True)
    with pytest.raises(ValueError, match="early"):
        native.TensorTap("l_out-9", 100, early="", **ADDRESSES)


@ctypes.CFUNCTYPE(None, ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
def tensor_set(of: Any, data: int, offset: int, size: int) -> None:
    ctypes.memmove(of.contents.data + offset, data, size)


def writable(data: bytes) -> tuple[native.HeldTensor, Tensor]:
    tap = native.TensorTap("l_out-9", 100, tensor_set=address(tensor_set), **ADDRESSES)
    tap.watch("cache_", tensor_bytes=SIZE)
    seen = tensor("cache_k_l0", data)
    ask(tap, seen)
    (held,) = tap.found()
    return held, seen


def test_what_is_held_can_be_written() -> None:
    held, seen = writable(b"0123456789")
    held.write(2, b"ab")
    held.write(9, memoryview(b"z"))
    held.write(10, b"")
    assert seen.buffer[:10] == b"01ab45678z"
    large, seen = writable(bytes(100_000))
    data = np.random.default_rng(1).integers(0, 256, 99_999, np.uint8)
    large.write(1, data)
    assert seen.buffer[:100_000] == b"\0" + data.tobytes()


@pytest.mark.parametrize(("offset", "size"), [(0, 5), (4, 1), (2**63, 1), (-1, 1)])
def test_nothing_outside_a_tensor_is_written(offset: int, size: int) -> None:
    held, seen = writable(b"abcd")
    with pytest.raises(ValueError, match=r"tensor|between"):
        held.write(offset, bytes(size))
    assert seen.buffer[:4] == b"abcd"


def test_a_tap_that_cannot_write_says_so() -> None:
    tap = watching()
    seen = tensor("cache_k_l0", b"abcd")
    ask(tap, seen)
    (held,) = tap.found()
    with pytest.raises(ValueError, match="tensor_set"):
        held.write(0, b"x")


def test_graphs_are_left_at_once_while_they_are_skipped() -> None:
    tap = make("l_out-9")
    tap.arm(room())
    tap.skip(True)
    first = tensor("inp_embd", [1.0])
    assert ask(tap, first)
    assert not show(tap, first)
    with pytest.raises(ValueError, match="not armed"):
        tap.collect()
    tap.skip(False)
    assert not ask(tap, first)
    assert show(tap, first)
