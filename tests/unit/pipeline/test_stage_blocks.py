"""What a stage makes of blocks: which it shows to the shelf, and how it restores a session's."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pyagent_node.base.errors import Conflict
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import (
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    TrimSequence,
)
from pyagent_node.inference.pipeline.frames import (
    MAX_SOURCES,
    CloseSession,
    Held,
    OpenSession,
    Restore,
    Restored,
    Step,
    Tail,
    pack_tail,
)
from pyagent_node.inference.pipeline.stage import PARKED_SECONDS, StageCore
from pyagent_node.inference.pipeline.stage_blocks import IMPORT_BLOCKS, Harvest, Load
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_keys import block_chain, rest_links

from .stage_driver import AFTER, BEFORE, EPOCH, HEAD, MODEL, Driver, errors, spec

ROOT = bytes(range(32))
CELLS = "toy"


def driver(rank: int = 1, *, n_seq: int = 2, cells: str = CELLS, cut: int = 64) -> Driver:
    """Return a stage with a shelf."""
    made = Driver(spec(rank, n_seq=n_seq))
    made.core = StageCore(made.spec, cells=cells, cut=cut)
    return made


def opened(
    at: Driver, name: str, *, root: bytes = ROOT, prompt: int = 100, cut: int = 64
) -> list[Outgoing]:
    """Open a session with a root."""
    at.at[name] = (0, 0)
    message = OpenSession(
        SessionId(name), MODEL, EPOCH, at.spec.rank, HEAD, 4096, prompt, SamplingParams(), root, cut
    )
    return at.core.receive(at.sender, message, b"", at.now)


def restore(
    at: Driver,
    name: str,
    n: int = 128,
    *,
    sender: PeerId | None = None,
    epoch: int = EPOCH,
    token: int = 1,
    tail: Tail | None = None,
    sources: tuple[PeerId, ...] = (),
) -> list[Outgoing]:
    """Ask for the blocks of ``n`` tokens."""
    message = Restore(SessionId(name), MODEL, epoch, at.spec.rank, n, sources)
    if tail is None:
        tail = pack_tail(np.full(n, token, dtype=np.int32), None)
    return at.core.receive(sender or at.sender, message, tail, at.now)


def cells(index: int, *, first: int = 10, last: int = 20) -> KvRange:
    """Return a block as a shelf would."""
    layers = tuple(LayerKv(layer, b"k" * 64, b"v" * 64) for layer in range(first, last))
    return KvRange(CELLS, 64 * index, 64 * index + 64, layers)


def load_of(at: Driver) -> Load:
    """Return the only load that can begin."""
    (load,) = at.core.blocks.take_loads()
    assert at.core.blocks.take_loads() == []
    return load


def shown(harvest: Harvest | None) -> list[int]:
    """Return the indices of blocks in a harvest."""
    return [] if harvest is None else [block.index for block in harvest.blocks]


def harvests(at: Driver) -> list[int]:
    """Return the indices of all blocks that are due."""
    found: list[int] = []
    while at.core.blocks.has_harvest:
        found += shown(at.core.blocks.next_harvest(3))
    return found


# ---- opening ---------------------------------------------------------------------------------


def test_the_greatest_cut_so_far_is_passed_on() -> None:
    for own, given, told in ((64, 64, 64), (512, 64, 512), (64, 512, 512)):
        (out,) = opened(driver(cut=own), "s", cut=given)
        assert isinstance(out.message, OpenSession)
        assert (out.peer, out.message.cut, out.message.root) == (AFTER, told, ROOT)


@pytest.mark.parametrize(
    ("root", "cut"), [(b"x", 64), (bytes(33), 64), (ROOT, 0), (ROOT, 65), (ROOT, 1024), (ROOT, -64)]
)
def test_a_root_or_cut_that_cannot_be_is_refused(root: bytes, cut: int) -> None:
    out = opened(driver(), "s", root=root, cut=cut)
    assert errors(out) == [(HEAD, "s", "bad_parameter")]


# ---- harvest ---------------------------------------------------------------------------------


def test_settled_blocks_are_shown_once_in_order_by_their_names() -> None:
    at = driver()
    opened(at, "s", prompt=130)
    at.step("s", 130, sample=False, tokens=list(range(60)))
    at.run(at.batch(), 1.3)
    harvest = at.core.blocks.next_harvest(8)
    assert harvest is not None
    assert not at.core.blocks.has_harvest
    tokens = [*range(60), *[1] * 70]
    chain = block_chain(ROOT, tokens, 130)
    assert [(b.index, b.chain) for b in harvest.blocks] == list(enumerate(chain))
    first = harvest.blocks[0]
    assert (first.session, first.head, first.model, first.cells) == ("s", HEAD, MODEL, CELLS)
    assert first.layers == range(10, 20)
    assert harvest.seconds == pytest.approx((0.64, 0.64))
    for _ in range(70):
        at.step("s")
        at.run(at.batch())
    assert harvests(at) == [2]


def test_few_at_a_time_and_every_session_gets_a_turn() -> None:
    at = driver()
    for name in ("a", "b"):
        opened(at, name, prompt=400)
        at.step(name, 400, sample=False)
    at.run(at.batch())
    at.run(at.batch())
    turns = []
    while (harvest := at.core.blocks.next_harvest(2)) is not None:
        turns.append((harvest.session.id, shown(harvest)))
    a, b = "a", "b"
    assert turns == [(s, [i, i + 1]) for i in (0, 2, 4) for s in (a, b)]


def test_guesses_are_not_settled_before_they_are_known_to_be_right() -> None:
    at = driver()
    opened(at, "s", prompt=60)
    at.step("s", 60)
    at.run(at.batch())
    at.step("s", 8, drafts=7)  # positions 60 to 67, one of them known
    at.run(at.batch())
    assert harvests(at) == []
    at.step("s", 1, position=63)  # two guesses were right
    at.run(at.batch())
    assert harvests(at) == [0]


def test_a_child_says_how_far_the_answer_has_come() -> None:
    at = driver()
    opened(at, "s", prompt=60)
    at.step("s", 60)
    at.run(at.batch())
    at.step("s", 8, drafts=7)
    at.run(at.batch())
    for step, settled in ((2, 0), (3, 68)):
        position = 68 + 4 * (step - 2)
        message = Step(
            SessionId("s"), MODEL, EPOCH, 1, step, position, 4, True, 0.0, 3, step - 1, (), settled
        )
        tail = pack_tail(np.ones(4, np.int32), np.ones((4, 2), np.float32))
        assert at.core.receive(BEFORE, message, tail, 0.0) == []
        at.run(at.batch())
        assert harvests(at) == ([0] if settled else [])


def test_what_a_child_says_is_not_believed_beyond_its_own_position() -> None:
    at = driver()
    opened(at, "s", prompt=60)
    at.step("s", 60)
    at.run(at.batch())
    at.step("s", 8, drafts=7)
    at.run(at.batch())
    message = Step(SessionId("s"), MODEL, EPOCH, 1, 2, 68, 4, True, 0.0, 3, 1, (), 2**40)
    tail = pack_tail(np.ones(4, np.int32), np.ones((4, 2), np.float32))
    at.core.receive(BEFORE, message, tail, 0.0)
    at.run(at.batch())
    assert harvests(at) == [0]


def test_a_session_that_goes_back_shows_what_it_says_then() -> None:
    at = driver()
    opened(at, "s", prompt=60)
    at.step("s", 60)
    at.run(at.batch())
    for _ in range(70):
        at.step("s")
        at.run(at.batch())
    assert harvests(at) == [0, 1]
    at.step("s", 8, position=62, token=9)
    at.run(at.batch())
    harvest = at.core.blocks.next_harvest(8)
    assert harvest is not None
    (block,) = harvest.blocks
    assert block.chain == block_chain(ROOT, [*[1] * 62, 9, 9], 60)[0]


@pytest.mark.parametrize(("root", "name"), [(b"", CELLS), (ROOT, "")])
def test_nothing_is_shown_without_a_root_or_a_shelf(root: bytes, name: str) -> None:
    at = driver(cells=name)
    opened(at, "s", root=root)
    at.step("s", 100, sample=False)
    at.run(at.batch())
    assert harvests(at) == []


def test_the_shelf_hears_of_every_end_once() -> None:
    at = driver()
    opened(at, "a")
    opened(at, "b", root=b"")
    opened(at, "c")
    at.close("a")
    at.close("b")
    assert at.core.blocks.take_ended() == ["a"]
    at.core.peer_down(HEAD)
    assert at.core.blocks.take_ended() == ["c"]
    assert at.core.blocks.take_ended() == []


# ---- restore ---------------------------------------------------------------------------------


def test_a_wish_is_passed_on_and_waits_for_a_slot() -> None:
    at = driver(n_seq=1)
    opened(at, "a")
    opened(at, "b")
    out = restore(at, "b", sources=(PeerId("p"),))
    message = Restore(SessionId("b"), MODEL, EPOCH, 2, 128, (PeerId("p"),))
    assert [(o.peer, o.message, len(o.tail)) for o in out] == [(AFTER, message, 512)]
    assert at.core.blocks.take_loads() == []
    at.close("a")
    load = load_of(at)
    wanted = at.core.blocks.wanted(load)
    assert wanted.chain == block_chain(ROOT, [1] * 128, 100)
    assert (wanted.session, wanted.layers, wanted.skip) == ("b", range(10, 20), 0)
    assert wanted.sources == (PeerId("p"),)


def test_imports_come_in_small_parts_and_the_head_is_told_how_far_it_came() -> None:
    at = driver()
    opened(at, "s", prompt=700)
    restore(at, "s", 64 * 10)
    load = load_of(at)
    jobs = at.core.blocks.imports(load, [cells(i) for i in range(9)])
    assert [(job.kv.start, job.kv.stop, len(job.tokens)) for job in jobs] == [
        (0, 64 * IMPORT_BLOCKS, 64 * IMPORT_BLOCKS),
        (64 * IMPORT_BLOCKS, 64 * 9, 64),
    ]
    for job in jobs:
        at.core.blocks.imported(job)
    assert at.core.blocks.wanted(load).skip == 9
    (answer,) = at.core.blocks.loaded(load)
    told = Restored(SessionId("s"), MODEL, EPOCH, 1, 9, 64)
    assert (answer.peer, answer.message) == (HEAD, told)
    assert at.core.blocks.loaded(load) == []
    # the head begins lower, since another rank has less: cells from there on are dropped
    assert at.step("s", 64, position=448, sample=False) == []
    batch = at.batch()
    assert batch.ops == (OpenSequence(0), TrimSequence(0, 448))
    at.run(batch)
    assert harvests(at) == list(range(8))
    assert at.core.view().restored == 64 * 9


@pytest.mark.parametrize("position", [577, 640, -1])
def test_the_first_step_begins_within_what_was_restored(position: int) -> None:
    at = driver()
    opened(at, "s", prompt=700)
    restore(at, "s", 640)
    load = load_of(at)
    for job in at.core.blocks.imports(load, [cells(i) for i in range(9)]):
        at.core.blocks.imported(job)
    at.core.blocks.loaded(load)
    assert errors(at.step("s", 10, position=position)) == [(HEAD, "s", "out_of_order")]


def test_a_step_ends_the_wait_and_cells_that_are_there_already_are_dropped() -> None:
    at = driver()
    opened(at, "s")
    restore(at, "s")
    load = load_of(at)
    (first,) = at.core.blocks.imports(load, [cells(0)])
    at.core.blocks.imported(first)
    assert at.step("s", 100, sample=False) == []
    assert not load.active
    batch = at.batch()
    assert batch.ops == (OpenSequence(0), FreeSequence(0), OpenSequence(0))
    assert at.core.blocks.loaded(load) == []
    at.run(batch)
    assert harvests(at) == [0]


def test_a_refused_import_empties_the_slot_and_the_session_begins_at_0() -> None:
    at = driver()
    opened(at, "s", prompt=700)
    restore(at, "s", 640)
    load = load_of(at)
    good, bad = at.core.blocks.imports(load, [cells(i) for i in range(9)])
    at.core.blocks.imported(good)
    at.core.not_imported(bad)
    (answer,) = at.core.blocks.loaded(load)
    assert isinstance(answer.message, Restored)
    assert answer.message.blocks == 0
    assert at.core.take_ops() == (OpenSequence(0), FreeSequence(0), OpenSequence(0))
    assert at.step("s", 512, sample=False) == []
    assert at.batch().ops == ()
    assert at.core.view().unfit == 1


def test_blocks_that_are_not_what_was_asked_for_are_left_out() -> None:
    wrong = [
        msgspec.structs.replace(cells(1), codec="other"),
        cells(2),
        cells(1, first=11),
        cells(1, last=19),
        msgspec.structs.replace(cells(1), stop=127),
    ]
    for block in wrong:
        at = driver()
        opened(at, "s", prompt=700)
        restore(at, "s", 640)
        load = load_of(at)
        (job,) = at.core.blocks.imports(load, [cells(0), block, cells(2)])
        assert (job.kv.start, job.kv.stop) == (0, 64)
        assert at.core.view().unfit == 1
    at = driver()
    opened(at, "s")
    restore(at, "s", 64)
    assert len(at.core.blocks.imports(load_of(at), [cells(0), cells(1)])) == 1


def test_a_session_that_is_over_is_not_answered_for() -> None:
    at = driver()
    opened(at, "s")
    restore(at, "s")
    load = load_of(at)
    (job,) = at.core.blocks.imports(load, [cells(0)])
    at.close("s")
    at.core.blocks.imported(job)
    at.core.not_imported(job)
    assert at.core.blocks.loaded(load) == []
    assert not load.active
    assert restore(at, "s") == []


def test_a_rank_without_a_shelf_answers_at_once() -> None:
    at = driver(cells="", cut=512)
    opened(at, "s")
    onward, answer = restore(at, "s")
    assert onward.peer == AFTER
    assert answer == Outgoing(HEAD, Restored(SessionId("s"), MODEL, EPOCH, 1, 0, 512))
    assert at.core.blocks.take_loads() == []
    assert at.step("s", 100) == []


@pytest.mark.parametrize(
    ("n", "size", "code"),
    [
        (0, 0, "malformed_restore"),
        (-64, 256, "malformed_restore"),
        (63, 252, "malformed_restore"),
        (64, 252, "malformed_restore"),
        (64, 260, "malformed_restore"),
        (64, 0, "malformed_restore"),
        (2**60, 256, "malformed_restore"),
        (4160, 4160 * 4, "bad_parameter"),
    ],
)
def test_a_wish_of_another_size_ends_its_session(n: int, size: int, code: str) -> None:
    at = driver()
    opened(at, "s")
    assert errors(restore(at, "s", n, tail=bytes(size))) == [(HEAD, "s", code)]
    assert not at.core.holds(SessionId("s"))


def test_wishes_that_make_no_sense_end_their_own_session() -> None:
    at = driver(n_seq=9)
    opened(at, "rootless", root=b"")
    assert errors(restore(at, "rootless")) == [(HEAD, "rootless", "malformed_restore")]
    opened(at, "twice")
    restore(at, "twice")
    assert errors(restore(at, "twice")) == [(HEAD, "twice", "out_of_order")]
    opened(at, "late")
    at.step("late", 10, sample=False)
    assert errors(restore(at, "late")) == [(HEAD, "late", "out_of_order")]
    opened(at, "vocabulary")
    assert errors(restore(at, "vocabulary", token=100)) == [(HEAD, "vocabulary", "bad_parameter")]
    opened(at, "negative")
    assert errors(restore(at, "negative", token=-1)) == [(HEAD, "negative", "bad_parameter")]
    opened(at, "sources")
    many = tuple(PeerId(f"p{i}") for i in range(MAX_SOURCES + 1))
    assert errors(restore(at, "sources", sources=many)) == [(HEAD, "sources", "bad_parameter")]
    assert at.core.blocks.take_loads() == []
    assert at.core.view().sessions == 0


def test_nobody_else_can_restore_for_a_session() -> None:
    at = driver()
    opened(at, "s")
    mallory = PeerId("mallory")
    assert errors(restore(at, "s", sender=mallory)) == [(mallory, "s", "wrong_sender")]
    assert errors(restore(at, "s", sender=HEAD)) == [(HEAD, "s", "wrong_sender")]
    assert errors(restore(at, "unknown")) == [(BEFORE, "unknown", "session_unknown")]
    assert restore(at, "s", epoch=EPOCH - 1) == []
    assert at.core.blocks.take_loads() == []
    assert at.core.view().refused == 4


# ---- the end of an epoch ----------------------------------------------------------------------


def parts(at: Driver, name: str) -> None:
    """Close a session whose epoch ends."""
    message = CloseSession(SessionId(name), MODEL, EPOCH, at.spec.rank, parts=True)
    at.core.receive(HEAD, message, b"", at.now)


def fed(at: Driver, name: str, prompt: int, more: int) -> None:
    """Compute a prompt and so many tokens after it."""
    opened(at, name, prompt=prompt)
    at.step(name, prompt, token=1)
    at.run(at.batch())
    for _ in range(more):
        at.step(name, 1, token=2)
        at.run(at.batch())


def test_a_session_that_moves_keeps_its_cells_until_the_stage_ends() -> None:
    at = driver(n_seq=1)
    fed(at, "a", 100, 30)
    at.step("a", 1, token=2)
    under_way = at.batch()
    parts(at, "a")
    assert not at.core.holds(SessionId("a"))
    assert at.run(under_way) == [], "nobody waits for it"
    opened(at, "b")
    assert not at.core.has_work, "there is no slot for another session"
    (parting,) = at.core.partings()
    chain = block_chain(ROOT, [1] * 100 + [2] * 28, 100)
    assert (parting.seq, parting.rest.start, parting.rest.parent) == (0, 128, chain[-1])
    assert parting.rest.links == rest_links(chain[-1], [2, 2], 100)
    assert (parting.rest.first_layer, parting.rest.last_layer) == (10, 20)
    at.core.stop(Conflict("over", code="stale_epoch"))
    assert at.core.partings() == []
    assert at.core.blocks.take_ended() == [SessionId("a"), SessionId("b")]


def test_an_open_session_is_handed_over_too_but_not_inside_its_prompt() -> None:
    at = driver()
    fed(at, "a", 100, 28)
    opened(at, "b", prompt=600)
    at.step("b", 512)
    at.run(at.batch())
    (parting,) = at.core.partings()
    # The rank of before may be a token behind: the whole last block is among it.
    assert (parting.rest.start, len(parting.rest.links)) == (64, 64)
    parts(at, "b")
    assert at.core.blocks.take_ended() == [SessionId("b")], "there is nothing to keep"


def test_what_waits_for_an_end_that_does_not_come_is_freed() -> None:
    at = driver(n_seq=1)
    fed(at, "a", 100, 30)
    parts(at, "a")
    opened(at, "b")
    at.core.expire(at.now + PARKED_SECONDS - 1)
    assert not at.core.has_work
    at.core.expire(at.now + PARKED_SECONDS)
    assert at.core.partings() == []
    assert at.batch().ops == (FreeSequence(0), OpenSequence(0, None))


def test_only_the_head_parks_a_session() -> None:
    at = driver()
    fed(at, "a", 100, 30)
    message = CloseSession(SessionId("a"), MODEL, EPOCH, at.spec.rank, parts=True)
    at.core.receive(PeerId("mallory"), message, b"", at.now)
    assert at.core.holds(SessionId("a"))


def test_a_rest_is_imported_behind_all_blocks_only() -> None:
    at = driver()
    opened(at, "a", prompt=100)
    tokens = np.array([1] * 100 + [2] * 50, dtype=np.int32)
    held = (Held(PeerId("p"), 5, 12), Held(PeerId("q"), 12, 30), Held(PeerId("p"), 3, 2))
    message = Restore(SessionId("a"), MODEL, EPOCH, 1, 128, (), 22, held)
    at.core.receive(at.sender, message, pack_tail(tokens, None), at.now)
    load = load_of(at)
    assert load.held == {PeerId("p"): [range(5, 12)], PeerId("q"): [range(12, 30)]}
    blocks = at.core.blocks
    wanted = blocks.wanted_rest(load)
    assert wanted is not None
    assert (wanted.start, wanted.parent, len(wanted.links)) == (128, load.chain[-1], 22)
    kv = KvRange(CELLS, 128, 140, cells(2).layers)
    assert blocks.rest_import(load, kv) is None, "the blocks are not there"
    for job in blocks.imports(load, [cells(0), cells(1)]):
        blocks.imported(job)
    for wrong in (
        msgspec.structs.replace(kv, start=127),
        msgspec.structs.replace(kv, stop=151),
        msgspec.structs.replace(kv, stop=128),
        msgspec.structs.replace(kv, codec="other"),
        msgspec.structs.replace(kv, layers=kv.layers[1:]),
    ):
        assert blocks.rest_import(load, wrong) is None
    job = blocks.rest_import(load, kv)
    assert job is not None
    blocks.imported(job)
    assert blocks.loaded(load) == [
        Outgoing(HEAD, Restored(SessionId("a"), MODEL, EPOCH, 1, 2, 64, 12))
    ]
    at.at["a"] = (0, 140)
    at.step("a", 1)
    assert at.batch().inputs[0].position == 140


@pytest.mark.parametrize(("n", "rest"), [(0, 0), (64, -1), (64, 64), (0, -1), (63, 1)])
def test_a_wish_for_a_rest_that_cannot_be_ends_the_session(n: int, rest: int) -> None:
    at = driver()
    opened(at, "a")
    message = Restore(SessionId("a"), MODEL, EPOCH, 1, n, (), rest)
    tail = pack_tail(np.ones(max(0, n + rest), dtype=np.int32), None)
    ((_, _, code),) = errors(at.core.receive(at.sender, message, tail, at.now))
    assert code == "malformed_restore"
