"""Landmarks of pieces: when a rank makes and takes them, and what its head is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.base.types import Digest, Placement, SessionId
from pyagent_node.inference.backend import CellAttention, KvRange, LayerKv, Tokens, WatchSequence
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.chunks import alone
from pyagent_node.inference.kv.forms import PATIENCE, SLOWER, WORTH, form_of
from pyagent_node.inference.kv.landmarks import cells_of
from pyagent_node.inference.kv.pieces import Marks, Piece
from pyagent_node.inference.kv.port import NullShelf, Wanted
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    Join,
    Joined,
    Keep,
    OpenSession,
    Restored,
    pack_tail,
)
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.landmark_work import LandmarkWork
from pyagent_node.inference.pipeline.making import _probe
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import block_chain
from pyagent_node.sharding.kv_landmarks import is_landmarks, landmark_chain
from pyagent_node.simulations.shelf import ShelfFaults, ToyShelves

from .stage_driver import AFTER, EPOCH, HEAD, HERE, MODEL, Driver, errors, spec
from .test_joins import head, word

SECONDS = st.one_of(st.just(0.0), st.floats(1e-4, 1e4), st.just(math.inf))
CELLS = "rows/1/f16"
SHAPE = KvShape(1, 4, 1e4)
ROOT = bytes(range(32))
SKIP, SIZE, PROBE = 4, 150, 12
MARKS = Marks(SIZE, SKIP, PROBE)
PIECE: Tokens = (np.arange(SIZE) % 90).astype(np.int32)
PADDED = alone(PIECE, Piece(0, SIZE))
END = len(PADDED)


# ---- which form ------------------------------------------------------------------------------


@given(SECONDS, SECONDS, SECONDS)
def test_the_whole_form_is_left_only_for_what_is_worth_it(
    whole: float, few: float, computing: float
) -> None:
    limit = WORTH * computing if computing > 0 else math.inf
    if form_of(whole, few, computing) == "landmarks":
        assert few < limit
        assert whole > few
        assert whole >= limit or whole > max(SLOWER * few, few + PATIENCE)
    else:
        assert few >= limit or (whole < limit and whole <= max(SLOWER * few, few + PATIENCE))
    assert form_of(0.0, few, computing) == "whole"
    assert form_of(whole, math.inf, computing) == "whole"


@given(SECONDS, SECONDS, SECONDS, st.floats(1, 100))
def test_a_slower_way_to_the_whole_form_never_speaks_for_it(
    whole: float, few: float, computing: float, more: float
) -> None:
    if form_of(whole, few, computing) == "landmarks":
        assert form_of(whole * more, few, computing) == "landmarks"


# ---- making ----------------------------------------------------------------------------------


def stage(*, prunes: bool = True, shape: KvShape | None = SHAPE) -> Driver:
    at = Driver(spec(1))
    at.core = StageCore(at.spec, cells=CELLS, cut=64, kv_shape=shape, prunes=prunes)
    return at


def opened(at: Driver, marks: Marks | None = MARKS, positions: int = END + PROBE) -> list[Outgoing]:
    at.at["s"] = (0, 0)
    message = OpenSession(
        SessionId("s"),
        MODEL,
        EPOCH,
        1,
        HEAD,
        positions,
        END,
        SamplingParams(),
        ROOT,
        landmarks=marks,
    )
    return at.core.receive(at.sender, message, b"", at.now)


def read(at: Driver) -> list[WatchSequence]:
    """Have the piece read, and the probe behind it."""
    at.step("s", END, sample=False, tokens=PADDED.tolist())
    at.run(at.batch())
    at.step("s", PROBE, sample=False)
    batch = at.batch()
    at.run(batch)
    return [op for op in batch.ops if isinstance(op, WatchSequence)]


def show(at: Driver) -> None:
    while (harvest := at.core.blocks.next_harvest(8)) is not None:
        at.core.blocks.exported(harvest)


class Runner:
    """Says that every third cell got attention."""

    def __init__(self, at: Driver) -> None:
        self.info = msgspec.defstruct("Info", [("kv_bytes_per_token", int), ("kv_codec", str)])(
            160, CELLS
        )
        self._layers = at.spec.slice

    async def attention(self, seq: int) -> CellAttention:
        n = END + PROBE
        mass = np.zeros((10, n), np.float32)
        mass[:, ::9] = 1.0
        return CellAttention(
            np.arange(n, dtype=np.int32),
            mass,
            mass[0],
            np.full(n, PROBE, np.int32),
            np.zeros(10, np.float32),
            PROBE,
        )

    async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        rng = np.random.default_rng(1)
        layers = []
        for layer in range(self._layers.first, self._layers.last):
            rows = rng.standard_normal((2, END, 4)).astype(np.float16)[:, start:stop]
            layers.append(LayerKv(layer, rows[0].tobytes(), rows[1].tobytes()))
        return KvRange(CELLS, start, stop, tuple(layers))


async def made(at: Driver, shelves: ToyShelves) -> LandmarkWork:
    """Have the landmarks of a piece made; returns who does it."""
    runner = Runner(at)
    work = LandmarkWork(at.core, runner, shelves.of(HERE))  # type: ignore[arg-type]
    turn = at.core.landmarks.next_turn()
    assert turn is not None
    await work.make(turn)
    for session in at.core.landmarks.take_ended():
        shelves.of(HERE).ended(session)
    return work


async def test_the_head_is_told_of_a_piece_when_its_landmarks_are_kept() -> None:
    at, shelves = stage(), ToyShelves(Random(0))
    (onward,) = opened(at)
    assert onward.peer == AFTER
    assert isinstance(onward.message, OpenSession)
    assert onward.message.landmarks == MARKS
    assert not at.core.landmarks.has_turn
    assert read(at) == [WatchSequence(0, 1, PROBE)]
    show(at)
    at.core.receive(at.sender, Keep(SessionId("s"), MODEL, EPOCH, 1), b"", at.now)
    session = at.core._sessions[SessionId("s")]
    assert at.core.blocks.kept(session) == []
    await made(at, shelves)
    told = [Outgoing(HEAD, Restored(SessionId("s"), MODEL, EPOCH, 1, END // 64, 64))]
    assert at.core.blocks.kept(session) == told
    names = landmark_chain(block_chain(ROOT, PADDED, END)[-1], 10, 20, 1)
    held = shelves.of(HERE).held
    assert {name[2] for name in held} == set(names)
    assert len(held) == 10
    assert at.core.view().marked == 1
    assert not shelves.of(HERE).sessions


async def test_a_session_that_ends_meanwhile_leaves_nothing() -> None:
    at, shelves = stage(), ToyShelves(Random(0))
    opened(at)
    read(at)
    turn = at.core.landmarks.next_turn()
    assert turn is not None
    at.close("s")
    await LandmarkWork(at.core, Runner(at), shelves.of(HERE)).make(turn)  # type: ignore[arg-type]
    assert not shelves.of(HERE).held
    assert at.core.view().marked == 0
    opened(at)  # the tombstone holds
    assert not at.core.landmarks.has_turn


async def test_who_looks_while_they_are_made_leaves_no_session_behind() -> None:
    """Frames come in while the runner is asked; the shelf hears of the end after the blocks."""
    at, shelves = stage(), ToyShelves(Random(0))
    shelf = shelves.of(HERE)

    def look() -> None:
        for session in at.core.landmarks.take_ended():
            shelf.ended(session)

    class Busy(Runner):
        async def attention(self, seq: int) -> CellAttention:
            look()
            return await super().attention(seq)

        async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
            look()
            return await super().export_kv(seq, start, stop)

    opened(at)
    read(at)
    turn = at.core.landmarks.next_turn()
    assert turn is not None
    await LandmarkWork(at.core, Busy(at), shelf).make(turn)  # type: ignore[arg-type]
    assert list(shelf.sessions) == [turn.blocks[0].session]
    look()
    assert not shelf.sessions


async def test_where_nothing_was_measured_nothing_is_chosen() -> None:
    class Blind(Runner):
        async def attention(self, seq: int) -> CellAttention:
            found = await super().attention(seq)
            nothing = np.zeros_like(found.mass), np.zeros_like(found.peak), found.seen * 0
            return CellAttention(found.positions, *nothing, found.entropy, 0)

    at, shelves = stage(), ToyShelves(Random(0))
    opened(at)
    read(at)
    turn = at.core.landmarks.next_turn()
    assert turn is not None
    await LandmarkWork(at.core, Blind(at), shelves.of(HERE)).make(turn)  # type: ignore[arg-type]
    assert not shelves.of(HERE).held
    assert at.core.view().marked == 0
    assert turn.session.marks is None


async def test_a_tokenizer_that_fails_costs_the_landmarks_only() -> None:
    class Broken:
        async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            raise RunnerFailed("It has died.", reason="exit")

    placement = Placement(MODEL, EPOCH, (), 4096, 2)
    model = HeadModel("m", 0, placement, Vocabulary((), frozenset()), Broken(), None)  # type: ignore[arg-type]
    assert len(await _probe(model)) == 0


@pytest.mark.parametrize("able", [{"prunes": False}, {"shape": None}])
def test_a_rank_that_cannot_only_computes(able: dict[str, object]) -> None:
    at = stage(**able)  # type: ignore[arg-type]
    opened(at)
    assert read(at) == []
    assert not at.core.landmarks.has_turn
    show(at)
    keep = Keep(SessionId("s"), MODEL, EPOCH, 1)
    _, told = at.core.receive(at.sender, keep, b"", at.now)
    assert isinstance(told.message, Restored)


@pytest.mark.parametrize(
    "marks",
    [
        Marks(END + 1, SKIP, PROBE),
        Marks(END - 64, SKIP, PROBE),
        Marks(SIZE, -1, PROBE),
        Marks(SIZE, 120, PROBE),
        Marks(SIZE, SKIP, 8),
        Marks(SIZE, SKIP, 64),
        Marks(SIZE, SKIP, PROBE + 1),
        Marks(-5, SKIP, PROBE),
    ],
)
def test_landmarks_that_cannot_be_are_refused(marks: Marks) -> None:
    assert errors(opened(stage(), marks)) == [(HEAD, "s", "bad_parameter")]


# ---- taking ----------------------------------------------------------------------------------

AT = Piece(10, 10 + SIZE)
PROMPT = AT.stop + 20


def joins(at: Driver, *, lossy: bool = True, landmarks: bool = True) -> None:
    """Open a session that asks for the piece."""
    at.at["j"] = (0, 0)
    message = OpenSession(
        SessionId("j"),
        MODEL,
        EPOCH,
        1,
        HEAD,
        4096,
        PROMPT,
        SamplingParams(),
        pruning=Pruning(4096) if lossy else None,
    )
    at.core.receive(at.sender, message, b"", at.now)
    wish = Join(SessionId("j"), MODEL, EPOCH, 1, ROOT, SKIP, (AT,), (), landmarks)
    at.core.receive(at.sender, wish, pack_tail(PADDED, None), at.now)
    at.batch()


async def taken(
    faults: ShelfFaults | None = None, *, lossy: bool = True, landmarks: bool = True
) -> tuple[Driver, bool, Outgoing]:
    """Have a stage take a piece; returns it, whether that settled the piece, and its answer."""
    at, shelves = stage(), ToyShelves(Random(0))
    opened(at)
    read(at)
    work = await made(at, shelves)
    shelves.faults = faults or ShelfFaults()
    joins(at, lossy=lossy, landmarks=landmarks)
    (load,) = at.core.joins.take_loads()
    done = await work.take(load, 0, at.core.joins.wanted(load, 0, 0, 0.5))
    (answer,) = at.core.joins.loaded(load)
    return at, done, answer


async def test_landmarks_go_in_with_gaps_and_count_as_given_up() -> None:
    at, done, answer = await taken()
    assert done
    assert answer == Outgoing(HEAD, Joined(SessionId("j"), MODEL, EPOCH, 1, (0,), (0,)))
    at.step("j", AT.start + SKIP, sample=False)
    at.run(at.batch())
    at.step("j", 20, position=AT.stop, sample=False)
    batch = at.batch()
    (cells,) = batch.cells
    assert (cells.kv.start, cells.kv.stop) == (AT.start + SKIP, AT.stop)
    assert cells.kv.kept[-1][1] == AT.stop
    count = sum(stop - start for start, stop in cells.kv.kept)
    assert count == cells_of(SIZE)
    assert all(len(x.keys) == len(x.values) == count * SHAPE.row_bytes for x in cells.kv.layers)
    assert at.core._sessions[SessionId("j")].evicted == SIZE - SKIP - count
    assert at.core.view().joined_landmarks == SIZE - SKIP
    at.run(batch)


@pytest.mark.parametrize("asks", [{"lossy": False}, {"landmarks": False}])
async def test_nobody_gets_them_unasked(asks: dict[str, bool]) -> None:
    at, done, answer = await taken(**asks)  # type: ignore[arg-type]
    assert not done
    assert answer.message == Joined(SessionId("j"), MODEL, EPOCH, 1, ())
    assert at.core.view().joined_landmarks == 0


async def test_what_is_damaged_is_computed() -> None:
    for faults in (ShelfFaults(broken=1.0), ShelfFaults(foreign=1.0)):
        at, done, answer = await taken(faults)
        assert done
        assert answer.message == Joined(SessionId("j"), MODEL, EPOCH, 1, ())
        assert at.core.joins.refused == 1


async def test_what_was_promised_and_is_lost_leaves_the_whole_form() -> None:
    _, done, answer = await taken(ShelfFaults(lost=1.0))
    assert not done
    assert answer.message == Joined(SessionId("j"), MODEL, EPOCH, 1, ())


async def test_what_comes_of_them_in_part_leaves_the_whole_form() -> None:
    """A peer that goes half-way has sent nothing wrong."""

    class Parted(NullShelf):
        def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
            return len(chain)

        async def cost(self, wanted: Wanted) -> float:
            return 0.001 if is_landmarks(wanted.cells) else math.inf

        async def load(self, wanted: Wanted) -> list[KvRange]:
            assert len(wanted.chain) == 2
            layers = tuple(LayerKv(layer, b"", b"") for layer in wanted.layers)
            return [KvRange(wanted.cells, 0, 64, layers)]

    at, long = stage(), Piece(10, 310)
    at.at["j"] = (0, 0)
    message = OpenSession(
        SessionId("j"),
        MODEL,
        EPOCH,
        1,
        HEAD,
        4096,
        330,
        SamplingParams(),
        pruning=Pruning(4096),
    )
    at.core.receive(at.sender, message, b"", at.now)
    wish = Join(SessionId("j"), MODEL, EPOCH, 1, ROOT, SKIP, (long,), (), True)
    tokens = alone(np.arange(330, dtype=np.int32) % 90, long)
    at.core.receive(at.sender, wish, pack_tail(tokens, None), at.now)
    at.batch()
    (load,) = at.core.joins.take_loads()
    work = LandmarkWork(at.core, Runner(at), Parted())  # type: ignore[arg-type]
    assert not await work.take(load, 0, at.core.joins.wanted(load, 0, 0, 0.0))
    assert at.core.joins.refused == 0


# ---- at the head, and between versions -------------------------------------------------------


def test_the_head_counts_what_any_rank_has_of_it_in_the_smaller_form() -> None:
    core = head()
    peer, message = word(0, 0, 1)
    core.on_restored(peer, msgspec.structs.replace(message, landmarks=(1,)))
    assert core.on_restored(*word(1, 0, 1))
    assert core.attempt is not None
    assert (core.attempt.joined, core.attempt.joined_landmarks) == (102, 36)


def test_a_piece_that_another_rank_lacks_is_none() -> None:
    core = head()
    peer, message = word(0, 0, 1)
    core.on_restored(peer, msgspec.structs.replace(message, landmarks=(1,)))
    core.on_restored(*word(1, 0))
    assert core.attempt is not None
    assert core.attempt.joined_landmarks == 0


def test_landmarks_of_a_piece_that_is_not_there_are_no_word() -> None:
    core = head()
    peer, message = word(0, 0)
    core.on_restored(peer, msgspec.structs.replace(message, landmarks=(1,)))
    assert core.over


def test_frames_of_nodes_that_do_not_know_them_are_read() -> None:
    join = Join(SessionId("s"), MODEL, EPOCH, 1, ROOT, SKIP, (AT,), (), True)
    said = Joined(SessionId("s"), MODEL, EPOCH, 1, (0,), (0,))
    for message in (join, said):
        body = msgspec.to_builtins(message)
        assert PIPE_CODEC.decode(PIPE_CODEC.encode(message)) == message
        del body["landmarks"]
        old = msgspec.convert(body, type(message), strict=False)
        assert not old.landmarks
