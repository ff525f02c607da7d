"""Operators at work on a mesh of real daemons: voters, leader, members, a lost majority."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import Conflict, PyAgentError, Refused
from pyagent_node.node.api.mesh_schema import RaftView
from pyagent_node.node.api.schema import InviteRequest
from pyagent_node.node.client import Client
from pyagent_node.node.home import Home
from pyagent_node.node.joining import join
from pyagent_node.node.log_recovery import recover_log
from pyagent_node.node.profiles import mesh_ids

from .daemons import Daemon
from .waiting import until

pytestmark = [pytest.mark.daemons, pytest.mark.slow]


def spares(client: Client) -> int:
    (setting,) = [each for each in client.mesh.settings().settings if each.name == "spares"]
    return setting.value


class Swarm:
    """Daemons of one mesh, by name; the first that starts creates it."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self.daemons: dict[str, Daemon] = {}
        self._stack = stack

    def home(self, name: str) -> Home:
        return Home(self.root / name)

    def start(self, name: str) -> Daemon:
        daemon = self._stack.enter_context(Daemon(self.home(name), "--name", name))
        daemon.up()
        self.daemons[name] = daemon
        return daemon

    def join(self, name: str, role: str = "voter", *, again: bool = False) -> None:
        ticket = self.ticket(role)
        trio.run(lambda: join(self.home(name), ticket, name=name, again=again))

    def ticket(self, role: str = "voter") -> str:
        first = next(iter(self.daemons.values()))
        with first.client() as client:
            return client.invite(InviteRequest(role=role, ttl_seconds=600)).ticket

    def raft(self, name: str) -> RaftView:
        with self.daemons[name].client() as client:
            return client.mesh.raft()

    def voters(self, name: str = "a") -> str:
        return "".join(sorted(node.name for node in self.raft(name).followers if node.voter))

    def until(self, what: Callable[[], bool], why: str = "") -> None:
        """Wait until ``what`` holds."""
        with next(iter(self.daemons.values())).client() as client:
            until(client, what, why)

    def address(self, name: str) -> tuple[str, ...]:
        with self.daemons[name].client() as client:
            return client.status().node.addresses

    def kill(self, *names: str) -> None:
        for name in names:
            self.daemons.pop(name).terminate(signal.SIGKILL)


@contextmanager
def swarm(root: Path, others: str = "bc") -> Iterator[Swarm]:
    with ExitStack() as stack:
        it = Swarm(root, stack)
        it.start("a")
        for name in others:
            it.join(name)
            it.start(name)
        yield it
        for daemon in it.daemons.values():
            assert daemon.terminate() == 0, daemon.log


def test_voters_leader_and_members(tmp_path: Path) -> None:
    with swarm(tmp_path, "bcd") as it:
        it.until(lambda: len(it.voters()) == 3, "three voters")
        with it.daemons["a"].client() as client:
            view = client.mesh.set_voters(("a", "b", "d"))
            assert sorted(n.name for n in view.followers if n.voter) == ["a", "b", "d"]
            assert client.mesh.transfer("b").leader_name == "b"
            it.until(lambda: it.raft("d").leader_name == "b")
            reply = client.mesh.verify()
            assert reply.good
            assert {node.verdict for node in reply.nodes} <= {"same", "behind"}
            assert client.mesh.snapshot().index > 0
            assert client.mesh.verify().good
            assert [m.name for m in client.mesh.members().members] == list("abcd")
            assert client.mesh.remove("d", force=False).status == "removed"
        it.until(lambda: it.voters() == "abc", "c votes for d")
        with it.daemons["b"].client() as client:
            with pytest.raises(Refused) as refused:
                client.mesh.revoke("c", "no")
            assert refused.value.code == "not_authority"
            assert "Do it on a" in str(refused.value)
        with it.daemons["a"].client() as client:
            it.until(lambda: [p.name for p in client.peers().peers if p.name == "d"] == [])
            client.mesh.set_voters(())
        it.daemons.pop("d").terminate()
        it.join("d", again=True)
        it.start("d")
        with it.daemons["a"].client() as client:
            it.until(lambda: any(p.name == "d" for p in client.peers().peers), "d is back")
            assert client.mesh.members().members[3].status == "member"
            assert client.mesh.revoke("d", "stolen").status == "revoked"
            it.until(lambda: all(p.name != "d" for p in client.peers().peers), "d is out")


def test_a_lost_majority_and_a_new_beginning(tmp_path: Path) -> None:
    with swarm(tmp_path) as it:
        it.until(lambda: it.voters() == "abc", "three voters")
        with it.daemons["a"].client() as client:
            client.mesh.change_setting("spares", 3)
        it.kill("b", "c")
        it.until(lambda: it.raft("a").missing == 1, "the loss shows")
        with it.daemons["a"].client() as client:
            with ThreadPoolExecutor(2) as at_once:
                change = at_once.submit(client.mesh.change_setting, "standbys", 2)
                voters = at_once.submit(client.mesh.set_voters, ())
                with pytest.raises(PyAgentError) as caught:
                    change.result()
                assert caught.value.code in ("no_leader", "propose_timeout")
                with pytest.raises(PyAgentError):
                    voters.result()
            assert client.status().node.name == "a"
        with pytest.raises(Conflict):
            recover_log(it.home("a"))
        assert it.daemons.pop("a").terminate() == 0
        done = recover_log(it.home("a"))
        assert len(done.lost) == 2
        assert Path(done.backup).is_dir()
        it.start("a")
        it.until(lambda: it.raft("a").leader_name == "a", "a leads")
        with it.daemons["a"].client() as client:
            assert spares(client) == 3
            client.mesh.change_setting("spares", 2)
        (address, *_) = it.address("a")
        for name in "bc":  # the lost ones turn up after all: without their logs they are welcome
            (mesh,) = mesh_ids(it.home(name))
            shutil.rmtree(it.home(name).log_dir(mesh))
            with it.start(name).client() as client:
                client.connect(address)
        it.until(lambda: it.voters() == "abc", "the others follow and vote again")
        with it.daemons["c"].client() as client:
            assert spares(client) == 2
            assert client.mesh.verify().good
