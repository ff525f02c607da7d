"""What a load request says about guessing, and which node drafts."""

from __future__ import annotations

import msgspec
import pytest

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Unavailable, Unsupported
from pyagent_node.base.types import Digest, Drafting, PeerId, Placement, Rank, Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.drafting.remote_messages import DraftView
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.guessing import (
    Wish,
    check_guessing,
    check_room,
    check_sizes,
    choose_drafter_node,
    describe,
    merged,
    says,
    wish_of,
)
from pyagent_node.node.placement_messages import DrafterReport
from pyagent_node.node.placement_views import drafter_view

D1, D2 = Digest("1" * 64), Digest("2" * 64)
A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
SHAPE = ModelShape("toy", (1000,) * 10, (1,) * 10, 1000, 1, 0, 1)
NEED = SHAPE.needs(Slice(0, 10, True), n_ctx=8, n_seq=1)
RANK = D2, B


def ask(**said: object) -> LoadRequest:
    return LoadRequest(model="m", **said)  # type: ignore[arg-type]


def record(n_vocab: int) -> ModelRecord:
    return ModelRecord(D1, "m", 1, "llama", 1, 1, n_vocab, 1, D1, 1)


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        (None, None),
        ("none", None),
        ("small", Wish("small", None)),
        ("small@bob", Wish("small", "bob")),
        ("a@b@bob", Wish("a@b", "bob")),
        *(("@bob", "bad_parameter"), ("small@", "bad_parameter"), ("", "bad_parameter")),
    ],
)
def test_a_drafter_is_a_model_and_maybe_a_node(text: str | None, wish: Wish | str | None) -> None:
    try:
        assert wish_of(ask(drafter=text)) == wish
    except InvalidRequest as error:
        assert error.code == wish  # noqa: PT017 - which are refused is part of the table


@pytest.mark.parametrize(
    "said",
    [
        {"speculation": "crystal ball"},
        {"speculation": ""},
        {"speculation": "other+suffix"},
        {"draft_length": 32},
        {"draft_length": -1},
        {"draft_depth": 0},
        {"draft_depth": 9},
    ],
)
def test_what_there_is_not_is_refused(said: dict[str, object]) -> None:
    assert says(ask(**said))
    with pytest.raises(InvalidRequest) as caught:
        check_guessing(ask(**said), ["small"])
    assert caught.value.facts["parameter"] in said


def test_what_there_is_passes() -> None:
    for choice in ("auto", "none", "default", "suffix", "small", "small+suffix", None):
        check_guessing(ask(speculation=choice, draft_length=31, draft_depth=8), ["small"])
    assert not says(ask(ranks=3))


@pytest.mark.parametrize(
    ("said", "before", "rank", "after"),
    [
        ({}, None, None, None),
        ({}, Drafting("auto", 3), None, Drafting("auto", 3)),
        ({"speculation": "none"}, Drafting("auto", 3, 2), None, Drafting("none")),
        ({"draft_length": 5}, Drafting("auto", 3, 2), None, Drafting("auto", 5, 2)),
        ({"speculation": "default"}, Drafting("auto", 3), None, None),
        ({"drafter": "x"}, None, RANK, Drafting("auto", None, None, *RANK)),
        ({"drafter": "x"}, Drafting("none"), RANK, Drafting("none", None, None, *RANK)),
        (
            {"drafter": "x", "speculation": "default"},
            None,
            RANK,
            Drafting(None, None, None, *RANK),
        ),
        (
            {"speculation": "x", "draft_length": 2},
            Drafting("auto", None, None, *RANK),
            None,
            Drafting("x", 2, None, *RANK),
        ),
        ({"drafter": "none"}, Drafting("auto", None, None, *RANK), None, Drafting("auto")),
        ({"drafter": "none"}, Drafting(None, None, None, *RANK), None, None),
        ({"draft_tree": True}, Drafting("auto", 3), None, Drafting("auto", 3, tree=True)),
        ({"draft_length": 5}, Drafting("x", 3, tree=True), None, Drafting("x", 5, tree=True)),
        ({"speculation": "x"}, Drafting("auto", 3, tree=True), None, Drafting("x")),
    ],
)
def test_what_is_not_said_stays(
    said: dict[str, object],
    before: Drafting | None,
    rank: tuple[Digest, PeerId] | None,
    after: Drafting | None,
) -> None:
    assert merged(ask(**said), before, rank) == after


def test_another_number_of_tokens_is_refused_at_once() -> None:
    check_sizes(record(151_936), record(151_665))
    with pytest.raises(Unsupported) as caught:
        check_sizes(record(49_152), record(151_936))
    assert caught.value.code == "vocabulary_mismatch"


def node(peer: PeerId, memory: float = 10, speed: float = 1e6) -> NodeFacts:
    return NodeFacts(peer, peer, int(memory * NEED), 1, speed, 1e12)


def chosen(nodes: list[NodeFacts], rtt: dict[tuple[PeerId, PeerId], float], **taken: int) -> str:
    return choose_drafter_node(
        SHAPE,
        nodes,
        rtt,
        head=A,
        n_ctx=8,
        n_seq=1,
        taken={PeerId(peer): count for peer, count in taken.items()},
    ).peer_id


def test_the_node_where_a_guess_comes_soonest() -> None:
    """A token takes 11 ms at 1 MB a second; four guesses share a trip."""
    near = {(A, B): 4.0, (C, A): 400.0}
    assert chosen([node(B), node(C)], near) == B
    assert chosen([node(B, speed=2e5), node(C, speed=1e9)], near) == B  # 56 ms against 100
    assert chosen([node(B, speed=1e5), node(C, speed=1e9)], near) == C
    assert chosen([node(A), node(B)], near) == A
    assert chosen([node(B), node(C)], {(A, B): 4.0}) == B  # a tie: the one that is named first
    assert chosen([node(B), node(C)], {}, B=1) == C  # as fast, and free


def test_memory_comes_first() -> None:
    assert chosen([node(B, memory=1), node(C)], {(A, C): 400.0}) == C
    assert chosen([node(B, memory=3), node(C)], {(A, C): 400.0}, B=2 * NEED) == C
    with pytest.raises(Unavailable) as caught:
        chosen([node(B, memory=1)], {})
    assert caught.value.code == "not_enough_memory"
    with pytest.raises(PyAgentError):
        chosen([], {})
    with pytest.raises(PyAgentError):
        chosen([node(B, memory=1, speed=float("nan"))], {})


def test_a_node_that_is_named_must_have_room() -> None:
    for memory, taken in ((2.0, 0), (4.0, 2 * NEED)):
        check_room(SHAPE, node(B, memory=memory), n_ctx=8, n_seq=1, taken={B: taken})
    for memory, taken in ((1.0, 0), (4.0, 3 * NEED)):
        with pytest.raises(Unavailable) as caught:
            check_room(SHAPE, node(B, memory=memory), n_ctx=8, n_seq=1, taken={B: taken})
        assert caught.value.code == "not_enough_memory"
        assert B in str(caught.value)
        assert "another node" in caught.value.remedy


def test_how_it_is_shown() -> None:
    rank = Rank(0, Slice(0, 10, True), A)
    placed = Placement(D1, 5, (rank,), 8, 1, drafting=Drafting("auto", 4, 2, *RANK))
    assert (
        describe(placed.drafting, lambda _: "small", str.lower)
        == "auto, 4 guesses a step, 2 steps in flight; small drafts on b"
    )
    assert describe(None, str, str) == "as each node is set"
    silent = drafter_view(placed, None, lambda _: "small", str.lower)
    assert silent is not None
    assert (silent.state, silent.name, silent.node) == ("unknown", "small", "b")
    report = DrafterReport(D1, 5, D2, "ready", memory_bytes=7, load=DraftView(1, 2, 3))
    view = drafter_view(placed, report, lambda _: "small", str.lower)
    assert view is not None
    assert (view.state, view.sessions, view.guesses, view.memory_bytes) == ("ready", 1, 3, 7)
    loading = msgspec.structs.replace(report, state="fetching")
    shown = drafter_view(placed, loading, lambda _: "small", str.lower)
    assert shown is not None
    assert shown.state == "loading"
    nothing = msgspec.structs.replace(placed, drafting=Drafting("auto"))
    assert drafter_view(nothing, None, str, str) is None
