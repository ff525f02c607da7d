"""A node of the swarm dies, and comes back."""

from __future__ import annotations

from pathlib import Path

import httpx
import psutil
import pytest

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.benchmarks.swarm import local_swarm
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.api.schema import InviteRequest, LoadRequest, PullRequest
from pyagent_node.node.client import Answer, Ask
from tests.integration.daemons import Daemon

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]


def test_a_node_that_dies_is_named_and_missed_and_welcomed_back(bundled_model: Path) -> None:
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

        endless = client.generate(
            Ask(model=model, prompt="Once", max_tokens=1500, ignore_eos=True, seed=1)
        )
        for _ in range(5):
            next(endless)
        assert second.process is not None
        runners = psutil.Process(second.pid).children(recursive=True)
        second.process.kill()
        second.process.wait()
        with pytest.raises(Unavailable) as caught:
            for _ in endless:
                pass
        assert caught.value.code == "peer_lost"
        assert caught.value.facts["rank"] == 1
        assert caught.value.facts["peer_id"] == second.peer_id
        assert not psutil.wait_procs(runners, 10)[1]  # they end with their daemon

        # The daemon lives, says what is missing, and refuses rather than hangs.
        assert first.state is not None
        ready = httpx.get(f"{first.state.api_url}/readyz")
        assert ready.status_code == 503
        assert second.name in ready.text
        assert any(c.result != "ok" for c in client.doctor().checks)
        with pytest.raises(PyAgentError) as refused:
            list(client.generate(asked))
        assert refused.value.http_status in (503, 504)

        with Daemon(second.home, "--name", second.name) as again:
            again.up()
            while not client.ready().ready:
                pass
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
