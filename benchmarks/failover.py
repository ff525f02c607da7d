"""The failover benchmark: a daemon with a rank is killed in the middle of an answer.

A swarm of real daemons answers a prompt; a node is killed as by a power cut; the answer must go on
by itself, with the tokens of an undisturbed run.  What the user sees of it is one long pause
between two tokens: the stall.  It is measured for a standby that has the slice loaded (``hot``), a
spare that has it on disk (``cold``), a node that has nothing and fetches it from peers
(``missing``), and for the Raft leader dying alone and together with a rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import NO_SPECULATION, ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, PlacementView, PullRequest

Say = Callable[[str], None]

Kind = Literal["hot", "cold", "missing", "leader", "leader+rank"]
KINDS: Final[tuple[Kind, ...]] = ("hot", "cold", "missing", "leader", "leader+rank")

NODES: Final = 5
"""Five voters still decide when the leader and a rank are gone at once."""
KILL_AT: Final = 24
"""Tokens that have come when the node is killed."""
WORDS_A_TOKEN: Final = (1, 2)
"""About how many words of a long prompt make a token."""
SETTLE_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.1


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """One kill.  ``stall_ms`` is the longest pause between two tokens that the client saw.

    ``plain_ms`` is the median pause between tokens of the same answer; ``recomputed_tokens`` were
    computed again on the new placement; ``identical`` compares with the undisturbed answer.
    """

    kind: Kind
    stall_ms: float
    plain_ms: float
    recomputed_tokens: int
    failovers: int
    identical: bool


class FailoverReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark, as it is printed and stored."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    tokens: int
    context: int
    blocks: bool
    recoveries: tuple[Recovery, ...]


class _Timed(msgspec.Struct, frozen=True):
    answer: Answer
    pauses: tuple[float, ...]


def measure(
    kind: Kind, path: str, *, tokens: int, say: Say, context: int = 0, blocks: bool = True
) -> Recovery:
    """Start a swarm, kill what ``kind`` says, and return how the answer fared.

    The prompt has about ``context`` tokens more than the question.  Without ``blocks`` the killed
    answer neither reads nor leaves KV blocks, and is replayed from its journal.
    """
    with local_swarm(NODES, say=lambda _: None) as nodes:
        model = _load(kind, nodes, path)
        _settle(nodes)
        ask = _question(model, tokens, context)
        expected = _ask(nodes[0], msgspec.structs.replace(ask, prompt_cache=False), None).answer
        victims = _victims(kind, nodes)

        def kill() -> None:
            for victim in victims:
                victim.kill()

        timed = _ask(nodes[0], msgspec.structs.replace(ask, prompt_cache=blocks), kill)
    recovery = Recovery(
        kind=kind,
        stall_ms=max(timed.pauses) * 1000,
        plain_ms=statistics.median(timed.pauses) * 1000,
        recomputed_tokens=timed.answer.recomputed_tokens,
        failovers=timed.answer.failovers,
        identical=timed.answer.token_ids == expected.token_ids,
    )
    say(
        f"  {kind}: {recovery.stall_ms:.0f} ms, {recovery.recomputed_tokens} tokens computed again,"
        f" {'same tokens' if recovery.identical else 'OTHER TOKENS'}"
    )
    return recovery


def _load(kind: Kind, nodes: list[LocalNode], path: str) -> str:
    """Place three ranks on nodes 1 to 3, with what ``kind`` keeps ready elsewhere."""
    client = nodes[0].client
    model = client.pull(PullRequest(source=f"file:{path}")).name
    standbys = 0 if kind in ("cold", "missing") else 1
    client.load(
        LoadRequest(
            model=model,
            layers=(10, 20),
            nodes=tuple(node.peer_id for node in nodes[1:4]),
            standbys=standbys,
            spares=1 if kind == "cold" else 0,
        )
    )
    return model


def _settle(nodes: list[LocalNode]) -> None:
    """Wait until every node votes and every rank has what is kept ready for it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            status = nodes[0].client.status()
            consensus = status.consensus
            voting = consensus is not None and len(consensus.voters) == len(nodes)
            if voting and all(_kept_ready(p) for p in status.placements):
                return
        except PyAgentError:
            voting = False  # an election is under way
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"The swarm was not complete within {SETTLE_SECONDS:.0f} s.",
                code="swarm_not_connected",
            )
        time.sleep(POLL_SECONDS)


def _kept_ready(placement: PlacementView) -> bool:
    reserves = [r for rank in placement.ranks for r in (*rank.standbys, *rank.spares)]
    return placement.ready and all(r.state in ("hot", "disk") for r in reserves)


def _victims(kind: Kind, nodes: list[LocalNode]) -> list[LocalNode]:
    """Return the nodes to kill, after making the right one the leader."""
    lead = nodes[4] if kind in ("leader", "leader+rank") else nodes[0]
    _make_leader(nodes[0], lead)
    match kind:
        case "leader":
            return [lead]
        case "leader+rank":
            return [lead, nodes[2]]
        case _:
            return [nodes[2]]


def _make_leader(asked: LocalNode, lead: LocalNode) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while _leader(asked) != lead.peer_id:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{lead.name} did not become the leader.", code="no_leader")
        asked.client.mesh.transfer(lead.peer_id)
        time.sleep(POLL_SECONDS)


def _leader(asked: LocalNode) -> PeerId | None:
    consensus = asked.client.status().consensus
    return consensus.leader if consensus is not None else None


def _question(model: str, tokens: int, context: int) -> Ask:
    told = (f"Day {day}: {day * 13 % 90} miles, {day % 7} fish." for day in range(1, 1000))
    words = " ".join(told).split(" ")[: context * WORDS_A_TOKEN[0] // WORDS_A_TOKEN[1]]
    return Ask(
        model=model,
        messages=(ChatMessage("user", " ".join([*words, "Tell me about three rivers."])),),
        max_tokens=tokens,
        temperature=0.8,
        seed=7,
        ignore_eos=True,
        speculation=NO_SPECULATION,
    )


def _ask(node: LocalNode, ask: Ask, kill: Callable[[], None] | None) -> _Timed:
    """Answer once; ``kill`` is called when :data:`KILL_AT` tokens have come."""
    pauses: list[float] = []
    seen, last = 0, 0.0
    for piece in node.client.generate(ask):
        now = time.perf_counter()
        if isinstance(piece, Answer):
            return _Timed(piece, tuple(pauses))
        if last:
            pauses.append(now - last)
        seen, last = seen + len(piece.token_ids), now
        if kill is not None and seen >= KILL_AT:
            kill()
            kill, last = None, time.perf_counter()
    raise AssertionError("the client raises unless an answer came")
