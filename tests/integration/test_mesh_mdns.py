"""Discovery on a local network: a namespace of its own with one link, and real multicast on it."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest

from .namespaces import why_not

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

PROGRAM = """
import trio
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.mesh import MeshConfig, open_mesh
from pyagent_node.node.mesh.authoriser import PeerAdmission


class Open:
    def credentials(self):
        return b""

    def judge(self, peer, credentials):
        return PeerAdmission("x", "voter")


def config(fingerprint):
    return MeshConfig(
        NodeKey.generate(),
        Open(),
        listen=("/ip4/0.0.0.0/tcp/0",),
        mdns=True,
        fingerprint=fingerprint,
    )


async def up(mesh, peer):
    async with mesh.events() as events:
        async for event in events:
            assert event.peer_id == peer, event
            return


async def main():
    ours, other = "a" * 32, "b" * 32
    async with (
        open_mesh(config(ours)) as a,
        open_mesh(config(ours)) as b,
        open_mesh(config(other)) as c,
    ):
        with trio.fail_after(30):
            await up(a, b.peer_id)
            await up(b, a.peer_id)
        assert not c.peers(), c.peers()
    print("found")


trio.run(main)
"""


def test_members_on_one_link_find_each_other_and_nobody_else() -> None:
    name = f"pyagent-{secrets.token_hex(4)}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "add", "left", "type", "veth", "peer", "name", "right")
        ip("-n", name, "addr", "add", "10.77.0.1/24", "dev", "left")
        ip("-n", name, "link", "set", "left", "up")
        ip("-n", name, "link", "set", "right", "up")
        ip("-n", name, "route", "add", "224.0.0.0/4", "dev", "left")
        done = subprocess.run(
            ["ip", "netns", "exec", name, sys.executable, "-W", "error", "-c", PROGRAM],
            check=False,
            capture_output=True,
            text=True,
            timeout=90,
        )
    finally:
        ip("netns", "delete", name)
    assert done.stdout == "found\n", done.stderr
