"""A node of the swarm dies, and comes back."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.benchmarks.swarm import local_swarm
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import InviteRequest, LoadRequest, PullRequest

from .daemons import Daemon
from .waiting import until

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]


def test_a_node_that_dies_is_replaced_and_welcomed_back(bundled_model: Path) -> None:
    with local_swarm(2) as (first, second):
        client = first.client
        model = client.pull(PullRequest(source=f"file:{bundled_model}")).name
        nodes = (first.peer_id, second.peer_id)
        client.load(LoadRequest(model=model, layers=(15,), nodes=nodes))
        asked = Ask(
            model=model, messages=(ChatMessage("user", "Name three rivers."),), max_tokens=8, seed=7
        )
        *_, before = client.generate(asked)
        assert isinstance(before, Answer)
        long = Ask(model=model, prompt="Once", max_tokens=80, ignore_eos=True, seed=1)
        *_, undisturbed = client.generate(long)
        assert isinstance(undisturbed, Answer)

        pieces = client.generate(long)
        for _ in range(5):
            next(pieces)
        assert second.process is not None
        runners = psutil.Process(second.pid).children(recursive=True)
        second.process.kill()
        second.process.wait()
        *_, answer = pieces
        assert isinstance(answer, Answer)
        assert answer.token_ids == undisturbed.token_ids
        assert not psutil.wait_procs(runners, 10)[1]  # they end with their daemon
        (placement,) = client.placements()
        assert {rank.peer_id for rank in placement.ranks} == {first.peer_id}
        assert placement.epoch == 2

        with Daemon(second.home, "--name", second.name) as again:
            again.up()

            def reserved() -> bool:
                (placement,) = client.placements()
                return all([r.state for r in rank.standbys] == ["hot"] for rank in placement.ranks)

            until(client, reserved, "every rank has its standby again")
            (placement,) = client.placements()
            assert placement.epoch == 2  # what serves stays where it is
            *_, after = client.generate(asked)
            assert isinstance(after, Answer)
            assert after.token_ids == before.token_ids
            with again.client() as own:
                *_, there = own.generate(asked)
                assert isinstance(there, Answer)
                assert there.token_ids == before.token_ids
            assert again.terminate() == 0


def test_a_node_answers_while_the_one_that_decides_is_away(bundled_model: Path) -> None:
    with local_swarm(2) as (first, second):
        client = second.client
        model = client.pull(PullRequest(source=f"file:{bundled_model}")).name
        client.load(LoadRequest(model=model, layers=(15,), nodes=(second.peer_id, second.peer_id)))
        assert first.process is not None
        first.process.terminate()
        assert first.process.wait(20) == 0
        *_, answer = client.generate(Ask(model=model, prompt="Once", max_tokens=5, seed=1))
        assert isinstance(answer, Answer)
        with pytest.raises(PyAgentError) as caught:
            client.invite(InviteRequest())
        assert caught.value.code == "not_authority"
        with pytest.raises(Unavailable):
            client.unload(model)
        findings = {c.name: c.result for c in client.doctor().checks}
        assert findings["agreement"] == "failed"
