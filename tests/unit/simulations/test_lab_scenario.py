"""Scenario files: what they mean, and what is said about wrong ones."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import ConfigError, NotFound, Unsupported
from pyagent_node.simulations.lab.ground import shape_of
from pyagent_node.simulations.lab.library import open_scenario, shipped
from pyagent_node.simulations.lab.scenario import MAX_FILE, Scenario, parse_scenario
from pyagent_node.simulations.lab.timeline import moments

PLAIN = """
name = "plain"
[[site]]
name = "a"
[[site]]
name = "b"
hosts = 2
[wan]
rtt = "60ms"
jitter = "3ms"
loss = "1%"
rate = "50mbit"
queue = "512KiB"
"""


def wrong(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(text)
    assert caught.value.code == "bad_scenario"
    assert caught.value.remedy
    return caught.value.message


def with_events(*events: str) -> Scenario:
    return parse_scenario(PLAIN + "".join(f"[[event]]\n{event}\n" for event in events))


def test_sites_become_hosts_and_links_have_two_directions_of_half_the_round_trip() -> None:
    scenario = parse_scenario(PLAIN)
    assert [host.name for host in scenario.hosts] == ["a", "b-1", "b-2"]
    link = scenario.between(scenario.hosts[0], scenario.hosts[2])
    assert (link.delay, link.jitter, link.loss) == (0.03, 0.003, 0.01)
    assert (link.rate, link.queue) == (50e6, 512 * 1024)
    lan = scenario.between(scenario.hosts[1], scenario.hosts[2])
    assert (lan.delay, lan.loss, lan.rate) == (0, 0, None)
    assert (scenario.asked, scenario.rank_count) == ("a", 3)
    assert scenario.holders == ("a", "b-1", "b-2")


def test_a_link_of_its_own_says_only_what_differs() -> None:
    scenario = parse_scenario(PLAIN + '[[link]]\nbetween = ["b", "a"]\nloss = "5%"\n')
    link = scenario.links[frozenset("ab")]
    assert (link.loss, link.delay) == (0.05, 0.03)


def test_a_partition_ends_by_itself_or_by_the_next_healing() -> None:
    scenario = with_events(
        'do = "partition"\nat = "1s"\nsides = [["a"], ["b"]]',
        'do = "partition"\nat = "2s"\nlasts = "500ms"\nsides = [["b-1"], ["b-2"]]\none_way = true',
        'do = "heal"\nat = "4s"',
        'do = "partition"\nat = "5s"\nsides = [["a"], ["b-1"]]',
    )
    cuts = scenario.timeline.cuts
    assert [(cut.start, cut.end) for cut in cuts] == [(1, 4), (2, 2.5), (5, math.inf)]
    assert cuts[0].severs("a", "b-2")
    assert cuts[0].severs("b-2", "a")
    assert not cuts[0].severs("b-1", "b-2")
    assert cuts[1].severs("b-1", "b-2")
    assert not cuts[1].severs("b-2", "b-1")


def test_of_two_worse_links_at_once_the_later_counts_and_then_it_is_as_before() -> None:
    scenario = with_events(
        'do = "degrade"\nat = "1s"\nlasts = "5s"\nbetween = ["a", "b"]\nloss = "20%"',
        'do = "degrade"\nat = "3s"\nlasts = "1s"\nbetween = ["b", "a"]\nrtt = "300ms"',
    )
    changes = [(c.at, c.spec and (c.spec.loss, c.spec.delay)) for c in scenario.timeline.changes]
    assert changes == [(1, (0.2, 0.03)), (3, (0.01, 0.15)), (4, None)]


def test_moments_are_told_in_the_order_of_time() -> None:
    scenario = with_events(
        'do = "start"\nat = "9s"\nhost = "b-1"',
        'do = "kill"\nat = "2s"\nhost = "b-1"',
        'do = "degrade"\nat = "3s"\nlasts = "1s"\nbetween = ["b", "b"]\nrate = "1mbit"',
        'do = "partition"\nat = "5s"\nlasts = "1min"\nsides = [["a"], ["b-2"]]',
    )
    assert [(moment.at, moment.text) for moment in moments(scenario.timeline)] == [
        (2, "b-1 is killed"),
        (3, "b: 0 ms, 1 Mbit/s"),
        (4, "b: as at the beginning"),
        (5, "a -x- b-2"),
        (9, "b-1 starts again"),
        (65, "a --- b-2"),
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("x = [", "end of document"),
        ("[wan]\n", "wan"),
        ('[lan]\nrtt = "fast"', "lan: 'fast' is no time"),
        ('[lan]\nrtt = "10ms"\njitter = "6ms"', "jitter is more than half"),
        ('[lan]\nloss = "101%"', "loss is '101%'"),
        ('[lan]\nloss = "1"', "write it as 1%"),
        ('[lan]\nrate = "1bit"', "no rate"),
        ('[lan]\nqueue = "4KiB"', "queue means nothing without rate"),
        ('[lan]\nrate = "1mbit"\nqueue = "1B"', "2KiB to 16MiB"),
        ("[lan]\nrtt = 5", "lan.rtt"),
        ("[lan]\nspeed = 5", "speed"),
        ('[[site]]\nname = "A b"', "site[2].name"),
        ('[[site]]\nname = "a"', "'a' is the name of two places"),
        ('[[site]]\nname = "b-1"', "'b-1' is the name of two places"),
        ('[[site]]\nname = "c"\nhosts = 14', "17 hosts"),
        ('[[link]]\nbetween = ["a", "z"]', "name sites"),
        ('[[link]]\nbetween = ["a", "b"]\n[[link]]\nbetween = ["b", "a"]', "described before"),
        ('[[event]]\ndo = "flood"\nat = "1s"', "flood"),
        ('[[event]]\ndo = "heal"\nat = "soon"', "event[0].at is 'soon'"),
        ('[[event]]\ndo = "heal"\nat = "61min"', "up to 60min"),
        ('[[event]]\ndo = "heal"', "at"),
        ('[[event]]\ndo = "partition"\nat = "1s"\nsides = [["a"], []]', "empty side"),
        ('[[event]]\ndo = "partition"\nat = "1s"\nsides = [["a"], ["z"]]', "'z'"),
        ('[[event]]\ndo = "partition"\nat = "1s"\nsides = [["b"], ["b-1"]]', "both sides"),
        (
            '[[event]]\ndo = "partition"\nat = "1s"\nlasts = "0s"\nsides = [["a"], ["b"]]',
            "lasts is nothing",
        ),
        ('[[event]]\ndo = "degrade"\nat = "1s"\nbetween = ["a", "b-1"]', "is no site"),
        ('[[event]]\ndo = "kill"\nat = "1s"\nhost = "b"', "is no host"),
        ('[[event]]\ndo = "kill"\nat = "1s"\nhost = "a"', "'a' is asked"),
        ('[[event]]\ndo = "start"\nat = "1s"\nhost = "b-1"', "is running already"),
        (
            '[[event]]\ndo = "kill"\nat = "1s"\nhost = "b-1"\n'
            '[[event]]\ndo = "kill"\nat = "2s"\nhost = "b-1"',
            "is dead already",
        ),
        ("[model]\nranks = 2\nlayers = [10]", "both ranks and layers"),
        ("[model]\nlayers = [10, 10]", "must grow"),
        ("[model]\nlayers = [0]", "above 0"),
        ("[model]\nranks = 4", "more than hosts"),
        ('[model]\non = ["a", "a"]', "different hosts"),
        ("[model]\non = []", "different hosts"),
        ('[model]\nranks = 2\non = ["a"]', "more than hosts"),
        ('[answer]\nof = "b"', "answer.of is 'b'"),
        ("[answer]\ntokens = 1", "answer.tokens"),
        ('[answer]\nprompt = ""', "answer.prompt"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(more: str, said: str) -> None:
    assert said in wrong(PLAIN + more)


@pytest.mark.parametrize("text", ["", "name = 'x'", "[[site]]", "\0", "a" * (MAX_FILE + 1)])
def test_what_is_no_scenario_at_all_is_refused(text: str) -> None:
    wrong(text)


def test_one_host_makes_no_network() -> None:
    assert "allowed are 2 to 16" in wrong('name = "one"\n[[site]]\nname = "a"')


def test_too_many_events_are_refused() -> None:
    assert "65 events" in wrong(PLAIN + '[[event]]\ndo = "heal"\nat = "1s"\n' * 65)


@given(st.text(max_size=300))
def test_any_text_is_a_scenario_or_a_clear_error(text: str) -> None:
    for whole in (text, PLAIN + text):
        with contextlib.suppress(ConfigError):
            parse_scenario(whole)


@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_scenario_is_sound_and_named_as_its_file(name: str) -> None:
    _, scenario = open_scenario(name)
    assert scenario.name == name
    assert scenario.about


def test_files_are_read_and_what_is_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PLAIN)
    assert open_scenario(str(path))[1].name == "plain"
    for name in ("nothing", str(tmp_path / "none.toml"), str(tmp_path), "a/\0b"):
        with pytest.raises(NotFound) as caught:
            open_scenario(name)
        assert caught.value.code == "no_scenario"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        open_scenario(str(path))
    path.write_bytes(b"#" * (MAX_FILE + 1))
    with pytest.raises(ConfigError):
        open_scenario(str(path))


def test_a_shape_is_what_all_links_are() -> None:
    text = 'name = "s"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n'
    assert shape_of(parse_scenario(text)) == ""
    alike = parse_scenario(text + '[wan]\nrtt = "80ms"\njitter = "2.5ms"\nrate = "50mbit"\n')
    assert shape_of(alike) == "rtt=80ms,jitter=2.5ms,rate=50000kbit"
    with pytest.raises(Unsupported, match="its links differ"):
        shape_of(parse_scenario(PLAIN))
    cut = '[[event]]\ndo = "partition"\nat = "1s"\nsides = [["a"], ["b"]]\n'
    with pytest.raises(Unsupported, match="its links change"):
        shape_of(parse_scenario(text + cut))
