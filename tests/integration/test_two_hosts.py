"""Two hosts with nothing in common but a network: one invites, the other joins, both answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.namespaces import Host, two_hosts, why_not

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path) as pair:
        yield pair


def test_two_hosts_join_by_ticket_and_answer_a_prompt(
    hosts: tuple[Host, Host], bundled_model: Path
) -> None:
    alice, bob = hosts
    alice.ask("mesh", "create", "pair")
    with alice.daemon():
        ticket = str(alice.ask("invite")["ticket"])
        bob.ask("join", ticket)
        with bob.daemon():
            pulled = alice.ask("model", "pull", str(bundled_model))["model"]
            assert isinstance(pulled, dict)
            alice.ask("model", "load", str(pulled["digest"]), "--ranks", "2", timeout=200)
            question = ("generate", "Name three rivers.", "--max-tokens", "12", "--seed", "7")
            first = alice.ask(*question)
            second = bob.ask(*question)
            assert first["text"]
            assert first["text"] == second["text"]


def test_a_ticket_works_once(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    alice, bob = hosts
    alice.ask("mesh", "create", "pair")
    with alice.daemon():
        ticket = str(alice.ask("invite")["ticket"])
        bob.ask("join", ticket)
        mallory = Host(bob.namespace, bob.address, tmp_path / "mallory")
        status, error = mallory.refused("join", ticket)
        assert (status, error["code"]) == (4, "ticket_used")
        assert ticket not in str(error)
