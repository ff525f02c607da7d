"""The last cells of sessions that move on: what lies behind their last full block.

When an epoch ends, its ranks hand these cells over to the node that they run on, which keeps them
in memory for a moment; the ranks of the next epoch ask for them as they restore a session.  So a
switch that was prepared computes nothing again.  Cells that are not there are computed, as ever.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import trio

from pyagent_node.base.errors import CorruptData, PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.port import Rest
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.node.kv_blocks import codec_name, is_f16
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import AskRest, RestPiece, frames_of, seal, unseal
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.kv")

KEPT_SECONDS: Final = 30.0
"""For how long a rest is kept."""
KEPT_BYTES: Final = 64 * MIB
"""Bytes of all rests; the oldest go first."""
END_SECONDS: Final = 1.0
"""How long a request waits for the ranks of an earlier epoch to end."""


class _Name(NamedTuple):
    model: Digest
    cells: str
    parent: bytes
    first_layer: int
    last: bytes
    """The name of all its tokens: many sessions may go on from one beginning."""


class _Kept(NamedTuple):
    rest: Rest
    kv: KvRange
    size: int
    until: float


class RestBook:
    """The rests that were handed over on this node.  Pure; time is passed in."""

    def __init__(self) -> None:
        self.bytes = 0
        self._kept: OrderedDict[_Name, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, rest: Rest, kv: KvRange, now: float) -> None:
        """Keep the cells of a rest; one of the same name is replaced."""
        name = _Name(
            rest.model, codec_name(rest.cells), rest.parent, rest.first_layer, rest.links[-1]
        )
        self._drop(name)
        size = sum(len(layer.keys) + len(layer.values) for layer in kv.layers)
        self._kept[name] = _Kept(rest, kv, size, now + KEPT_SECONDS)
        self.bytes += size
        while self._kept:
            oldest = next(iter(self._kept))
            if self.bytes <= KEPT_BYTES and self._kept[oldest].until > now:
                return
            self._drop(oldest)

    def find(self, ask: AskRest, now: float) -> dict[int, tuple[int, LayerKv]]:
        """Return for each layer that is here how many of the tokens asked for, and their cells."""
        found: dict[int, tuple[int, LayerKv]] = {}
        layers = range(ask.first_layer, ask.last_layer)
        for name, kept in self._kept.items():
            if name[:3] != (ask.model, ask.codec, ask.parent) or kept.until <= now:
                continue
            tokens = _common(kept.rest.links, ask.links)
            if not tokens:
                continue
            start = kept.kv.start
            for layer in part_of(kept.kv, start, start + tokens).layers:
                if layer.layer in layers and tokens > found.get(layer.layer, (0,))[0]:
                    found[layer.layer] = (tokens, layer)
        return found

    def _drop(self, name: _Name) -> None:
        kept = self._kept.pop(name, None)
        if kept is not None:
            self.bytes -= kept.size


class Rests:
    """Keeps the rests of this node, answers for them, and gets those of others."""

    def __init__(self, mesh: Mesh, client: KvClient) -> None:
        self.book = RestBook()
        self.loaded = 0
        """Tokens that were taken over from ranks of an earlier epoch."""
        self.moved_on: Callable[[Digest, int], Awaitable[None]] = _at_once
        """Waits until the ranks of a model here of epochs before one have handed over."""
        self._mesh = mesh
        self._client = client

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """Keep what a rank that ends hands over."""
        self.book.add(rest, kv, trio.current_time())

    async def answer(self, request: AskRest) -> list[tuple[RestPiece, bytes]]:
        """Return the messages for what is here of a rest; the caller has checked the rights."""
        with trio.move_on_after(END_SECONDS):
            await self.moved_on(request.model, request.epoch)
        found = self.book.find(request, trio.current_time())
        layers = range(request.first_layer, request.last_layer)
        messages = []
        for tokens in sorted({count for count, _ in found.values()}):
            sealed = [
                _pack(request, layer, tokens, found[layer][1])
                if layer in found and found[layer][0] == tokens
                else None
                for layer in layers
            ]
            for first, run in frames_of(layers.start, sealed):
                sizes = tuple(len(each) for each in run)
                messages.append((RestPiece(tokens, first, sizes), b"".join(run)))
        return messages

    async def load(self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]) -> KvRange | None:
        """See ``KvShelf.load_rest``."""
        found: dict[int, tuple[int, LayerKv]] = {}

        def add(layer: int, tokens: int, kv: LayerKv) -> None:
            if tokens > found.get(layer, (0,))[0]:
                found[layer] = (tokens, kv)

        async with trio.open_nursery() as nursery:
            for peer, ranges in held.items():
                for layers in ranges:
                    first = max(layers.start, wanted.first_layer)
                    last = min(layers.stop, wanted.last_layer)
                    if first < last:
                        nursery.start_soon(self._get, peer, wanted, range(first, last), add)
        tokens = min((found.get(layer, (0,))[0] for layer in wanted.layers), default=0)
        if not tokens:
            return None
        self.loaded += tokens
        stop = wanted.start + tokens
        parts = [
            part_of(
                KvRange(
                    wanted.cells, wanted.start, wanted.start + found[layer][0], (found[layer][1],)
                ),
                wanted.start,
                stop,
            ).layers[0]
            for layer in wanted.layers
        ]
        return KvRange(wanted.cells, wanted.start, stop, tuple(parts))

    async def _get(
        self, peer: PeerId, wanted: Rest, layers: range, add: Callable[[int, int, LayerKv], None]
    ) -> None:
        """Get some layers from a peer, or from here."""
        request = AskRest(
            wanted.model,
            codec_name(wanted.cells),
            wanted.parent,
            wanted.links,
            layers.start,
            layers.stop,
            wanted.epoch,
        )
        if peer == self._mesh.peer_id:
            await self.moved_on(wanted.model, wanted.epoch)
            for layer, (tokens, kv) in self.book.find(request, trio.current_time()).items():
                add(layer, tokens, kv)
            return
        if all(info.peer_id != peer for info in self._mesh.peers()):
            return

        def take(tokens: int, layer: int, sealed: bytes) -> None:
            add(layer, tokens, _unpack(request, layer, tokens, sealed, wanted.cells))

        try:
            await self._client.rest(peer, request, take)
        except PyAgentError as error:
            log.info("%s handed no cells over: %s", peer, error)


async def _at_once(_model: Digest, _epoch: int) -> None:
    await trio.lowlevel.checkpoint()


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Return how many leading names two rests have in common."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _key(request: AskRest, layer: int, tokens: int) -> BlockKey:
    return BlockKey(request.model, layer, request.links[tokens - 1], request.codec)


def _pack(request: AskRest, layer: int, tokens: int, kv: LayerKv) -> bytes:
    size = len(kv.keys).to_bytes(4, "little")
    return seal(_key(request, layer, tokens), b"".join((size, kv.keys, kv.values)))


def _unpack(request: AskRest, layer: int, tokens: int, sealed: bytes, cells: str) -> LayerKv:
    """Return the cells of a layer.

    Raises :class:`CorruptData` (``bad_kv_block``) for what was changed or cannot be cells.
    """
    payload = unseal(_key(request, layer, tokens), sealed)
    size = int.from_bytes(payload[:4], "little")
    keys, values = payload[4 : 4 + size], payload[4 + size :]
    whole = bool(keys and values) and not len(keys) % tokens and not len(values) % tokens
    if whole and is_f16(cells):
        whole = not len(keys) % 2 and not len(values) % 2
        whole = whole and all(
            bool(np.isfinite(np.frombuffer(data, np.float16)).all()) for data in (keys, values)
        )
    if not whole:
        raise CorruptData(
            "Cells that were handed over are not such of this model.",
            code="bad_kv_block",
            remedy="They are computed again.",
            layer=layer,
        )
    return LayerKv(layer, keys, values)
