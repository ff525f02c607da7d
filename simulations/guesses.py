"""Random trees of guesses, for tests: of any shape, right as far as they are told to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pyagent_node.inference.drafting.port import Draft

Following = Callable[[Sequence[int]], int]
"""Says which token comes after a path of guesses."""


def random_tree(
    rng: random.Random, size: int, following: Following, *, right: float, n_vocab: int
) -> Draft:
    """Return a tree of at most ``size`` guesses.

    A guess that follows right ones only is right with a probability of ``right``, if none beside it
    is; where in the tree the right ones are is left to chance.
    """
    steep = rng.choice([0.0, 0.2, 0.5, 0.9])
    decoy = rng.random() < 0.3  # the right ones are far from the principal path
    tokens: list[int] = []
    parents: list[int] = []
    path: list[int] = []
    beside: dict[int, set[int]] = {}
    for _ in range(size):
        while path and rng.random() < steep:
            path.pop()
        parent = path[-1] if path else -1
        token = rng.randrange(n_vocab)
        if rng.random() < right:
            token = following([tokens[at] for at in path])
        if decoy and not tokens:
            token = (following([]) + 1) % n_vocab
        siblings = beside.setdefault(parent, set())
        if token in siblings:
            continue
        siblings.add(token)
        if tokens or not decoy:
            path.append(len(tokens))
        tokens.append(token)
        parents.append(parent)
    return Draft(tuple(tokens), (0.5,) * len(tokens), "tree", tuple(parents))
