"""A member of a private mesh turns on it, over real libp2p: all it sends is refused and counted.

One node is a whole one, the other shows its certificate and then says what it likes.  At the end
the whole node decides as before, and ``/metrics`` tells of everything.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from pyagent_node.base.errors import PyAgentError, Refused
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import Digest, PeerId, Rank, SessionId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    ModelRecord,
    RegisterModel,
    RevokeMember,
    SetPlacement,
)
from pyagent_node.consensus.raft_core import RAFT_RS
from pyagent_node.consensus.raft_engine import RaftEngine
from pyagent_node.consensus.raft_messages import PROTOCOL as RAFT
from pyagent_node.consensus.raft_messages import (
    RAFT_MESSAGES,
    Hello,
    Propose,
    Refusal,
    frame,
    pieces,
)
from pyagent_node.consensus.raft_storage import raft_id
from pyagent_node.inference.drafting.remote_messages import (
    DRAFT_PROTOCOL,
    FROM_DRAFTER,
    TO_DRAFTER,
    DraftRefused,
    OpenDraft,
)
from pyagent_node.inference.models.blob_messages import PROTOCOL as BLOB
from pyagent_node.inference.models.blob_messages import REPLIES, REQUESTS, BlobError, GetManifest
from pyagent_node.inference.pipeline.frames import PIPE_CODEC, PIPE_PROTOCOL, StageError, Step
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.certificates import Certificate, issue
from pyagent_node.node.config import load_settings
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.joining import join
from pyagent_node.node.journal_messages import PROTOCOL as JOURNAL
from pyagent_node.node.kv_messages import PROTOCOL as KV
from pyagent_node.node.kv_messages import REQUESTS as KV_REQUESTS
from pyagent_node.node.kv_messages import Advert, Fetch, Have, Put
from pyagent_node.node.logs import Redactor
from pyagent_node.node.membership import Credentials, Membership
from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh
from pyagent_node.node.mesh.settings import MeshConfig
from pyagent_node.node.profiles import MeshProfile, create_mesh
from pyagent_node.node.rpc import PROTOCOL as RPC
from pyagent_node.node.runtime import Node, open_node
from pyagent_node.node.services import NodeServices
from pyagent_node.node.tickets import make_ticket
from tests.unit.consensus.raft_lies import candidacies, orders

from .waiting import eventually

pytestmark = [pytest.mark.daemons, pytest.mark.slow]

QUIET = {"listen": ["/ip4/127.0.0.1/tcp/0"], "api_port": 0, "mdns": False}
INCARNATION = b"m" * 16
MODEL = Digest("ab" * 32)
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Attack:
    """The whole node, its metrics, and the member that attacks it."""

    def __init__(self, node: Node, mesh: Libp2pMesh) -> None:
        self.node = node
        self.mesh = mesh
        self.services = NodeServices(node, shutdown=lambda: None)
        self.heard: list[object] = []
        mesh.handle(RAFT, self._listen_raft)
        mesh.handle(PIPE_PROTOCOL, self._listen_pipe)

    @property
    def engine(self) -> RaftEngine:
        assert isinstance(self.node.consensus, RaftEngine)
        return self.node.consensus

    @property
    def raft_id(self) -> int:
        return raft_id(self.mesh.peer_id, INCARNATION)

    def hello(self, *, voter: bool = False) -> Frame:
        return frame(Hello(self.raft_id, INCARNATION, voter=voter, last_index=0))

    async def _listen_raft(self, stream: FrameStream) -> None:
        while (received := await stream.receive()) is not None:
            self.heard.append(RAFT_MESSAGES.decode(received.header))

    async def _listen_pipe(self, stream: FrameStream) -> None:
        while (received := await stream.receive()) is not None:
            self.heard.append(PIPE_CODEC.decode(received.header))

    def metric(self, name: str, **labels: str) -> float:
        """Return a counter as a scrape shows it."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        head = f"pyagent_{name}_total" + (f"{{{wanted}}}" if wanted else "")
        for line in self.services.telemetry.render().decode().splitlines():
            if line.startswith(head + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            await eventually(condition, what, seconds=20)
        except AssertionError:
            text = self.services.telemetry.render().decode()
            shown = [x for x in text.splitlines() if "refused" in x and "#" not in x]
            raise AssertionError(f"{what}\n" + "\n".join(shown)) from None

    async def say(self, protocol: str, *frames: Frame) -> FrameStream:
        stream = await self.mesh.open(self.node.mesh.peer_id, protocol)
        for each in frames:
            await stream.send(each)
        return stream


@asynccontextmanager
async def attack(tmp_path: Path) -> AsyncIterator[Attack]:
    ann, mallory = Home(tmp_path / "ann"), Home(tmp_path / "mallory")
    create_mesh(ann, "meadow", "private", node_name="ann", clock=time.time)
    async with open_node(load_settings(ann, flags=QUIET), ann, Redactor()) as node:
        profile = node.membership.profile
        ticket = make_ticket(
            profile, role="learner", seconds=60, addresses=node.mesh.addresses, now=time.time()
        )
        theirs = await join(mallory, ticket.text, name="mallory")
        async with member(mallory.node_key(), Membership(theirs, clock=time.time), theirs) as mesh:
            await mesh.connect(node.mesh.addresses[0])
            yield Attack(node, mesh)


@asynccontextmanager
async def member(
    key: NodeKey, membership: Membership, profile: MeshProfile
) -> AsyncIterator[Libp2pMesh]:
    listen = ("/ip4/127.0.0.1/tcp/0",)
    config = MeshConfig(key=key, membership=membership, psk=profile.psk, listen=listen)
    async with open_mesh(config) as mesh:
        yield mesh


async def test_all_that_a_hostile_member_sends_is_refused_and_counted(tmp_path: Path) -> None:
    async with attack(tmp_path) as it:
        await malformed(it)
        await oversized(it)
        await false_names(it)
        await future_terms(it)
        await bad_commands(it)
        await replays(it)
        await stale_epochs(it)
        await kv_without_rights(it)
        await false_certificates(it)
        await revoked(it)
        await goes_on(it)


async def malformed(it: Attack) -> None:
    unknown = msgspec.msgpack.encode({"type": "unheard_of"})
    for protocol in (PIPE_PROTOCOL, RPC, BLOB, JOURNAL, KV):
        await it.say(protocol, Frame(b"\xc1 garbage", b"tail"))
        await it.say(protocol, Frame(unknown))
        for code in ("malformed_message", "unknown_message"):
            labels = {"protocol": protocol, "code": code}
            await it.until(lambda labels=labels: it.metric("refused", **labels) >= 1, str(labels))
    before = it.metric("log_refused_messages")
    await it.say(RAFT, Frame(b"\xc1 garbage"))
    await it.until(lambda: it.metric("log_refused_messages") > before, "garbage for the log")


async def oversized(it: Attack) -> None:
    for protocol in (PIPE_PROTOCOL, RPC, BLOB, JOURNAL, KV, RAFT):
        before = it.metric("mesh_refused", code="frame_too_large")
        stream = await it.say(protocol)
        await stream._channel.write(b"\xff" * 8 + b"and more")  # type: ignore[attr-defined]
        await it.until(
            lambda before=before: it.metric("mesh_refused", code="frame_too_large") > before,
            protocol,
        )


async def kv_without_rights(it: Attack) -> None:
    """A learner that was given no layers reads and writes no KV, and no nonsense is noted."""
    other, chain = Digest("cd" * 32), (b"c" * 32,)
    sealed = b"s" * 40
    for request, tail, code in (
        (Have(other, "f16-00000000", chain, 0, 4), b"", "kv_not_yours"),
        (Fetch(other, "f16-00000000", chain, 0, 4), b"", "kv_not_yours"),
        (
            Put(other, "f16-00000000", *chain, b"", 0, 0, (len(sealed),), 1.0),
            sealed,
            "kv_not_yours",
        ),
        (Have(other, "f16-00000000", (b"short",), 0, 4), b"", "bad_kv_request"),
        (Advert(), b"nonsense", "bad_summary"),
    ):
        labels = {"protocol": KV, "code": code}
        before = it.metric("refused", **labels)
        stream = await it.say(KV, Frame(KV_REQUESTS.encode(request), tail))
        answer = await stream.receive()
        assert answer is not None
        assert code.encode() in answer.header
        assert it.metric("refused", **labels) == before + 1
        await stream.aclose()
    assert not it.node.kv.vault.store.held()


async def false_names(it: Attack) -> None:
    """Another node's greeting is not believed, nor that of nobody."""
    before = it.metric("log_refused_messages")
    node = it.engine.hello()
    await it.say(RAFT, frame(node))
    await it.until(lambda: it.metric("log_refused_messages") > before, "a replayed greeting")


async def future_terms(it: Attack) -> None:
    """A follower of the log tells of terms to come, orders and stands for election."""
    own, me = it.raft_id, it.engine.members.me
    term = it.engine.status().term
    await it.say(RAFT, it.hello())
    await it.until(lambda: it.mesh.peer_id in it.engine.status().learners, "it follows the log")
    for voter in (False, True):
        said = [it.hello(voter=voter)]
        for ahead in (0, 1, 1 << 20, 1 << 40):
            for data in (
                *orders(RAFT_RS, own, me, term - 1 + ahead, b"forged"),
                *candidacies(RAFT_RS, own, me, term - 1 + ahead),
            ):
                said += pieces(me, data)
        due = it.metric("log_refused_messages") + len(said) - 1
        await it.say(RAFT, *said)
        await it.until(
            lambda due=due: it.metric("log_refused_messages") >= due,
            "orders of one who must not give any",
        )
    assert it.engine.status().term == term
    assert it.engine.status().role == "leader"


async def bad_commands(it: Attack) -> None:
    """Commands without a schema, and those that a learner may not propose."""
    mine = it.mesh.peer_id
    commands = {
        b"": "malformed_message",
        b"\xc1": "malformed_message",
        msgspec.msgpack.encode({"type": "set_fire"}): "unknown_message",
        msgspec.msgpack.encode({"type": "revoke_member", "peer_id": 7}): "malformed_message",
        bytes(60_000): "command_too_large",
        encode_command(RevokeMember(it.node.mesh.peer_id, "mine")): "cannot_revoke_writer",
        encode_command(AdmitMember(mine, "mallory", "voter", b"me")): "not_authority",
        encode_command(BurnTicket("0" * 32, mine, int(time.time()))): "not_authority",
    }
    before = it.metric("log_refused_proposals")
    it.heard.clear()
    index = it.engine.state.index
    said = [frame(Propose(bytes([n]) * 16, each, index)) for n, each in enumerate(commands)]
    await it.say(RAFT, it.hello(), *said)
    await it.until(
        lambda: it.metric("log_refused_proposals") == before + len(commands), "bad commands"
    )
    await it.until(
        lambda: len([x for x in it.heard if isinstance(x, Refusal)]) == len(commands), "answers"
    )
    codes = [each.error.code for each in it.heard if isinstance(each, Refusal)]
    assert codes == list(commands.values())
    assert it.engine.state.index == index


async def replays(it: Attack) -> None:
    """The same proposal again and again happens once."""
    record = ModelRecord(MODEL, "toy", 1, "llama", 4, 8, 8, 64, Digest("0" * 64), created=0)
    said = frame(Propose(b"r" * 16, encode_command(RegisterModel(record)), it.engine.state.index))
    await it.say(RAFT, it.hello(), said, said, said)
    await it.until(lambda: MODEL in it.engine.state.models, "a proposal that is allowed")
    index = it.engine.state.index
    await it.say(RAFT, it.hello(), said, said, said)
    await it.engine.read_barrier()
    assert it.engine.state.index == index


async def stale_epochs(it: Attack) -> None:
    """What is asked for a placement that was replaced is refused with the epoch that holds."""
    ranks = (Rank(0, Slice(0, 4, True), it.mesh.peer_id),)
    for epoch in range(3):
        await it.engine.propose(SetPlacement(MODEL, ranks, 64, 1, epoch))
    stream = await it.say(BLOB, Frame(REQUESTS.encode(GetManifest(MODEL, 1))))
    received = await stream.receive()
    assert received is not None
    reply = REPLIES.decode(received.header)
    assert isinstance(reply, BlobError)
    assert (reply.info.code, reply.info.facts["epoch"]) == ("stale_epoch", 3)
    assert it.metric("refused", protocol=BLOB, code="stale_epoch") == 1
    step = Step(SessionId("s" * 32), MODEL, 1, 0, 0, 0, 1, True)
    it.heard.clear()
    await it.say(PIPE_PROTOCOL, Frame(PIPE_CODEC.encode(step), bytes(4)))
    await it.until(lambda: any(isinstance(x, StageError) for x in it.heard), "an answer")
    assert it.metric("refused", protocol=PIPE_PROTOCOL, code="stage_not_ready") == 1


async def false_certificates(it: Attack) -> None:
    """A stranger that holds the mesh's key, but no certificate of its authority."""
    profile = it.node.membership.profile
    key, authority = NodeKey.generate(), NodeKey.generate()
    now = int(time.time())
    made = Certificate(profile.mesh_id, key.peer_id, "eve", "voter", now, now + 3600)

    class Liar(Membership):
        """Shows what it is told to."""

        shown = b""

        def credentials(self) -> bytes:
            own = Credentials(profile.mesh_id, "eve", "voter", self.shown)
            return msgspec.msgpack.encode(own)

    liar = Liar(profile, clock=time.time)
    async with member(key, liar, profile) as mesh:
        for shown, code in (
            (issue(authority, made), "certificate_forged"),
            (profile.certificate, "certificate_forged"),  # another's, seen on the wire
            (b"\xc1", "certificate_forged"),
            (b"", "no_certificate"),
        ):
            liar.shown = shown
            before = it.metric("mesh_refused", code=code)
            with pytest.raises(Refused) as caught:
                await mesh.connect(it.node.mesh.addresses[0])
            assert caught.value.code == code
            await it.until(
                lambda code=code, before=before: it.metric("mesh_refused", code=code) > before,
                "a false certificate",
            )
            with pytest.raises(PyAgentError):  # no protocol is spoken with who did not get in
                await mesh.open(it.node.mesh.peer_id, DRAFT_PROTOCOL)


async def asks_to_draft(it: Attack) -> FrameStream:
    """Ask for guesses; what comes back is that there is no drafter here, so it was let in."""
    opening = OpenDraft(MODEL, 1, Digest("cd" * 32), SamplingParams())
    stream = await it.say(DRAFT_PROTOCOL, Frame(TO_DRAFTER.encode(opening)))
    received = await stream.receive()
    assert received is not None
    reply = FROM_DRAFTER.decode(received.header)
    assert isinstance(reply, DraftRefused)
    assert reply.error.code == "drafter_not_ready"
    return await it.mesh.open(it.node.mesh.peer_id, DRAFT_PROTOCOL)


async def revoked(it: Attack) -> None:
    """Who is shut out is disconnected at once, and does not come back; no stream of it goes on."""
    asking = await asks_to_draft(it)
    before = it.metric("mesh_refused", code="revoked")
    await it.engine.propose(RevokeMember(it.mesh.peer_id, "an enemy"))
    await it.until(lambda: not it.node.mesh.peers(), "it is out")
    with pytest.raises(PyAgentError) as caught:
        await it.mesh.connect(it.node.mesh.addresses[0])
    assert caught.value.code == "revoked"
    with pytest.raises(PyAgentError):
        await it.mesh.open(it.node.mesh.peer_id, DRAFT_PROTOCOL)
    with pytest.raises(PyAgentError):
        await asking.send(Frame(b"more"))
    await it.until(lambda: it.metric("mesh_refused", code="revoked") >= before + 2, "it stays out")


async def goes_on(it: Attack) -> None:
    """The node decides as before; every metric that it shows is in the documentation."""
    await it.engine.read_barrier()
    before = it.engine.state.index
    await it.engine.propose(BurnTicket("1" * 32, PeerId("x"), 1))
    assert it.engine.state.index == before + 1
    assert it.engine.status().problem is None
    text, described = it.services.telemetry.render().decode(), DOCS.read_text()
    names = set(re.findall(r"^# TYPE pyagent_(\S+)", text, re.MULTILINE))
    missing = sorted(n for n in names if f"`{n.removesuffix('_total')}" not in described)
    assert not missing
