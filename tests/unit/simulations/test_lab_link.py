"""One direction of a link: order, rate, the bound of the queue, the share of losses."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.simulations.lab.link import Link, LinkSpec

Traffic = list[tuple[int, float]]


class Never:
    """Draws what is never under a loss of less than one."""

    def random(self) -> float:
        return 1.0 - 1e-12


specs = st.builds(
    LinkSpec,
    delay=st.floats(0.02, 0.5),
    jitter=st.floats(0, 0.02),
    loss=st.floats(0, 1),
    rate=st.none() | st.floats(1e4, 1e9),
    queue=st.integers(2048, 1 << 20),
)
traffics = st.lists(st.tuples(st.integers(20, 1500), st.floats(0, 0.05)), max_size=200)
"""Packets: size, and seconds after the one before."""


def play(link: Link, traffic: Traffic) -> list[tuple[int, float, float | str]]:
    now, seen = 0.0, []
    for size, pause in traffic:
        now += pause
        seen.append((size, now, link.send(size, now)))
    return seen


@given(specs, traffics, st.integers(0, 99))
def test_packets_arrive_in_order_and_never_too_early(
    spec: LinkSpec, traffic: Traffic, seed: int
) -> None:
    seen = play(Link(spec, random.Random(seed)), traffic)
    arrived = [(now, at) for _, now, at in seen if not isinstance(at, str)]
    assert all(at >= now + spec.delay - spec.jitter - 1e-9 for now, at in arrived)
    assert all(one <= other for (_, one), (_, other) in pairwise(arrived))


@given(specs, traffics, st.integers(0, 99))
def test_the_same_seed_gives_the_same_arrivals(spec: LinkSpec, traffic: Traffic, seed: int) -> None:
    one, other = (play(Link(spec, random.Random(seed)), traffic) for _ in range(2))
    assert one == other


@given(st.floats(1e5, 1e8), st.integers(4096, 1 << 18), traffics)
def test_no_stretch_of_time_carries_more_than_rate_and_burst(
    rate: float, queue: int, traffic: Traffic
) -> None:
    spec = LinkSpec(rate=rate, queue=queue)
    seen = play(Link(spec, Never()), traffic)
    sent = [(size, at) for size, _, at in seen if not isinstance(at, str)]
    for i in range(0, len(sent), 7):
        size = 0
        for packet, at in sent[i:]:
            size += packet
            assert size <= spec.burst + 1500 + (at - sent[i][1]) * rate / 8 + 1


@given(st.floats(1e4, 1e7), st.integers(2048, 1 << 16), traffics)
def test_nothing_waits_longer_than_the_queue_is_deep(
    rate: float, queue: int, traffic: Traffic
) -> None:
    link = Link(LinkSpec(rate=rate, queue=queue), Never())
    for _, now, at in play(link, traffic):
        if not isinstance(at, str):
            assert at - now <= queue * 8 / rate + 1e-6
        else:
            assert at == "queue"


def test_a_packet_that_does_not_fit_is_dropped_and_costs_no_tokens() -> None:
    spec = LinkSpec(rate=8e6, queue=3000, burst=1000)  # a byte a microsecond
    link = Link(spec, Never())
    assert link.send(1000, 0.0) == 0.0
    assert link.send(1500, 0.0) == pytest.approx(0.0015)
    assert link.send(1500, 0.0) == pytest.approx(0.003)
    assert link.send(1, 0.0) == "queue"
    assert link.queued(0.001) == pytest.approx(2000)
    assert link.send(1000, 0.001) == pytest.approx(0.004)


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.5, 1.0])
def test_the_share_of_losses_is_the_one_that_was_asked_for(loss: float) -> None:
    link = Link(LinkSpec(loss=loss), random.Random(5))
    lost = sum(link.send(100, 0.0) == "lost" for _ in range(20_000))
    assert lost / 20_000 == pytest.approx(loss, abs=0.005)


def test_a_slower_link_takes_what_waits_with_it() -> None:
    link = Link(LinkSpec(rate=8e6, queue=10_000, burst=1000), Never())
    assert link.send(1000, 0.0) == 0.0
    assert link.send(2000, 0.0) == pytest.approx(0.002)
    link.change(LinkSpec(rate=8e5, queue=10_000, burst=1000, delay=0.1), 0.001)
    assert link.queued(0.001) == pytest.approx(1000)
    assert link.send(1000, 0.001) == pytest.approx(0.001 + 0.02 + 0.1)


def test_a_link_without_a_rate_has_no_queue() -> None:
    link = Link(LinkSpec(rate=8e3, queue=4096, burst=1), Never())
    link.send(4000, 0.0)
    link.change(LinkSpec(), 0.0)
    assert (link.queued(0.0), link.send(10**6, 5.0)) == (0.0, 5.0)
