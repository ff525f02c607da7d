"""A member that breaks the pipe protocol harms its own streams and sessions only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import Digest, PeerId, Placement, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.backend_names import MAX_CLASS, MAX_CLASSES
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    PIPE_PROTOCOL,
    CancelSteps,
    CloseSession,
    OpenSession,
    PipeMessage,
    Result,
    StageError,
    Step,
    pack_tail,
)
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.mesh import SimulatedMesh
from pyagent_node.simulations.pipeline import (
    MODEL,
    NAME,
    PipelineWorld,
    open_pipeline_world,
    peer,
)

MALLORY = 9
S = SessionId("f" * 32)
GREEDY = SamplingParams(temperature=0.0)


class Mallory:
    """A member of the mesh that sends what it likes to one node."""

    def __init__(self, mesh: SimulatedMesh) -> None:
        self.mesh = mesh
        self.got: list[PipeMessage] = []
        self.streams: dict[PeerId, FrameStream] = {}

    async def listen(self) -> None:
        """Note what is sent to us."""

        async def handle(stream: FrameStream) -> None:
            while (frame := await stream.receive()) is not None:
                self.got.append(PIPE_CODEC.decode(frame.header))

        self.mesh.handle(PIPE_PROTOCOL, handle)

    async def send(self, to: PeerId, *messages: tuple[PipeMessage, bytes]) -> None:
        """Send frames on one stream and give them time to arrive."""
        stream = self.streams.get(to) or await self.mesh.open(to, PIPE_PROTOCOL)
        self.streams[to] = stream
        for message, tail in messages:
            await stream.send(Frame(PIPE_CODEC.encode(message), tail))
        await trio.sleep(0.1)


@asynccontextmanager
async def attacked() -> AsyncIterator[tuple[PipelineWorld, Placement, Mallory]]:
    """Run three good nodes with a placement, and Mallory."""
    async with open_pipeline_world(3) as world:
        placement = world.place((3, 7), (0, 1, 2), seconds=0.01)
        mallory = Mallory(world.network.node(peer(MALLORY), name="mallory"))
        await mallory.listen()
        await world.network.connect_all()
        yield world, placement, mallory
        answer = await world.ask(0, [1, 2, 3], max_tokens=5, sampling=GREEDY)
        assert answer.tokens == toy_generate(10, [1, 2, 3], 5, GREEDY)
        await trio.sleep(1)
        assert world.sessions == 0


@pytest.mark.parametrize(
    "frame",
    [
        Frame(b""),
        Frame(b"\xff\xff\xff"),
        Frame(b"\x81\xa4type\xa5draft"),
        Frame(b"\x81\xa4type\xa4step"),
        Frame(b"\x91" * 60_000),
        Frame(PIPE_CODEC.encode(CloseSession(S, MODEL, 1, 0))[:-1], b"tail"),
    ],
)
async def test_garbage_ends_its_own_stream(frame: Frame, autojump_clock: MockClock) -> None:
    async with attacked() as (world, _, mallory):
        stream = await mallory.mesh.open(peer(0), PIPE_PROTOCOL)
        await stream.send(frame)
        await trio.sleep(0.1)
        assert world.meshes[0].metrics.handler_errors == 1


async def test_steps_and_closings_for_anothers_session_change_nothing(
    autojump_clock: MockClock,
) -> None:
    async with attacked() as (world, placement, mallory):
        ask = GenerationRequest(
            NAME, tokens=(1, 2, 3), max_tokens=30, ignore_eos=True, sampling=GREEDY
        )
        got: list[int] = []
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                if isinstance(event, Generated):
                    got.append(event.token)
                if len(got) == 3:
                    (view,) = world.pipelines[1].engine.sessions()
                    session, epoch = view.session, placement.epoch
                    tail = pack_tail(np.zeros(1, np.int32), np.zeros((1, 6), np.float32))
                    for rank in range(3):
                        await mallory.send(
                            peer(rank),
                            (CloseSession(session, MODEL, epoch, rank), b""),
                            (CancelSteps(session, MODEL, epoch, rank, 0, 2**40), b""),
                            (Step(session, MODEL, epoch, rank, 9, 9, 1, True), tail),
                            (Result(session, MODEL, epoch, 2, 3, 0.0, (Sampled(1),)), b""),
                            (
                                StageError(
                                    session,
                                    MODEL,
                                    epoch,
                                    1,
                                    peer(1),
                                    ErrorInfo("unavailable", "peer_lost", "boo"),
                                ),
                                b"",
                            ),
                        )
        assert got == toy_generate(10, [1, 2, 3], 30, GREEDY)
        refused = [m for m in mallory.got if isinstance(m, StageError)]
        assert {m.error.code for m in refused} == {"wrong_sender"}
        assert world.pipelines[0].engine.refused == {"wrong_sender": 2}
        assert all(view.refused for p in world.pipelines for view in p.stages.views())


async def test_a_session_in_anothers_name_is_refused(autojump_clock: MockClock) -> None:
    async with attacked() as (world, placement, mallory):
        for rank in range(3):
            message = OpenSession(S, MODEL, placement.epoch, rank, peer(1), 10, 1, SamplingParams())
            await mallory.send(peer(rank), (message, b""))
        assert world.sessions == 0
        codes = [m.error.code for m in mallory.got if isinstance(m, StageError)]
        assert codes == ["wrong_sender"] * 3


async def test_guesses_that_make_no_sense_end_their_own_session(
    autojump_clock: MockClock,
) -> None:
    async with attacked() as (_, placement, mallory):
        epoch = placement.epoch
        rows = np.zeros((40, 6), np.float32)
        for number, (position, n, drafts, parent, code) in enumerate(
            [
                (2, 3, 3, None, "bad_parameter"),
                (2, 3, -1, None, "bad_parameter"),
                (2, 40, 39, None, "bad_parameter"),
                (2, 3, 2**40, None, "bad_parameter"),
                (1, 3, 2, None, "out_of_order"),
                (3, 3, 2, None, "out_of_order"),
                (2, 3, 2, 7, "out_of_order"),
                (2**40, 3, 2, None, "out_of_order"),
            ]
        ):
            session = SessionId(f"{number:032x}")
            opening = OpenSession(session, MODEL, epoch, 0, peer(MALLORY), 64, 2, GREEDY)
            start = Step(session, MODEL, epoch, 0, 0, 0, 2, True)
            step = Step(
                session, MODEL, epoch, 0, 1, position, n, True, drafts=drafts, parent=parent
            )
            mallory.got.clear()
            await mallory.send(
                peer(0),
                (opening, b""),
                (start, pack_tail(np.ones(2, np.int32), rows[:2])),
                (step, pack_tail(np.ones(n, np.int32), rows[:n])),
            )
            codes = [m.error.code for m in mallory.got if isinstance(m, StageError)]
            assert codes == [code]
            for rank in range(3):
                await mallory.send(peer(rank), (CloseSession(session, MODEL, epoch, rank), b""))


async def test_a_flood_is_bounded_and_answered(autojump_clock: MockClock) -> None:
    async with attacked() as (world, placement, mallory):
        epoch = placement.epoch
        for number in range(100):
            session = SessionId(f"{number:032x}")
            opening = OpenSession(
                session, MODEL, epoch, 0, peer(MALLORY), 4096, 1, SamplingParams()
            )
            tail = pack_tail(np.zeros(512, np.int32), np.zeros((512, 6), np.float32))
            await mallory.send(
                peer(0),
                (opening, b""),
                *(
                    (Step(session, MODEL, epoch, 0, i, 512 * i, 512, False), tail)
                    for i in range(20)
                ),
            )
            (view,) = world.pipelines[0].stages.views()
            assert view.sessions <= 32
            assert view.queued <= 256
        codes = {m.error.code for m in mallory.got if isinstance(m, StageError)}
        assert codes >= {"too_many_sessions", "step_too_long"}
        world.network.isolate(peer(MALLORY))
        await trio.sleep(5)
        assert world.sessions == 0


async def test_frames_for_models_that_are_not_here_are_answered(
    autojump_clock: MockClock,
) -> None:
    async with attacked() as (_, placement, mallory):
        other = Digest("0" * 64)
        me = peer(MALLORY)
        await mallory.send(
            peer(0),
            (OpenSession(S, other, 1, 0, me, 10, 1, SamplingParams()), b""),
            (Step(S, MODEL, placement.epoch, 77, 0, 0, 1, True), b""),
            (CloseSession(S, other, 1, 0), b""),
            (Result(S, other, 1, 0, 0, 0.0), b""),
        )
        codes = [m.error.code for m in mallory.got if isinstance(m, StageError)]
        assert codes == ["stage_not_ready"] * 2


async def test_only_the_last_rank_says_who_answered_and_only_of_its_model(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4, latency=0.01) as world:
        placement = world.place((3, 7), (1, 2, 3))
        engine = world.pipelines[0].engine
        ask = GenerationRequest(NAME, tokens=(1, 2, 3), max_tokens=20)
        async with engine.generate(ask) as events:
            await anext(events)
            (wire,) = engine._wires
            for sender in (1, 2, 3):
                for each in "bcd":
                    message = Result(wire, Digest(each * 64), placement.epoch, 2, 0, 0.0)
                    long = ("x" * 10_000,) * 1000
                    engine.on_result(peer(sender), msgspec.structs.replace(message, classes=long))
        assert set(engine._served) <= {MODEL}
        for classes, _ in engine._served.values():
            assert len(classes) <= MAX_CLASSES
            assert all(len(name) <= MAX_CLASS for name in classes)
