"""Activations cross in f32, f16 or bf16: rounding, what does not fit, classes of answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, LimitExceeded, Unsupported
from pyagent_node.base.types import ACTIVATIONS, SessionId
from pyagent_node.inference.backend import StepOutput
from pyagent_node.inference.backend_names import MAX_CLASS, rooted
from pyagent_node.inference.pipeline.activations import (
    check_fits,
    crossed,
    number_bytes,
    pack_rows,
    unpack_rows,
)
from pyagent_node.inference.pipeline.frames import (
    OpenSession,
    StageError,
    Step,
    pack_tail,
    unpack_tail,
)
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.sampling import SamplingParams

from .stage_driver import BEFORE, HEAD, N_EMBD, spec

Rows = NDArray[np.float32]


def stage(kind: str, rank: int = 1) -> StageSpec:
    """Return a stage whose activations cross in ``kind``."""
    plain = spec(rank)
    return type(plain)(
        **{name: getattr(plain, name) for name in plain.__struct_fields__ if name != "activations"},
        activations=kind,
    )


def nearest_bf16(number: float) -> float:
    """Round by the definition: the nearer of two neighbours, the even one between both."""
    bits = int(np.float32(number).view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    up = rest > 0x8000 or (rest == 0x8000 and low & 1)
    return float(np.uint32((low + up) << 16).view(np.float32))


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=6, max_size=6),
    st.sampled_from(ACTIVATIONS),
)
def test_rows_come_back_rounded_once(numbers: list[float], kind: str) -> None:
    rows = np.array(numbers, dtype=np.float32).reshape(3, 2)
    check_fits(rows, kind)
    data = bytes(pack_rows(rows, kind))
    assert len(data) == rows.size * number_bytes(kind)
    back = unpack_rows(data, 3, 2, kind)
    assert back.dtype == np.float32
    wanted = {
        "f32": rows,
        "f16": rows.astype(np.float16).astype(np.float32),
        "bf16": np.array([nearest_bf16(x) for x in numbers], np.float32).reshape(3, 2),
    }[kind]
    assert np.array_equal(back, wanted)
    assert bytes(pack_rows(back, kind)) == data


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_each_row_is_rounded_for_itself(kind: str) -> None:
    rows = np.random.default_rng(5).standard_normal((7, 5)).astype(np.float32)
    whole = unpack_rows(bytes(pack_rows(rows, kind)), 7, 5, kind)
    single = [unpack_rows(bytes(pack_rows(row[None], kind)), 1, 5, kind) for row in rows]
    assert np.array_equal(whole, np.concatenate(single))


@pytest.mark.parametrize(
    ("kind", "most", "beyond"),
    [("f16", 65519.0, 65520.0), ("bf16", 3.3895e38, 3.4e38)],
)
def test_what_does_not_fit_is_an_error(kind: str, most: float, beyond: float) -> None:
    fits = np.array([[most, -most]], np.float32)
    check_fits(fits, kind)
    assert np.isfinite(unpack_rows(bytes(pack_rows(fits, kind)), 1, 2, kind)).all()
    for bad in (beyond, -beyond, np.inf, -np.inf, np.nan):
        rows = np.array([[1.0, bad]], np.float32)
        with pytest.raises(LimitExceeded) as caught:
            check_fits(rows, kind)
        assert caught.value.code == "activation_overflow"
        check_fits(rows, "f32")
    check_fits(np.empty((0, 2), np.float32), kind)


def test_tails_say_their_size_by_their_kind() -> None:
    tokens = np.array([5, 7], np.int32)
    rows = np.array([[0.5, 2.0], [-1.0, 0.25]], np.float32)
    for kind in ACTIVATIONS:
        tail = pack_tail(tokens, rows, kind)
        assert len(tail) == 2 * (4 + 2 * number_bytes(kind))
        ids, back = unpack_tail(tail, 2, 2, kind)
        assert back is not None
        assert ids.tolist() == [5, 7]
        assert np.array_equal(back, rows)
        assert unpack_tail(pack_tail(tokens, None, kind), 2, 2, kind)[1] is None
        for cut in (tail[:-1], tail + b"\0", b""):
            with pytest.raises(CorruptData):
                unpack_tail(cut, 2, 2, kind)
    with pytest.raises(CorruptData, match="activations in f16"):
        unpack_tail(pack_tail(tokens, rows), 2, 2, "f16")
    for call in (lambda: pack_tail(tokens, rows, "f8"), lambda: unpack_tail(b"", 1, 2, "f8")):
        with pytest.raises(Unsupported, match="f8"):
            call()


def test_classes_name_the_places_where_a_session_crosses() -> None:
    assert crossed(("llama.cpp/1/cpu",), "f32", 10) == ("llama.cpp/1/cpu",)
    first = crossed((), "f16", 0)
    assert first == ("activations/f16/0",)
    second = crossed((*first, "llama.cpp/1/cpu"), "f16", 10)
    assert second == ("activations/f16/0,10", "llama.cpp/1/cpu")
    root = bytes(32)
    assert len({rooted(root, each) for each in (("llama.cpp/1/cpu",), first, second)}) == 3
    long: tuple[str, ...] = ()
    seen = set()
    for layer in range(0, 400, 5):
        long = crossed(long, "bf16", layer)
        (name,) = long
        assert len(name) <= MAX_CLASS
        assert name.startswith("activations/bf16/")
        seen.add(name)
    assert len(seen) == 80


def opened(kind: str) -> tuple[StageCore, OpenSession]:
    """Return a stage with a session, and what it passed on."""
    core = StageCore(stage(kind), exactness="toy/1")
    message = OpenSession(
        SessionId("s"),
        core.spec.model,
        core.spec.epoch,
        1,
        HEAD,
        8,
        4,
        SamplingParams(),
        classes=() if kind == "f32" else (f"activations/{kind}/0",),
    )
    (sent,) = core.receive(BEFORE, message, b"", 0.0)
    assert isinstance(sent.message, OpenSession)
    return core, sent.message


def step(core: StageCore, tail: bytes) -> list[StageError]:
    """Send a step of four tokens and return the errors."""
    message = Step(SessionId("s"), core.spec.model, core.spec.epoch, 1, 0, 0, 4, False)
    sent = core.receive(BEFORE, message, tail, 0.0)
    return [out.message for out in sent if isinstance(out.message, StageError)]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_stage_takes_and_gives_rows_in_its_kind(kind: str) -> None:
    core, onward = opened(kind)
    assert onward.classes == (
        ("toy/1",) if kind == "f32" else (f"activations/{kind}/0,10", "toy/1")
    )
    tokens, rows = np.arange(4, dtype=np.int32), np.full((4, N_EMBD), 0.1, np.float32)
    assert not step(core, pack_tail(tokens, rows, kind))
    batch = core.next_batch()
    assert batch is not None
    ((_, queued),) = batch.work
    assert queued.activations is not None
    assert np.allclose(queued.activations, 0.1, rtol=2**-8)
    (out,) = core.completed(batch, [StepOutput(rows * 3)], 0.1, 1.0)
    assert bytes(out.tail) == pack_tail(tokens, rows * 3, kind)


def test_a_stage_names_an_overflow_and_goes_on_serving() -> None:
    core, _ = opened("f16")
    tokens, rows = np.arange(4, dtype=np.int32), np.ones((4, N_EMBD), np.float32)
    assert not step(core, pack_tail(tokens, rows, "f16"))
    batch = core.next_batch()
    assert batch is not None
    (out,) = core.completed(batch, [StepOutput(rows * 1e6)], 0.1, 1.0)
    assert isinstance(out.message, StageError)
    assert out.message.error.code == "activation_overflow"
    assert "--activations bf16 or f32" in (out.message.error.remedy or "")
    assert core.view().sessions == 0


def test_rows_of_another_kind_end_the_session_by_name() -> None:
    core, _ = opened("f16")
    tokens, rows = np.arange(4, dtype=np.int32), np.ones((4, N_EMBD), np.float32)
    (error,) = step(core, pack_tail(tokens, rows))
    assert error.error.code == "malformed_step"
