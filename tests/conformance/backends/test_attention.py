"""Watching and pruning on every backend: what is measured is llama.cpp's, and bits stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.errors import Conflict, InvalidRequest, LimitExceeded
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CellAttention,
    CopySequence,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    PruneSequence,
    ResetSequences,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.formats.convert import convert

from . import kit
from .kit import (
    GREEDY,
    N_CTX,
    Loaded,
    begin,
    generate,
    loaded,
    log_softmax,
    prompt,
    step,
    tokens_of,
)

WHOLE = Slice(0, 4, True)
PROMPT = prompt(70)
KEEP = ((0, 4), (20, 33), (60, 70))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random model in f16, of each architecture."""
    folder = tmp_path_factory.mktemp("tiny")
    made: Path = kit.tiny_models().tiny_model(folder / "q8.gguf", arch=request.param, tokens=True)
    convert(made, folder / "f16.gguf", to="gguf")
    return folder / "f16.gguf"


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Iterator[Loaded]:
    with loaded("llama.cpp", tiny, WHOLE) as backend:
        yield backend


@pytest.fixture(scope="module", params=kit.params())
def one(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Loaded]:
    """Return the whole model in each backend."""
    with loaded(request.param, tiny, WHOLE) as backend:
        assert backend.info.prunes
        yield backend


@pytest.fixture
def backend(one: Loaded) -> Loaded:
    one.apply(ResetSequences())
    return one


@pytest.fixture
def reference(llama: Loaded) -> Loaded:
    llama.apply(ResetSequences())
    return llama


def watched(backend: Loaded, seq: int = 0, *, every: int = 1) -> tuple[list[int], CellAttention]:
    """Feed the prompt and six tokens; return what came and where they attended."""
    backend.apply(OpenSequence(seq, GREEDY))
    backend.apply(WatchSequence(seq, every, 8))
    first = step(backend, seq, 0, PROMPT).sampled[0].token
    fed = prompt(6, seed=11)
    found = [first]
    for at, token in enumerate(fed.tolist(), start=len(PROMPT)):
        found.append(step(backend, seq, at, tokens_of(token)).sampled[0].token)
    return found, backend.attention(seq)


def test_what_is_measured_is_what_llama_cpp_measures(backend: Loaded, reference: Loaded) -> None:
    _, got = watched(backend)
    _, wanted = watched(reference)
    assert np.array_equal(got.positions, wanted.positions)
    assert np.array_equal(got.seen, wanted.seen)
    assert got.rows == wanted.rows == 8 + 6
    assert got.mass.shape == wanted.mass.shape == (4, 76)
    assert np.allclose(got.mass.sum(axis=1), got.rows, rtol=1e-4)
    # a row's weights: llama.cpp's f16 products round the queries of deep layers differently
    assert np.abs(got.mass - wanted.mass).max() < 1e-3 * got.rows
    assert np.abs(got.peak - wanted.peak).max() < 2e-3 * got.rows
    assert np.abs(got.entropy - wanted.entropy).max() < 2e-3


def test_watching_changes_no_bit(backend: Loaded) -> None:
    plain_first = begin(backend, 0, PROMPT)
    plain = generate(backend, 0, len(PROMPT), plain_first, 8)
    cells = backend.export_kv(0, 0, 78)
    backend.apply(FreeSequence(0))
    backend.apply(OpenSequence(0, GREEDY))
    backend.apply(WatchSequence(0))
    first = step(backend, 0, 0, PROMPT).sampled[0].token
    assert generate(backend, 0, len(PROMPT), first, 8) == plain
    assert backend.export_kv(0, 0, 78) == cells
    assert backend.attention(0).rows == 32 + 8
    backend.apply(WatchSequence(0, 0))
    with pytest.raises(InvalidRequest) as caught:
        backend.attention(0)
    assert caught.value.code == "not_watched"


def test_rows_are_sampled_as_often_as_asked(backend: Loaded) -> None:
    _, found = watched(backend, every=3)
    assert found.rows == 8 + 2
    backend.apply(TrimSequence(0, 40))
    assert len(backend.attention(0).positions) == 40
    for at in range(40, 43):
        step(backend, 0, at, tokens_of(at))
    after = backend.attention(0)
    assert after.rows == found.rows + 1
    assert after.mass.shape == (4, 43)


def test_sequences_of_one_call_are_measured_apart(backend: Loaded) -> None:
    alone, wanted = watched(backend, 0)
    backend.apply(FreeSequence(0))
    begin(backend, 1, prompt(30, seed=3))
    again, found = watched(backend, 0)
    assert again == alone
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def _pruned(backend: Loaded) -> list[int]:
    backend.apply(PruneSequence(0, KEEP))
    return [
        step(backend, 0, at, tokens_of(token)).sampled[0].token
        for at, token in enumerate(prompt(12, seed=5).tolist(), start=len(PROMPT))
    ]


def test_pruned_sequences_go_on_as_in_llama_cpp(backend: Loaded, reference: Loaded) -> None:
    scores = []
    for each in (backend, reference):
        begin(each, 0, PROMPT)
        each.apply(WatchSequence(0))
        each.apply(PruneSequence(0, KEEP))
        usage = each.kv_usage(0)
        assert usage.pruned
        assert usage.cells == 27
        scores.append(log_softmax(each.score(prompt(12, seed=5), 0)))
        step(each, 0, len(PROMPT), tokens_of(9))
        assert each.attention(0).positions.tolist() == [
            *(at for start, stop in KEEP for at in range(start, stop)),
            len(PROMPT),
        ]
    ours, theirs = scores
    assert float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).max()) < 1e-3


def _beyond(backend: Loaded) -> list[int]:
    """Go on to the last position of the model, in a slot of half as many cells."""
    found = [begin(backend, 0, PROMPT)]
    trained = backend.info.n_ctx_train
    for at in range(len(PROMPT), trained):
        cells = backend.kv_usage(0).cells
        if cells == N_CTX:
            backend.apply(PruneSequence(0, ((0, 4), (at - 40, at))))
        found.append(step(backend, 0, at, tokens_of(3 + at)).sampled[0].token)
        assert backend.kv_usage(0).cells <= N_CTX
    return found


def test_a_pruned_sequence_may_have_more_positions_than_cells(
    backend: Loaded, reference: Loaded
) -> None:
    assert backend.info.n_ctx_train > N_CTX
    assert len(_beyond(backend)) == len(_beyond(reference)) == backend.info.n_ctx_train - 69
    with pytest.raises(LimitExceeded) as caught:
        step(backend, 0, backend.info.n_ctx_train, tokens_of(9))
    assert caught.value.code == "kv_full"
    # the next sequence in its place is as if nothing had been
    assert generate(backend, 1, 70, begin(backend, 1, PROMPT), 9) == generate(
        reference, 1, 70, begin(reference, 1, PROMPT), 9
    )
    begin(backend, 2, PROMPT)
    for at in range(len(PROMPT), N_CTX):
        step(backend, 2, at, tokens_of(9))
    with pytest.raises(LimitExceeded):
        step(backend, 2, N_CTX, tokens_of(9))


def test_what_is_computed_beyond_the_slot_is_what_a_longer_slot_computes(tiny: Path) -> None:
    """The same cells at the same positions, in a slot that never fills up and in one that does."""
    scores = []
    for n_ctx in (N_CTX, 256):
        with loaded("llama.cpp", tiny, WHOLE, n_ctx=n_ctx, n_seq=1) as backend:
            begin(backend, 0, PROMPT)
            backend.apply(PruneSequence(0, ((0, 4), (30, len(PROMPT)))))
            for at in range(len(PROMPT), 200):
                step(backend, 0, at, tokens_of(3 + at))
                if backend.kv_usage(0).cells == 100:
                    backend.apply(PruneSequence(0, ((0, 4), (at - 40, at + 1))))
            scores.append(log_softmax(backend.score(prompt(12, seed=5), 0)))
    assert np.array_equal(*scores)


def test_cells_with_gaps_are_those_that_pruning_leaves(backend: Loaded) -> None:
    begin(backend, 0, PROMPT)
    whole = backend.export_kv(0, 0, len(PROMPT))
    wanted = _pruned(backend)
    row = len(whole.layers[0].keys) // len(PROMPT)

    def picked(data: bytes) -> bytes:
        return b"".join(data[start * row : stop * row] for start, stop in KEEP)

    layers = tuple(
        LayerKv(each.layer, picked(each.keys), picked(each.values)) for each in whole.layers
    )
    backend.apply(OpenSequence(1, GREEDY))
    gaps = KvRange(whole.codec, 0, len(PROMPT), layers, KEEP)
    backend.import_kv(1, gaps, PROMPT)
    assert backend.kv_usage(1).pruned
    found = [
        step(backend, 1, at, tokens_of(token)).sampled[0].token
        for at, token in enumerate(prompt(12, seed=5).tolist(), start=len(PROMPT))
    ]
    assert found == wanted
    backend.apply(OpenSequence(2, GREEDY))
    with pytest.raises(InvalidRequest):
        backend.import_kv(2, KvRange(whole.codec, 0, 70, layers, ((0, 4), (3, 9))), PROMPT)


def test_what_was_pruned_is_not_given_away(backend: Loaded) -> None:
    begin(backend, 0, PROMPT)
    for bad in ((), ((0, 4),), ((0, 80),), ((5, 3), (60, 70))):
        with pytest.raises(InvalidRequest) as caught:
            backend.apply(PruneSequence(0, bad))
        assert caught.value.code == "kv_range"
    backend.apply(PruneSequence(0, KEEP))
    backend.apply(PruneSequence(0, KEEP))
    backend.apply(OpenSequence(1, GREEDY))
    for refused in (
        lambda: backend.export_kv(0, 0, 4),
        lambda: backend.apply(CopySequence(1, 0, 0, 4)),
        lambda: backend.apply(TrimSequence(0, 40)),
    ):
        with pytest.raises(Conflict) as held:
            refused()
        assert held.value.code == "kv_pruned"
    backend.apply(TrimSequence(0, 0))
    exact = begin(backend, 2, PROMPT)
    assert step(backend, 0, 0, PROMPT).sampled[0].token == exact
