"""What a load request says about guessing, and which node drafts.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import InvalidRequest, Unavailable, Unsupported
from pyagent_node.base.types import Digest, Drafting, PeerId, Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.backend import MAX_DRAFTS
from pyagent_node.inference.drafting.model import MAX_PADDING
from pyagent_node.inference.generation import AUTO_SPECULATION, NO_SPECULATION
from pyagent_node.inference.pipeline.plan_types import MEMORY_SHARE, ModelShape, NodeFacts
from pyagent_node.inference.pipeline.speculation import MAX_DEPTH
from pyagent_node.node.api.schema import LoadRequest

NODE_SETTING: Final = "default"
"""As ``speculation`` of a load request: what each head's own setting says, from now on."""
NO_DRAFTER: Final = "none"
"""As ``drafter`` of a load request: no drafter rank from now on."""
SUFFIX: Final = "suffix"
GUESSES_A_TRIP: Final = 4
"""Guesses that one question to a drafter rank brings, as far as choosing a node goes."""


class Wish(NamedTuple):
    """A drafter as a load request names it: ``NAME`` or ``NAME@NODE``."""

    model: str
    node: str | None


def says(request: LoadRequest) -> bool:
    """Whether a request says anything about guessing."""
    said = (
        request.speculation,
        request.draft_length,
        request.draft_depth,
        request.draft_tree,
        request.drafter,
    )
    return any(value is not None for value in said)


def wish_of(request: LoadRequest) -> Wish | None:
    """Return the drafter that a request asks for.

    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    text = request.drafter
    if text is None or text == NO_DRAFTER:
        return None
    model, at, node = text.rpartition("@")
    if not at:
        model, node = text, ""
    if not model or (at and not node):
        raise InvalidRequest(
            f"drafter is {text[:80]!r}; it is a model's name, or NAME@NODE.",
            code="bad_parameter",
            parameter="drafter",
        )
    return Wish(model, node or None)


def check_guessing(request: LoadRequest, models: Iterable[str]) -> None:
    """Check what a request says, as far as it can be known; ``models`` are those of the mesh.

    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    for name, value, low, high in (
        ("draft_length", request.draft_length, 0, MAX_DRAFTS),
        ("draft_depth", request.draft_depth, 1, MAX_DEPTH),
    ):
        if value is not None and not low <= value <= high:
            raise InvalidRequest(
                f"{name} is {value}; it must lie between {low} and {high}.",
                code="bad_parameter",
                parameter=name,
            )
    choice = request.speculation
    known = [NO_SPECULATION, AUTO_SPECULATION, NODE_SETTING, SUFFIX]
    known += [each for name in models for each in (name, f"{name}+{SUFFIX}")]
    if choice is not None and choice not in known:
        raise InvalidRequest(
            f"There is no drafter {choice[:64]!r}; speculation is {AUTO_SPECULATION},"
            f" {NO_SPECULATION}, {NODE_SETTING}, {SUFFIX}, or a model of the mesh by its name, or"
            f" that and +{SUFFIX}.",
            code="bad_parameter",
            parameter="speculation",
        )


def merged(
    request: LoadRequest, before: Drafting | None, rank: tuple[Digest, PeerId] | None
) -> Drafting | None:
    """Return how sessions guess after a request; what it does not say stays as it was ``before``.

    ``rank`` is the drafter rank that it asks for.  One that is asked for without a word about who
    shall guess is used: ``auto``.
    """
    drafting = before or Drafting()
    if request.speculation is not None:
        said = request.speculation
        drafting = msgspec.structs.replace(
            drafting,
            speculation=None if said == NODE_SETTING else said,
            length=request.draft_length,
            depth=request.draft_depth,
            tree=request.draft_tree,
        )
    else:
        length, depth, tree = request.draft_length, request.draft_depth, request.draft_tree
        drafting = msgspec.structs.replace(
            drafting,
            length=drafting.length if length is None else length,
            depth=drafting.depth if depth is None else depth,
            tree=drafting.tree if tree is None else tree,
        )
    if request.drafter == NO_DRAFTER:
        drafting = msgspec.structs.replace(drafting, drafter=None, peer_id=None)
    elif rank is not None:
        drafting = msgspec.structs.replace(drafting, drafter=rank[0], peer_id=rank[1])
        if drafting.speculation is None and request.speculation is None:
            drafting = msgspec.structs.replace(drafting, speculation=AUTO_SPECULATION)
    return None if drafting == Drafting() else drafting


def moved(before: Drafting | None, after: Drafting | None) -> bool:
    """Whether the drafter rank is another one, or elsewhere."""
    then, now = before or Drafting(), after or Drafting()
    return (then.drafter, then.peer_id) != (now.drafter, now.peer_id)


def check_sizes(drafter: ModelRecord, target: ModelRecord) -> None:
    """Refuse a drafter that cannot have the tokens of ``target``, by what the mesh knows of both.

    Whether they are the same tokens its node finds out.  Raises :class:`Unsupported`
    (``vocabulary_mismatch``).
    """
    if abs(drafter.n_vocab - target.n_vocab) > MAX_PADDING:
        raise Unsupported(
            f"The model {drafter.name} cannot draft for {target.name}: it has {drafter.n_vocab}"
            f" tokens, {target.name} {target.n_vocab}.",
            code="vocabulary_mismatch",
            remedy="Use a drafter of the same family, with the same tokenizer.",
            drafter=drafter.name,
        )


def choose_drafter_node(
    shape: ModelShape,
    nodes: Sequence[NodeFacts],
    rtt_ms: Mapping[tuple[PeerId, PeerId], float],
    *,
    head: PeerId,
    n_ctx: int,
    n_seq: int,
    taken: Mapping[PeerId, int],
) -> NodeFacts:
    """Return the node on which a whole model guesses soonest for ``head``, of those with room.

    A guess takes what a token of the model takes there, and its share of a round trip; a distance
    that was not measured counts as the longest.  ``taken`` are bytes promised to the ranks of the
    placement.  Raises :class:`Unavailable` (``not_enough_memory``).
    """
    need = _need(shape, n_ctx, n_seq)
    weights = sum(shape.layer_bytes) + shape.head_bytes
    flops = sum(shape.layer_flops) + shape.head_flops
    far = max(rtt_ms.values(), default=0.0)

    def seconds(node: NodeFacts) -> tuple[float, int, PeerId]:
        computing = max(weights / node.bandwidth, flops / node.compute)
        there, back = (head, node.peer_id), (node.peer_id, head)
        trip = 0.0 if node.peer_id == head else rtt_ms.get(there, rtt_ms.get(back, far))
        busy = node.peer_id in taken
        return (computing + trip / 1000 / GUESSES_A_TRIP, busy, node.peer_id)

    able = [node for node in nodes if node.usable and _free(node, taken) >= need]
    if not able:
        most = max((_free(node, taken) for node in nodes if node.usable), default=0.0)
        raise Unavailable(
            f"No node has room for the drafter {shape.name}: it needs {need >> 20} MiB, and at most"
            f" {max(0, int(most)) >> 20} MiB are free.",
            code="not_enough_memory",
            remedy="Use a smaller drafter, or fewer or shorter sessions.",
        )
    return min(able, key=seconds)


def check_room(
    shape: ModelShape, node: NodeFacts, *, n_ctx: int, n_seq: int, taken: Mapping[PeerId, int]
) -> None:
    """Raise :class:`Unavailable` (``not_enough_memory``) where a whole model does not fit."""
    need, free = _need(shape, n_ctx, n_seq), _free(node, taken)
    if free < need:
        raise Unavailable(
            f"{node.name} has no room for the drafter {shape.name}: it needs {need >> 20} MiB, and"
            f" {max(0, int(free)) >> 20} MiB are free.",
            code="not_enough_memory",
            remedy="Name another node, or none to have one chosen; or use a smaller drafter, or"
            " fewer or shorter sessions.",
        )


def _need(shape: ModelShape, n_ctx: int, n_seq: int) -> int:
    return shape.needs(Slice(0, shape.n_layers, head=True), n_ctx=n_ctx, n_seq=n_seq)


def _free(node: NodeFacts, taken: Mapping[PeerId, int]) -> float:
    return MEMORY_SHARE * node.memory_bytes - taken.get(node.peer_id, 0)


def describe(
    drafting: Drafting | None, model: Callable[[Digest], str], node: Callable[[PeerId], str]
) -> str:
    """Return how the sessions of a placement guess, in a few words."""
    drafting = drafting or Drafting()
    words = drafting.speculation or "as each node is set"
    if drafting.length is not None:
        words += f", {drafting.length} guesses a step{' in a tree' if drafting.tree else ''}"
    if drafting.depth is not None:
        words += f", {drafting.depth} steps in flight"
    if drafting.drafter is not None and drafting.peer_id is not None:
        words += f"; {model(drafting.drafter)} drafts on {node(drafting.peer_id)}"
    return words
