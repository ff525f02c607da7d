"""Following a time line: what is due is done and said, in order; what was not due is not."""

from __future__ import annotations

import threading

import pytest

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.simulations.lab.play import Follower
from pyagent_node.simulations.lab.timeline import Act, Cut, Timeline

A, B = frozenset("a"), frozenset("b")


def test_what_is_due_is_said_and_done_in_order() -> None:
    acts = (Act(0.0, "b", "kill"), Act(0.01, "b", "start"), Act(3600.0, "c", "kill"))
    timeline = Timeline(cuts=(Cut(0.0, 0.005, A, B, True),), acts=acts)
    done: list[Act] = []
    said: list[str] = []
    second = threading.Event()

    def act(what: Act) -> None:
        done.append(what)
        if len(done) == 2:
            second.set()

    with Follower(timeline, act, said.append):
        assert second.wait(10)
    assert done == list(acts[:2])
    assert [line.split("s  ")[1] for line in said] == [
        "a -x-> b",
        "b is killed",
        "a ---> b",
        "b starts again",
    ]


def failing(tried: threading.Event) -> Follower:
    def act(_: Act) -> None:
        tried.set()
        raise Unavailable("It does not start.", code="daemon_not_started")

    return Follower(Timeline(acts=(Act(0.0, "b", "start"),)), act, lambda _: None)


def test_an_act_that_fails_ends_the_run() -> None:
    tried = threading.Event()
    with pytest.raises(PyAgentError, match="does not start"), failing(tried):
        assert tried.wait(10)


def test_an_error_of_the_answer_comes_first() -> None:
    tried = threading.Event()

    def interrupted() -> None:
        with failing(tried):
            assert tried.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
