"""What tells the log of sessions, and what carries them to holders."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Refused, Unavailable
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import Command, DropCheckpoints, PutCheckpoints
from pyagent_node.consensus.state import State
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.journal_book import BookLimits, JournalBook, Writer
from pyagent_node.node.journal_lanes import JournalLane
from pyagent_node.node.journal_manifests import BATCH, Manifests
from pyagent_node.node.journal_messages import (
    PROTOCOL,
    TO_HEAD,
    TO_HOLDER,
    Append,
    Begin,
    Declined,
    End,
    Held,
    encode_token,
    public_id,
    unpack,
)
from pyagent_node.node.journal_session import HeadedSession
from pyagent_node.simulations.mesh import open_network
from pyagent_node.simulations.pipeline import peer

KEY = NodeKey(bytes(31) + b"\1")
HEAD = KEY.peer_id
HOLDERS = (PeerId("h1"), PeerId("h2"))


def headed(number: int = 1, claim: int = 1) -> HeadedSession:
    journal = SessionJournal(
        session=SessionId(f"{number:032x}"),
        model=Digest("ab" * 32),
        sampling=SamplingParams(),
        stop=(),
        budget=10_000,
        ignore_eos=False,
        prompt=(1, 2, 3),
        created=0.0,
    )
    return HeadedSession(journal, HEAD, claim, KEY.sign)


def held(number: int, claim: int = 1) -> HeadedSession:
    session = headed(number, claim)
    session.holders = {HOLDERS[1]: 7, HOLDERS[0]: 5}
    return session


class Log:
    """Takes proposals, or raises what it is told to."""

    def __init__(self) -> None:
        self.state = State()
        self.taken: list[Command] = []
        self.faults: list[PyAgentError] = []
        self.tries = 0
        self.gate: trio.Event | None = None

    async def propose(self, command: Command) -> None:
        self.tries += 1
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.faults:
            raise self.faults.pop(0)
        self.taken.append(command)


def manifests(log: Log, nursery: trio.Nursery) -> Manifests:
    made = Manifests(log, HEAD, lambda: 1000.0)  # type: ignore[arg-type]
    nursery.start_soon(made.run)
    return made


async def test_a_manifest_says_who_holds_what(autojump_clock, nursery):
    log = Log()
    committed: list[SessionId] = []
    made = manifests(log, nursery)
    made.committed = lambda session: committed.append(session.public)
    session = held(1)
    made.put(session)
    await trio.sleep(1)
    [put] = log.taken
    assert isinstance(put, PutCheckpoints)
    assert put.at == 1000
    [checkpoint] = put.checkpoints
    assert checkpoint.session == session.public
    assert checkpoint.head == checkpoint.signer == HEAD
    assert checkpoint.holders == ("h1", "h2")
    assert checkpoint.tokens == 5
    assert checkpoint.expires == 1000 + 750 + 1
    assert committed == [session.public]
    made.drop(session)
    await trio.sleep(1)
    assert log.taken[1:] == [DropCheckpoints((session.public,), HEAD)]


async def test_many_sessions_are_few_commands(autojump_clock, nursery):
    log = Log()
    made = manifests(log, nursery)
    sessions = [held(i) for i in range(1, 201)]
    for session in sessions:
        made.put(session)
    await trio.sleep(5)
    assert [len(c.checkpoints) for c in log.taken] == [BATCH, BATCH, BATCH, 200 - 3 * BATCH]
    for session in sessions:
        made.drop(session)
    await trio.sleep(5)
    assert sum(len(c.sessions) for c in log.taken[4:]) == 200
    assert len(log.taken) == 8


async def test_what_never_got_there_is_not_dropped(autojump_clock, nursery):
    log = Log()
    made = manifests(log, nursery)
    session = held(1)
    made.put(session)
    made.drop(session)
    await trio.sleep(5)
    assert log.tries == 0
    # but a session that was another head's is known to the log
    made.drop(held(2, claim=2))
    await trio.sleep(5)
    assert log.tries == 1


async def test_a_log_without_a_leader_is_asked_again(autojump_clock, nursery):
    log = Log()
    log.faults = [Unavailable("away", code="no_leader")] * 3
    made = manifests(log, nursery)
    session, ended = held(1), held(2)
    made.put(session)
    made.put(ended)
    await trio.sleep(1)
    assert not log.taken
    made.drop(ended)
    await trio.sleep(30)
    puts = [c for c in log.taken if isinstance(c, PutCheckpoints)]
    assert [c.session for put in puts for c in put.checkpoints] == [session.public]
    assert [c for c in log.taken if isinstance(c, DropCheckpoints)] == [
        DropCheckpoints((ended.public,), HEAD)
    ]
    assert log.tries == 5


async def test_a_new_session_does_not_wait_for_what_failed_before_it(autojump_clock, nursery):
    """Or a session that begins when a full disk has room again would be unsafe for seconds."""
    log = Log()
    log.faults = [Unavailable("full", code="disk_full")] * 4
    made = manifests(log, nursery)
    made.put(held(1))
    await trio.sleep(12)
    assert log.tries == 4
    assert not log.taken
    made.put(held(2))
    await trio.sleep(0.1)
    [put] = log.taken
    assert isinstance(put, PutCheckpoints)
    assert len(put.checkpoints) == 2


@pytest.mark.parametrize(
    "fault", [Refused("no", code="role_not_allowed"), LimitExceeded("full", code="state_full")]
)
async def test_a_log_that_refuses_is_not_asked_again(fault, autojump_clock, nursery):
    log = Log()
    log.faults = [fault]
    made = manifests(log, nursery)
    made.put(held(1))
    await trio.sleep(100)
    assert log.tries == 1


async def test_a_session_dropped_while_its_manifest_is_under_way(autojump_clock, nursery):
    log = Log()
    log.gate = trio.Event()
    made = manifests(log, nursery)
    session = held(1)
    made.put(session)
    await trio.sleep(1)
    session.outcome = "left"
    made.drop(session)
    log.gate.set()
    await trio.sleep(1)
    assert [type(c) for c in log.taken] == [PutCheckpoints, DropCheckpoints]


# ---- lanes ---------------------------------------------------------------------------------------


class Owner:
    def __init__(self) -> None:
        self.told: list[tuple[str, int | str]] = []

    def held(self, peer_id: PeerId, session: SessionId, tokens: int) -> None:
        self.told.append((session, tokens))

    def lost(self, peer_id: PeerId, session: SessionId, error: PyAgentError) -> None:
        self.told.append((session, error.code))


class Holder:
    """Takes what comes, as slowly as it is told to, and answers what it is told to."""

    def __init__(self) -> None:
        self.messages: list[tuple[object, int]] = []
        self.gate: trio.Event | None = None
        self.answer: Callable[[object], object | None] = lambda _message: None

    async def serve(self, stream) -> None:
        while (frame := await stream.receive()) is not None:
            if self.gate is not None:
                await self.gate.wait()
            message = TO_HOLDER.decode(frame.header)
            count = len(unpack(frame.tail)) if frame.tail else 0
            self.messages.append((message, count))
            answer = self.answer(message)
            if isinstance(answer, bytes):
                await stream.send(Frame(answer))
            elif answer is not None:
                await stream.send(Frame(TO_HEAD.encode(answer)))


class Lane:
    def __init__(self, lane: JournalLane, holder: Holder, owner: Owner, network) -> None:
        self.lane = lane
        self.holder = holder
        self.owner = owner
        self.network = network


async def lane(nursery: trio.Nursery) -> Lane:
    network = await nursery.start(_network)
    head, there = network.node(peer(0)), network.node(peer(1))
    holder, owner = Holder(), Owner()
    there.handle(PROTOCOL, holder.serve)
    await network.connect_all()
    made = JournalLane(head, peer(1), owner)
    nursery.start_soon(made.run)
    return Lane(made, holder, owner, network)


async def _network(task_status=trio.TASK_STATUS_IGNORED) -> None:
    async with open_network(latency=0.01) as network:
        task_status.started(network)
        await trio.sleep_forever()


async def test_tokens_that_come_together_go_together(autojump_clock, nursery):
    it = await lane(nursery)
    session = headed()
    it.lane.add(session)
    await trio.sleep(1)
    for start in range(0, 10, 2):
        session.append(start, [Sampled(1), Sampled(2)])
        it.lane.touch(session.public)
    await trio.sleep(1)
    it.lane.touch(session.public)  # nothing is new
    await trio.sleep(1)
    assert [(type(m), n) for m, n in it.holder.messages] == [(Begin, 1), (Append, 10)]
    assert it.lane.idle
    it.lane.remove(session.public, end=True)
    await trio.sleep(1)
    assert isinstance(it.holder.messages[-1][0], End)


async def test_a_slow_holder_costs_few_messages(autojump_clock, nursery):
    it = await lane(nursery)
    session = headed()
    it.lane.add(session)
    await trio.sleep(1)
    it.holder.gate = trio.Event()
    big = Sampled(1, -1.0, tuple((i, -1.0) for i in range(20)))
    for start in range(20_000):
        session.append(start, [big])
        it.lane.touch(session.public)
        if start % 10 == 0:
            await trio.lowlevel.checkpoint()
    it.holder.gate.set()
    await trio.sleep(5)
    assert sum(n for m, n in it.holder.messages if isinstance(m, Append)) == 20_000
    starts = [m.start for m, _ in it.holder.messages if isinstance(m, Append)]
    assert starts == sorted(starts)


async def test_a_holder_is_asked_now_and_then(autojump_clock, nursery):
    it = await lane(nursery)
    session = headed()
    it.holder.answer = lambda m: Held(m.session, 10**9) if getattr(m, "ack", True) else None
    it.lane.add(session)
    for start in range(40):
        await trio.sleep(0.1)
        session.append(start, [Sampled(1)])
        it.lane.touch(session.public)
    await trio.sleep(1)
    told = [tokens for _, tokens in it.owner.told]
    assert told == sorted(told)
    assert 4 <= len(told) <= 6
    assert max(told) <= 40, "a holder cannot hold more than there is"


async def test_what_a_holder_declines_is_told(autojump_clock, nursery):
    it = await lane(nursery)
    first, second = headed(1), headed(2)
    full = LimitExceeded("full", code="journals_full").to_info()
    it.holder.answer = lambda m: (
        Declined(m.session, full) if m.session == first.public else Held(m.session, 0)
    )
    it.lane.add(first)
    it.lane.add(second)
    await trio.sleep(1)
    assert (first.public, "journals_full") in it.owner.told
    assert (second.public, 0) in it.owner.told
    assert first.public not in it.lane
    assert second.public in it.lane


@pytest.mark.parametrize("answer", [b"\xc1", b"", b"\x81\xa4type\xa5begin"])
async def test_a_holder_that_talks_rubbish_is_lost(answer, autojump_clock, nursery):
    it = await lane(nursery)
    it.holder.answer = lambda _message: answer
    session = headed()
    it.lane.add(session)
    await trio.sleep(1)
    [(public, code)] = it.owner.told
    assert public == session.public
    assert code in ("malformed_message", "unknown_message")


async def test_a_holder_that_goes_is_told_once(autojump_clock, nursery):
    it = await lane(nursery)
    it.lane.add(headed(1))
    it.lane.add(headed(2))
    await trio.sleep(1)
    it.network.crash(peer(1))
    await trio.sleep(1)
    assert sorted(s for s, _ in it.owner.told) == sorted(headed(i).public for i in (1, 2))


async def test_answers_about_strange_sessions_are_nothing(autojump_clock, nursery):
    it = await lane(nursery)
    it.holder.answer = lambda _message: Held(public_id(SessionId("f" * 32)), 5)
    it.lane.add(headed(1))
    await trio.sleep(1)
    assert it.owner.told == []


# ---- the book, whatever is done to it ------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_the_book_keeps_count(seed: int):
    rng = random.Random(seed)
    book = JournalBook(BookLimits(sessions=5, sessions_per_head=3, bytes=4000, bytes_per_head=2500))
    heads = [NodeKey(bytes(31) + bytes([i])) for i in range(1, 4)]
    writers = [Writer(key.peer_id) for key in heads]
    now = 0.0
    for _ in range(60):
        writer, number = rng.choice(writers), rng.randint(1, 6)
        public = headed(number).public
        now += rng.random()
        try:
            match rng.randrange(6):
                case 0 | 1:
                    session = headed(number, claim=rng.randint(1, 3))
                    message = Begin(public, session.claim, b"")
                    book.begin(writer, message, list(session.pieces), now)
                case 2 | 3:
                    copy = book.get(public, now)
                    start = copy.tokens if copy else 0
                    tokens = [encode_token(Sampled(1))] * rng.randint(0, 9)
                    book.append(writer, Append(public, start, b""), tokens)
                case 4:
                    book.end(writer, public)
                case 5:
                    book.leave(writer, now + 1)
                    book.expire(now)
        except PyAgentError:
            pass
        copies = list(book._copies.values())
        assert book.size == sum(copy.size for copy in copies) <= 4000
        assert len(book) == len(copies) <= 5
        for key in heads:
            mine = [copy for copy in copies if copy.head == key.peer_id]
            load = book._loads.get(key.peer_id)
            assert (
                (load.sessions, load.size)
                if load
                else (
                    len(mine),
                    sum(copy.size for copy in mine),
                )
                == (0, 0)
            )
            assert len(mine) <= 3
            assert sum(copy.size for copy in mine) <= 2500
