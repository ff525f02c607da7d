"""The story of a failure: what is told, and what is left out."""

from __future__ import annotations

from pyagent_node.simulations.story import MAIN, named, tell
from pyagent_node.simulations.trace import Event


def test_the_nodes_that_a_violation_names() -> None:
    assert named("nodes 2 and 5 both lead term 3") == [2, 5]
    assert named("node 12 is at entry 4 of 7; node 12 again") == [12]
    assert named("requests [3] were not answered") == []


def test_no_story_where_nothing_was_broken() -> None:
    assert tell([]) == []
    assert tell([Event(1.0, None, "fault", "Crash")]) == []


def test_many_events_become_few_lines() -> None:
    events = [Event(float(i), i % 7, "applied", f"{i}..{i}") for i in range(5000)]
    events += [Event(5000.0 + i, None, "fault", f"Fault {i}") for i in range(100)]
    events += [Event(5100.0, n, "up", "life 1") for n in range(7)]
    events += [
        Event(5200.0, 4, "asker", "31: peer_lost"),
        *(Event(5201.0 + i, i % 7, "asker", "3: no_leader") for i in range(90)),
        Event(5300.0, None, "VIOLATION", "a: node 3 is odd"),
        Event(5300.0, None, "VIOLATION", "b: requests [3] were not answered"),
        Event(5300.0, 3, "state", "leader of term 9"),
        Event(5301.0, None, "fault", "too late"),
    ]
    lines = tell(events)
    text = "\n".join(lines)
    assert len(lines) < 60
    assert lines[0] == f"Before: {100 - (MAIN - 3)} faults."
    assert "life 1 (nodes 0, 1, 2, 3, 4, 5, 6)" in text
    assert "The last of node 3:" in text
    assert "4994..4994" in text
    assert "The last of request 3:" in text
    assert "3: no_leader (and 89 times more)" in text
    assert "31: peer_lost" not in text
    assert "node 3: leader of term 9" in text
    assert "too late" not in text


def test_without_a_name_the_last_events_are_told() -> None:
    events = [Event(1.0, 0, "applied", "1..4"), Event(2.0, None, "VIOLATION", "x: nobody leads")]
    assert any("1..4" in line for line in tell(events))
