"""Drafters that a placement brings: its drafter rank, and what its loading said about guessing."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

import msgspec

from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, Drafting
from pyagent_node.inference.drafting.combined import CombinedDrafters
from pyagent_node.inference.drafting.port import DrafterFactory
from pyagent_node.inference.drafting.remote import DraftPlace, RemoteDrafters
from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.generation import (
    AUTO_SPECULATION,
    NO_SPECULATION,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.ports import HeadModel

Current = Callable[[Digest], HeadModel | None]


def suffix_of(factories: Iterable[DrafterFactory]) -> SuffixDrafters | None:
    """Return the suffix drafters among ``factories``."""
    return next((f for f in factories if isinstance(f, SuffixDrafters)), None)


def by_placement(
    request: GenerationRequest,
    drafting: Drafting | None,
    names: Container[str],
    default: str,
) -> GenerationRequest:
    """Return a request that does not say who guesses as its model's loading says, or the node.

    ``names`` are the drafters that there are; length, depth and tree of the loading hold where
    the request has none.
    """
    said = drafting.speculation if drafting is not None else None
    if drafting is None or said is None:
        return msgspec.structs.replace(request, speculation=default)
    there = said in (NO_SPECULATION, AUTO_SPECULATION) or said in names
    length, depth = request.draft_length, request.draft_depth
    return msgspec.structs.replace(
        request,
        speculation=said if there else AUTO_SPECULATION,
        draft_length=drafting.length if length is None else length,
        draft_depth=drafting.depth if depth is None else depth,
        draft_tree=drafting.tree if request.draft_tree is None else request.draft_tree,
    )


class PlacedDrafters:
    """The drafters of drafter ranks, by the model they guess for.

    ``suffix`` is what they are combined with.
    """

    def __init__(self, suffix: SuffixDrafters | None) -> None:
        self._suffix = suffix
        self._mesh: Mesh | None = None
        self._current: Current | None = None
        self._remote: dict[tuple[Digest, str], RemoteDrafters] = {}

    def connect(self, mesh: Mesh, current: Current) -> None:
        """Reach the ranks over ``mesh``; ``current`` returns what is offered of a model now."""
        self._mesh = mesh
        self._current = current

    def factories(self, model: HeadModel) -> Sequence[DrafterFactory]:
        """Return the drafters that the placement of ``model`` brings, the best one first."""
        name, digest = model.drafter, model.placement.model
        if name is None or self._mesh is None or self._current is None:
            return ()
        remote = self._remote.get((digest, name))
        if remote is None:
            self._remote = {key: kept for key, kept in self._remote.items() if key[0] != digest}
            remote = RemoteDrafters(name, self._mesh, lambda: self._place(digest))
            self._remote[digest, name] = remote
        if self._suffix is None:
            return (remote,)
        both = CombinedDrafters(f"{name}+{self._suffix.name}", self._suffix, remote)
        return (both, remote)

    def _place(self, digest: Digest) -> DraftPlace | None:
        model = self._current(digest) if self._current is not None else None
        drafting = model.placement.drafting if model is not None else None
        if model is None or drafting is None:
            return None
        if drafting.peer_id is None or drafting.drafter is None:
            return None
        return DraftPlace(drafting.peer_id, digest, model.placement.epoch, drafting.drafter)
