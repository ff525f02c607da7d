"""The tree of prefixes and what it gives up first, against a plain model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.sharding.block_tree import DISK, MEMORY, BlockTree, Place, UnitId
from pyagent_node.sharding.kv_keys import BlockKey
from tests.unit.sharding.blocks import MODEL, OTHER, chain_of


def add(
    tree: BlockTree,
    chain: tuple[bytes, ...],
    number: int,
    *,
    tier: int = MEMORY,
    layer: int = 0,
    size: int = 100,
    cost: float = 1.0,
) -> BlockKey:
    key = BlockKey(MODEL, layer, chain[number], "f16")
    parent = chain[number - 1] if number else b""
    tree.add(tier, Place(key, parent, number), size, cost)
    return key


def add_all(tree: BlockTree, chain: tuple[bytes, ...], **more: float) -> list[BlockKey]:
    return [add(tree, chain, number, **more) for number in range(len(chain))]  # type: ignore[arg-type]


def unit(link: bytes) -> UnitId:
    return UnitId(MODEL, "f16", link)


def test_ends_of_chains_go_first_and_the_rest_stays_a_prefix() -> None:
    tree = BlockTree()
    chain = chain_of(1, 6)
    keys = add_all(tree, chain)
    for left in (5, 4, 3, 2, 1, 0):
        assert tree.evict(MEMORY, 1) == [keys[left]]
        assert tree.leading(MODEL, chain, range(1), "f16", None) == left
    assert tree.evict(MEMORY, 1) == []
    assert tree.units == {}
    assert tree.nbytes == [0, 0]
    assert tree.blocks == [0, 0]


def test_a_shared_prefix_outlives_its_branches() -> None:
    tree = BlockTree()
    one, two = chain_of(1, 4), chain_of(2, 4)
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    add_all(tree, one)
    add_all(tree, two)
    gone = [key.chain for _ in range(4) for key in tree.evict(MEMORY, 1)]
    assert set(gone) == {*one[2:], *two[2:]}
    assert tree.leading(MODEL, one, range(1), "f16", MEMORY) == 2


def test_what_is_dear_for_its_size_and_what_is_used_stays() -> None:
    tree = BlockTree()
    cheap, dear, small, used = (chain_of(8 * i, 1) for i in range(4))
    add_all(tree, cheap, cost=1.0)
    add_all(tree, dear, cost=3.0)
    add_all(tree, small, cost=1.0, size=25)
    add_all(tree, used, cost=1.0)
    for _ in range(5):
        tree.touch(unit(used[0]), 1.0)
    order = [key.chain for _ in range(4) for key in tree.evict(MEMORY, 1)]
    assert order == [cheap[0], dear[0], small[0], used[0]]


def test_what_was_used_once_grows_old() -> None:
    tree = BlockTree()
    loved = chain_of(0, 1)
    add_all(tree, loved)
    for _ in range(20):
        tree.touch(unit(loved[0]), 1.0)
    for turn in range(1, 200):
        add_all(tree, chain_of(8 * turn, 1))
        tree.evict(MEMORY, tree.nbytes[MEMORY] - 400)
        if not tree.holds(BlockKey(MODEL, 0, loved[0], "f16")):
            break
    assert 20 < turn < 150


def test_pins_hold_also_before_the_block_comes() -> None:
    tree = BlockTree()
    chain = chain_of(1, 3)
    for link in chain:
        tree.pin(unit(link))
        tree.pin(unit(link))
    add_all(tree, chain)
    assert tree.evict(MEMORY, 10**6) == []
    for link in chain:
        tree.unpin(unit(link))
    assert tree.evict(MEMORY, 10**6) == []
    for link in chain:
        tree.unpin(unit(link))
    assert len(tree.evict(MEMORY, 10**6)) == 3


def test_layers_and_tiers_are_counted_apart() -> None:
    tree = BlockTree()
    chain = chain_of(1, 4)
    for layer in range(4):
        add_all(tree, chain[: 4 - layer], layer=layer)
    add_all(tree, chain, layer=3, tier=DISK)
    assert tree.counts(MODEL, chain, range(5), "f16") == [4, 3, 2, 4, 0]
    assert tree.leading(MODEL, chain, range(4), "f16", None) == 2
    assert tree.leading(MODEL, chain, range(4), "f16", MEMORY) == 1
    assert tree.leading(MODEL, chain, range(3, 4), "f16", DISK) == 4
    assert tree.leading(OTHER, chain, range(1), "f16", None) == 0
    assert tree.leading(MODEL, chain, range(1), "int8", None) == 0
    assert tree.leading(MODEL, chain, range(0), "f16", None) == 4
    assert tree.blocks == [10, 4]
    add_all(tree, chain, layer=3, tier=DISK, size=999)  # again: nothing changes
    assert tree.nbytes == [1000, 400]


@pytest.mark.parametrize("turn", [0, 1])
def test_lies_about_parents_cannot_make_anything_stay_for_ever(turn: int) -> None:
    tree = BlockTree()
    a, b, c = chain_of(1, 3)
    ring = [(a, c, 0), (b, a, 1), (c, b, 2)] if turn else [(a, a, 0), (b, c, 1), (c, b, 1)]
    for link, parent, number in ring:
        tree.add(MEMORY, Place(BlockKey(MODEL, 0, link, "f16"), parent, number), 1, 1.0)
    assert len(tree.evict(MEMORY, 3)) == 3
    assert tree.units == {}


class Plain:
    """The same, the slow way: sets of keys."""

    def __init__(self) -> None:
        self.held: tuple[dict[BlockKey, int], dict[BlockKey, int]] = ({}, {})

    def leading(self, chain: tuple[bytes, ...], layers: range) -> int:
        for count, link in enumerate(chain):
            for layer in layers:
                key = BlockKey(MODEL, layer, link, "f16")
                if key not in self.held[0] and key not in self.held[1]:
                    return count
        return len(chain)


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_any_history_agrees_with_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    tree, plain = BlockTree(), Plain()
    chains = [chain_of(text, 5) for text in (0, 1, 2, 8, 9)]
    pinned: list[UnitId] = []
    for _ in range(150):
        chain, tier = rng.choice(chains), rng.choice((MEMORY, DISK))
        number, layer = rng.randrange(5), rng.randrange(3)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                size = rng.randrange(1, 50)
                key = add(tree, chain, number, tier=tier, layer=layer, size=size)
                plain.held[tier].setdefault(key, size)
            case 4:
                key = BlockKey(MODEL, layer, chain[number], "f16")
                tree.remove(key, tier)
                plain.held[tier].pop(key, None)
            case 5:
                tree.touch(unit(chain[number]), rng.random())
            case 6 if pinned and rng.random() < 0.6:
                tree.unpin(pinned.pop(rng.randrange(len(pinned))))
            case 6:
                pinned.append(unit(chain[number]))
                tree.pin(pinned[-1])
            case _:
                want = rng.randrange(1, 200)
                before = sum(plain.held[tier].values())
                for key in tree.evict(tier, want):
                    assert unit(key.chain) not in pinned
                    del plain.held[tier][key]
                left = {unit(key.chain) for key in plain.held[tier]} - set(pinned)
                freed = before - sum(plain.held[tier].values())
                if freed < want:  # then only what is pinned, and what that hangs on, is left
                    below = {
                        tree.units[name].parent
                        for name in tree.units
                        if tree.units[name].masks[tier]
                    }
                    assert left <= below
        assert tree.nbytes == [sum(held.values()) for held in plain.held]
        assert tree.blocks == [len(held) for held in plain.held]
        assert set(tree.names()) == plain.held[0].keys() | plain.held[1].keys()
        for one in chains:
            assert tree.leading(MODEL, one, range(2), "f16", None) == plain.leading(one, range(2))
