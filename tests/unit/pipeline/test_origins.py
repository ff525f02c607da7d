"""Under which names a rank looks for blocks and keeps its own, and what hostile heads may say."""

from __future__ import annotations

import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import SessionId, Slice
from pyagent_node.inference.backend_names import MAX_CLASS, is_adopted
from pyagent_node.inference.pipeline.origins import (
    MAX_ORIGINS,
    Origin,
    Roots,
    Source,
    adopting,
    check_origins,
    roots,
)

LLAMA, MLX, TORCH = "llama.cpp/0.3/cpu", "mlx/0.32/cpu/f32", "torch/2.15.0+cu132/cpu/AVX512/1/f16"
ROOT = bytes(range(32))
CUTS = (0, 10, 20, 30)


def chain(
    labels: tuple[str, ...],
    cuts: tuple[int, ...] = CUTS,
    former: tuple[Origin, ...] = (),
    *,
    session: str = "w1",
    root: bytes = ROOT,
) -> list[Roots]:
    """Return what the ranks of a pipeline make of an opening that is passed on."""
    found: list[Roots] = []
    for first, last, label in zip(cuts, cuts[1:], labels, strict=False):
        found.append(
            roots(
                root,
                found[-1].classes if found else (),
                [each.origin for each in found],
                former,
                session=SessionId(session),
                part=Slice(first, last, last == cuts[-1]),
                own=label,
            )
        )
    return found


def trail(found: list[Roots]) -> tuple[Origin, ...]:
    return tuple(each.origin for each in found)


def test_where_all_is_llama_names_are_the_plain_ones() -> None:
    found = chain((LLAMA,) * 3)
    assert {each.origin.root for each in found} == {ROOT}
    assert {each.source for each in found} == {None}
    assert chain((LLAMA,), (0, 30), trail(found))[0].source is None  # cut anew
    assert {each.origin.root for each in chain(("",) * 3)} == {ROOT}


def test_names_say_at_which_layer_classes_meet() -> None:
    one, other = chain((LLAMA, MLX), (0, 10, 30)), chain((LLAMA, MLX), (0, 15, 30))
    assert one[1].classes == other[1].classes
    assert one[1].origin.root != other[1].origin.root
    finer = chain((LLAMA, MLX, MLX))
    assert finer[1].origin.root == finer[2].origin.root == one[1].origin.root


def test_a_rank_of_another_class_and_those_behind_it_adopt() -> None:
    before = chain((LLAMA, LLAMA, LLAMA))
    assert {each.origin.cut for each in before} == {64}
    after = chain((LLAMA, MLX, LLAMA), former=trail(before), session="w2")
    assert [each.origin.label for each in after] == [LLAMA, adopting(MLX), adopting(LLAMA)]
    assert [each.source for each in after] == [None, Source(ROOT, 64), Source(ROOT, 64)]
    kept = {each.origin.root for each in after}
    assert len(kept) == 3
    # nobody else's: not those of a plain pipeline like it, nor of another session
    assert kept & {each.origin.root for each in chain((LLAMA, MLX, LLAMA))} == {ROOT}
    other = chain((LLAMA, MLX, LLAMA), former=trail(before), session="w3")
    assert kept & {each.origin.root for each in other} == {ROOT}


def test_the_same_classes_adopt_nothing() -> None:
    before = chain((LLAMA, TORCH, MLX))
    assert chain((LLAMA, TORCH, MLX), former=trail(before)) == before


def test_adopted_cells_are_adopted_again() -> None:
    before = chain((LLAMA,) * 3)
    second = chain((LLAMA, MLX, LLAMA), former=trail(before), session="w2")
    third = chain((LLAMA, LLAMA, LLAMA), former=trail(second), session="w3")
    assert third[0].source is None
    for one, other in zip(third[1:], second[1:], strict=True):
        assert one.source == Source(other.origin.root, 64)
    assert [is_adopted(each.origin.label) for each in third] == [False, True, True]


def test_layers_under_two_names_are_not_asked_for() -> None:
    before = chain((LLAMA, MLX, MLX))
    (whole,) = chain((MLX,), (0, 30), trail(before))
    assert whole.source is None
    assert not is_adopted(whole.origin.label)


def test_without_a_root_there_are_no_names() -> None:
    found = chain((LLAMA, MLX, MLX), former=trail(chain((LLAMA,) * 3)), root=b"")
    assert {each.origin.root for each in found} == {b""}
    assert {each.source for each in found} == {None}


def test_a_class_of_any_length_stays_one() -> None:
    assert len(adopting("x" * MAX_CLASS)) == MAX_CLASS


@pytest.mark.parametrize(
    "origins",
    [
        (Origin(-1, LLAMA, ROOT),),
        (Origin(0, "x" * (MAX_CLASS + 1), ROOT),),
        (Origin(0, LLAMA, b"short"),),
        (Origin(0, LLAMA, ROOT, 0),),
        (Origin(0, LLAMA, ROOT, 100),),
        (Origin(0, LLAMA, ROOT),) * (MAX_ORIGINS + 1),
    ],
)
def test_what_cannot_be_is_refused(origins: tuple[Origin, ...]) -> None:
    check_origins((Origin(0, LLAMA, ROOT), Origin(4, "", b"")))
    with pytest.raises(InvalidRequest):
        check_origins(origins)
