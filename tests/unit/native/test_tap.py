"""The tensor tap, driven through its C interface with a make-believe ggml."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node import native

Callback = Callable[[int | None, bool, int | None], bool]


class Tensor(ctypes.Structure):
    """What the make-believe ggml calls a tensor."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
    )


def tensor(name: str, values: list[float] | bytes) -> Tensor:
    data = values if isinstance(values, bytes) else np.array(values, np.float32).tobytes()
    buffer = ctypes.create_string_buffer(data, max(len(data), 1))
    made = Tensor(name.encode(), ctypes.addressof(buffer), len(data))
    made.buffer = buffer  # keeps the memory alive
    return made


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Tensor))
def get_name(of: Any) -> int | None:
    value = ctypes.cast(ctypes.addressof(of.contents), ctypes.POINTER(ctypes.c_void_p))[0]
    return int(value) if value else None


@ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.POINTER(Tensor))
def nbytes(of: Any) -> int:
    return int(of.contents.nbytes)


@ctypes.CFUNCTYPE(None, ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
def tensor_get(of: Any, to: int, offset: int, size: int) -> None:
    ctypes.memmove(to, of.contents.data + offset, size)


def address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value
    return value


ADDRESSES = {
    "get_name": address(get_name),
    "nbytes": address(nbytes),
    "tensor_get": address(tensor_get),
}


def make(name: str = "l_out-9", capacity: int = 100) -> native.TensorTap:
    return native.TensorTap(name, capacity, **ADDRESSES)


def callback(tap: native.TensorTap) -> Callback:
    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    return kind(tap.callback)


def ask(tap: native.TensorTap, about: Tensor) -> bool:
    return callback(tap)(ctypes.addressof(about), True, tap.user_data)


def show(tap: native.TensorTap, shown: Tensor) -> bool:
    return callback(tap)(ctypes.addressof(shown), False, tap.user_data)


def room(n: int = 100) -> NDArray[np.float32]:
    return np.full(n, np.nan, np.float32)


def test_only_the_named_tensor_is_asked_for() -> None:
    tap = make("l_out-9")
    tap.arm(room())
    wanted = {
        name: ask(tap, tensor(name, [1.0]))
        for name in ("l_out-9", "l_out-90", "l_out-", "", "l_out-9 (view)", "L_OUT-9")
    }
    assert [name for name, yes in wanted.items() if yes] == ["l_out-9"]


def test_pieces_are_appended() -> None:
    tap, out = make(), room()
    tap.arm(out)
    for values in ([1.0, 2.0], [3.0], []):
        assert ask(tap, tensor("l_out-9", values))
        assert show(tap, tensor("l_out-9", values))
    assert tap.collect() == 3
    assert out[:3].tolist() == [1, 2, 3]
    assert np.isnan(out[3:]).all()


def test_the_floats_are_copied_bit_for_bit() -> None:
    bits = np.arange(0x7FC00000, 0x7FC00040, dtype=np.uint32)  # NaNs with payloads
    tap, out = make(), room(64)
    tap.arm(out)
    show(tap, tensor("l_out-9", bits.tobytes()))
    assert tap.collect() == 64
    assert (out.view(np.uint32) == bits).all()


def test_another_tensor_is_let_through_untouched() -> None:
    tap, out = make(), room()
    tap.arm(out)
    assert show(tap, tensor("ffn_out-3", [5.0]))
    assert tap.collect() == 0
    assert np.isnan(out).all()


def test_a_tap_that_is_not_armed_asks_for_nothing_and_stops_nothing() -> None:
    tap = make()
    for _ in range(2):
        assert not ask(tap, tensor("l_out-9", [1.0]))
        assert show(tap, tensor("l_out-9", [1.0]))
        with pytest.raises(ValueError, match="not armed"):
            tap.collect()
        tap.arm(room())
        assert tap.collect() == 0


def test_null_pointers_are_survived() -> None:
    tap = make()
    tap.arm(room())
    call, some = callback(tap), tensor("l_out-9", [1.0])
    for pointer, user_data in ((None, tap.user_data), (ctypes.addressof(some), None)):
        assert not call(pointer, True, user_data)
        assert call(pointer, False, user_data)
    assert not ask(tap, Tensor(None, None, 0))
    assert tap.collect() == 0


@pytest.mark.parametrize("data", [[1.0] * 4, b"seven b", b"x" * 4001])
def test_what_does_not_fit_is_told_and_nothing_is_written_past_the_end(
    data: list[float] | bytes,
) -> None:
    tap, whole = make(), room(100)
    tap.arm(whole[:3])
    assert show(tap, tensor("l_out-9", data))
    assert tap.collect() == -1
    assert np.isnan(whole).all()
    tap.arm(whole)
    show(tap, tensor("l_out-9", [2.0]))
    assert tap.collect() == 1


def test_arming_again_starts_anew() -> None:
    tap, first, second = make(), room(), room()
    tap.arm(first)
    show(tap, tensor("l_out-9", [1.0]))
    tap.arm(second)
    show(tap, tensor("l_out-9", [2.0]))
    assert tap.collect() == 1
    assert (first[0], second[0]) == (1, 2)


def test_a_matrix_may_be_armed() -> None:
    tap, out = make(), np.zeros((2, 3), np.float32)
    tap.arm(out)
    show(tap, tensor("l_out-9", [1.0, 2, 3, 4, 5, 6]))
    assert tap.collect() == 6
    assert out.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_armed_array_is_kept_alive() -> None:
    tap = make()
    tap.arm(room(10))
    gc.collect()
    show(tap, tensor("l_out-9", [1.0]))
    assert tap.collect() == 1


def test_the_armed_array_cannot_be_resized() -> None:
    tap, out = make(), room(10)
    tap.arm(out)
    with pytest.raises(ValueError, match="resize"):
        out.resize(1000)
    tap.collect()


def test_two_taps_do_not_meet() -> None:
    taps = [make("l_out-1"), make("l_out-2")]
    outs = [room(), room()]
    for tap, out in zip(taps, outs, strict=True):
        tap.arm(out)
    for tap in taps:
        show(tap, tensor("l_out-1", [1.0]))
        show(tap, tensor("l_out-2", [2.0]))
    assert [tap.collect() for tap in taps] == [1, 1]
    assert [out[0] for out in outs] == [1, 2]


def test_another_thread_may_arm_while_a_graph_runs() -> None:
    tap, shown = make(), tensor("l_out-9", [1.0])
    stop = threading.Event()

    def graph() -> None:
        while not stop.is_set():
            ask(tap, shown)
            show(tap, shown)

    thread = threading.Thread(target=graph)
    thread.start()
    try:
        for _ in range(200):
            tap.arm(room())
            assert -1 <= tap.collect() <= 100
    finally:
        stop.set()
        thread.join()


GOOD: dict[str, Any] = {"name": "l_out-9", "capacity": 10, **ADDRESSES}


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("name", "", ValueError, "name has 0 bytes"),
        ("name", "n" * 64, ValueError, "name has 64 bytes; a tensor's name has 1 to 63"),
        ("name", "a\0b", ValueError, "zero byte"),
        ("name", b"l_out", TypeError, "name"),
        ("capacity", 0, ValueError, "capacity is 0"),
        ("capacity", -1, ValueError, "capacity must lie between"),
        ("get_name", 0, ValueError, "get_name is 0"),
        ("nbytes", -1, ValueError, "nbytes must lie between"),
        ("tensor_get", 2**64, ValueError, "tensor_get must lie between"),
        ("tensor_get", None, TypeError, "tensor_get must be an integer"),
    ],
)
def test_bad_taps_are_refused(name: str, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        native.TensorTap(**{**GOOD, name: value})


def test_bad_arrays_are_refused() -> None:
    tap = make(capacity=10)
    read_only = np.zeros(4, np.float32)
    read_only.flags.writeable = False
    cases: list[tuple[Any, type[Exception], str]] = [
        (np.zeros(4), TypeError, "out must be a NumPy array of float32, not .*float64"),
        ([1.0], TypeError, "not list"),
        (np.zeros(0, np.float32), ValueError, "out holds 0 floats; this tap takes 1 to 10"),
        (np.zeros(11, np.float32), ValueError, "out holds 11 floats"),
        (np.zeros(8, np.float32)[::2], ValueError, "contiguous"),
        (np.zeros((3, 3), np.float32).T, ValueError, "contiguous"),
        (np.zeros(17, np.uint8)[1:].view(np.float32), ValueError, "aligned"),
        (read_only, ValueError, "writable"),
    ]
    for out, error, words in cases:
        with pytest.raises(error, match=words):
            tap.arm(out)
    with pytest.raises(ValueError, match="not armed"):
        tap.collect()
