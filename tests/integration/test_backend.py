"""The llama.cpp backend against a plain llama-cpp-python process on the unsliced file, with ``==``.

Log-probabilities are compared as well as tokens: they are computed from all logits in doubles, so
that one flipped bit anywhere shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CopySequence,
    FreeSequence,
    OpenSequence,
    ResetSequences,
    StepInput,
    Tokens,
    TrimSequence,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.selftest import LonePolicy
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.native import sample

pytestmark = [pytest.mark.slow, pytest.mark.model]

N_LAYERS = 30
N_CTX = 768
LENGTHS = (5, 1, 40, 70, 520, 252, 200, 3)
"""Prompts of eight sessions: shorter and longer than a tile, a chunk, and 256 cells."""


class Job(NamedTuple):
    """One session: its prompt, how it samples, how many tokens it makes."""

    prompt: list[int]
    sampling: SamplingParams
    n: int


def jobs(lengths: Sequence[int], n: int = 8) -> list[Job]:
    rng = np.random.default_rng(sum(lengths))
    return [
        Job(
            rng.integers(100, 40_000, length).tolist(),
            SamplingParams(
                seed=index,
                temperature=0.0 if index % 3 == 0 else 0.8,
                top_p=0.95 if index % 4 == 1 else 1.0,
                repetition_penalty=1.1 if index % 2 else 1.0,
                logprobs=True,
                top_logprobs=5,
            ),
            n,
        )
        for index, length in enumerate(lengths)
    ]


class PlainProcess:
    """A loop over llama-cpp-python's own ``Llama``, with one thread and nothing of ours."""

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=2048,
            n_batch=512,
            n_threads=1,
            n_threads_batch=1,
            flash_attn=True,
            verbose=False,
        )
        self._known: dict[str, list[Sampled]] = {}

    def run(self, job: Job) -> list[Sampled]:
        """Return what the process samples for a job; jobs come up in several tests."""
        key = repr(job)
        if key not in self._known:
            self._known[key] = self._run(job)
        return list(self._known[key])

    def _run(self, job: Job) -> list[Sampled]:
        llama = self._llama
        llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        tokens = list(job.prompt)
        result: list[Sampled] = []
        llama.eval(tokens)
        for _ in range(job.n):
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)
            )
            picked = plain_sample(logits, tokens, job.sampling)
            result.append(picked)
            tokens.append(picked.token)
            llama.eval([picked.token])
        return result

    def close(self) -> None:
        self._llama.close()


def plain_sample(logits: NDArray[np.float32], tokens: list[int], p: SamplingParams) -> Sampled:
    token, logprob, top = sample(
        logits,
        np.array(tokens, np.int32),
        len(tokens),
        seed=p.seed,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        frequency_penalty=p.frequency_penalty,
        presence_penalty=p.presence_penalty,
        bias_tokens=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        top_logprobs=p.top_logprobs,
    )
    return Sampled(token, logprob, tuple(top))


@pytest.fixture(scope="module")
def plain(bundled_model: Path) -> Iterator[PlainProcess]:
    with closing(PlainProcess(bundled_model)) as process:
        yield process


@pytest.fixture(scope="module")
def table(bundled_model: Path) -> Iterator[EmbeddingTable]:
    with EmbeddingTable(bundled_model) as opened:
        yield opened


class Chain:
    """Backends in a row, as a pipeline runs them."""

    def __init__(self, backends: Sequence[LlamaBackend], table: EmbeddingTable) -> None:
        self.backends = backends
        self.table = table

    def open(self, seq: int, sampling: SamplingParams) -> None:
        for backend in self.backends:
            backend.apply(OpenSequence(seq, sampling if backend.info.slice.head else None))

    def free(self, seq: int) -> None:
        for backend in self.backends:
            backend.apply(FreeSequence(seq))

    def decode(self, requests: Sequence[tuple[int, int, Tokens]]) -> list[Sampled]:
        whole = len(self.backends) == 1
        rows = [None if whole else self.table.rows(tokens) for _, _, tokens in requests]
        for backend in self.backends:
            outputs = backend.decode(
                [
                    StepInput(seq, position, tokens, x, backend.info.slice.head)
                    for (seq, position, tokens), x in zip(requests, rows, strict=True)
                ]
            )
            rows = [output.activations for output in outputs]
        return [sampled for output in outputs for sampled in output.sampled]

    def run(self, work: Sequence[Job], *, together: bool) -> list[list[Sampled]]:
        """Run jobs in sequences 0, 1, ...: all at once, or one token of each in turn."""
        results: list[list[Sampled]] = [[] for _ in work]
        for seq, job in enumerate(work):
            self.open(seq, job.sampling)
            prompt = np.array(job.prompt, np.int32)
            results[seq] += self.decode([(seq, 0, prompt)])
        for step in range(1, work[0].n):
            requests = [
                (seq, len(job.prompt) + step - 1, np.array([results[seq][-1].token], np.int32))
                for seq, job in enumerate(work)
            ]
            groups = [requests] if together else [[request] for request in requests]
            for group in groups:
                for (seq, _, _), picked in zip(group, self.decode(group), strict=True):
                    results[seq].append(picked)
        for seq in range(len(work)):
            self.free(seq)
        return results


MakeChain = Callable[..., AbstractContextManager[Chain]]


@pytest.fixture(scope="module")
def slices(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Slice], Path]:
    folder = tmp_path_factory.mktemp("slices")

    def path_of(part: Slice) -> Path:
        if part.first == 0 and part.head:
            return bundled_model
        path = folder / f"{part}.gguf"
        if not path.exists():
            write_slice(bundled_model, part, path)
        return path

    return path_of


@pytest.fixture
def make_chain(slices: Callable[[Slice], Path], table: EmbeddingTable) -> MakeChain:
    @contextmanager
    def make(*cuts: int, n_seq: int = 8, threads: int = 1, n_ctx: int = N_CTX) -> Iterator[Chain]:
        with ExitStack() as stack:
            backends = []
            for first, last in itertools.pairwise((0, *cuts, N_LAYERS)):
                part = Slice(first, last, head=last == N_LAYERS)
                backend = LlamaBackend(
                    slices(part), part, n_ctx=n_ctx, n_seq=n_seq, threads=threads
                )
                stack.enter_context(closing(backend))
                backends.append(backend)
            yield Chain(backends, table)

    return make


@pytest.mark.parametrize(
    "cuts",
    [(), (10, 20), (1, 29), (6, 12, 18, 24)],
    ids=["1 rank", "3 even ranks", "3 uneven ranks", "5 ranks"],
)
def test_slices_equal_the_whole_for_eight_sessions(
    make_chain: MakeChain, plain: PlainProcess, cuts: tuple[int, ...]
) -> None:
    work = jobs(LENGTHS)
    expected = [plain.run(job) for job in work]
    with make_chain(*cuts) as chain:
        assert chain.run(work, together=True) == expected
        if cuts == (10, 20):
            assert chain.run(work, together=False) == expected


@pytest.mark.alone
def test_threads_change_nothing(make_chain: MakeChain, plain: PlainProcess) -> None:
    work = jobs((260, 254), n=4)
    expected = [plain.run(job) for job in work]
    with make_chain(15, n_seq=2, threads=2, n_ctx=512) as chain:
        assert chain.run(work, together=True) == expected
        assert chain.run(work, together=False) == expected


@pytest.mark.alone
@pytest.mark.parametrize(
    "policy", [LonePolicy(2, 1, companion=False), LonePolicy(1, 1, companion=True)]
)
def test_every_way_to_compute_a_lone_row_is_the_same(
    make_chain: MakeChain,
    plain: PlainProcess,
    monkeypatch: pytest.MonkeyPatch,
    policy: LonePolicy,
) -> None:
    """The self-test picks a way by its speed on this machine; both are right, to the last cell."""
    work = jobs((254, 509), n=4)
    expected = [plain.run(job) for job in work]
    with make_chain(15, n_seq=2, threads=2, n_ctx=512) as chain:
        for backend in chain.backends:
            monkeypatch.setattr(backend._calls, "_lone", policy)
        assert chain.run(work, together=False) == expected


@pytest.mark.parametrize(
    ("threads", "lengths"), [(1, (503, 3)), pytest.param(2, (250,), marks=pytest.mark.alone)]
)
def test_a_journal_fed_again_in_short_steps_gives_the_very_next_token(
    make_chain: MakeChain, plain: PlainProcess, threads: int, lengths: tuple[int, ...]
) -> None:
    """What a failover relies on, over the borders at 256 cells and at a prefill chunk."""
    with make_chain(15, n_seq=2, threads=threads) as chain:
        for job in jobs(lengths, n=20):
            expected = plain.run(job)
            tokens = np.array([sampled.token for sampled in expected], np.int32)
            for kept in (9, 19):
                for backend in chain.backends:
                    backend.apply(ResetSequences())
                chain.open(1, job.sampling)
                chain.decode([(1, 0, np.array(job.prompt, np.int32))])
                for at in range(0, kept, 8):
                    part = tokens[at : min(at + 8, kept)]
                    got = chain.decode([(1, len(job.prompt) + at, part)])
                assert got == [expected[kept]]


def test_neighbours_coming_and_going_change_nothing(
    make_chain: MakeChain, plain: PlainProcess
) -> None:
    """One session goes on while others start, end, leave gaps and come back in its stream's way."""
    job, *others = jobs((60, 30, 90, 8, 2), n=12)
    expected = plain.run(job)
    with make_chain(20, n_seq=5) as chain:
        chain.open(2, job.sampling)
        got = chain.decode([(2, 0, np.array(job.prompt, np.int32))])
        present: dict[int, int] = {}
        for step in range(1, job.n):
            seq = (0, 1, 3, 4)[step % 4]
            requests = []
            if seq in present:
                chain.free(seq)
                del present[seq]
            else:
                other = others[step % len(others)]
                chain.open(seq, other.sampling)
                requests.append((seq, 0, np.array(other.prompt, np.int32)))
                present[seq] = len(other.prompt)
            running = [s for s in present if (s, 0) not in [(r[0], r[1]) for r in requests]]
            for s in running:
                requests.append((s, present[s], np.array([s + 7], np.int32)))
                present[s] += 1
            mine = (2, len(job.prompt) + step - 1, np.array([got[-1].token], np.int32))
            requests.insert(step % (len(requests) + 1), mine)
            outputs = chain.decode(requests)
            got.append(outputs[requests.index(mine)])
    assert got == expected


def test_a_prompt_may_come_in_pieces_of_any_small_size(
    make_chain: MakeChain, plain: PlainProcess
) -> None:
    job = jobs((61,), n=4)[0]
    prompt = np.array(job.prompt, np.int32)
    expected = plain.run(job)
    with make_chain(15, n_seq=2) as chain:
        for size in (1, 3, 7, 8, 20):
            chain.open(1, job.sampling)
            for at in range(0, len(prompt), size):
                picked = chain.decode([(1, at, prompt[at : at + size])])
            assert picked == expected[:1]
            chain.free(1)


def test_trimming_and_computing_again_is_the_same(
    make_chain: MakeChain, plain: PlainProcess
) -> None:
    job = jobs((80,), n=8)[0]
    expected = plain.run(job)
    with make_chain(15, n_seq=2) as chain:
        chain.open(0, job.sampling)
        got = chain.decode([(0, 0, np.array(job.prompt, np.int32))])
        for step in (1, 2, 3, 4):
            got += chain.decode([(0, 79 + step, np.array([got[-1].token], np.int32))])
        for backend in chain.backends:
            backend.apply(TrimSequence(0, 82))
        del got[3:]
        for step in range(3, 8):
            got += chain.decode([(0, 79 + step, np.array([got[-1].token], np.int32))])
    assert got == expected


def test_a_copy_goes_on_like_its_source(make_chain: MakeChain, plain: PlainProcess) -> None:
    job = jobs((300,), n=5)[0]
    prompt = np.array(job.prompt, np.int32)
    expected = plain.run(job)
    with make_chain(15, n_seq=3) as chain:
        chain.open(0, job.sampling)
        got = chain.decode([(0, 0, prompt)])
        chain.open(2, job.sampling)
        for backend in chain.backends:
            backend.apply(CopySequence(2, 0, 0, 200))
            backend.apply(CopySequence(2, 0, 200, 300))
        chain.free(0)
        for step in range(1, job.n):
            got += chain.decode([(2, 299 + step, np.array([got[-1].token], np.int32))])
    assert got == expected


def test_kv_moves_to_other_slice_boundaries(make_chain: MakeChain, plain: PlainProcess) -> None:
    """KV of 0-10, 10-20, 20-30 goes on in 0-14, 14-30, in two pieces, and says the same."""
    job = jobs((90,), n=6)[0]
    prompt = np.array(job.prompt, np.int32)
    expected = plain.run(job)
    with make_chain(10, 20, n_seq=1) as old, make_chain(14, n_seq=2) as new:
        old.open(0, job.sampling)
        got = old.decode([(0, 0, prompt)])
        got += old.decode([(0, 90, np.array([got[0].token], np.int32))])
        tokens = np.append(prompt, np.int32(got[0].token))
        new.open(1, job.sampling)
        for start, stop in ((0, 64), (64, 91)):
            ranges = [backend.export_kv(0, start, stop) for backend in old.backends]
            layers = [layer for kv in ranges for layer in kv.layers]
            for backend in new.backends:
                part = backend.info.slice
                kv = type(ranges[0])(
                    ranges[0].codec, start, stop, tuple(layers[part.first : part.last])
                )
                backend.import_kv(1, kv, tokens[start:stop])
        for step in range(2, job.n):
            got += new.decode([(1, 89 + step, np.array([got[-1].token], np.int32))])
    assert got == expected
