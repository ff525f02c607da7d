"""A context on real daemons: added by all of them, asked of all of them, beside other ways to find.

The corpus is that of ``context_corpus``.  Every daemon adds its share of the files, as a user would
over the API; when every daemon knows all of them, the questions that tuning never saw are asked,
each of another daemon.  Then the daemons are stopped, the chunks and vectors that they hold are
read from their disks, and the other ways search over exactly those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import trio

from pyagent_node.base.errors import DeadlineExceeded
from pyagent_node.base.types import ContextPolicy
from pyagent_node.benchmarks.context_answers import CHUNKS, AnswerRow, give_encoder, place_model
from pyagent_node.benchmarks.context_answers import measure as measure_answers
from pyagent_node.benchmarks.context_corpus import Fact, corpus, facts
from pyagent_node.benchmarks.context_index import (
    Row,
    Searched,
    exactly,
    hyperplanes,
    measure,
    spread,
    word_by_word,
)
from pyagent_node.benchmarks.context_spread import sharded
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.models.encoders import EncoderFiles, minilm_files
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node.api.context_schema import ContextView, QueryRequest
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.context_store import open_context_store
from pyagent_node.sharding.context.defaults import axes_of
from pyagent_node.sharding.context.lexical import Lexical
from pyagent_node.sharding.context.minilm import MiniLm
from pyagent_node.sharding.context.records import ChunkBody

NAME: Final = "library"
COUNT: Final = 16
"""Chunks that a question asks for."""
ADDING: Final = 2
"""Files that are on their way at once, whatever the number of daemons."""
KNOWN_SECONDS: Final = 300.0
"""Longest wait until every daemon knows every document."""
ANSWERS: Final = ("kv_ttft_speedup", "answer_accuracy", "answer_accuracy_full_prefill")
POLL_SECONDS: Final = 0.2
STORE_BYTES: Final = 1 << 40

Report = Callable[[Progress], None]


class ContextReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; times in seconds or milliseconds as the name says.

    ``recall_at_8`` is the share of questions whose sentence is in one of the first 8 chunks.
    ``index_bytes`` is what every daemon holds of the whole context, ``chunk_bytes`` what all of
    them hold together of texts and exact vectors, copies counted.  ``nodes_contacted_fraction`` is
    of the daemons asked over all, on average.  ``baselines`` search the same chunks and vectors in
    one process; ``spread`` is recall@8 by the number of nodes asked, of 16, and ``sharded`` that of
    the form that nodes have (``context_spread``).  ``unmeasured`` says
    why a figure is null.
    """

    bench: str
    time: float
    machine: dict[str, str | int]
    nodes: int
    tokens: int
    documents: int
    chunks: int
    windows: int
    questions: int
    ingest_seconds: float
    tokens_per_second: float
    known_seconds: float
    index_bytes: int
    chunk_bytes: int
    replicated_bytes_per_window: float
    recall_at_8: float
    recall_at_16: float
    exact_recall_at_8: float
    exact_recall_at_16: float
    missing: int
    nodes_contacted_fraction: float
    candidate_chunks: float
    query_ms_p50: float
    query_ms_p99: float
    question_vector_ms_p50: float
    by_meaning: Row
    baselines: dict[str, Row]
    spread: dict[str, Row]
    sharded: Row
    kv_ttft_speedup: float | None = None
    answer_accuracy: float | None = None
    answer_accuracy_full_prefill: float | None = None
    answers: AnswerRow | None = None
    unmeasured: dict[str, str]


def run(
    tokens: int,
    nodes: int,
    files: EncoderFiles,
    *,
    model: Path,
    answers: int,
    report: Report,
    say: Callable[[str], None],
    machine: dict[str, str | int],
    split: str = "held-out",
    top: int = CHUNKS,
) -> ContextReport:
    """Measure; ``answers`` of the questions are also answered by ``model``, placed on all daemons.

    Raises what starting daemons, adding and asking raise, and :class:`DeadlineExceeded`
    (``context_not_known``) if a daemon does not hear of every document.
    """
    embedder = MiniLm(files.model, files.tokenizer)
    every = facts()
    wanted = [fact for fact in every if split == "all" or fact.tuning == (split == "tuning")]
    texts = corpus(tokens, embedder.count_tokens, every)
    say(f"{len(texts)} files, {len(wanted)} questions.")
    with local_swarm(nodes, say=say) as swarm:
        for node in swarm:
            give_encoder(node, files)
        swarm[0].client.contexts.create(NAME, ContextPolicy())
        _all_known(swarm, 0)
        ingest = _add(swarm, texts, report)
        began = time.monotonic()
        view = _all_known(swarm, len(texts))
        known = time.monotonic() - began
        say(f"Added {view.tokens} tokens in {ingest:.0f} s.")
        both = _ask(swarm, wanted, "both", report)
        meaning = _ask(swarm, wanted, "meaning", report)
        answered = _answers(swarm, model, wanted[:answers], top, say)
        folders = [_contexts(node) for node in swarm]
        for node in swarm:
            node.close()
            assert node.process is not None
            node.process.terminate()
            node.process.wait()
        bodies = trio.run(_bodies, folders)
    unique = list({body.id: body for body in bodies}.values())
    found = _searched(unique, wanted, embedder)
    baselines = _baselines(found)
    return ContextReport(
        bench="context",
        time=time.time(),
        machine=machine,
        nodes=nodes,
        tokens=view.tokens,
        documents=view.documents,
        chunks=len(unique),
        windows=view.windows,
        questions=len(wanted),
        ingest_seconds=round(ingest, 1),
        tokens_per_second=round(view.tokens / ingest, 1),
        known_seconds=round(known, 2),
        index_bytes=view.record_bytes,
        chunk_bytes=sum(len(b.vectors) + len(b.text.encode()) for b in bodies),
        replicated_bytes_per_window=round(view.record_bytes / view.windows, 2),
        recall_at_8=both["recall_at_8"],
        recall_at_16=both["recall_at_16"],
        exact_recall_at_8=baselines["exact"]["recall_at_8"],
        exact_recall_at_16=baselines["exact"]["recall_at_16"],
        missing=int(both["missing"]),
        nodes_contacted_fraction=both["contacted"],
        candidate_chunks=both["candidate_chunks"],
        query_ms_p50=both["query_ms_p50"],
        query_ms_p99=both["query_ms_p99"],
        question_vector_ms_p50=both["question_vector_ms_p50"],
        by_meaning=meaning,
        baselines=baselines,
        spread=spread(found, np.random.default_rng(0)),
        sharded=sharded(found, axes_of(embedder)),
        kv_ttft_speedup=answered.kv_ttft_speedup if answered else None,
        answer_accuracy=answered.answer_accuracy if answered else None,
        answer_accuracy_full_prefill=answered.answer_accuracy_full_prefill if answered else None,
        answers=answered,
        unmeasured={} if answered else dict.fromkeys(ANSWERS, "no answers were asked for"),
    )


def _answers(
    swarm: Sequence[LocalNode],
    model: Path,
    wanted: Sequence[Fact],
    top: int,
    say: Callable[[str], None],
) -> AnswerRow | None:
    """Have a model on all daemons answer questions, by KV of chunks and by computing all."""
    if not wanted:
        return None
    say(f"Asking {len(wanted)} questions of a model, three times each.")
    name = place_model(swarm, model)
    return measure_answers(swarm[0], name, NAME, wanted, chunks=top, say=say)


def encoder(store: ModelStore, folder: Path | None = None) -> EncoderFiles:
    """Return the encoder's files: of a folder, or of a store, fetched if they are not there."""
    if folder is not None:
        return EncoderFiles(folder / "model.onnx", folder / "tokenizer.json")
    return trio.run(minilm_files, store)


def _add(swarm: Sequence[LocalNode], files: Sequence[tuple[str, str]], report: Report) -> float:
    """Add every file at one of the daemons; returns the seconds."""
    done = 0
    began = time.monotonic()

    def add(number: int) -> None:
        nonlocal done
        name, text = files[number]
        client = swarm[number % len(swarm)].client
        client.contexts.add(NAME, name, text.encode(), modified=0)
        done += 1
        report(Progress(step="add", text="Adding", done=done, total=len(files), unit="files"))

    with ThreadPoolExecutor(ADDING) as pool:
        for _ in pool.map(add, range(len(files))):
            pass
    return time.monotonic() - began


def _all_known(swarm: Sequence[LocalNode], documents: int) -> ContextView:
    """Wait until every daemon knows every document; returns what the first one says."""
    deadline = time.monotonic() + KNOWN_SECONDS
    for node in swarm:
        while True:
            views = [v for v in node.client.contexts.list().contexts if v.name == NAME]
            if views and views[0].documents >= documents:
                break
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{node.name} does not know all {documents} documents after"
                    f" {KNOWN_SECONDS:.0f} s.",
                    code="context_not_known",
                )
            time.sleep(POLL_SECONDS)
    return next(v for v in swarm[0].client.contexts.list().contexts if v.name == NAME)


def _ask(swarm: Sequence[LocalNode], wanted: Sequence[Fact], way: str, report: Report) -> Row:
    """Ask every question of one of the daemons, after one that warms each up."""
    request = msgspec.convert({"question": "Is there anything?", "way": way}, QueryRequest)
    for node in swarm:
        node.client.contexts.query(NAME, request)
    places: list[float] = []
    took: list[float] = []
    vector: list[float] = []
    contacted: list[float] = []
    chunks: list[int] = []
    missing = 0
    for number, fact in enumerate(wanted):
        request = msgspec.structs.replace(request, question=fact.question, count=COUNT)
        began = time.perf_counter()
        reply = swarm[number % len(swarm)].client.contexts.query(NAME, request)
        took.append((time.perf_counter() - began) * 1e3)
        vector.append(reply.embed_seconds * 1e3)
        contacted.append(reply.nodes_asked / max(1, reply.nodes))
        chunks.append(reply.candidate_chunks)
        missing += reply.missing
        hits = [rank for rank, hit in enumerate(reply.hits, 1) if fact.sentence in hit.text]
        places.append(hits[0] if hits else np.inf)
        text = f"Asking, by {way}"
        report(
            Progress(
                step=f"ask-{way}", text=text, done=number + 1, total=len(wanted), unit="questions"
            )
        )
    ranks = np.array(places)
    return {
        "recall_at_8": round(float(np.mean(ranks <= 8)), 4),
        "recall_at_16": round(float(np.mean(ranks <= 16)), 4),
        "query_ms_p50": round(float(np.percentile(took, 50)), 1),
        "query_ms_p99": round(float(np.percentile(took, 99)), 1),
        "question_vector_ms_p50": round(float(np.percentile(vector, 50)), 1),
        "contacted": round(float(np.mean(contacted)), 4),
        "candidate_chunks": round(float(np.mean(chunks)), 1),
        "missing": missing,
    }


def _contexts(node: LocalNode) -> Path:
    """Return where a daemon keeps its part of contexts."""
    (mesh,) = (path for path in node.home.meshes_dir.iterdir() if (path / "contexts").is_dir())
    return mesh / "contexts"


async def _bodies(folders: Sequence[Path]) -> list[ChunkBody]:
    """Read the chunks that stopped daemons hold."""
    found: list[ChunkBody] = []
    for folder in folders:
        async with open_context_store(folder, limit_bytes=STORE_BYTES) as store:
            found += await store.bodies(list(store.held()))
    return found


def _searched(bodies: Sequence[ChunkBody], wanted: list[Fact], embedder: MiniLm) -> Searched:
    """Make of chunks what every other way searches."""
    owners = [number for number, body in enumerate(bodies) for _ in body.spans]
    questions = np.stack([embedder.embed_question(fact.question) for fact in wanted])
    aim = axes_of(embedder).model.aim
    return Searched(
        chunk_of=np.array(owners, np.uint32),
        vectors=np.concatenate([body.matrix() for body in bodies]),
        facts=wanted,
        questions=np.stack([aim(question) for question in questions]),
        plain=questions,
        answers=[{n for n, b in enumerate(bodies) if fact.sentence in b.text} for fact in wanted],
        words=Lexical(body.text for body in bodies),
        texts=[body.text[slice(*span)] for body in bodies for span in body.spans],
        embedder=embedder,
    )


def _baselines(found: Searched) -> dict[str, Row]:
    every = np.arange(len(found.vectors), dtype=np.uint32)
    planes = hyperplanes(found, np.random.default_rng(0))
    ways = {
        "exact": exactly(found, lambda _: every),
        "exact, question not aimed": exactly(found, lambda _: every, found.plain),
        "exact, word by word": word_by_word(found, lambda _: every),
        "words (BM25)": lambda number: [
            chunk for chunk, _ in found.words.nearest(found.facts[number].question, COUNT)
        ],
        "random hyperplanes": exactly(found, planes),
    }
    rows = {name: measure(found, ranked) for name, ranked in ways.items()}
    looked = [len(planes(number)) for number in range(len(found.facts))]
    rows["random hyperplanes"]["compared"] = round(float(np.mean(looked)) / len(every), 4)
    return rows
