"""Contexts over real daemons: two are killed and one comes while documents are added and found."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyagent_node.base.types import ContextPolicy
from pyagent_node.benchmarks.swarm import (
    LocalNode,
    await_up,
    begin_join,
    finish_join,
    local_swarm,
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


def ask(client: Client, name: str) -> QueryReply:
    return client.contexts.query("shelf", QueryRequest(question=FACTS[name][1], count=3))


def gist(reply: QueryReply) -> list[tuple[str, str, float]]:
    return [(hit.source, hit.text, hit.score) for hit in reply.hits]


def add(client: Client, name: str) -> None:
    """Add a document, again while the swarm is changing."""
    data = FACTS[name][0].encode()
    until(client, lambda: client.contexts.add("shelf", f"{name}.txt", data, modified=1), name)


def restored(nodes: list[LocalNode], documents: int) -> bool:
    """Whether the nodes hold two copies of every chunk together."""
    views = [node.client.contexts.show("shelf").context for node in nodes]
    return (
        all(view.documents == view.chunks == documents for view in views)
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


class Asker(threading.Thread):
    """Asks one node for what is there already, until it is told to stop."""

    def __init__(self, client: Client, names: list[str]) -> None:
        super().__init__()
        self.client, self.names = client, names
        self.answers: list[tuple[str, QueryReply]] = []
        self.failures: list[Exception] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            name = self.names[len(self.answers) % len(self.names)]
            try:
                self.answers.append((name, ask(self.client, name)))
            except Exception as error:
                self.failures.append(error)
            self.over.wait(0.1)


def test_two_daemons_are_killed_and_one_comes(encoder_files: EncoderFiles) -> None:
    names = list(FACTS)
    with local_swarm(4) as nodes, ExitStack() as stack:
        for node in nodes:
            give_encoder(node, encoder_files)
        first, second, third, fourth = by_votes(nodes)
        fifth = LocalNode("node-4", Home(first.home.root.parent / "node-4"))
        give_encoder(fifth, encoder_files)
        stack.callback(stop_all, [fifth])
        first.client.mesh.change_setting("context_patience", 2)
        first.client.contexts.create("shelf", ContextPolicy())
        for name in names[:4]:
            add(first.client, name)
        wait_restored(nodes, 4)
        before = {name: gist(ask(second.client, name)) for name in names[:4]}
        asker = Asker(Client.from_home(first.home), names[:4])
        asker.start()
        try:
            fourth.kill()
            for name in names[4:6]:
                add(second.client, name)
            wait_restored([first, second, third], 6)
            finish_join(fifth, begin_join(first, fifth), time.monotonic() + 60)
            start_process(fifth)
            await_up(fifth, time.monotonic() + 60)
            for name in names[6:8]:
                add(third.client, name)
            wait_restored([first, second, third, fifth], 8)
            third.kill()
            for name in names[8:]:
                add(second.client, name)
            wait_restored([first, second, fifth], len(names))
        finally:
            asker.over.set()
            asker.join()
            asker.client.close()
        assert asker.failures == []
        assert len(asker.answers) > 10
        for name, reply in asker.answers:
            assert reply.hits[0].source == before[name][0][0]
        for name in names:
            replies = [ask(node.client, name) for node in (first, second, fifth)]
            assert all(reply.missing == 0 for reply in replies)
            assert all(gist(reply) == gist(replies[0]) for reply in replies)
            if name in before:
                assert gist(replies[0])[0][:2] == before[name][0][:2]


def test_two_daemons_add_at_once_and_sketches_are_spread(encoder_files: EncoderFiles) -> None:
    with local_swarm(3) as nodes:
        for node in nodes:
            give_encoder(node, encoder_files)
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

        def spread(wanted: bool) -> bool:
            views = [client.contexts.show("shelf").context for client in clients]
            here = [view.sketch_bytes_here for view in views]
            if wanted:  # two owners have each, with its place and its group besides
                done = sum(here) * SKETCH_BYTES == 2 * (SKETCH_BYTES + 3) * views[0].sketch_bytes
            else:
                done = all(view.sketch_bytes_here >= view.sketch_bytes for view in views)
            return done and all(view.spread == wanted for view in views)

        until(clients[0], lambda: spread(True), "the sketches are spread", seconds=60)
        for name in names:
            for client in clients:
                reply = ask(client, name)
                assert reply.missing == 0
                assert reply.hits[0].text == before[name][0][1]
        clients[0].mesh.change_setting("context_index_bytes", None)
        until(clients[0], lambda: spread(False), "every daemon has all sketches", seconds=60)
        for name in names:
            reply = ask(clients[1], name)
            assert (reply.missing, reply.probed) == (0, 0)
            assert gist(reply)[0][:2] == before[name][0][:2]
