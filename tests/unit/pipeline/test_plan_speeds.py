"""Which backend a node computes with and how fast: measured before estimated."""

from __future__ import annotations

import math

import msgspec
import pytest

from pyagent_node.base.types import PeerId
from pyagent_node.inference.backend_names import BackendState, Choice
from pyagent_node.inference.machine import DeviceMemory, MeasuredSpeed, SpeedSource
from pyagent_node.inference.pipeline.plan_speeds import (
    ACCELERATION,
    UNBOUND,
    Ability,
    abilities,
    faster_backend,
    measured,
    resolved,
)
from pyagent_node.inference.pipeline.plan_types import NodeFacts

LLAMA = Choice("llama.cpp", "the fastest on a processor")
STATES = (
    BackendState("llama.cpp", "0.3", "cpu"),
    BackendState("torch", "2.9", "cpu"),
    BackendState("mlx", "", "cpu"),
)


def speed(
    decode: float,
    source: SpeedSource = "loading",
    *,
    backend: str = "llama.cpp",
    threads: int = 4,
    prefill: float = 0.0,
    head: float = 0.0,
) -> MeasuredSpeed:
    return MeasuredSpeed(backend, threads, decode, prefill, source, None, head)


def node(name: str, *speeds: MeasuredSpeed, **kwargs: object) -> NodeFacts:
    made = NodeFacts(PeerId(name), name, 1000, 4, 40.0, 400.0, (), STATES, speeds=speeds)
    return msgspec.structs.replace(made, **kwargs)


def test_what_sessions_show_counts_before_loading_and_other_models() -> None:
    told = node("a", speed(9, "others"), speed(6, "loading"), speed(4, "sessions"))
    assert measured(told, "llama.cpp") == speed(4, "sessions")
    assert measured(told, "torch") is None
    several = node("a", speed(3), speed(5, prefill=70), speed(40))
    assert measured(several, "llama.cpp") == speed(5, prefill=70)


@pytest.mark.parametrize("figure", [0.0, -1.0, math.nan, math.inf, 1e30])
def test_figures_that_no_machine_has_do_not_count(figure: float) -> None:
    told = node("a", speed(figure), speed(5, prefill=figure if figure else -1.0))
    assert measured(told, "llama.cpp") is None
    assert measured(node("a", speed(5, threads=3)), "llama.cpp") is None


def test_an_estimate_is_scaled_by_what_others_reach() -> None:
    fast = node("a", speed(8, prefill=100, head=16))
    able = abilities([fast, node("b")], lambda _: LLAMA)
    one, other = able[PeerId("a")], able[PeerId("b")]
    assert (one.source, one.bandwidth, one.head, one.compute) == ("loading", 8, 16, 100)
    assert (other.source, other.bandwidth, other.head, other.compute) == ("estimate", 8, 16, 100)
    alone = abilities([node("b")], lambda _: LLAMA)[PeerId("b")]
    assert (alone.bandwidth, alone.compute, alone.bound) == (40, 400, True)


def test_a_gpu_that_nobody_measured_is_taken_to_be_faster() -> None:
    states = (BackendState("torch", "2.9", "cuda"),)
    memories = (DeviceMemory("ram", 9000, 5000), DeviceMemory("vram", 800, 700))
    pc = node("pc", backends=states, memories=memories)
    ability = abilities([pc], lambda _: Choice("torch", ""))[PeerId("pc")]
    assert ability.bandwidth == 40 * ACCELERATION["cuda"]
    assert ability.memory == memories[1]
    plain = abilities([pc], lambda _: LLAMA)[PeerId("pc")]
    assert plain.memory == DeviceMemory("ram", 9000, 1000)


def test_the_planner_sees_the_resolved_figures() -> None:
    told = node("a", speed(8, prefill=100, head=16))
    able = abilities([told], lambda _: LLAMA)
    seen = resolved([told], able)[0]
    assert (seen.bandwidth, seen.head_bandwidth, seen.prompt_compute) == (8, 16, 100)
    assert seen.compute == UNBOUND
    assert seen.usable
    assert isinstance(able[PeerId("a")], Ability)
    broken = node("x", bandwidth=math.nan)
    assert resolved([broken], abilities([broken], lambda _: LLAMA)) == [broken]


def test_another_backend_is_used_only_when_it_was_measured_clearly_faster() -> None:
    def choose(llama: float, torch: float, source: SpeedSource = "sessions") -> Choice:
        told = node("a", speed(llama, source), speed(torch, source, backend="torch"))
        return faster_backend(told, LLAMA)

    assert choose(10, 12) == LLAMA
    assert choose(10, 20).name == "torch"
    assert choose(10, 20).why == "measured 2.0 times as fast as llama.cpp"
    assert choose(10, 20, "others") == LLAMA
    assert faster_backend(node("a", speed(90, backend="torch")), LLAMA) == LLAMA
    absent = node("a", speed(1), speed(90, backend="mlx"), speed(90, backend="nonsense"))
    assert faster_backend(absent, LLAMA) == LLAMA
