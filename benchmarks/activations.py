"""What activations in f16 or bf16 save between ranks, and what they change.

    python -m pyagent_node.benchmarks.activations MODEL.gguf --tokens 48 --rounds 3

Three ranks.  *Numbers*: in this process, over one text for each kind of text, greedily: how many
tokens come as in f32, how close the likeliest two were at the first one that does not, and how far
the chosen tokens' log-probabilities are from those in f32 before it.  *Speed* (``--speed``): on
three daemons of this machine instead, every hop over a stream, with links as they are and at 100
Mbit and 50 ms of round trip; the kinds take turns in each round.  Bytes are those of one token's
step frame.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import numpy as np

from pyagent_node.base.types import ACTIVATIONS, EXACT_ACTIVATIONS, Digest, SessionId, Slice
from pyagent_node.benchmarks.shaped import answer, reshape_to, shaped_swarm
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.benchmarks.texts import TEXTS
from pyagent_node.inference.backend import (
    Activations,
    FreeSequence,
    OpenSequence,
    StepInput,
    Tokens,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.activations import check_fits
from pyagent_node.inference.pipeline.frames import PIPE_CODEC, Step, pack_tail, unpack_tail
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.answers import Ask
from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest

RANKS = 3
LINKS = (("loopback", ""), ("100 Mbit, 50 ms", "rtt=50ms,rate=100mbit"))
N_CTX = 1024
FRAME = 4
"""Bytes that say how long a frame's header is."""


class Numbers(msgspec.Struct, frozen=True):
    """One text in one kind, against f32; gaps are in nats, and ``None`` where all is alike."""

    text: str
    activations: str
    tokens: int
    alike: int
    gap_there: float | None
    largest_difference: float


class Speed(msgspec.Struct, frozen=True):
    """One link and kind; medians over the rounds."""

    link: str
    activations: str
    prompt_tokens: int
    ttft_ms: float
    tokens_per_second: float
    alike: int


class Report(msgspec.Struct, frozen=True):
    """What is printed; ``token_bytes`` is one token's frame to the next rank, by kind."""

    model: str
    token_bytes: dict[str, int]
    numbers: tuple[Numbers, ...]
    speed: tuple[Speed, ...]


class Chain:
    """Three slices in this process, and rows that cross as they do between nodes."""

    def __init__(self, path: Path, folder: Path, stack: ExitStack) -> None:
        store = ModelStore(folder)
        digest = store.add_file(path, about=About("model")).digest
        file = store.model_file(digest)
        self.table = stack.enter_context(EmbeddingTable(file))
        self.n_embd = model_shape(file.header).n_embd
        layers = model_shape(file.header).n_layers
        cuts = [layers * rank // RANKS for rank in range(RANKS + 1)]
        self.slices = [
            stack.enter_context(
                closing(
                    LlamaBackend(
                        store.make_slice(digest, part), part, n_ctx=N_CTX, n_seq=1, threads=1
                    )
                )
            )
            for part in (
                Slice(cuts[rank], cuts[rank + 1], rank == RANKS - 1) for rank in range(RANKS)
            )
        ]

    def answer(self, prompt: Tokens, n: int, kind: str) -> list[Sampled]:
        """Return ``n`` greedy tokens with the likeliest two of each."""
        sampling = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=2)
        for part in self.slices:
            tail = part is self.slices[-1]
            part.apply(OpenSequence(0, sampling if tail else None))
        found: list[Sampled] = []
        ids = prompt
        position = 0
        while len(found) < n:
            found.append(self._step(ids, position, kind))
            position += len(ids)
            ids = np.array([found[-1].token], np.int32)
        for part in self.slices:
            part.apply(FreeSequence(0))
        return found

    def _step(self, ids: Tokens, position: int, kind: str) -> Sampled:
        rows: Activations | None = self.table.rows(ids)
        for part in self.slices:
            assert rows is not None, "all but the last give activations"
            check_fits(rows, kind)
            _, rows = unpack_tail(pack_tail(ids, rows, kind), len(ids), self.n_embd, kind)
            last = part is self.slices[-1]
            (output,) = part.decode([StepInput(0, position, ids, rows, last)])
            rows = output.activations
        return output.sampled[0]


def numbers(path: Path, n: int) -> Iterator[Numbers]:
    """Yield what each kind changes, text by text."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyagent-bench-"))
        chain = Chain(path, Path(folder), stack)
        tokenizer = stack.enter_context(closing(LlamaTokenizer(path)))
        for name, texts in TEXTS.items():
            prompt = tokenizer.tokenize(texts[0].encode(), add_special=True, parse_special=False)
            exact = chain.answer(prompt, n, EXACT_ACTIVATIONS)
            for kind in ACTIVATIONS[1:]:
                yield _compare(name, kind, exact, chain.answer(prompt, n, kind))


def _compare(name: str, kind: str, exact: list[Sampled], got: list[Sampled]) -> Numbers:
    pairs = list(zip(exact, got, strict=True))
    alike = next((i for i, (a, b) in enumerate(pairs) if a.token != b.token), len(pairs))
    top = exact[alike].top if alike < len(pairs) else ()
    differences = [abs((a.logprob or 0.0) - (b.logprob or 0.0)) for a, b in pairs[:alike]]
    return Numbers(
        name,
        kind,
        len(pairs),
        alike,
        round(top[0][1] - top[1][1], 5) if len(top) > 1 else None,
        round(max(differences, default=0.0), 5),
    )


def speeds(path: Path, n: int, rounds: int) -> Iterator[Speed]:
    """Yield what each kind takes on each link."""
    layers = model_shape(read_header(path)).n_layers
    with shaped_swarm(RANKS, say=_say) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{path}")).name
        client.load(_request(model, nodes, layers, EXACT_ACTIVATIONS))
        for name, link in LINKS:
            _say(f"  {name}")
            reshape_to(nodes, link, model)
            took: dict[str, list[tuple[float, float, int, tuple[int, ...]]]] = {}
            for turn in range(rounds):
                for kind in ACTIVATIONS:
                    nodes[0].client.apply(_request(model, nodes, layers, kind), _quiet)
                    ask = Ask(
                        model=model,
                        prompt="".join((TEXTS["code"] + TEXTS["prose"])[:4]),
                        max_tokens=n,
                        temperature=0.0,
                        ignore_eos=True,
                        speculation="none",
                        prompt_cache=False,
                        seed=turn,
                    )
                    got = answer(nodes[0], ask)
                    took.setdefault(kind, []).append(
                        (got.ttft_seconds, got.tokens_per_second, got.prompt_tokens, got.token_ids)
                    )
            exact = took[EXACT_ACTIVATIONS][0][3]
            for kind, found in took.items():
                same = zip(exact, found[0][3], strict=True)
                yield Speed(
                    name,
                    kind,
                    found[0][2],
                    round(statistics.median(each[0] for each in found) * 1000, 1),
                    round(statistics.median(each[1] for each in found), 2),
                    next((i for i, (a, b) in enumerate(same) if a != b), n),
                )


def _request(model: str, nodes: list[LocalNode], layers: int, kind: str) -> LoadRequest:
    return LoadRequest(
        model=model,
        layers=tuple(layers * rank // RANKS for rank in range(1, RANKS)),
        nodes=tuple(nodes[(rank + 1) % RANKS].peer_id for rank in range(RANKS)),
        n_ctx=N_CTX,
        standbys=0,
        spares=0,
        activations=kind,
    )


def token_bytes(n_embd: int) -> dict[str, int]:
    """Return the bytes of one token's step on its way to the next rank, by kind."""
    step = Step(SessionId("5" * 32), Digest("a" * 64), 3, 1, 100, 612, 1, True, 0.0123)
    header, rows = len(PIPE_CODEC.encode(step)), np.ones((1, n_embd), np.float32)
    ids = np.zeros(1, np.int32)
    return {kind: FRAME + header + len(pack_tail(ids, rows, kind)) for kind in ACTIVATIONS}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _quiet(progress: Progress) -> None:
    """Take a progress report."""


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speed", action="store_true", help="Measure speed, on daemons, instead.")
    args = parser.parse_args()
    report = Report(
        args.model.name,
        token_bytes(model_shape(read_header(args.model)).n_embd),
        () if args.speed else tuple(numbers(args.model, args.tokens)),
        tuple(speeds(args.model, args.tokens, args.rounds)) if args.speed else (),
    )
    print(json.dumps(msgspec.to_builtins(report), indent=1))


if __name__ == "__main__":
    main()
