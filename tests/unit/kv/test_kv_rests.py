"""The last cells of sessions that move on: who keeps them, who gets them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import CorruptData, InvalidRequest, Refused
from pyagent_node.base.types import Digest, SessionId
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.port import Rest
from pyagent_node.node import kv_rests
from pyagent_node.node.kv_blocks import codec_name
from pyagent_node.node.kv_messages import AskRest, RestPiece, check_request, seal
from pyagent_node.node.kv_rests import KEPT_BYTES, KEPT_SECONDS, RestBook
from pyagent_node.sharding.kv_keys import BlockKey, rest_links

from .kv_kit import MODEL, A, B, C, D, nodes, placed, rank

CELLS = "toy/1"
CODEC = codec_name(CELLS)
PARENT = b"p" * 32
START = 128
TOKENS = tuple(range(100, 140))
NOW = 5.0


def rest(tokens: Sequence[int] = TOKENS, layers: range = range(10), **changes: object) -> Rest:
    made = Rest(
        session=SessionId("5" * 32),
        model=MODEL,
        epoch=4,
        cells=CELLS,
        parent=PARENT,
        links=rest_links(PARENT, tokens, 100),
        start=START,
        first_layer=layers.start,
        last_layer=layers.stop,
    )
    return msgspec.structs.replace(made, **changes)


def cells(of: Rest, row: int = 4) -> KvRange:
    """Return cells that say which layer and token they are of."""
    count = len(of.links)
    layers = tuple(
        LayerKv(
            layer,
            b"".join(bytes([layer, token]) * (row // 2) for token in range(count)),
            b"".join(bytes([token, layer]) * (row // 2) for token in range(count)),
        )
        for layer in of.layers
    )
    return KvRange(of.cells, of.start, of.start + count, layers)


def ask(of: Rest) -> AskRest:
    return AskRest(
        of.model, codec_name(of.cells), of.parent, of.links, of.first_layer, of.last_layer, of.epoch
    )


# ---- names ---------------------------------------------------------------------------------------


def test_names_agree_as_far_as_tokens_do() -> None:
    one, other = rest_links(PARENT, (1, 2, 3), 9), rest_links(PARENT, (1, 2, 4, 5), 9)
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert not set(one) & set(rest_links(PARENT, (1, 2, 3), 8)), "another prompt"
    assert not set(one) & set(rest_links(b"q" * 32, (1, 2, 3), 9)), "another beginning"
    assert rest_links(PARENT, np.array((1, 2, 3), dtype=np.int32), 9) == one
    assert rest_links(PARENT, (), 9) == ()


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (TOKENS, 40),
        (TOKENS[:39], 39),
        ((*TOKENS, 7), 40),
        ((*TOKENS[:12], 0, 0), 12),
        ((0, *TOKENS[1:]), 0),
    ],
)
def test_as_much_is_found_as_both_agree_on(wanted: tuple[int, ...], count: int) -> None:
    book, held = RestBook(), rest()
    book.add(held, cells(held), NOW)
    found = book.find(ask(rest(wanted, range(3, 20))), NOW)
    assert set(found) == (set(range(3, 10)) if count else set())
    for layer, (tokens, kv) in found.items():
        assert tokens == count
        assert kv == LayerKv(
            layer,
            cells(held).layers[layer].keys[: 4 * count],
            cells(held).layers[layer].values[: 4 * count],
        )


def test_nothing_is_found_under_another_name() -> None:
    book, held = RestBook(), rest()
    book.add(held, cells(held), NOW)
    for other in (
        rest(parent=b"q" * 32),
        rest(cells="toy/2"),
        rest(model=Digest("cd" * 32)),
        rest(layers=range(10, 20)),
    ):
        assert book.find(ask(other), NOW) == {}


def test_what_is_old_or_too_much_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    book, held = RestBook(), rest()
    book.add(held, cells(held), NOW)
    assert book.find(ask(held), NOW + KEPT_SECONDS - 0.1)
    assert not book.find(ask(held), NOW + KEPT_SECONDS)
    size = book.bytes
    book.add(held, cells(held), NOW)
    assert (len(book), book.bytes) == (1, size), "the same once more"
    monkeypatch.setattr(kv_rests, "KEPT_BYTES", 3 * size)
    assert size < KEPT_BYTES
    other = rest((*TOKENS[:20], *TOKENS[:20]))
    book.add(other, cells(other), NOW)
    assert {count for count, _ in book.find(ask(held), NOW).values()} == {40}, "both are kept"
    for name in range(5):
        book.add(rest(parent=bytes([name]) * 32), cells(held), NOW)
    assert (len(book), book.bytes) == (3, 3 * size)
    book.add(rest(parent=b"x" * 32), cells(held), NOW + KEPT_SECONDS)
    assert len(book) == 1


# ---- between nodes -------------------------------------------------------------------------------


STATE = placed(rank(0, 0, 8, A), rank(1, 8, 30, B), epoch=5)


async def test_a_rank_gets_layers_from_all_who_had_them(autojump_clock: MockClock) -> None:
    async with nodes(STATE, A, B, C) as (_, _, (a, b, c)):
        for node, layers in ((a, range(12)), (c, range(12, 20)), (b, range(20, 30))):
            held = rest(TOKENS[: 38 + (node is a)], layers)
            node.rests.hand_over(held, cells(held))
        wanted = rest(TOKENS[:39], range(8, 30), epoch=5)
        owners = {A: [range(12)], C: [range(12, 20)], B: [range(20, 30)]}
        got = await b.rests.load(wanted, owners)
        assert got == KvRange(
            CELLS, START, START + 38, cells(rest(TOKENS[:38], range(8, 30))).layers
        )
        assert b.rests.loaded == 38
        del owners[C]
        assert await b.rests.load(wanted, owners) is None, "layers are missing"
        assert await b.rests.load(wanted, {**owners, D: [range(12, 20)]}) is None


async def test_ranks_of_an_earlier_epoch_end_first(autojump_clock: MockClock) -> None:
    async with nodes(STATE, A, B) as (_, _, (a, b)):
        held = rest()

        async def moved_on(model: Digest, epoch: int) -> None:
            assert (model, epoch) == (MODEL, 5)
            await trio.sleep(0.2)
            a.rests.hand_over(held, cells(held))

        a.rests.moved_on = moved_on
        wanted = rest(layers=range(8, 10), epoch=5)
        got = await b.rests.load(wanted, {A: [range(10)]})
        assert got is not None

        async def stays(model: Digest, epoch: int) -> None:
            await trio.sleep_forever()

        a.rests.moved_on = stays
        assert await b.rests.load(wanted, {A: [range(10)]}) == got, "not waited for for ever"


async def test_only_those_who_have_the_layers_are_told(autojump_clock: MockClock) -> None:
    async with nodes(STATE, A, B, C) as (_, _, (a, b, c)):
        held = rest()
        a.rests.hand_over(held, cells(held))
        for node, layers in ((c, range(2)), (b, range(7, 9))):
            with pytest.raises(Refused) as caught:
                await node.client.rest(A, ask(rest(layers=layers)), lambda *_: None)
            assert caught.value.code == "kv_not_yours"
            assert await node.rests.load(rest(layers=layers), {A: [range(10)]}) is None


@pytest.mark.parametrize("how", ["changed", "longer", "odd", "not finite", "empty", "all", "twice"])
async def test_what_cannot_be_the_cells_is_refused(
    how: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "real/f16"
    wanted = rest(TOKENS[:2], range(8, 9), cells=name, epoch=5)
    good = (8).to_bytes(4, "little") + bytes(8) + bytes(8)
    payload = {
        "changed": good,
        "longer": good,
        "odd": (6).to_bytes(4, "little") + bytes(6) + bytes(7),
        "not finite": (4).to_bytes(4, "little") + bytes(4) + b"\x00\x7c" * 2,
        "empty": (0).to_bytes(4, "little") + bytes(4),
        "all": (400).to_bytes(4, "little") + bytes(8),
        "twice": good,
    }[how]
    tokens = 5 if how == "longer" else 2
    sealed = seal(BlockKey(MODEL, 8, wanted.links[1], codec_name(name)), payload)
    if how == "changed":
        sealed = sealed[:-1] + b"\1"
    first = 7 if how == "twice" else 8

    async def answer(request: AskRest) -> list[tuple[RestPiece, bytes]]:
        return [(RestPiece(tokens, first, (len(sealed),)), sealed)]

    def take(tokens: int, layer: int, data: bytes) -> None:
        kv_rests._unpack(ask(wanted), layer, tokens, data, wanted.cells)

    async with nodes(STATE, A, B) as (_, _, (a, b)):
        monkeypatch.setattr(a.rests, "answer", answer)
        assert await b.rests.load(wanted, {A: [range(10)]}) is None
        with pytest.raises(CorruptData):
            await b.client.rest(A, ask(wanted), take)


@pytest.mark.parametrize(
    "changes",
    [
        {"links": ()},
        {"links": (PARENT,) * 65},
        {"links": (b"short",)},
        {"parent": b""},
        {"first_layer": 3, "last_layer": 3},
        {"first_layer": -1},
        {"last_layer": 5000},
        {"codec": "c" * 65},
    ],
)
def test_a_request_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    good = ask(rest())
    check_request(good, 0)
    with pytest.raises(InvalidRequest):
        check_request(msgspec.structs.replace(good, **changes), 0)
    with pytest.raises(InvalidRequest):
        check_request(good, 1)
