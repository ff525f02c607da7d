"""How well and how fast the index of a context finds what was hidden in it.

The corpus is Python's standard library with 201 sentences hidden in it, each asked for in other
words (``context_corpus``).  For each question, recall@k says whether the chunk that holds the
sentence is among the first k.  By default only the questions that tuning never saw are counted.
All ways are measured over the same chunks, windows and vectors, in one run, and take a question
away from the centre of all (``SketchModel.aim``) unless they say otherwise:

``exact``       every window by its exact vector
``words``       BM25 over the chunks
``hyperplanes`` 16 hash tables of 10 random hyperplanes, 5 probes each, then exact
``signs``       256 random hyperplanes as signs, the best 300 windows then exact
``sketches``    the index: the encoder's sketches, the best 300 windows then exact
``both``        the same joined with the ranking by words
``..., word by word``  the best 24 chunks again, by what the question's words find in their windows

    python -m pyagent_node.benchmarks.context_index --tokens 1000000 --cache /tmp/vectors --json

``kept`` is the share of the exact top 8 windows that a way finds.  ``spread`` gives recall@8 where
the windows lie on 16 nodes and only some are asked, by learned buckets, random ones, and centroids;
``sharded`` the same for the form that nodes have (``context_spread``).
Computing the vectors takes minutes; ``--cache`` keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.files import make_private_dir
from pyagent_node.benchmarks.context_corpus import Fact, corpus, facts
from pyagent_node.benchmarks.context_spread import sharded
from pyagent_node.inference.gguf_embedder import GgufIdentity
from pyagent_node.inference.models.encoders import minilm_files
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.native import Blake3, lsh_probes, sketch_scan
from pyagent_node.node.api.following import nobody
from pyagent_node.node.config import load_settings
from pyagent_node.node.context_encoder import Encoders
from pyagent_node.node.home import Home
from pyagent_node.node.offline import open_store
from pyagent_node.sharding.context.chunking import Chunk, chunks
from pyagent_node.sharding.context.defaults import Axes, axes_of
from pyagent_node.sharding.context.duplicates import near_texts
from pyagent_node.sharding.context.embedder import MAX_TEXTS, Embedder, Vectors
from pyagent_node.sharding.context.index import RERANKED, Index, Way
from pyagent_node.sharding.context.index_codec import StoredIndex, encode_index
from pyagent_node.sharding.context.lexical import Lexical
from pyagent_node.sharding.context.minilm import MiniLm
from pyagent_node.sharding.context.rerank import COMPARED, WEIGHT
from pyagent_node.sharding.context.sketches import BITS, Buckets, Sketches
from pyagent_node.sharding.context.windows import windows

NODES: Final = 16
TABLES, PLANES, PROBES = 16, 10, 5
Ints = NDArray[np.uint32]
Ranked = Callable[[int], Sequence[int]]
Row = dict[str, float]


class Searched(NamedTuple):
    """What every way searches.

    ``chunk_of`` and ``vectors`` are of the windows, ``words`` of the chunks.  ``questions`` are the
    vectors of questions as the index takes them (``SketchModel.aim``), ``plain`` as the encoder
    gives them; ``answers`` are the chunks that hold a fact's sentence.  ``texts`` are those of the
    windows, and ``embedder`` compares them with a question word by word.
    """

    chunk_of: Ints
    vectors: Vectors
    facts: list[Fact]
    questions: Vectors
    plain: Vectors
    answers: list[set[int]]
    words: Lexical
    texts: Sequence[str]
    embedder: Embedder


class Material(NamedTuple):
    """Chunks, what is searched, the axes of the encoder, and what making them took."""

    chunks: list[Chunk]
    searched: Searched
    axes: Axes
    seconds: dict[str, float]


def material(tokens: int, embedder: Embedder, split: str, cache: Path | None) -> Material:
    """Make the corpus, cut it, and compute the vectors."""
    began = time.perf_counter()
    every = facts()
    files = corpus(tokens, embedder.count_tokens, every)
    found = [c for name, text in files for c in chunks(text, name, embedder.count_tokens)]
    cut = time.perf_counter()
    stands = near_texts([chunk.text for chunk in found])
    found = [chunk for number, chunk in enumerate(found) if stands[number] == number]
    joined = time.perf_counter()
    texts: list[str] = []
    owners: list[int] = []
    for number, chunk in enumerate(found):
        parts = windows(chunk.text)
        texts += [part.text for part in parts]
        owners += [number] * len(parts)
    vectors = embed(embedder, texts, cache)
    embedded = time.perf_counter()
    wanted = [fact for fact in every if split == "all" or fact.tuning == (split == "tuning")]
    answers = [
        {number for number, chunk in enumerate(found) if fact.sentence in chunk.text}
        for fact in wanted
    ]
    asked = time.perf_counter()
    questions = np.stack([embedder.embed_question(fact.question) for fact in wanted])
    answered = time.perf_counter()
    words = Lexical(chunk.text for chunk in found)
    seconds = {
        "cut": cut - began,
        "join": joined - cut,
        "embed": embedded - joined,
        "embed_one_question": (answered - asked) / len(wanted),
        "words": time.perf_counter() - answered,
    }
    axes = axes_of(embedder)
    aimed = np.stack([axes.model.aim(question) for question in questions])
    searched = Searched(
        np.array(owners, np.uint32),
        vectors,
        wanted,
        aimed,
        questions,
        answers,
        words,
        texts,
        embedder,
    )
    return Material(found, searched, axes, seconds)


def embed(embedder: Embedder, texts: list[str], cache: Path | None) -> Vectors:
    """Return the vectors of windows, from the cache if they are there."""
    key = Blake3()
    for text in (embedder.identity, *texts):
        key.update(text.encode() + b"\0")
    place = cache / f"{key.hexdigest()}.npy" if cache else None
    if place is not None and place.is_file():
        return np.asarray(np.load(place, allow_pickle=False), np.float32)
    step = min(1024, MAX_TEXTS)
    parts: list[Vectors] = []
    for at in range(0, len(texts), step):
        parts.append(embedder.embed(texts[at : at + step]))
        print(f"\rembedded {at + len(parts[-1])} of {len(texts)} windows", end="", file=sys.stderr)
    print(file=sys.stderr)
    vectors = np.concatenate(parts)
    if place is not None:
        make_private_dir(place.parent)
        np.save(place, vectors)
    return vectors


def chunk_order(chunk_of: Ints, rows: Ints, likeness: NDArray[np.float32]) -> list[int]:
    """Return chunks in the order of their best window."""
    order = np.argsort(-likeness, kind="stable")
    return list(dict.fromkeys(chunk_of[rows[order]].tolist()))


def measure(found: Searched, ranked: Ranked) -> Row:
    """Return the recall and the milliseconds a question of a way."""
    places: list[float] = []
    took: list[float] = []
    for number, answers in enumerate(found.answers):
        began = time.perf_counter()
        order = ranked(number)
        took.append(time.perf_counter() - began)
        hit = [rank for rank, chunk in enumerate(order, 1) if chunk in answers]
        places.append(hit[0] if hit else np.inf)
    milliseconds = np.array(took) * 1e3
    return {
        "recall_at_8": round(float(np.mean(np.array(places) <= 8)), 4),
        "recall_at_16": round(float(np.mean(np.array(places) <= 16)), 4),
        "query_ms_p50": round(float(np.percentile(milliseconds, 50)), 2),
        "query_ms_p99": round(float(np.percentile(milliseconds, 99)), 2),
    }


def kept(found: Searched, candidates: Callable[[int], Ints]) -> float:
    """Return the share of the exact top 8 windows that are among the candidates."""
    shares: list[float] = []
    for number, question in enumerate(found.questions):
        best = np.argsort(-(found.vectors @ question), kind="stable")[:8]
        shares.append(float(np.isin(best, candidates(number)).mean()))
    return round(float(np.mean(shares)), 4)


def exactly(
    found: Searched, candidates: Callable[[int], Ints], questions: Vectors | None = None
) -> Ranked:
    """Return the way that compares some windows exactly."""
    asked = found.questions if questions is None else questions

    def ranked(number: int) -> list[int]:
        rows = candidates(number)
        return chunk_order(found.chunk_of, rows, found.vectors[rows] @ asked[number])

    return ranked


def word_by_word(found: Searched, candidates: Callable[[int], Ints]) -> Ranked:
    """Return the way that compares some windows exactly, and the best chunks of them by words."""

    def ranked(number: int) -> list[int]:
        rows = candidates(number)
        likeness = found.vectors[rows] @ found.questions[number]
        best: dict[int, int] = {}
        for at in np.argsort(-likeness, kind="stable"):
            best.setdefault(int(found.chunk_of[rows[at]]), int(at))
        order = list(best)
        first = order[:COMPARED]
        texts = [found.texts[int(rows[best[chunk]])] for chunk in first]
        question = found.facts[number].question
        among = {int(found.chunk_of[rows[at]]) for at in np.argsort(-likeness)[:RERANKED]}
        words = found.embedder.compare(question, texts, found.words.rarities(question, among))
        if words is None:
            return order
        scores = {
            chunk: float(likeness[best[chunk]]) + WEIGHT * float(own)
            for chunk, own in zip(first, words, strict=True)
        }
        return [*sorted(first, key=lambda chunk: -scores[chunk]), *order[COMPARED:]]

    return ranked


def hyperplanes(found: Searched, generator: np.random.Generator) -> Callable[[int], Ints]:
    """Return the candidates of hash tables of random hyperplanes."""
    size = found.vectors.shape[1]
    planes = generator.standard_normal((TABLES, size, PLANES)).astype(np.float32)
    powers = 1 << np.arange(PLANES)
    tables = [((found.vectors @ table) > 0) @ powers for table in planes]

    def candidates(number: int) -> Ints:
        hits = [
            np.flatnonzero(np.isin(table, lsh_probes(found.questions[number] @ plane, PROBES)[0]))
            for table, plane in zip(tables, planes, strict=True)
        ]
        return np.unique(np.concatenate(hits)).astype(np.uint32)

    return candidates


def random_signs(found: Searched, generator: np.random.Generator) -> Callable[[int], Ints]:
    """Return the candidates of signs along random directions, as many bits as a sketch has."""
    axes = generator.standard_normal((found.vectors.shape[1], BITS)).astype(np.float32)
    packed = np.packbits(found.vectors @ axes > 0, axis=1, bitorder="little").reshape(-1)
    return lambda number: sketch_scan(packed, found.questions[number] @ axes, RERANKED)[0]


def centroids(vectors: Vectors, count: int, generator: np.random.Generator) -> Vectors:
    """Return the means that k-means finds (10 rounds)."""
    means = vectors[generator.choice(len(vectors), count, replace=False)]
    for _ in range(10):
        nearest = (vectors @ means.T - (means * means).sum(axis=1) / 2).argmax(axis=1)
        means = np.stack(
            [
                vectors[nearest == i].mean(axis=0) if (nearest == i).any() else means[i]
                for i in range(count)
            ]
        )
    return means


def spread(found: Searched, generator: np.random.Generator) -> dict[str, Row]:
    """Return recall@8 against the number of nodes asked, of 16."""
    learned = Buckets.train(found.vectors, NODES.bit_length() - 1)
    planes = generator.standard_normal((found.vectors.shape[1], len(learned.axes))).astype(
        np.float32
    )
    means = centroids(found.vectors, NODES, generator)
    homes = {
        "learned": learned.of(found.vectors),
        "random": (((found.vectors @ planes) > 0) @ (1 << np.arange(len(learned.axes)))),
        "centroids": (found.vectors @ means.T - (means * means).sum(axis=1) / 2).argmax(axis=1),
    }
    orders: dict[str, Callable[[NDArray[np.float32]], Ints]] = {
        "learned": lambda q: learned.probe(q, NODES),
        "random": lambda q: lsh_probes(q @ planes, NODES)[0],
        "centroids": lambda q: np.argsort(-(means @ q), kind="stable").astype(np.uint32),
    }
    report: dict[str, Row] = {}
    for name, home in homes.items():
        shares = np.bincount(home.astype(np.int64), minlength=NODES) / len(home)
        row: Row = {"largest_node": round(float(shares.max()), 3)}
        for asked in (1, 2, 4, 8, 16):

            def candidates(
                number: int, asked: int = asked, name: str = name, home: NDArray[np.integer] = home
            ) -> Ints:
                wanted = orders[name](found.questions[number])[:asked]
                return np.flatnonzero(np.isin(home, wanted)).astype(np.uint32)

            row[f"nodes_{asked}"] = measure(found, exactly(found, candidates))["recall_at_8"]
        report[name] = row
    return report


def run(material: Material, identity: str) -> dict[str, object]:
    """Measure every way."""
    found, model = material.searched, material.axes.model
    generator = np.random.default_rng(0)
    every = np.arange(len(found.vectors), dtype=np.uint32)
    began = time.perf_counter()
    sketches = Sketches.of(model, found.vectors)
    sketched = time.perf_counter()
    words = found.words
    index = Index(sketches, found.chunk_of, found.vectors.__getitem__, words)
    stored = encode_index(StoredIndex(sketches, found.chunk_of, identity))

    def searching(way: Way) -> Ranked:
        def ranked(number: int) -> list[int]:
            question = found.facts[number].question
            hits = index.search(question, found.questions[number], count=16, way=way)
            return [hit.chunk for hit in hits]

        return ranked

    ways: dict[str, tuple[Ranked, Callable[[int], Ints] | None]] = {}
    for name, candidates in {
        "exact": lambda _: every,
        "hyperplanes": hyperplanes(found, generator),
        "signs": random_signs(found, generator),
    }.items():
        ways[name] = (exactly(found, candidates), candidates)
    ways["exact, question not aimed"] = (exactly(found, lambda _: every, found.plain), None)
    ways["words"] = (searching("words"), None)
    ways["sketches"] = (
        searching("meaning"),
        lambda number: sketches.nearest(found.questions[number], RERANKED)[0],
    )
    ways["both"] = (searching("both"), None)
    ways["exact, word by word"] = (word_by_word(found, lambda _: every), None)
    nearest = ways["sketches"][1]
    assert nearest is not None, "it was just put there"
    ways["sketches, word by word"] = (word_by_word(found, nearest), None)
    rows: dict[str, Row] = {}
    for name, (ranked, offered) in ways.items():
        rows[name] = measure(found, ranked)
        if offered is not None:
            rows[name]["kept"] = kept(found, offered)
            looked = [len(offered(number)) for number in range(len(found.facts))]
            rows[name]["compared"] = round(float(np.mean(looked)) / len(every), 4)
    return {
        "tokens": sum(chunk.tokens for chunk in material.chunks),
        "chunks": len(material.chunks),
        "windows": len(every),
        "questions": len(found.facts),
        "lost_answers": sum(not answers for answers in found.answers),
        "seconds": {
            **{name: round(value, 3) for name, value in material.seconds.items()},
            "sketch": round(sketched - began, 2),
        },
        "replicated_bytes": len(stored),
        "replicated_bytes_per_window": round(len(stored) / len(every), 2),
        "words_bytes_per_window": round(words.nbytes / len(every), 2),
        "ways": rows,
        "spread": spread(found, generator),
        "sharded": sharded(found, material.axes),
    }


def _minilm(folder: Path | None) -> Embedder:
    if folder is not None:
        return MiniLm(folder / "model.onnx", folder / "tokenizer.json")
    home = Home.default()
    return MiniLm(*trio.run(minilm_files, open_store(home, load_settings(home))))


@contextlib.contextmanager
def _gguf(path: Path, question: str, text: str) -> Iterator[Embedder]:
    """Open a GGUF encoder as a node would that holds nothing else."""

    async def open_it(encoders: Encoders, identity: str) -> Embedder:
        return await encoders.open(identity, nobody)

    with tempfile.TemporaryDirectory() as folder:
        store = ModelStore(Path(folder))
        model = store.add_file(path, about=About("encoder"))
        encoders = Encoders(store)
        identity = GgufIdentity(model.digest, model.manifest, question, text)
        try:
            yield trio.run(open_it, encoders, identity.checked())
        finally:
            trio.run(encoders.close)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--split", choices=("held-out", "tuning", "all"), default="held-out")
    parser.add_argument("--encoder", type=Path, help="a folder of model.onnx and tokenizer.json")
    parser.add_argument("--gguf", type=Path, help="a GGUF encoder instead of MiniLM")
    parser.add_argument("--question-prefix", default="", help="what it wants before questions")
    parser.add_argument("--text-prefix", default="", help="what it wants before texts")
    parser.add_argument("--cache", type=Path, help="a folder for the windows' vectors")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        embedder = (
            stack.enter_context(_gguf(args.gguf, args.question_prefix, args.text_prefix))
            if args.gguf
            else _minilm(args.encoder)
        )
        report = run(material(args.tokens, embedder, args.split, args.cache), embedder.identity)
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()
        return
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, row in value.items():
                cells = row.items() if isinstance(row, dict) else [("", row)]
                print(f"  {key:12}", "  ".join(f"{a} {b}".strip() for a, b in cells))
        else:
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
