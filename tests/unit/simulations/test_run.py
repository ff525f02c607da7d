"""A run of the simulator: what its story says of the time that healing took."""

from __future__ import annotations

import pytest

from pyagent_node.simulations import run
from pyagent_node.simulations.faults import Schedule
from pyagent_node.simulations.run import Run


@pytest.mark.slow
def test_the_story_tells_what_the_last_question_had_to_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a question that was asked late looks like one that is answered slowly."""
    pretended = [[("bounded", f"{tasks} tasks still run")] for tasks in (533, 531)]
    look = run._wrong
    monkeypatch.setattr(run, "_wrong", lambda *of: pretended.pop(0) if pretended else look(*of))
    played = Run(1, Schedule(3, 1.0, ()))

    assert played.play().violations == ()

    phases = [event for event in played.story if event.kind == "phase"]
    assert [event.detail for event in phases[:2]] == ["faults begin", "everything is mended"]
    assert phases[2].detail.startswith("everything is whole, which waited last for ")
    assert phases[2].time >= phases[1].time + 2  # both were looked at again a second later
