"""A reply says which exactness classes served it, and KV is shared within the same ones only."""

from __future__ import annotations

import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend_names import MAX_CLASSES, joined_classes, rooted
from pyagent_node.inference.pipeline.frames import OpenSession
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_checks import check_opening
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.sampling import SamplingParams

from .stage_driver import BEFORE, HEAD, spec

LLAMA, MLX = "llama.cpp/0.3/cpu", "mlx/0.32/metal/f16"
ROOT = bytes(range(32))


def test_classes_are_gathered_from_rank_to_rank() -> None:
    assert joined_classes((), LLAMA) == (LLAMA,)
    assert joined_classes((LLAMA,), LLAMA) == (LLAMA,)
    assert joined_classes((MLX,), LLAMA) == (LLAMA, MLX) == joined_classes((LLAMA,), MLX)
    assert joined_classes((LLAMA,), "") == (LLAMA,)


def test_blocks_behind_other_classes_have_other_names() -> None:
    assert rooted(ROOT, ()) == rooted(ROOT, (LLAMA,)) == ROOT
    assert rooted(b"", (MLX,)) == b""
    names = {rooted(ROOT, classes) for classes in ((LLAMA,), (MLX,), (LLAMA, MLX))}
    assert len(names) == 3
    assert all(len(name) == len(ROOT) for name in names)


def opening(stage: StageSpec, classes: tuple[str, ...] = ()) -> OpenSession:
    return OpenSession(
        SessionId("s"),
        stage.model,
        stage.epoch,
        stage.rank,
        HEAD,
        8,
        4,
        SamplingParams(),
        classes=classes,
    )


def test_a_rank_passes_on_the_classes_with_its_own() -> None:
    stage = spec(1)
    core = StageCore(stage, exactness=MLX)
    (sent,) = core.receive(BEFORE, opening(stage, (LLAMA,)), b"", 0.0)
    assert isinstance(sent.message, OpenSession)
    assert sent.message.classes == (LLAMA, MLX)


@pytest.mark.parametrize("classes", [("",), ("x" * 65,), (LLAMA,) * (MAX_CLASSES + 1)])
def test_hostile_classes_are_refused(classes: tuple[str, ...]) -> None:
    check_opening(spec(1), opening(spec(1), (LLAMA, MLX)))
    with pytest.raises(InvalidRequest):
        check_opening(spec(1), opening(spec(1), classes))
