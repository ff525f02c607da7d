"""First tokens on a node that is far from the KV of its chunks: landmarks, whole chunks, neither.

Two daemons with a slow link between them.  The first holds the model, is asked, and so makes the
KV of the chunks, landmarks too; then the model moves to the second, which is asked the same: with a
``kv_budget``, so that it may take landmarks; without, so that it fetches whole chunks or computes;
and ``exact``.  Which of these it does for each chunk is its own choice, by what it has measured.

    python -m pyagent_node.benchmarks.context_far --model FILE --shape rtt=60ms,rate=10mbit
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click
import msgspec
import trio

from pyagent_node.base.types import ContextPolicy
from pyagent_node.benchmarks.context_answers import N_CTX, NAME, give_encoder
from pyagent_node.benchmarks.context_corpus import corpus, facts
from pyagent_node.benchmarks.shaped import answer
from pyagent_node.benchmarks.swarm import LocalNode, running
from pyagent_node.inference.generation import NO_SPECULATION, ChatMessage
from pyagent_node.inference.models.encoders import minilm_files
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node.answers import Answer, Ask, ContextChoice
from pyagent_node.node.api.schema import LoadRequest, PullRequest
from pyagent_node.node.home import Home

ANSWER_TOKENS: Final = 8


class FarRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a way came to; ``ttft`` is the median, in seconds, the others are sums."""

    way: str
    ttft: float
    prompt_tokens: int
    joined_tokens: int
    joined_landmarks: int


def row_of(way: str, answers: Sequence[Answer]) -> FarRow:
    """Return the row of a way."""
    return FarRow(
        way=way,
        ttft=round(statistics.median(each.ttft_seconds for each in answers), 2),
        prompt_tokens=sum(each.prompt_tokens for each in answers),
        joined_tokens=sum(each.joined_tokens for each in answers),
        joined_landmarks=sum(each.joined_landmarks for each in answers),
    )


def _ask(model: str, question: str, chunks: int, budget: str | None, *, exact: bool) -> Ask:
    return Ask(
        model=model,
        messages=(ChatMessage("user", question),),
        max_tokens=ANSWER_TOKENS,
        temperature=0.0,
        speculation=NO_SPECULATION,
        prompt_cache=False,
        kv_budget=budget,
        context=ContextChoice(name=NAME, count=chunks, exact=exact),
    )


def measure(nodes: Sequence[LocalNode], model: str, questions: Sequence[str], chunks: int) -> None:
    """Ask both nodes and print the rows; raises what the nodes raise."""
    near, far = nodes

    def load(node: LocalNode) -> None:
        peers = (node.peer_id,)
        wish = LoadRequest(model=model, ranks=1, nodes=peers, n_ctx=N_CTX, standbys=0, spares=0)
        node.client.load(wish)

    def ask(node: LocalNode, way: str, budget: str | None = None) -> None:
        wish = (_ask(model, each, chunks, budget, exact=way == "exact") for each in questions)
        row = row_of(way, [answer(node, each) for each in wish])
        click.echo(msgspec.json.encode(row).decode())

    load(near)
    ask(near, "made")
    near.client.unload(model)
    load(far)
    ask(far, "exact")  # so that it knows what computing takes
    for way, budget in (("lossy", "auto"), ("whole", None), ("exact", None)):
        ask(far, way, budget)


@click.command()
@click.option("--model", required=True, type=Path, help="A GGUF file.")
@click.option("--shape", default="rtt=60ms,rate=10mbit", help="The link, as for up --shape.")
@click.option("--tokens", default=9000, help="Size of the corpus.")
@click.option("--questions", default=2, type=click.IntRange(1, 56), help="How many are asked.")
@click.option("--chunks", default=4, type=click.IntRange(1, 32), help="Chunks in a prompt.")
@click.option("--encoder-home", type=Path, help="A home with the encoder (default: your own).")
def main(
    *,
    model: Path,
    shape: str,
    tokens: int,
    questions: int,
    chunks: int,
    encoder_home: Path | None,
) -> None:
    """Measure, and print a line of JSON for each way; see the module."""
    own = Home.default({}) if encoder_home is None else Home(encoder_home)
    files = trio.run(minilm_files, ModelStore(own.models_dir))
    every = facts()
    documents = corpus(tokens, lambda text: len(text) // 4 + 1, every)
    wanted = [fact.question for fact in every if not fact.tuning][:questions]
    with tempfile.TemporaryDirectory(prefix="pyagent-far-", ignore_cleanup_errors=True) as root:
        nodes = [
            LocalNode(f"node-{i}", Home(Path(root, f"node-{i}")), flags=("--shape", shape))
            for i in range(2)
        ]
        for node in nodes:
            node.home.root.mkdir(parents=True)
            node.home.config_path.write_text("context_landmarks = true\n")
        with running(nodes, say=lambda text: click.echo(text, err=True)):
            names = []
            for node in nodes:
                give_encoder(node, files)
                source = f"file:{model.resolve()}"
                names.append(node.client.pull(PullRequest(source=source)).name)
            nodes[0].client.contexts.create(NAME, ContextPolicy())
            for source, text in documents:
                nodes[0].client.contexts.add(NAME, source, text.encode(), modified=0)
            measure(nodes, names[0], wanted, chunks)


if __name__ == "__main__":
    main()
