"""Who reaches whom, and when: every packet of a scenario's hosts."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.simulations.lab.network import Network, address4, address6
from pyagent_node.simulations.lab.router import Lateness
from pyagent_node.simulations.lab.scenario import parse_scenario

TEXT = """
name = "three"
[[site]]
name = "a"
[[site]]
name = "b"
hosts = 2
[wan]
rtt = "100ms"
rate = "8mbit"
queue = "16KiB"
[lan]
rtt = "2ms"
[[event]]
do = "partition"
at = "1s"
lasts = "2s"
sides = [["a"], ["b-1"]]
one_way = true
[[event]]
do = "degrade"
at = "4s"
lasts = "1s"
between = ["a", "b"]
rtt = "600ms"
"""


class Half:
    def random(self) -> float:
        return 0.5


def network(text: str = TEXT) -> Network:
    made = Network(parse_scenario(text), make_rng=lambda _: Half())
    made.set_conditions(True)
    return made


def near(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-9)


def packet(target: int, size: int = 100, version: int = 4) -> bytes:
    if version == 4:
        head = bytes([0x45]) + bytes(15) + ip_address(address4(target)).packed
    else:
        head = bytes([0x60]) + bytes(23) + ip_address(address6(target)).packed
    return head.ljust(size, b"\0")


@pytest.mark.parametrize("version", [4, 6])
def test_packets_reach_the_host_they_are_for_after_half_the_round_trip(version: int) -> None:
    net = network()
    assert net.route(0, packet(1, version=version), 0.0) == (1, 0.05)
    assert net.route(1, packet(2, version=version), 0.0) == (2, 0.001)
    assert net.traffic[0, 1].sent == 1
    assert net.traffic[0, 1].bytes == 100


def test_a_calm_network_delivers_at_once_and_counts_nothing() -> None:
    net = network()
    net.set_conditions(False)
    assert net.route(0, packet(1), 7.0) == (1, 7.0)
    assert net.traffic[0, 1].sent == 0


def test_all_hosts_of_a_site_share_the_way_to_another() -> None:
    net = network()
    for _ in range(100):
        net.route(0, packet(1, 1500), 0.0)
    assert net.route(0, packet(2, 1500), 0.0) == "queue"
    assert net.traffic[0, 2].queue == 1
    assert net.route(1, packet(0, 1500), 0.0) == (0, 0.05), "the other direction is free"


def test_a_one_way_cut_stops_one_direction_for_its_time() -> None:
    net = network()
    net.start_timeline(10.0)
    assert net.route(0, packet(1), 10.9) == (1, near(10.95))
    assert net.route(0, packet(1), 11.0) == "cut"
    assert net.route(0, packet(2), 11.0) == (2, near(11.05))
    assert net.route(1, packet(0), 11.0) == (0, near(11.05))
    assert net.route(0, packet(1), 13.0) == (1, near(13.05))
    assert (net.traffic[0, 1].sent, net.traffic[0, 1].cut) == (3, 1)


def test_a_worse_link_lasts_its_time_and_the_time_line_can_begin_anew() -> None:
    net = network()
    for start in (0.0, 100.0):
        net.start_timeline(start)
        assert net.route(1, packet(0), start + 3.9) == (0, near(start + 3.95))
        assert net.route(1, packet(0), start + 4.1) == (0, near(start + 4.4))
        assert net.route(1, packet(0), start + 5.0) == (0, near(start + 5.05))
    net.start_timeline(200.0)
    net.route(1, packet(0), 204.5)
    net.stop_timeline(204.6)
    assert net.route(1, packet(0), 205.0) == (0, near(205.05))


def test_what_is_for_nobody_here_goes_nowhere() -> None:
    net = network()
    multicast = bytes([0x45]) + bytes(15) + bytes([224, 0, 0, 251])
    for lost in (b"", b"\x45", multicast, packet(0), packet(9), bytes([0x60]) + bytes(30)):
        assert net.route(0, lost, 0.0) == "stray"
    assert net.strays[0] == 6


@given(st.binary(max_size=80))
def test_any_bytes_are_routed_or_dropped(data: bytes) -> None:
    assert network().route(0, data, 0.0) in ("stray", (1, 0.05), (2, 0.05))


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 2), st.integers(0, 2)), max_size=60))
def test_every_packet_that_does_not_arrive_is_accounted_for(
    sends: list[tuple[float, int, int]],
) -> None:
    net = network()
    net.start_timeline(0.0)
    arrived = 0
    for now, source, target in sorted(sends):
        where = net.route(source, packet(target, 1500), now)
        arrived += not isinstance(where, str)
    counted = net.traffic.values()
    assert arrived == sum(t.sent - t.lost - t.queue - t.cut for t in counted)
    assert len(sends) == sum(t.sent for t in counted) + sum(net.strays.values())


def test_lateness_is_told_in_quantiles() -> None:
    late = Lateness()
    assert late.quantile(0.5) == 0.0
    for step in range(100):
        late.add(step / 10_000)
    assert late.quantile(0.5) == pytest.approx(4.95, abs=0.1)
    assert late.quantile(0.99) == pytest.approx(9.85, abs=0.15)
    late.add(1e9)
    assert late.quantile(1.0) == pytest.approx(100)
