"""The messages of ``/pyagent/blob/1``: manifests and chunks of models.

A client sends requests on a stream of its own and may send several before the first answer; the
server answers them in order.  Raw bytes (a manifest, a bitmap, a chunk) travel as the frame's tail.

Every request names the epoch of the placement for which it is made (0: for none).  A server that
knows a later one answers ``stale_epoch`` with that epoch and sends nothing.
"""

from __future__ import annotations

from typing import Final

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Digest
from pyagent_node.base.wire import Codec

PROTOCOL: Final = "/pyagent/blob/1"
WINDOW: Final = 4
"""Requests that a client keeps unanswered on one stream."""


class GetManifest(msgspec.Struct, frozen=True, tag="get_manifest"):
    """Ask for the manifest of a model."""

    model: Digest
    epoch: int = 0


class ManifestReply(msgspec.Struct, frozen=True, tag="manifest"):
    """The tail is the encoded manifest."""

    model: Digest


class GetHave(msgspec.Struct, frozen=True, tag="get_have"):
    """Ask which chunks of a model the peer holds."""

    model: Digest
    epoch: int = 0


class HaveReply(msgspec.Struct, frozen=True, tag="have"):
    """The tail is a bitmap of ``count`` chunks (``chunks.ChunkSet``)."""

    model: Digest
    count: int


class GetChunk(msgspec.Struct, frozen=True, tag="get_chunk"):
    """Ask for one chunk."""

    model: Digest
    index: int
    epoch: int = 0


class ChunkReply(msgspec.Struct, frozen=True, tag="chunk"):
    """The tail is the chunk."""

    model: Digest
    index: int


class BlobError(msgspec.Struct, frozen=True, tag="error"):
    """The request that is next in order failed."""

    info: ErrorInfo


BlobRequest = GetManifest | GetHave | GetChunk
BlobReply = ManifestReply | HaveReply | ChunkReply | BlobError

REQUESTS: Codec[BlobRequest] = Codec("blob request", GetManifest, GetHave, GetChunk)
REPLIES: Codec[BlobReply] = Codec("blob reply", ManifestReply, HaveReply, ChunkReply, BlobError)
