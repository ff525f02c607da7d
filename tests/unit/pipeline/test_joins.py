"""Joining KV of pieces: what a stage makes of a wish, and how a head feeds what is left."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.backend import KvRange, LayerKv, StepInput, StepOutput, Tokens
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.chunks import (
    alone,
    blocks_of,
    check_pieces,
    chunk_root,
    moved_to,
    split_alone,
)
from pyagent_node.inference.kv.pieces import JoinPlan, Piece
from pyagent_node.inference.kv.port import NullShelf, Wanted
from pyagent_node.inference.pipeline.frames import (
    Join,
    Joined,
    Keep,
    OpenSession,
    Restored,
    Step,
    pack_tail,
)
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.joining import Joining
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_errors import not_joined
from pyagent_node.inference.pipeline.stage_queue import Batch
from pyagent_node.inference.pipeline.stage_service import StageService
from pyagent_node.inference.pipeline.stage_shelf import ShelfWork
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import block_chain, cache_root

from .stage_driver import AFTER, EPOCH, HEAD, HERE, MODEL, Driver, errors, spec

CELLS = "rows/1/f16"
SHAPE = KvShape(1, 4, 1e4)
ROOT = bytes(range(32))
PIECES = (Piece(10, 80), Piece(80, 120))
PLAN = JoinPlan(PIECES, skip=4)
PROMPT: Tokens = (np.arange(130) % 90).astype(np.int32)


def driver(*, shape: KvShape | None = SHAPE, cells: str = CELLS) -> Driver:
    """Return a stage that can join."""
    at = Driver(spec(1))
    at.core = StageCore(at.spec, cells=cells, cut=64, kv_shape=shape)
    at.open("s", prompt_tokens=130)
    return at


def join(at: Driver, *, tail: bytes | None = None, **changes: object) -> list[Outgoing]:
    """Ask for the pieces."""
    tokens = np.concatenate([alone(PROMPT, piece) for piece in PIECES])
    message = Join(SessionId("s"), MODEL, EPOCH, 1, ROOT, 4, PIECES)
    message = msgspec.structs.replace(message, **changes)
    tail = pack_tail(tokens, None) if tail is None else tail
    return at.core.receive(at.sender, message, tail, at.now)


def block(index: int, *, codec: str = CELLS, first: int = 10) -> KvRange:
    """Return a block as a shelf would."""
    rows = np.full((64, 4), index + 1, np.float16).tobytes()
    layers = tuple(LayerKv(layer, rows, rows) for layer in range(first, first + 10))
    return KvRange(codec, 64 * index, 64 * index + 64, layers)


def load_all(at: Driver) -> list[Outgoing]:
    """Load and move every piece."""
    joins = at.core.joins
    (load,) = joins.take_loads()
    assert joins.take_loads() == []
    for index, piece in enumerate(PIECES):
        wanted = joins.wanted(load, index, 0, 0.5)
        tokens = alone(PROMPT, piece)
        assert wanted.chain == block_chain(ROOT, tokens, len(tokens))
        assert wanted.layers == range(10, 20)
        kv = joins.taken(load, index, [block(i) for i in range(blocks_of(piece))])
        assert kv is not None
        assert (kv.start, kv.stop) == (4, piece.tokens)
        joins.moved(load, index, tuple(moved_to(kv, load.gap(index).start, SHAPE)))
    return joins.loaded(load)


def test_cells_of_pieces_go_in_before_the_step_that_begins_behind_them() -> None:
    at = driver()
    (onward,) = join(at)
    assert onward.peer == AFTER
    assert isinstance(onward.message, Join)
    assert onward.message.rank == 2
    at.batch()
    told = [Outgoing(HEAD, Joined(SessionId("s"), MODEL, EPOCH, 1, (0, 1)))]
    assert load_all(at) == told
    assert at.core.joins.joined == 66 + 36
    assert at.step("s", 14, sample=False) == []
    assert at.step("s", 4, sample=False, position=80) == []
    assert at.step("s", 10, position=120) == []
    taken = []
    for _ in range(3):
        batch = at.batch()
        assert batch is not None
        taken += [(c.kv.start, c.kv.stop, c.tokens.tolist()) for c in batch.cells]
        at.run(batch)
    assert taken == [(14, 80, PROMPT[14:80].tolist()), (84, 120, PROMPT[84:120].tolist())]
    assert at.core.view().restored == 66 + 36


async def test_a_step_for_which_cells_of_a_piece_leave_no_room_costs_the_pieces() -> None:
    """Where cells are given up on the way, the step alone has room: the head goes on without."""

    class Full:
        async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
            raise LimitExceeded("There is no room.", code="kv_full")

    async def refused(at: Driver, batch: Batch) -> list[tuple[PeerId, str, str]]:
        service, sent = StageService(HERE), list[Outgoing]()
        service._send = sent.extend  # type: ignore[assignment,method-assign]
        await service._compute(at.core, Full(), batch)  # type: ignore[arg-type]
        return errors(sent)

    at = driver()
    join(at)
    at.batch()
    load_all(at)
    at.step("s", 14, sample=False)
    at.step("s", 4, sample=False, position=80)
    at.run(at.batch())
    batch = at.batch()
    assert batch.cells
    assert batch.without(5).cells == batch.apart()[0].cells == batch.cells
    assert await refused(at, batch) == [(HEAD, "s", "pieces_refused")]
    at = driver()
    at.step("s", 14, sample=False)
    assert await refused(at, at.batch()) == [(HEAD, "s", "kv_full")]


async def test_no_more_cells_wait_for_a_session_than_a_slot_has() -> None:
    """A prompt whose cells are given up on the way may be many times as long."""

    class Asked(NullShelf):
        def __init__(self) -> None:
            self.chains: list[int] = []

        async def load(self, wanted: Wanted) -> list[KvRange]:
            self.chains.append(len(wanted.chain))
            return []

    at, shelf, sent = Driver(spec(1)), Asked(), list[Outgoing]()
    shape = {"cells": CELLS, "cut": 64, "kv_shape": SHAPE}
    at.core = StageCore(at.spec, prunes=True, trained=1 << 17, **shape)  # type: ignore[arg-type]
    pieces = (Piece(0, 1024), Piece(1024, 4096), Piece(4096, 4200), Piece(4200, 8000))
    message = OpenSession(
        SessionId("s"),
        MODEL,
        EPOCH,
        1,
        HEAD,
        9000,
        8999,
        SamplingParams(),
        pruning=Pruning(256, rolling=True),
    )
    (onward,) = at.core.receive(at.sender, message, b"", at.now)
    assert onward.peer == AFTER
    tokens = np.concatenate([alone(np.zeros(8999, np.int32), piece) for piece in pieces])
    wish = Join(SessionId("s"), MODEL, EPOCH, 1, ROOT, 4, pieces)
    (onward,) = at.core.receive(at.sender, wish, pack_tail(tokens, None), at.now)
    assert onward.peer == AFTER
    at.batch()
    (load,) = at.core.joins.take_loads()
    work = ShelfWork(at.core, None, shelf, sent.extend, lambda: None)  # type: ignore[arg-type]
    await work._join(load)
    assert sorted(shelf.chains) == [1024 // 64, 3072 // 64]
    assert sent == [Outgoing(HEAD, Joined(SessionId("s"), MODEL, EPOCH, 1, ()))]


def test_a_piece_that_another_rank_lacks_is_computed() -> None:
    at = driver()
    join(at)
    at.batch()
    load_all(at)
    at.step("s", 84, sample=False)
    at.step("s", 10, position=120)
    first, second = at.batch(), None
    assert first is not None
    assert first.cells == ()
    at.run(first)
    second = at.batch()
    assert second is not None
    assert [(c.kv.start, c.kv.stop) for c in second.cells] == [(84, 120)]


@pytest.mark.parametrize("position", [13, 15, 79, 81, 120])
def test_a_step_begins_nowhere_else(position: int) -> None:
    at = driver()
    join(at)
    at.batch()
    load_all(at)
    at.step("s", 14, sample=False)
    assert errors(at.step("s", 4, sample=False, position=position)) == [(HEAD, "s", "out_of_order")]


def test_without_cells_no_step_may_leave_a_gap() -> None:
    at = driver()
    join(at)
    at.batch()
    (load,) = at.core.joins.take_loads()
    assert at.core.joins.taken(load, 0, [block(0)]) is None  # one is missing
    assert at.core.joins.taken(load, 0, [block(0), block(1, codec="other/f16")]) is None
    assert at.core.joins.taken(load, 0, [block(0), block(2)]) is None
    assert at.core.joins.taken(load, 0, [block(0), block(1, first=0)]) is None
    assert at.core.joins.refused == 3
    (answer,) = at.core.joins.loaded(load)
    assert answer == Outgoing(HEAD, Joined(SessionId("s"), MODEL, EPOCH, 1, ()))
    at.step("s", 14, sample=False)
    assert errors(at.step("s", 4, position=80)) == [(HEAD, "s", "out_of_order")]


def test_a_rank_that_cannot_move_keys_says_so_at_once() -> None:
    for at in (driver(shape=None), driver(shape=KvShape(1, 4)), driver(cells="toy")):
        out = join(at)
        assert [each.peer for each in out] == [AFTER, HEAD]
        assert out[1].message == Joined(SessionId("s"), MODEL, EPOCH, 1, ())


def test_a_step_that_comes_early_ends_the_wait() -> None:
    at = driver()
    join(at)
    at.batch()
    (load,) = at.core.joins.take_loads()
    at.step("s", 100, sample=False)
    assert not load.active
    assert at.core.joins.loaded(load) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"root": b""}, "malformed_join"),
        ({"skip": 0}, "bad_join"),
        ({"pieces": ()}, "malformed_restore"),
        ({"pieces": (Piece(10, 80),)}, "malformed_join"),
        ({"pieces": (Piece(90, 130), Piece(10, 80))}, "bad_join"),
        ({"pieces": (Piece(-5, 60), Piece(80, 120))}, "bad_join"),
        ({"sources": tuple(PeerId(str(i)) for i in range(17))}, "bad_parameter"),
    ],
)
def test_what_cannot_be_joined_is_refused(changes: dict[str, object], code: str) -> None:
    out = join(driver(), **changes, **({"tail": b""} if changes.get("pieces") == () else {}))
    assert errors(out) == [(HEAD, "s", code)]


def test_hostile_tails_are_refused() -> None:
    for tail in (b"", bytes(7), bytes(4 * 64), pack_tail(np.full(192, 100, np.int32), None)):
        ((peer, name, code),) = errors(join(driver(), tail=tail))
        assert (peer, name) == (HEAD, "s")
        assert code in ("malformed_restore", "malformed_join", "bad_parameter")


def test_sessions_with_names_for_their_blocks_join_nothing() -> None:
    at = driver()
    at.core.blocks.opened(at.core._sessions[SessionId("s")], ROOT, 64, 130)
    assert errors(join(at)) == [(HEAD, "s", "malformed_join")]


def test_the_head_is_told_when_the_blocks_are_kept() -> None:
    at = driver()
    at.core.blocks.opened(at.core._sessions[SessionId("s")], ROOT, 64, 128)
    at.core._sessions[SessionId("s")].prompt_tokens = 128
    at.step("s", 128, sample=False)
    keep = Keep(SessionId("s"), MODEL, EPOCH, 1)
    (onward,) = at.core.receive(at.sender, keep, b"", at.now)
    assert onward == Outgoing(AFTER, Keep(SessionId("s"), MODEL, EPOCH, 2))
    at.run(at.batch())
    harvest = at.core.blocks.next_harvest(1)
    assert harvest is not None
    assert at.core.blocks.exported(harvest) == []
    harvest = at.core.blocks.next_harvest(1)
    assert harvest is not None
    kept = [Outgoing(HEAD, Restored(SessionId("s"), MODEL, EPOCH, 1, 2, 64))]
    assert at.core.blocks.exported(harvest) == kept
    assert at.core.blocks.exported(harvest) == []


# ---- at the head -----------------------------------------------------------------------------

PLACEMENT = Placement(
    MODEL, 4, tuple(Rank(r, Slice(r, r + 1, r == 1), PeerId(f"p{r}")) for r in range(2)), 4096, 1
)


def head() -> HeadCore:
    """Return a session with pieces that has begun."""
    plan = HeadPlan(
        SessionId("stable"),
        PeerId("h"),
        MODEL,
        20,
        (),
        True,
        SamplingParams(),
        join=PLAN,
        join_root=ROOT,
    )
    core = HeadCore(plan, PROMPT, Vocabulary((b"x",) * 100, frozenset()), 0.0)
    _, wish = core.begin(SessionId("s"), PLACEMENT, None, 0.0)
    assert isinstance(wish.message, Join)
    assert (wish.message.pieces, wish.message.skip, wish.message.root) == (PIECES, 4, ROOT)
    assert core.next_chunk() is None
    return core


def word(rank: int, *pieces: int) -> tuple[PeerId, Joined]:
    """Return what a rank says."""
    return PeerId(f"p{rank}"), Joined(SessionId("s"), MODEL, 4, rank, pieces)


def spans(core: HeadCore) -> list[tuple[int, int]]:
    """Return the steps of the prompt that are sent now."""
    found: list[tuple[int, int]] = []
    while (chunk := core.next_chunk()) is not None:
        assert core.attempt is not None
        message = core.attempt.send_chunk(chunk, None, 0.0).message
        assert isinstance(message, Step)
        found.append((message.position, message.position + message.n))
    return found


def test_what_all_ranks_have_is_left_out() -> None:
    core = head()
    assert not core.on_restored(*word(0, 0, 1))
    assert core.on_restored(*word(1, 0, 1))
    assert core.attempt is not None
    assert core.attempt.joined == 102
    assert spans(core) == [(0, 14), (80, 84), (120, 130)]


@pytest.mark.parametrize(
    ("first", "second", "steps"),
    [
        ((0,), (0, 1), [(0, 14), (80, 130)]),
        ((0, 1), (1,), [(0, 84), (120, 130)]),
        ((0,), (1,), [(0, 130)]),
        ((), (), [(0, 130)]),
    ],
)
def test_what_one_rank_lacks_is_computed(
    first: tuple[int, ...], second: tuple[int, ...], steps: list[tuple[int, int]]
) -> None:
    core = head()
    core.on_restored(*word(0, *first))
    assert core.on_restored(*word(1, *second))
    assert spans(core) == steps


def test_a_rank_that_says_nothing_has_nothing() -> None:
    core = head()
    core.on_restored(*word(0, 0, 1))
    assert core.attempt is not None
    core.attempt.start(0)
    assert spans(core) == [(0, 130)]


def test_after_refused_cells_the_prompt_is_computed() -> None:
    core = head()
    core.on_restored(*word(0, 0, 1))
    core.on_restored(*word(1, 0, 1))
    core.interrupt(not_joined(CorruptData("bad", code="not_finite")), 1.0)
    assert not core.over
    assert len(core.begin(SessionId("t"), PLACEMENT, None, 2.0)) == 1
    assert spans(core) == [(0, 130)]


def test_words_that_cannot_be_end_the_session() -> None:
    wait = Joining(PLACEMENT, PLAN, 0.0)
    assert not wait.take(PeerId("stranger"), word(0)[1])
    with pytest.raises(CorruptData):
        wait.take(*word(0, 2))
    assert wait.gaps() == {}


# ---- pieces ----------------------------------------------------------------------------------


def test_pieces_are_padded_to_blocks_and_come_apart_again() -> None:
    parts = [alone(PROMPT, piece) for piece in PIECES]
    assert [len(part) for part in parts] == [128, 64]
    assert parts[0].tolist() == [*PROMPT[10:80], *[PROMPT[79]] * 58]
    whole = np.concatenate(parts)
    again = list(split_alone(whole, PIECES))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    with pytest.raises(CorruptData):
        list(split_alone(whole[:-1], PIECES))


@pytest.mark.parametrize(
    ("pieces", "skip", "n"),
    [
        ((), 1, 10),
        ((Piece(0, 5),), 0, 10),
        ((Piece(0, 5),), 5, 10),
        ((Piece(0, 5),), 1, 5),
        ((Piece(-1, 5),), 1, 10),
        ((Piece(0, 5), Piece(4, 8)), 1, 10),
        ((Piece(5, 2),), 1, 10),
        (tuple(Piece(i * 3, i * 3 + 3) for i in range(65)), 1, 1000),
    ],
)
def test_pieces_that_cannot_be_are_refused(pieces: tuple[Piece, ...], skip: int, n: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_pieces(pieces, skip, n)
    assert caught.value.code == "bad_join"


def test_names_of_pieces_are_never_those_of_prompts() -> None:
    model = Digest("a" * 64)
    roots = {chunk_root(model, ""), chunk_root(model, "x"), cache_root(model, "")}
    assert len(roots) == 3


def test_keys_turn_by_the_angle_of_their_pair() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(5, 2, 8)).astype("<f2")
    for halves in (False, True):
        shape = KvShape(2, 8, 1e3, rope_halves=halves)
        kv = KvRange(CELLS, 3, 8, (LayerKv(0, rows.tobytes(), rows.tobytes()),))
        (found,) = moved_to(kv, 1003, shape)
        assert found.values == rows.tobytes()
        angles = 1000 * 1e3 ** (-np.arange(4) / 4)
        plain = rows.astype(np.float64)
        pairs = plain.reshape(5, 2, 2, 4).swapaxes(2, 3) if halves else plain.reshape(5, 2, 4, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        got = np.frombuffer(found.keys, "<f2").reshape(5, 2, 8).astype(np.float64)
        got_pairs = got.reshape(5, 2, 2, 4).swapaxes(2, 3) if halves else got.reshape(5, 2, 4, 2)
        assert np.allclose(got_pairs[..., 0], turned.real, atol=4e-3)
        assert np.allclose(got_pairs[..., 1], turned.imag, atol=4e-3)
        (same,) = moved_to(kv, 3, shape)
        assert same.keys == rows.tobytes()


def test_rows_of_another_shape_are_not_moved() -> None:
    kv = KvRange(CELLS, 0, 2, (LayerKv(0, bytes(12), bytes(12)),))
    with pytest.raises(CorruptData):
        list(moved_to(kv, 1, SHAPE))
    with pytest.raises(Unsupported):
        list(moved_to(kv, 1, KvShape(1, 4)))
