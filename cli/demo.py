"""``demo``: a swarm on this machine answers a prompt, and one process answers it too."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest, RunnerFailed
from pyagent_node.base.types import PeerId
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.model import DEFAULT, boundaries
from pyagent_node.inference.generation import ChatMessage

if TYPE_CHECKING:
    from pyagent_node.benchmarks.single import SingleAnswer
    from pyagent_node.benchmarks.swarm import LocalNode
    from pyagent_node.node.answers import Answer
    from pyagent_node.node.api.schema import PlacementView

MAX_NODES = 16
N_CTX = 2048


class DraftFile(NamedTuple):
    """The file of a model that drafts, and what it is called; ``None``: after its file."""

    path: Path
    name: str | None

    def give(self, node: LocalNode) -> str:
        """Let a node draft with it, once it is started again; return its name there."""
        from pyagent_node.benchmarks.shaped import draft_with  # noqa: PLC0415
        from pyagent_node.node.api.schema import PullRequest  # noqa: PLC0415

        pulled = node.client.pull(PullRequest(source=f"file:{self.path}", name=self.name)).name
        draft_with(node, pulled)
        return pulled


class DemoRank(msgspec.Struct, frozen=True):
    """Which node held which layers; ``layers`` are ``[first, last)``."""

    rank: int
    layers: tuple[int, int]
    peer_id: PeerId


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of ``demo --json``."""

    text: str
    token_ids: tuple[int, ...]
    tokens_per_second: float
    ttft_seconds: float
    ranks: tuple[DemoRank, ...]
    identical_to_single_process: bool
    single_process_tokens_per_second: float
    model: str
    seed: int
    temperature: float


@click.command("demo")
@click.option("--nodes", type=click.IntRange(1, MAX_NODES), default=3, show_default=True)
@click.option("--prompt", default="Name three rivers.", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1, 1024), default=48, show_default=True)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--temperature", type=float, default=0.8, show_default=True)
@click.option("--layers", metavar="A,B,..", help="Cut before these layers (default: evenly).")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@json_option
@pass_app
def demo_command(
    app: App,
    *,
    nodes: int,
    prompt: str,
    max_tokens: int,
    seed: int,
    temperature: float,
    layers: str | None,
    model: str,
) -> int:
    """Split a model over daemons on this machine and ask it.

    Starts the daemons as separate processes with homes of their own, forms a private mesh, gives
    each node some layers, streams the answer, then compares its tokens with those of one
    process that runs the whole model.  Everything is cleaned up, also after Ctrl-C.
    Ends with 0 when the tokens are equal.
    """
    from pyagent_node.benchmarks.single import Job, SingleProcess  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible, local_swarm  # noqa: PLC0415
    from pyagent_node.node.answers import Ask  # noqa: PLC0415

    cuts = boundaries(layers)
    if cuts is not None and len(cuts) != nodes - 1:
        raise InvalidRequest(
            f"--layers {layers} makes {len(cuts) + 1} ranks for {nodes} nodes.",
            code="usage",
            remedy=f"Name {nodes - 1} layers, or leave it out.",
        )
    with interruptible():
        path = model_file(app, model)
        with local_swarm(nodes, say=app.out.note) as swarm:
            placement = place(app, swarm, path, cuts=cuts)
            _show_ranks(app, placement)
            ask = Ask(
                model=placement.name,
                messages=(ChatMessage("user", prompt),),
                max_tokens=max_tokens,
                seed=seed,
                temperature=temperature,
            )
            app.out.text(f"\n> {prompt}")
            answer = stream_answer(app, swarm[0], ask)
        app.out.note("\nAsking one process that runs the whole model ...")
        job = Job(
            path=str(path),
            prompt=prompt,
            max_tokens=max_tokens,
            seed=seed,
            temperature=temperature,
            n_ctx=N_CTX,
            threads=1,  # whose results ours are, at any length
        )
        with SingleProcess() as single:
            reference = single.generate(job)
    result = DemoResult(
        text=answer.text,
        token_ids=answer.token_ids,
        tokens_per_second=round(answer.tokens_per_second, 2),
        ttft_seconds=round(answer.ttft_seconds, 4),
        ranks=tuple(
            DemoRank(rank.rank, (rank.slice.first, rank.slice.last), rank.peer_id)
            for rank in answer.placement.ranks
        ),
        identical_to_single_process=answer.token_ids == reference.token_ids,
        single_process_tokens_per_second=round(reference.tokens_per_second, 2),
        model=model,
        seed=seed,
        temperature=temperature,
    )
    app.out.result(result, lambda: _summary(app, result, answer, reference))
    return 0 if result.identical_to_single_process else 1


def model_file(app: App, model: str) -> Path:
    """Return the file of a model: ``model`` itself, or what it names, fetched when missing."""
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node import offline  # noqa: PLC0415

    if Path(model).is_file():
        return Path(model).absolute()
    store = offline.open_store(app.home, app.settings())
    with Reporter(app.out, stream_json=False) as report:
        name = offline.pull_model(store, model, report=report).digest
    path = offline.model_path(store, name)
    if path is None:
        raise RunnerFailed(f"The model {model} is not whole.", code="model_not_whole")
    return path


def draft_file(app: App, model: str | None) -> DraftFile | None:
    """Return the file of the model that is to draft, fetched when missing."""
    return DraftFile(model_file(app, model), called(model)) if model else None


def called(model: str) -> str | None:
    """Return what a model is called that :func:`model_file` finds; ``None``: after its file."""
    return None if Path(model).is_file() or ":" in model else model


def place(
    app: App,
    swarm: list[LocalNode],
    path: Path,
    *,
    cuts: tuple[int, ...] | None = None,
    ranks: int | None = None,
    name: str | None = None,
) -> PlacementView:
    """Give a model file to the first node and split it over ``ranks`` nodes (default: all).

    Every node gets one slice; ``cuts`` are the layers where the next begins (default: evenly).
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.schema import LoadRequest, PullRequest  # noqa: PLC0415

    client = swarm[0].client
    count = ranks or len(swarm)
    with Reporter(app.out, stream_json=False) as report:
        model = client.pull(PullRequest(source=f"file:{path}", name=name), report)
        if cuts is None and model.n_layers is not None:
            cuts = even_cuts(model.n_layers, count)
        request = LoadRequest(
            model=model.digest,
            ranks=count,
            layers=cuts,
            nodes=tuple(node.peer_id for node in swarm[:count]),
            n_ctx=N_CTX,
            standbys=0,  # one machine gains nothing by holding everything twice
            spares=0,
        )
        return client.load(request, report)


def even_cuts(n_layers: int, ranks: int) -> tuple[int, ...]:
    """Return the layers where ranks of even size begin, the first rank's left out."""
    return tuple(n_layers * rank // ranks for rank in range(1, ranks))


def stream_answer(app: App, node: LocalNode, ask: object) -> Answer:
    """Stream the answer of a node to the terminal and return the whole of it."""
    from pyagent_node.node.answers import Answer, Ask  # noqa: PLC0415

    assert isinstance(ask, Ask)
    with contextlib.closing(node.client.generate(ask)) as pieces:
        for piece in pieces:
            if isinstance(piece, Answer):
                app.out.piece("\n")
                return piece
            app.out.piece(piece.text)
    raise AssertionError("the client raises unless an answer came")


def _show_ranks(app: App, placement: PlacementView) -> None:
    from pyagent_node.cli.views import placement_view  # noqa: PLC0415

    if not app.out.json:
        app.out.console.print(placement_view(placement))


def _summary(app: App, result: DemoResult, answer: Answer, reference: SingleAnswer) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("", "tokens", "tokens/s", "first token"):
        table.add_column(column, justify="left" if not column else "right")
    for name, tokens, speed, first in (
        (
            f"{len(result.ranks)} nodes",
            answer.completion_tokens,
            answer.tokens_per_second,
            answer.ttft_seconds,
        ),
        (
            "one process",
            len(reference.token_ids),
            reference.tokens_per_second,
            reference.ttft_seconds,
        ),
    ):
        table.add_row(name, str(tokens), f"{speed:.1f}", f"{first * 1000:.0f} ms")
    app.out.console.print()
    app.out.console.print(table)
    same = result.identical_to_single_process
    app.out.text(f"\nTokens equal to those of one process: {'yes' if same else 'NO'}")
