"""What is torch's own in its backend; the port is held to by ``tests/conformance/backends``.

Torch is imported in the tests alone: elsewhere it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.errors import Conflict, InvalidRequest, LimitExceeded, Unavailable
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import OpenSequence, StepInput
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.sampling import SamplingParams

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(util.find_spec("torch") is None, reason="torch is not installed"),
]

WHOLE = Slice(0, 4, True)
GREEDY = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=4)
PROMPT = np.arange(20, 60, dtype=np.int32)


def _tiny() -> Callable[..., Path]:
    path = Path(__file__).parent.parent / "models" / "tiny_models.py"
    spec = util.spec_from_file_location("tiny_models_of_torch", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[..., Path] = module.tiny_model
    return made


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small model as ``q8.gguf``, ``f16.gguf`` and ``st``."""
    folder = tmp_path_factory.mktemp("torch")
    _tiny()(folder / "q8.gguf", arch=request.param, tokens=True, tied=False)
    convert(folder / "q8.gguf", folder / "st", to="safetensors")
    convert(folder / "st", folder / "f16.gguf", to="gguf")
    return folder


def _scores(path: Path, **more: str) -> tuple[np.ndarray, str]:
    from pyagent_node.inference.torch_backend.backend import TorchBackend

    backend = TorchBackend(path, WHOLE, n_ctx=128, n_seq=2, threads=1, **more)
    with closing(backend):
        assert backend.info.batch_invariant
        return backend.score(PROMPT), backend.info.exactness


def test_every_format_computes_the_same_bits(model: Path) -> None:
    scores = [_scores(model / name)[0] for name in ("q8.gguf", "f16.gguf", "st")]
    assert np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[1], scores[2])


def test_types_of_matrices_differ_in_rounding_and_class(model: Path) -> None:
    (one, mine), (two, other) = (_scores(model / "st", dtype=kind) for kind in ("f16", "f32"))
    assert mine != other
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(one, two, atol=0.05 * np.abs(two).max())


def test_a_slice_of_a_folder_reads_its_own_layers(model: Path, tmp_path: Path) -> None:
    """The layers of the front are not finite in a copy: only who reads them can tell."""
    from safetensors.numpy import load_file, save_file

    from pyagent_node.inference.torch_backend.backend import TorchBackend

    (tmp_path / "config.json").write_bytes((model / "st" / "config.json").read_bytes())
    tensors = load_file(model / "st" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    rows = np.random.default_rng(1).standard_normal((40, 128)).astype(np.float32)
    got = []
    for folder in (model / "st", tmp_path):
        back = TorchBackend(folder, Slice(1, 4, True), n_ctx=128, n_seq=2, threads=1)
        with closing(back):
            back.apply(OpenSequence(0, GREEDY))
            got.append(back.decode([StepInput(0, 0, PROMPT, rows, True)]))
    assert got[0] == got[1]


def test_score_needs_a_whole_model_and_a_free_slot(model: Path) -> None:
    from pyagent_node.inference.torch_backend.backend import TorchBackend

    whole = TorchBackend(model / "st", WHOLE, n_ctx=64, n_seq=1, threads=1)
    with closing(whole):
        whole.apply(OpenSequence(0, GREEDY))
        with pytest.raises(Conflict):
            whole.score(PROMPT)
    part = TorchBackend(model / "st", Slice(0, 2, False), n_ctx=64, n_seq=1, threads=1)
    with closing(part), pytest.raises(InvalidRequest):
        part.score(PROMPT)


def test_other_slices_than_the_file_has_are_refused(model: Path) -> None:
    from pyagent_node.inference.torch_backend.backend import TorchBackend

    for part in (Slice(0, 5, False), Slice(2, 2, False), Slice(0, 3, True)):
        with pytest.raises(InvalidRequest) as error:
            TorchBackend(model / "f16.gguf", part, n_ctx=64, n_seq=1, threads=1)
        assert error.value.code == "wrong_slice"


@pytest.mark.parametrize(("device", "dtype"), [("tpu", None), ("", "f64"), (None, "bf16")])
def test_devices_and_types_that_are_not_there_are_refused(
    device: str | None, dtype: str | None
) -> None:
    from pyagent_node.inference.torch_backend.devices import choose_device

    with pytest.raises(InvalidRequest) as error:
        choose_device(device, dtype)
    assert error.value.code == "bad_parameter"


def test_errors_of_torch_become_errors_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pyagent_node.inference.torch_backend.devices import torch_errors

    for full in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ):
        with pytest.raises(LimitExceeded) as error, torch_errors("to compute"):
            raise full
        assert error.value.code == "not_enough_memory"
        assert error.value.remedy
    with pytest.raises(Unavailable) as other, torch_errors("to compute"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")
    assert other.value.code == "decode_failed"
    with pytest.raises(InvalidRequest), torch_errors("to compute"):
        raise InvalidRequest("ours", code="bad_step")


def test_a_call_that_runs_out_of_memory_leaves_the_sequence(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from pyagent_node.inference.torch_backend import context
    from pyagent_node.inference.torch_backend.backend import TorchBackend

    backend = TorchBackend(model / "f16.gguf", WHOLE, n_ctx=128, n_seq=2, threads=1)
    with closing(backend):
        backend.apply(OpenSequence(0, GREEDY))
        backend.decode([StepInput(0, 0, PROMPT, None, True)])
        step = StepInput(0, len(PROMPT), PROMPT[:1], None, True)

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with monkeypatch.context() as patch:
            patch.setattr(context, "feed_forward", full)
            with pytest.raises(LimitExceeded):
                backend.decode([step])
        kept = backend.export_kv(0, 0, len(PROMPT))
        (again,) = backend.decode([step])
        backend.apply(OpenSequence(1, GREEDY))
        backend.import_kv(1, kept, PROMPT)
        (other,) = backend.decode([StepInput(1, len(PROMPT), PROMPT[:1], None, True)])
        assert again == other
