"""One model over formats: the same arrays, the same identity, and clear errors for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from importlib import util
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import trio
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    NotFound,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Slice
from pyagent_node.inference.formats import convert as converting
from pyagent_node.inference.formats import safetensors_out
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.formats.hf_config import Llama3, llama3_factors, read_config
from pyagent_node.inference.formats.identity import identify, manifest_path, read_identity
from pyagent_node.inference.formats.names import to_halves, to_pairs
from pyagent_node.inference.formats.weights import (
    embedding_weights,
    head_weights,
    layer_weights,
    open_weights,
)
from pyagent_node.inference.models.pull import pull
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.models.store import ModelStore


def _tiny() -> ModuleType:
    path = Path(__file__).parent.parent / "models" / "tiny_models.py"
    spec = util.spec_from_file_location("tiny_models_of_formats", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_model: Callable[..., Path] = _tiny().tiny_model


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_the_same_model(tmp_path: Path, arch: str, *, tied: bool) -> None:
    source = tiny_model(tmp_path / "m.gguf", arch=arch, tied=tied, tokens=True)
    done: list[tuple[int, int]] = []
    made = convert(
        source, tmp_path / "st", to="safetensors", report=lambda *pair: done.append(pair)
    )
    back = convert(tmp_path / "st", tmp_path / "back.gguf", to="gguf")
    again = convert(tmp_path / "back.gguf", tmp_path / "again", to="safetensors")
    assert made.weights == back.weights == again.weights
    assert made.tokenizer == back.tokenizer == again.tokenizer != ""
    assert done[-1][0] == done[-1][1] > 0
    paths = (source, tmp_path / "st", tmp_path / "back.gguf", tmp_path / "again")
    identities = []
    for path in paths:
        with closing(open_weights(path)) as weights:
            identities.append(identify(weights))
    assert all(identity == identities[0] for identity in identities)
    for path in paths[1:]:
        assert read_identity(manifest_path(path)) == identities[0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("st", "again"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not list(tmp_path.glob(".*"))


def test_a_slice_has_the_arrays_of_the_whole(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.gguf", tied=False)
    write_slice(source, Slice(1, 3, False), tmp_path / "middle.gguf")
    write_slice(source, Slice(3, 4, True), tmp_path / "tail.gguf")
    with closing(open_weights(source)) as whole:
        for name, layers in (("middle.gguf", (1, 2)), ("tail.gguf", (3,))):
            with closing(open_weights(tmp_path / name)) as part:
                for layer in layers:
                    mine, theirs = (layer_weights(w, layer, np.float32) for w in (part, whole))
                    assert mine.keys() == theirs.keys()
                    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
                with pytest.raises(InvalidRequest) as error:
                    layer_weights(part, 0, np.float32)
                assert error.value.code == "wrong_slice"
        with closing(open_weights(tmp_path / "tail.gguf")) as tail:
            for mine, theirs in zip(
                head_weights(tail, np.float16), head_weights(whole, np.float16), strict=True
            ):
                assert np.array_equal(mine, theirs)
        assert embedding_weights(whole, np.float16).dtype == np.float16
    with pytest.raises(InvalidRequest) as error:
        convert(tmp_path / "tail.gguf", tmp_path / "x", to="safetensors")
    assert error.value.code == "wrong_slice"


def test_another_weight_is_another_model(tmp_path: Path) -> None:
    one = convert(tiny_model(tmp_path / "a.gguf", tokens=True), tmp_path / "a", to="safetensors")
    two = convert(
        tiny_model(tmp_path / "b.gguf", tokens=True, seed=2), tmp_path / "b", to="safetensors"
    )
    assert one.weights != two.weights
    assert one.config == two.config
    assert one.tokenizer == two.tokenizer
    found = read_identity(tmp_path / "a" / "identity.json").differs(
        read_identity(tmp_path / "b" / "identity.json")
    )
    assert "blk.0.attn_q.weight" in found
    assert "config" not in found


def test_pairs_and_halves_are_inverse() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    assert to_pairs(rows, 6)[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert np.array_equal(to_halves(to_pairs(rows, 6), 6), rows)
    assert np.array_equal(to_pairs(rows[:, 0], 6), to_pairs(rows, 6)[:, 0])


def test_several_files_and_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model(tmp_path / "m.gguf", tokens=True)
    small = safetensors_out.write_safetensors
    monkeypatch.setattr(
        converting,
        "write_safetensors",
        lambda *args: small(*args, file_bytes=200_000),
    )
    convert(source, tmp_path / "st", to="safetensors")
    files = sorted(path.name for path in (tmp_path / "st").glob("*.safetensors"))
    assert len(files) > 2
    with closing(open_weights(source)) as one, closing(open_weights(tmp_path / "st")) as two:
        assert identify(one).weights == identify(two).weights
    folder = tmp_path / "bf16"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "st" / "config.json").read_bytes())
    _write_bf16(
        folder / "model.safetensors",
        {k: v for name in files for k, v in load_file(tmp_path / "st" / name).items()},
    )
    with closing(open_weights(source)) as one, closing(open_weights(folder)) as two:
        mine, theirs = (w.tensor("blk.1.attn_k.weight", np.float32) for w in (one, two))
    assert np.allclose(mine, theirs, rtol=2**-7, atol=1e-6)
    assert np.any(mine != theirs)


def _write_bf16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, object] = {}
    data = b""
    for name, values in tensors.items():
        raw = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.gguf", tokens=True)
    with pytest.raises(Conflict) as conflict:
        convert(source, source, to="gguf")
    assert conflict.value.code == "file_exists"
    with pytest.raises(NotFound):
        convert(tmp_path / "none", tmp_path / "x", to="gguf")
    plain = tiny_model(tmp_path / "plain.gguf")
    with pytest.raises(Unsupported) as unsupported:
        convert(plain, tmp_path / "x.gguf", to="gguf")
    assert unsupported.value.code == "no_vocabulary"
    given = convert(plain, tmp_path / "y.gguf", to="gguf", tokenizer=source)
    assert given.tokenizer
    other = tiny_model(tmp_path / "phi.gguf", arch="phi3", tokens=True)
    with pytest.raises(Unsupported) as unsupported:
        convert(other, tmp_path / "x", to="safetensors")
    assert unsupported.value.code == "unsupported_architecture"
    data = bytearray(source.read_bytes())
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptData):
        convert(tmp_path / "cut.gguf", tmp_path / "x", to="safetensors")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_model(tmp_path / "m.gguf", tokens=True)

    def half(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    for name, to in (("x", "safetensors"), ("x.gguf", "gguf")):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / name, to=to, report=half)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_numbers_that_f16_cannot_hold_are_named(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.gguf", kind=GGMLQuantizationType.F32, tokens=True)
    convert(source, tmp_path / "st", to="safetensors", type="f32")
    path = tmp_path / "st" / "model.safetensors"
    tensors = load_file(path)
    for value in (1e6, np.nan):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
        save_file(tensors, path)
        with pytest.raises(CorruptData) as error:
            convert(tmp_path / "st", tmp_path / "x.gguf", to="gguf")
        assert error.value.code == "not_finite"
        assert "blk.0.ffn_up.weight" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("model_type", "gemma", "unsupported_architecture"),
        ("hidden_act", "gelu", "unsupported_architecture"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "unsupported_architecture"),
        ("num_attention_heads", 0, "config_malformed"),
        ("num_key_value_heads", 3, "config_malformed"),
        ("hidden_size", -1, "config_malformed"),
        ("rms_norm_eps", "big", "config_malformed"),
        ("vocab_size", 2**40, "config_malformed"),
    ],
)
def test_hostile_settings_are_named(tmp_path: Path, field: str, value: object, code: str) -> None:
    convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    path = tmp_path / "st" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises((CorruptData, Unsupported)) as error:
        open_weights(tmp_path / "st")
    assert error.value.code == code


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"{}", b"\x02" + b"\0" * 7 + b"{}"])
def test_hostile_safetensors_are_named(tmp_path: Path, data: bytes) -> None:
    convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    (tmp_path / "st" / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptData) as error:
        convert(tmp_path / "st", tmp_path / "x.gguf", to="gguf")
    assert error.value.code in ("safetensors_malformed", "tensor_malformed")


def test_an_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    index = {"weight_map": {"lm_head.weight": "../m.gguf"}}
    (tmp_path / "st" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptData) as error:
        open_weights(tmp_path / "st")
    assert error.value.code == "safetensors_malformed"


def test_the_scaling_of_llama_3_survives(tmp_path: Path) -> None:
    factors = llama3_factors(Llama3(32.0, 1.0, 4.0, 8192), 10_000.0, 32)
    assert factors[0] == 1.0
    assert factors[-1] > 1.0

    def settings(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    source = tiny_model(tmp_path / "m.gguf", tokens=True, settings=settings)
    convert(source, tmp_path / "st", to="safetensors")
    raw = msgspec.json.decode((tmp_path / "st" / "config.json").read_bytes())
    assert raw["rope_scaling"]["factor"] == 32.0
    assert read_config((tmp_path / "st" / "config.json").read_bytes(), name="x").rope_factors == (
        factors
    )
    made = convert(tmp_path / "st", tmp_path / "back.gguf", to="gguf")
    with closing(open_weights(tmp_path / "back.gguf")) as weights:
        assert weights.config.rope_factors == factors
        assert identify(weights).weights == made.weights


async def test_a_folder_that_is_pulled_becomes_a_gguf_file(tmp_path: Path) -> None:
    made = convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    store = ModelStore(tmp_path / "store")
    found = await pull(store, f"file:{tmp_path / 'st'}")
    assert found.name == "st-f16"
    assert found.path is not None
    with closing(open_weights(found.path)) as weights:
        assert identify(weights).weights == made.weights
    assert (await pull(store, f"file:{tmp_path / 'st'}")).digest == found.digest
    assert (await pull(store, f"file:{tmp_path / 'st'}", name="mine")).name == "mine"
    assert not [path for path in store.layout.downloads().iterdir() if path.suffix != ".lock"]


async def test_pulling_a_folder_checks_room_says_how_far_it_is_and_ends_when_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    store, source = ModelStore(tmp_path / "store"), f"file:{tmp_path / 'st'}"
    downloads = store.layout.downloads()
    told: list[tuple[int, int | None]] = []
    places: list[str] = []

    def progress(done: int, total: int | None) -> None:
        told.append((done, total))
        places.extend(path.name for path in downloads.iterdir() if path.is_dir())
        scope.cancel()

    with trio.CancelScope() as scope:
        await pull(store, source, progress=progress)
    assert scope.cancelled_caught
    assert len(told) == 1  # at the next tensor it saw that nobody waits any more
    assert places[0].startswith("copy.")  # so a later start of the store finds it
    assert not [path for path in downloads.iterdir() if path.suffix != ".lock"]
    total = told[0][1]
    asked: list[int] = []

    def no_room(nbytes: int) -> None:
        asked.append(nbytes)
        raise Unavailable("The disk is full.", code="disk_full")

    monkeypatch.setattr(store.layout, "check_room", no_room)
    with pytest.raises(Unavailable):
        await pull(store, source)
    assert asked == [total]
    assert not [path for path in downloads.iterdir() if path.suffix != ".lock"]
    assert not store.list()


async def test_a_folder_without_what_a_model_takes_says_what_to_do(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"config\.json"):
        await pull(store, f"file:{tmp_path / 'empty'}")
    convert(tiny_model(tmp_path / "m.gguf", tokens=True), tmp_path / "st", to="safetensors")
    (tmp_path / "st" / "tokenizer.gguf").unlink()
    with pytest.raises(Unsupported) as error:
        await pull(store, f"file:{tmp_path / 'st'}")
    assert error.value.code == "no_vocabulary"
    assert f"model convert {tmp_path / 'st'}" in str(error.value.remedy)
    assert not store.list()
