"""Contexts over real daemons: two are killed and one comes while documents are added and found."""

from __future__ import annotations

import shutil
import threading
import time
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
