"""Answers from a context: with KV of chunks joined, and with the same prompt computed as a whole.

Each question is asked three times of one node: for one token, so that its chunks have KV (the first
use); then from that KV, and ``exact``, without any cache, in turns which of the two comes first.
Both prompts are the same tokens, so the times to the first token compare joining with computing the
very same chunks again, and the answers differ by nothing else.

::

    python -m pyagent_node.benchmarks.context_answers --model FILE --tokens 20000 --questions 8

An answer counts as right when it says a key of the fact, in whatever case.  The first 56 held-out
facts have keys; of others an answer is right when it says at least a third of what the fact says
and the question does not (words of four letters or more, and numbers): a crude judge, but the same
for both.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from pyagent_node.base.files import write_atomic
from pyagent_node.base.types import ContextPolicy
from pyagent_node.benchmarks.context_corpus import Fact, corpus, facts
from pyagent_node.benchmarks.shaped import answer
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import NO_SPECULATION, ChatMessage
from pyagent_node.inference.models.encoders import (
    MINILM_MODEL,
    MINILM_TOKENIZER,
    EncoderFiles,
    minilm_files,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node.answers import Answer, Ask, ContextChoice
from pyagent_node.node.api.context_schema import QueryRequest
from pyagent_node.node.api.schema import LoadRequest, PullRequest
from pyagent_node.node.home import Home

Say = Callable[[str], None]

NAME: Final = "facts"
ANSWER_TOKENS: Final = 32
CHUNKS: Final = 8
N_CTX: Final = 4096
_WORDS: Final = re.compile(r"[0-9]+|[^\W\d_]{4,}")


class AnswerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What answers came to; times to the first token are medians, in seconds.

    ``kv_ttft_speedup`` is the median over the questions of computed over joined, ``joined_share``
    what part of the tokens of the prompts came from KV of chunks.  ``found`` is the share of
    questions whose fact was in the prompt.  ``accuracy_points`` is by how many percentage points
    joined answers were right more often (less, if below 0), question by question, and
    ``accuracy_points_error`` its standard error.
    """

    questions: int
    prompt_tokens: float
    joined_share: float
    ttft_joined: float
    ttft_computed: float
    ttft_first_use: float
    kv_ttft_speedup: float
    answer_accuracy: float
    answer_accuracy_full_prefill: float
    same_answers: float
    chunks: int
    found: float
    accuracy_points: float
    accuracy_points_error: float
    seconds: float


def is_right(fact: Fact, text: str) -> bool:
    """Whether ``text`` says what the fact says; see the module."""
    if fact.keys:
        return any(key in text.lower() for key in fact.keys)
    asked = set(_WORDS.findall(fact.question.lower()))
    told = set(_WORDS.findall(fact.sentence.lower())) - asked
    said = set(_WORDS.findall(text.lower()))
    return bool(told) and 3 * len(told & said) >= len(told)


def measure(
    node: LocalNode,
    model: str,
    context: str,
    wanted: Sequence[Fact],
    *,
    chunks: int = CHUNKS,
    say: Say = lambda _: None,
) -> AnswerRow:
    """Ask a node that has a model and a context; raises what the node raises."""
    began = time.monotonic()
    found = 0
    first: list[Answer] = []
    joined: list[Answer] = []
    computed: list[Answer] = []
    for number, fact in enumerate(wanted):
        hits = node.client.contexts.query(
            context, QueryRequest(question=fact.question, count=chunks)
        ).hits
        found += any(fact.sentence in hit.text for hit in hits)
        once = _ask(model, context, fact.question, chunks, exact=False)
        first.append(answer(node, msgspec.structs.replace(once, max_tokens=1)))
        arms = ((joined, False), (computed, True))
        for kept, exact in arms if number % 2 else arms[::-1]:
            kept.append(answer(node, _ask(model, context, fact.question, chunks, exact=exact)))
        say(
            f"  {number + 1} of {len(wanted)}: first token after {joined[-1].ttft_seconds:.2f} s"
            f" joined, {computed[-1].ttft_seconds:.2f} s computed"
        )
    pairs = list(zip(wanted, joined, computed, strict=True))
    prompts = sum(one.prompt_tokens for one in joined)
    gains = [is_right(fact, one.text) - is_right(fact, two.text) for fact, one, two in pairs]
    points, error = difference(gains)
    return AnswerRow(
        questions=len(wanted),
        prompt_tokens=prompts / len(wanted),
        joined_share=round(sum(one.joined_tokens for one in joined) / prompts, 4),
        ttft_joined=round(statistics.median(a.ttft_seconds for a in joined), 3),
        ttft_computed=round(statistics.median(a.ttft_seconds for a in computed), 3),
        ttft_first_use=round(statistics.median(a.ttft_seconds for a in first), 3),
        kv_ttft_speedup=round(
            statistics.median(b.ttft_seconds / a.ttft_seconds for _, a, b in pairs), 2
        ),
        answer_accuracy=_share(is_right(fact, one.text) for fact, one, _ in pairs),
        answer_accuracy_full_prefill=_share(is_right(fact, one.text) for fact, _, one in pairs),
        same_answers=_share(a.token_ids == b.token_ids for _, a, b in pairs),
        chunks=chunks,
        found=round(found / len(wanted), 4),
        accuracy_points=points,
        accuracy_points_error=error,
        seconds=round(time.monotonic() - began, 1),
    )


def difference(gains: Sequence[int]) -> tuple[float, float]:
    """Return the mean of paired differences (-1, 0, 1) and its standard error, both in points."""
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return (
        round(100 * statistics.fmean(gains), 2),
        round(100 * spread / math.sqrt(len(gains)), 2),
    )


def _share(found: Iterable[bool]) -> float:
    every = list(found)
    return round(sum(every) / len(every), 4)


def _ask(model: str, context: str, question: str, chunks: int, *, exact: bool) -> Ask:
    return Ask(
        model=model,
        messages=(ChatMessage("user", question),),
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
        speculation=NO_SPECULATION,
        prompt_cache=False,
        context=ContextChoice(name=context, count=chunks, exact=exact),
    )


def give_encoder(node: LocalNode, encoder: EncoderFiles) -> None:
    """Put the encoder's files where the daemon's own store would have put them."""
    pairs = ((MINILM_MODEL, encoder.model), (MINILM_TOKENIZER, encoder.tokenizer))
    for wanted, path in pairs:
        place = node.home.models_dir / ".encoders" / wanted.sha256 / wanted.name
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            place.hardlink_to(path)
            continue
        write_atomic(place, path.read_bytes())


def place_model(swarm: Sequence[LocalNode], model: Path) -> str:
    """Give a model's file to the first daemon and a rank to each; return the model's name."""
    client = swarm[0].client
    name = client.pull(PullRequest(source=f"file:{model.resolve()}")).name
    peers = tuple(node.peer_id for node in swarm)
    client.load(
        LoadRequest(model=name, ranks=len(swarm), nodes=peers, n_ctx=N_CTX, standbys=0, spares=0)
    )
    return name


@click.command()
@click.option("--tokens", default=20_000, help="Size of the corpus.")
@click.option("--questions", default=8, help="How many are asked.")
@click.option("--chunks", default=CHUNKS, help="Chunks in a prompt.")
@click.option("--nodes", default=3, help="Daemons; each has a rank.")
@click.option("--model", required=True, help="A GGUF file.")
@click.option("--encoder-home", type=Path, help="A home with the encoder (default: your own).")
def main(
    *, tokens: int, questions: int, chunks: int, nodes: int, model: str, encoder_home: Path | None
) -> None:
    """Measure answers from a context over real daemons, and print a row of JSON."""
    home = Home.default({}) if encoder_home is None else Home(encoder_home)
    files = trio.run(minilm_files, ModelStore(home.models_dir))
    every = facts()
    documents = corpus(tokens, lambda text: len(text) // 4 + 1, every)
    wanted = [fact for fact in every if not fact.tuning][:questions]
    with local_swarm(nodes, say=click.echo) as swarm:
        for node in swarm:
            give_encoder(node, files)
        client, name = swarm[0].client, place_model(swarm, Path(model))
        client.contexts.create(NAME, ContextPolicy())
        for source, text in documents:
            client.contexts.add(NAME, source, text.encode(), modified=0)
        row = measure(swarm[0], name, NAME, wanted, chunks=chunks, say=click.echo)
    click.echo(msgspec.json.encode(row).decode())


if __name__ == "__main__":
    main()
