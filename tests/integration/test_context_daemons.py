"""Contexts over real daemons: two are killed and one comes while documents are added and found."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pyagent_node.base.types import ContextPolicy
from pyagent_node.benchmarks.swarm import (
    LocalNode,
    await_up,
    begin_join,
    finish_join,
    running,
    start_process,
    stop_all,
)
from pyagent_node.inference.models.encoders import (
    MINILM_MODEL,
    MINILM_TOKENIZER,
    EncoderFiles,
)
from pyagent_node.node.api.context_schema import QueryReply, QueryRequest
from pyagent_node.node.client import Client
from pyagent_node.node.home import Home
from pyagent_node.sharding.context.catalog import SKETCH_BYTES

from .waiting import until, votes_settled

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

FACTS = {
    "lamp": ("The spare lamp of the lighthouse lies under the third stair.", "where is the lamp"),
    "bees": ("The bees of the monastery make honey from heather.", "what do the bees make"),
    "boat": ("The ferry to the island leaves at a quarter past six.", "when does the ferry leave"),
    "bread": ("The baker lets her sourdough rest for nineteen hours.", "how long rests sourdough"),
    "clock": ("The tower's clock is four minutes slow on purpose.", "is the tower's clock right"),
    "dog": ("The shepherd whistles twice to call her dog back.", "how is the dog called back"),
    "well": ("The well in the courtyard is thirty metres deep.", "how deep is the well"),
    "wine": ("The cellar holds two hundred bottles of white wine.", "how much wine is there"),
    "snow": ("The pass is closed by snow from November to May.", "when does snow close the pass"),
    "train": ("The night train to the coast has only sleeping cars.", "what has the night train"),
}
"""By document: what it says, and a question."""


def fresh_node(root: Path, number: int, files: EncoderFiles) -> LocalNode:
    """A node that has the encoder and gives chunks of replaced documents up after a second."""
    node = LocalNode(f"node-{number}", Home(root / f"node-{number}"))
    give_encoder(node, files)
    node.home.config_path.parent.mkdir(parents=True, exist_ok=True)
    node.home.config_path.write_text("context_keep_seconds = 1\n")
    return node


@contextmanager
def swarm(count: int, files: EncoderFiles) -> Iterator[list[LocalNode]]:
    with tempfile.TemporaryDirectory(prefix="pyagent-", ignore_cleanup_errors=True) as root:
        nodes = [fresh_node(Path(root), number, files) for number in range(count)]
        with running(nodes):
            yield nodes


def ask(client: Client, name: str) -> QueryReply:
    return client.contexts.query("shelf", QueryRequest(question=FACTS[name][1], count=3))


def gist(reply: QueryReply) -> list[tuple[str, str, float]]:
    return [(hit.source, hit.text, hit.score) for hit in reply.hits]


def add(client: Client, name: str) -> None:
    """Add a document, again while the swarm is changing."""
    data = FACTS[name][0].encode()
    until(client, lambda: client.contexts.add("shelf", f"{name}.txt", data, modified=1), name)


def restored(nodes: list[LocalNode], documents: int) -> bool:
    """Whether these nodes own everything, nobody else does, and they hold two copies together."""
    views = [node.client.contexts.show("shelf").context for node in nodes]
    return (
        all(view.owners == len(nodes) for view in views)
        and all(view.documents == view.chunks == documents for view in views)
        and sum(view.bodies_here for view in views) == 2 * documents
    )


def by_votes(nodes: list[LocalNode]) -> list[LocalNode]:
    """Return the first node, another voter, a third one, and the one that does not vote.

    Of three voters only one is killed, so that there is somebody to decide who owns what.
    """
    client = nodes[0].client
    until(client, lambda: votes_settled(client, 3), "three of four nodes vote")
    voters = client.status().consensus.voters
    return [nodes[0], *sorted(nodes[1:], key=lambda node: node.peer_id not in voters)]


def wait_restored(nodes: list[LocalNode], documents: int) -> None:
    why = f"two copies of {documents} documents at {len(nodes)} nodes"
    until(nodes[0].client, lambda: restored(nodes, documents), why, seconds=90)


def give_encoder(node: LocalNode, files: EncoderFiles) -> None:
    for wanted, path in ((MINILM_MODEL, files.model), (MINILM_TOKENIZER, files.tokenizer)):
        place = Path(node.home.models_dir, ".encoders", wanted.sha256, wanted.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def spread(clients: list[Client], wanted: bool) -> bool:
    """Whether the sketches lie spread over these nodes, or all on each of them."""
    views = [client.contexts.show("shelf").context for client in clients]
    here = [view.sketch_bytes_here for view in views]
    if wanted:  # two owners have each, with its place and its group besides
        done = sum(here) * SKETCH_BYTES == 2 * (SKETCH_BYTES + 3) * views[0].sketch_bytes
    else:
        done = all(view.sketch_bytes_here >= view.sketch_bytes for view in views)
    return done and all(view.spread == wanted for view in views)


class Asker(threading.Thread):
    """Asks one node for what is there already, until it is told to stop."""

    def __init__(self, client: Client, names: list[str]) -> None:
        super().__init__()
        self.client, self.names = client, names
        self.answers: list[tuple[str, QueryReply]] = []
        self.failures: list[Exception] = []
        self.over = threading.Event()

    def __enter__(self) -> Asker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()
        self.client.close()

    def run(self) -> None:
        while not self.over.is_set():
            name = self.names[len(self.answers) % len(self.names)]
            try:
                self.answers.append((name, ask(self.client, name)))
            except Exception as error:
                self.failures.append(error)
            self.over.wait(0.1)


def ask_all(nodes: list[LocalNode], names: list[str]) -> dict[str, list[QueryReply]]:
    """Ask every node for everything, the nodes at the same time."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        rows = pool.map(lambda node: [ask(node.client, name) for name in names], nodes)
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_two_daemons_are_killed_and_one_comes(encoder_files: EncoderFiles) -> None:
    """One is killed and one comes while documents are added, one while they are only asked for.

    The first time every node has all sketches, the second time these lie spread.
    """
    names = list(FACTS)
    with swarm(4, encoder_files) as nodes, ExitStack() as stack:
        first, second, third, fourth = by_votes(nodes)
        fifth = fresh_node(first.home.root.parent, 4, encoder_files)
        stack.callback(stop_all, [fifth])
        first.client.mesh.change_setting("context_patience", 2)
        first.client.contexts.create("shelf", ContextPolicy())
        for name in names[:4]:
            add(first.client, name)
        wait_restored(nodes, 4)
        before = {name: gist(ask(second.client, name)) for name in names[:4]}
        with Asker(Client.from_home(first.home), names[:4]) as asker:
            fourth.kill()
            for name in names[4:6]:
                add(second.client, name)
            wait_restored([first, second, third], 6)
            finish_join(fifth, begin_join(first, fifth), time.monotonic() + 60)
            start_process(fifth)
            await_up(fifth, time.monotonic() + 60)
            for name in names[6:]:
                add(third.client, name)
            left = [first, second, third, fifth]
            wait_restored(left, len(names))
        assert asker.failures == []
        assert len(asker.answers) > 10
        for name, reply in asker.answers:
            assert reply.hits[0].source == before[name][0][0]
        first.client.mesh.change_setting("context_index_bytes", 0)
        clients = [node.client for node in left]
        until(clients[0], lambda: spread(clients, True), "the sketches are spread")
        full = {name: gist(replies[0]) for name, replies in ask_all([first], names).items()}
        with Asker(Client.from_home(first.home), names) as asker:
            third.kill()
            left.remove(third)
            clients = [node.client for node in left]
            wait_restored(left, len(names))
            until(clients[0], lambda: spread(clients, True), "the sketches are spread again")
        assert asker.failures == []
        assert len(asker.answers) > 3
        for name, reply in asker.answers:
            assert (gist(reply), reply.missing) == (full[name], 0)
        for name, replies in ask_all(left, names).items():
            assert all(reply.missing == 0 for reply in replies)
            assert all(gist(reply) == full[name] for reply in replies)
            if name in before:
                assert full[name][0][:2] == before[name][0][:2]


def test_two_daemons_add_at_once_and_sketches_are_spread(encoder_files: EncoderFiles) -> None:
    with swarm(3, encoder_files) as nodes:
        clients = [node.client for node in nodes]
        clients[0].contexts.create("shelf", ContextPolicy())
        names = list(FACTS)
        until(clients[1], lambda: clients[1].contexts.show("shelf"), "the context is known")
        both = threading.Barrier(2)

        def adding(client: Client, own: list[str]) -> None:
            both.wait()
            for name in own:
                add(client, name)
            text = f"Written with {own[0]} at hand.".encode()
            client.contexts.add("shelf", "same.txt", text, modified=1)

        with ThreadPoolExecutor(2) as pool:
            halves = [pool.submit(adding, clients[0], names[::2])]
            halves.append(pool.submit(adding, clients[1], names[1::2]))
            for half in halves:
                half.result()
        wait_restored(nodes, len(names) + 1)
        versions = {
            (row.counter, row.writer)
            for client in clients
            for row in client.contexts.show("shelf").documents
            if row.source == "same.txt"
        }
        assert len(versions) == 1  # of two that came at once one has won, the same everywhere
        before = {name: gist(ask(clients[2], name)) for name in names}
        clients[0].mesh.change_setting("context_index_bytes", 0)

        until(clients[0], lambda: spread(clients, True), "the sketches are spread", seconds=60)
        for name, replies in ask_all(nodes, names).items():
            for reply in replies:
                assert reply.missing == 0
                assert reply.hits[0].text == before[name][0][1]
        clients[0].mesh.change_setting("context_index_bytes", None)
        until(
            clients[0], lambda: spread(clients, False), "every daemon has all sketches", seconds=60
        )
        for name in names:
            reply = ask(clients[1], name)
            assert (reply.missing, reply.probed) == (0, 0)
            assert gist(reply)[0][:2] == before[name][0][:2]
