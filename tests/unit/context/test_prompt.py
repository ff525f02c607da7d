"""How prompts with chunks are laid out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.kv.chunks import check_pieces
from pyagent_node.node.context_prompt import (
    INSTRUCTIONS,
    MAX_PASSAGE,
    PASSAGES,
    Frame,
    asked_text,
    frame_of,
    lay_out,
    piece_text,
    plain_text,
    probed,
    question_of,
    room_for,
    with_instructions,
)

USER = ChatMessage("user", "why?")


def test_the_template_is_what_two_renderings_have_in_common() -> None:
    assert frame_of([1, 2, 7, 8, 3], [1, 2, 9, 3]) == Frame((1, 2), (3,))
    assert frame_of([1, 2, 7, 7, 3], [1, 2, 7, 3]) == Frame((1, 2, 7), (3,))
    assert frame_of([1, 2, 3], [1, 2, 3]) is None
    assert frame_of([1, 2], [3, 4]) is None
    assert frame_of([1, 2, 3], [1, 2, 4]) is None
    assert frame_of([], [1]) is None


@given(
    before=st.integers(1, 9),
    after=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 300), max_size=80),
    question=st.integers(1, 20),
    room=st.integers(0, 3000),
    exact=st.booleans(),
)
def test_every_prompt_is_whole_and_its_pieces_are_the_chunks(
    before: int, after: int, sizes: list[int], question: int, room: int, exact: bool
) -> None:
    frame = Frame((1,) * before, (2,) * after)
    pieces = [[100 + rank] * size for rank, size in enumerate(sizes)]
    laid = lay_out(frame, (3,), pieces, (4,) * question, room, exact=exact)
    chosen = [pieces[rank] for rank in reversed(laid.chunks)]
    middle = [token for piece in chosen for token in piece]
    assert laid.tokens == (*frame.before, 3, *middle, *(4,) * question, *frame.after)
    assert not laid.chunks or len(laid.tokens) <= room
    assert list(laid.chunks) == sorted(laid.chunks)
    if laid.join is None:
        assert exact or all(len(piece) <= 16 for piece in chosen)
        return
    check_pieces(laid.join.pieces, laid.join.skip, len(laid.tokens))
    for piece in laid.join.pieces:
        part = laid.tokens[piece.start : piece.stop]
        assert list(part) in chosen


def test_a_chunk_is_the_same_text_everywhere_and_its_name_cannot_break_out() -> None:
    assert piece_text("a.py", 3, 9, "\n\nx = 1\n\n") == "[a.py, lines 3-9]\nx = 1\n\n"
    hostile = piece_text("a\n\x1b[31m" + "y" * 500, 1, 2, "z")
    assert hostile.count("\n") == 3
    assert "\x1b" not in hostile
    assert len(hostile) < 240


def test_the_last_message_is_the_question() -> None:
    assert question_of((ChatMessage("system", "s"), USER)) == "why?"
    for last in (
        ChatMessage("assistant", "a"),
        ChatMessage("user", " \n"),
        ChatMessage("system", ""),
    ):
        with pytest.raises(InvalidRequest):
            question_of((USER, last))


def test_instructions_are_given_where_there_are_none() -> None:
    own = (ChatMessage("system", "be kind"), USER)
    assert with_instructions(own) == own
    assert with_instructions((USER,)) == (ChatMessage("system", INSTRUCTIONS), USER)
    assert probed(own, "x") == (own[0], ChatMessage("user", "x"))


def test_an_answer_has_room() -> None:
    assert room_for(4096, None) == 3840
    assert room_for(4096, 100) == 3996
    assert room_for(100, None) == 50
    assert room_for(100, 1000) == 50


def test_the_plain_form_says_the_same() -> None:
    asked = asked_text("why?", [])
    assert asked == "Question: why?"
    assert plain_text(["one\n\n", "two\n\n"], asked) == "Sources:\n\ntwo\n\none\n\nQuestion: why?"


def test_passages_stand_before_the_question_the_best_last() -> None:
    text = asked_text("why?", ["the  best\n one", "", "x" * 999])
    lines = text.splitlines()
    assert lines[0] == PASSAGES.strip()
    assert lines[1] == "- " + "x" * MAX_PASSAGE
    assert lines[2:] == ["- the best one", "", "Question: why?"]
