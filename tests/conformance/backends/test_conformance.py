"""One suite for all backends: what the ``Backend`` port says, on the same weights in f16.

llama.cpp is the reference for numbers; each backend is its own for bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    Unsupported,
)
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    KV_ROWS,
    CopySequence,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    ResetSequences,
    ShiftSequence,
    StepInput,
    TrimSequence,
)
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.runner import RunnerSpec, open_slice_runner

from . import kit
from .kit import GREEDY, LOADERS, N_CTX, Loaded, begin, generate, loaded, prompt, step, tokens_of

WHOLE = Slice(0, 4, True)
FRONT, BACK = Slice(0, 2, False), Slice(2, 4, True)
KL_BOUND = 1e-3
"""Greatest divergence of a next-token distribution from llama.cpp's in f16, in nats."""
PERPLEXITY_BOUND = 1e-3

TEXT = (
    "The river Rhine rises in the Alps, passes Lake Constance and Basel, and reaches the North"
    " Sea near Rotterdam after more than twelve hundred kilometres."
)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random model in f16, of each architecture."""
    folder = tmp_path_factory.mktemp("tiny")
    made: Path = kit.tiny_models().tiny_model(folder / "q8.gguf", arch=request.param, tokens=True)
    convert(made, folder / "f16.gguf", to="gguf")
    return folder / "f16.gguf"


@pytest.fixture(scope="module")
def parts(tiny: Path) -> dict[Slice, Path]:
    """Return the files of its two halves."""
    files = {part: tiny.parent / f"{part}.gguf" for part in (FRONT, BACK)}
    for part, path in files.items():
        write_slice(tiny, part, path)
    return files


@pytest.fixture(scope="module", params=kit.params())
def one(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Loaded]:
    """Return the whole model in each backend."""
    with loaded(request.param, tiny, WHOLE) as backend:
        yield backend


@pytest.fixture
def backend(one: Loaded) -> Loaded:
    one.apply(ResetSequences())
    return one


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[Loaded]:
    with loaded("llama.cpp", tiny, WHOLE) as backend:
        yield backend


@pytest.fixture
def reference(llama: Loaded) -> Loaded:
    llama.apply(ResetSequences())
    return llama


def test_it_says_what_it_is(backend: Loaded) -> None:
    info = backend.info
    assert info.backend in LOADERS
    assert info.exactness.startswith(f"{info.backend}/{info.version}/{info.device}")
    assert info.slice == WHOLE
    assert 1 in info.batch_invariant_widths
    assert info.kv_portable
    assert info.kv_codec == KV_ROWS
    assert info.kv_shape is not None


def test_the_next_token_is_distributed_as_in_llama_cpp(backend: Loaded, reference: Loaded) -> None:
    """Over four texts: on 60 tokens of a random model rounding alone moves perplexity by 0.1%."""
    ratios: list[float] = []
    for seed in range(4):
        text = prompt(60, seed=seed)
        ours, theirs = kit.logits(backend, text), kit.logits(reference, text)
        assert kit.divergence(theirs, ours) < KL_BOUND
        ratios.append(kit.perplexity(ours, text) / kit.perplexity(theirs, text))
    assert abs(np.exp(np.mean(np.log(ratios))) - 1) < PERPLEXITY_BOUND


# ---- sequence operations -----------------------------------------------------------------------


def test_what_was_trimmed_can_be_fed_again(backend: Loaded) -> None:
    text = prompt(20)
    token = begin(backend, 0, text)
    first = generate(backend, 0, 20, token, 6)
    backend.apply(TrimSequence(0, 20))
    assert generate(backend, 0, 20, token, 6) == first
    with pytest.raises(InvalidRequest):
        backend.apply(TrimSequence(0, -1))


def test_a_freed_sequence_leaves_nothing_behind(backend: Loaded) -> None:
    token = begin(backend, 1, prompt(20))
    expected = generate(backend, 1, 20, token, 4)
    begin(backend, 0, prompt(33, seed=1))
    backend.apply(FreeSequence(0))
    assert begin(backend, 0, prompt(20)) == token
    assert generate(backend, 0, 20, token, 4) == expected


def test_a_copy_goes_on_as_the_original(backend: Loaded) -> None:
    token = begin(backend, 0, prompt(20))
    backend.apply(OpenSequence(2, GREEDY))
    backend.apply(CopySequence(2, 0, 0, 20))
    assert generate(backend, 2, 20, token, 5) == generate(backend, 0, 20, token, 5)
    with pytest.raises(InvalidRequest):
        backend.apply(CopySequence(2, 0, 0, 99))


def test_shifted_cells_are_those_that_were_computed_there(backend: Loaded) -> None:
    """Moved by -8, the cells of tokens 8.. are nearly those of the same tokens from 0 on.

    In the first layer they are, but for the rounding of keys: nothing before them was attended to.
    """
    text = prompt(24)
    begin(backend, 0, text)
    backend.apply(TrimSequence(0, 24))
    backend.apply(OpenSequence(1, GREEDY))
    backend.apply(CopySequence(1, 0, 8, 24))
    backend.apply(ShiftSequence(1, 8, 24, -8))
    begin(backend, 2, text[8:])
    moved, fresh = backend.export_kv(1, 0, 16).layers[0], backend.export_kv(2, 0, 16).layers[0]
    np.testing.assert_allclose(_half(moved.keys), _half(fresh.keys), atol=0.02)
    np.testing.assert_allclose(_half(moved.values), _half(fresh.values), atol=0.01)
    assert step(backend, 1, 16, text[:1]).sampled  # and it can go on
    with pytest.raises(InvalidRequest):
        backend.apply(ShiftSequence(1, 0, 16, -1))


def _half(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.frombuffer(data, "<f2").astype(np.float32)


def test_cells_out_of_order_are_attended_by_position(backend: Loaded) -> None:
    """A sequence put together of two pieces, the later one first, goes on as the straight one."""
    text = prompt(24)
    token = begin(backend, 0, text)
    expected = generate(backend, 0, 24, token, 3)
    backend.apply(TrimSequence(0, 24))
    backend.apply(OpenSequence(1, GREEDY))
    backend.apply(CopySequence(1, 0, 0, 12))
    backend.apply(ShiftSequence(1, 0, 12, 40))
    backend.apply(ShiftSequence(1, 40, 52, -40))
    backend.apply(CopySequence(1, 0, 12, 24))
    assert generate(backend, 1, 24, token, 3) == expected


def test_refused_steps_change_nothing(backend: Loaded) -> None:
    token = begin(backend, 0, prompt(20))
    expected = generate(backend, 0, 20, token, 3)
    backend.apply(TrimSequence(0, 20))
    for bad in (
        StepInput(0, 5, tokens_of(1), None, True),
        StepInput(0, 20, tokens_of(-1), None, True),
        StepInput(0, 20, np.zeros(0, np.int32), None, True),
        StepInput(3, 0, tokens_of(1), None, True),
        StepInput(0, 20, prompt(N_CTX), None, True),
    ):
        with pytest.raises(PyAgentError):
            backend.decode([bad])
    assert generate(backend, 0, 20, token, 3) == expected


def test_a_full_sequence_says_so(backend: Loaded) -> None:
    begin(backend, 0, prompt(N_CTX))
    with pytest.raises(LimitExceeded) as caught:
        step(backend, 0, N_CTX, tokens_of(5))
    assert caught.value.code == "kv_full"


# ---- batches -----------------------------------------------------------------------------------


def test_company_changes_no_bit(backend: Loaded) -> None:
    alone: list[list[tuple[int, float | None]]] = []
    texts = [prompt(10 + 7 * i, seed=i) for i in range(kit.N_SEQ)]
    for seq, text in enumerate(texts):
        token, at = begin(backend, seq, text), len(text)
        alone.append([])
        for _ in range(6):
            (sampled,) = step(backend, seq, at, tokens_of(token)).sampled
            alone[-1].append((sampled.token, sampled.logprob))
            token, at = sampled.token, at + 1
    backend.apply(ResetSequences())
    last = [begin(backend, seq, text) for seq, text in enumerate(texts)]
    for round_ in range(6):
        steps = [
            StepInput(seq, len(text) + round_, tokens_of(last[seq]), None, True)
            for seq, text in enumerate(texts)
        ]
        for seq, output in enumerate(backend.decode(steps)):
            (sampled,) = output.sampled
            assert (sampled.token, sampled.logprob) == alone[seq][round_]
            last[seq] = sampled.token


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_tokens_fed_in_any_width_give_the_same_bits(backend: Loaded, width: int) -> None:
    text, more = prompt(20), prompt(16, seed=3)
    seen = []
    for n in (1, width):
        begin(backend, 0, text)
        for at in range(0, len(more), n):
            output = step(backend, 0, 20 + at, more[at : at + n])
        seen.append(output.sampled[0])
        backend.apply(FreeSequence(0))
    assert seen[0] == seen[1]


def test_guesses_and_trees_change_no_token(backend: Loaded) -> None:
    token = begin(backend, 0, prompt(20))
    plain = generate(backend, 0, 20, token, 6)
    backend.apply(TrimSequence(0, 20))
    wrong = (plain[3] + 1) % 300
    output = step(backend, 0, 20, tokens_of(*plain[:3], wrong), drafts=3)
    assert [s.token for s in output.sampled] == plain[1:4]
    assert generate(backend, 0, 23, plain[3], 2) == plain[3:6]
    backend.apply(TrimSequence(0, 20))
    tree = tokens_of(plain[0], (plain[1] + 1) % 300, plain[1], plain[2])
    output = step(backend, 0, 20, tree, drafts=3, parents=(0, 0, 2))
    assert [s.token for s in output.sampled] == plain[1:4]
    assert generate(backend, 0, 23, plain[3], 2) == plain[3:6]


# ---- KV ----------------------------------------------------------------------------------------


def test_cells_come_back_to_the_bit(backend: Loaded) -> None:
    text = prompt(30)
    token = begin(backend, 0, text)
    kv = backend.export_kv(0, 0, 30)
    assert [layer.layer for layer in kv.layers] == [0, 1, 2, 3]
    backend.apply(OpenSequence(1, GREEDY))
    backend.import_kv(1, KvRange(kv.codec, 0, 16, _cut(kv, 0, 16)), text[:16])
    backend.import_kv(1, KvRange(kv.codec, 16, 30, _cut(kv, 16, 30)), text[16:])
    assert backend.export_kv(1, 0, 30) == kv
    assert step(backend, 1, 30, tokens_of(token)) == step(backend, 0, 30, tokens_of(token))


def _cut(kv: KvRange, start: int, stop: int) -> tuple[LayerKv, ...]:
    row = len(kv.layers[0].keys) // (kv.stop - kv.start)
    span = slice(start * row, stop * row)
    return tuple(LayerKv(x.layer, x.keys[span], x.values[span]) for x in kv.layers)


@pytest.mark.parametrize("there", [True, False], ids=["to-llama.cpp", "from-llama.cpp"])
def test_cells_of_one_backend_serve_another(
    backend: Loaded, reference: Loaded, *, there: bool
) -> None:
    """Cells differ in the last bits of f16, and so do the logits behind them."""
    giver, taker = (backend, reference) if there else (reference, backend)
    text = prompt(40)
    token = begin(giver, 0, text)
    kv = giver.export_kv(0, 0, 40)
    taker.apply(OpenSequence(1, GREEDY))
    taker.import_kv(1, kv, text)
    begin(taker, 2, text)
    own = taker.export_kv(2, 0, 40)
    for theirs, ours in zip(kv.layers, own.layers, strict=True):
        for a, b in ((theirs.keys, ours.keys), (theirs.values, ours.values)):
            scale = np.abs(_half(b)).max()
            np.testing.assert_allclose(_half(a), _half(b), atol=0.01 * scale)
    borrowed = step(taker, 1, 40, tokens_of(token)).sampled[0]
    computed = step(taker, 2, 40, tokens_of(token)).sampled[0]
    assert borrowed.token == computed.token
    assert borrowed.logprob == pytest.approx(computed.logprob, abs=0.05)


def test_foreign_and_broken_cells_are_refused(backend: Loaded) -> None:
    text = prompt(8)
    begin(backend, 0, text)
    kv = backend.export_kv(0, 0, 8)
    backend.apply(OpenSequence(1, GREEDY))
    nan = np.full(len(kv.layers[0].keys) // 2, np.nan, "<f2").tobytes()
    broken: list[tuple[KvRange, type[PyAgentError]]] = [
        (KvRange("rows/0/f64", 0, 8, kv.layers), Unsupported),
        (KvRange(kv.codec, 0, 8, kv.layers[:-1]), CorruptData),
        (KvRange(kv.codec, 0, 8, (LayerKv(0, b"", b""), *kv.layers[1:])), CorruptData),
        (KvRange(kv.codec, 0, 8, (LayerKv(0, nan, nan), *kv.layers[1:])), CorruptData),
        (KvRange(kv.codec, 8, 0, kv.layers), PyAgentError),
    ]
    for bad, error in broken:
        with pytest.raises(error):
            backend.import_kv(1, bad, text)
    backend.import_kv(1, kv, text)


# ---- slices, and several backends in one pipeline -----------------------------------------------


@pytest.mark.parametrize("front", kit.params())
@pytest.mark.parametrize("back", kit.params())
def test_two_halves_are_the_whole(
    front: str, back: str, tiny: Path, parts: dict[Slice, Path]
) -> None:
    """To the bit on one backend; over two the distribution is that of either."""
    text = prompt(40)
    with (
        loaded(front, parts[FRONT], FRONT) as a,
        loaded(back, parts[BACK], BACK) as b,
        EmbeddingTable(tiny) as table,
    ):
        a.apply(OpenSequence(0))
        b.apply(OpenSequence(0, GREEDY))
        rows = table.rows(text)
        middle = step(a, 0, 0, text, rows).activations
        assert middle is not None
        assert middle.dtype == np.float32
        (sampled,) = step(b, 0, 0, text, middle).sampled
        with loaded(back, tiny, WHOLE) as whole:
            whole.apply(OpenSequence(0, GREEDY))
            (expected,) = step(whole, 0, 0, text).sampled
    if front == back:
        assert sampled == expected
    else:
        assert sampled.token == expected.token
        assert sampled.logprob == pytest.approx(expected.logprob, abs=0.02)


@pytest.mark.parametrize("name", kit.params())
def test_a_slice_computes_every_path_of_a_tree(
    name: str, tiny: Path, parts: dict[Slice, Path]
) -> None:
    text = prompt(12)
    with loaded(name, parts[FRONT], FRONT) as backend, EmbeddingTable(tiny) as table:
        for seq in (0, 1):
            backend.apply(OpenSequence(seq))
            step(backend, seq, 0, text, table.rows(text))
        tree = tokens_of(5, 6, 7, 8)  # 6 and 7 follow 5, 8 follows 7
        got = step(backend, 0, 12, tree, table.rows(tree), drafts=3, parents=(0, 0, 2)).activations
        assert got is not None
        chain = tokens_of(5, 7, 8)
        alone = step(backend, 1, 12, chain, table.rows(chain)).activations
        assert alone is not None
        assert np.array_equal(got[[0, 2, 3]], alone)
        # behind it are the cells of the principal path: 5, 6
        assert len(backend.export_kv(0, 0, 14).layers) == 2


# ---- processes, memory -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", kit.params())
async def test_a_cancelled_prompt_leaves_a_runner_in_order(name: str, tiny: Path) -> None:
    text = prompt(100)
    async with open_slice_runner(RunnerSpec(str(tiny), WHOLE, N_CTX, 2, 1, backend=name)) as runner:
        assert runner.info.backend == name
        await runner.apply([OpenSequence(0, GREEDY)])
        whole = StepInput(0, 0, text, None, True)
        with trio.move_on_after(0) as scope:
            await runner.decode([whole])
        assert scope.cancelled_caught
        await runner.apply([TrimSequence(0, 0)])
        (first,) = await runner.decode([whole])
        await runner.apply([FreeSequence(0), OpenSequence(0, GREEDY)])
        assert await runner.decode([whole]) == [first]


@pytest.mark.parametrize("name", kit.params())
def test_a_model_that_does_not_fit_is_not_loaded(name: str, tiny: Path) -> None:
    with pytest.raises(LimitExceeded) as caught:
        LOADERS[name]()(tiny, WHOLE, n_ctx=256, n_seq=64, threads=1, available=lambda *_: 1 << 20)
    assert caught.value.code == "not_enough_memory"
    assert caught.value.remedy


@pytest.mark.parametrize("name", kit.params())
@pytest.mark.parametrize(("n_ctx", "n_seq"), [(0, 1), (257, 1), (16, 0), (16, 65)])
def test_numbers_out_of_range_are_refused(name: str, tiny: Path, n_ctx: int, n_seq: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LOADERS[name]()(tiny, WHOLE, n_ctx=n_ctx, n_seq=n_seq, threads=1)
    assert caught.value.code == "bad_parameter"


# ---- the real model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "f16.gguf"
    convert(bundled_model, path, to="gguf")
    return path


@pytest.fixture(scope="module")
def text(bundled_model: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    from pyagent_node.inference.llama.tokenizer import LlamaTokenizer

    tokenizer = LlamaTokenizer(bundled_model)
    return tokenizer.tokenize(TEXT.encode(), add_special=True, parse_special=False)


@pytest.fixture(scope="module")
def expected(real: Path, text: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> object:
    with loaded("llama.cpp", real, Slice(0, 30, True), n_ctx=64, n_seq=1) as backend:
        return kit.logits(backend, text)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", kit.params("mlx", "torch"))
def test_the_bundled_model_is_the_same_in_f16(
    name: str,
    real: Path,
    text: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    expected: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> None:
    with loaded(name, real, Slice(0, 30, True), n_ctx=64, n_seq=1) as backend:
        found = kit.logits(backend, text)
    ratio = kit.perplexity(found, text) / kit.perplexity(expected, text)
    kl = kit.divergence(expected, found)
    print(
        f"{name}: perplexity x {ratio:.6f}, KL {kl:.2e}, max {np.abs(found - expected).max():.3f}"
    )
    assert abs(ratio - 1) < PERPLEXITY_BOUND
    assert kl < KL_BOUND
