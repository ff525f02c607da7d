"""What a daemon and its runner processes say to each other, over the frames of ``base.wire``.

The daemon writes requests to the runner's standard input, one at a time, and reads one reply each
from its standard output; ``id`` pairs them.  The first request loads the model.  Arrays travel in
the tail, little-endian, one after the other, with their lengths in the header.  End of input ends
the runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData, ErrorInfo
from pyagent_node.base.types import Slice
from pyagent_node.base.wire import Codec
from pyagent_node.inference.backend import (
    BackendInfo,
    KvRange,
    LayerKv,
    SequenceOp,
    StepInput,
    StepOutput,
    Tokens,
)
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.sampling import Sampled

Tail = bytes | bytearray | memoryview


class Request(msgspec.Struct, frozen=True):
    """Every request has a number, counting up."""

    id: int


class LoadSlice(Request, frozen=True, tag="load_slice"):
    """Become the runner of a slice."""

    path: str
    slice: Slice
    n_ctx: int
    n_seq: int
    threads: int


class LoadTokenizer(Request, frozen=True, tag="load_tokenizer"):
    """Become the runner of a vocabulary."""

    path: str


class Ping(Request, frozen=True, tag="ping"):
    """Answer at once."""


class StepHeader(msgspec.Struct, frozen=True, array_like=True):
    """A step without its arrays."""

    seq: int
    position: int
    n: int
    activations: bool
    sample: bool
    drafts: int = 0
    parents: tuple[int, ...] = ()


class Decode(Request, frozen=True, tag="decode"):
    """Tail: the tokens of all steps (int32), then their activations (float32)."""

    steps: tuple[StepHeader, ...]


class Apply(Request, frozen=True, tag="apply"):
    """Tail: a MessagePack list of sequence operations."""


class ExportKv(Request, frozen=True, tag="export_kv"):
    """Ask for the cells of a range."""

    seq: int
    start: int
    stop: int


class LayerHeader(msgspec.Struct, frozen=True, array_like=True):
    """A layer of KV without its bytes."""

    layer: int
    keys: int
    values: int


class ImportKv(Request, frozen=True, tag="import_kv"):
    """Tail: tokens (int32), then keys and values layer by layer."""

    seq: int
    codec: str
    start: int
    stop: int
    layers: tuple[LayerHeader, ...]


class Tokenize(Request, frozen=True, tag="tokenize"):
    """Tail: the text in UTF-8."""

    add_special: bool
    parse_special: bool


class Chat(Request, frozen=True, tag="chat"):
    """Tail: a MessagePack list of chat messages; ``now`` is the templates' time, Unix seconds."""

    as_tokens: bool
    now: float


class GetPieces(Request, frozen=True, tag="get_pieces"):
    """Ask for the bytes of every token."""


AnyRequest = (
    LoadSlice
    | LoadTokenizer
    | Ping
    | Decode
    | Apply
    | ExportKv
    | ImportKv
    | Tokenize
    | Chat
    | GetPieces
)

REQUESTS: Final[Codec[AnyRequest]] = Codec(
    "runner request",
    LoadSlice,
    LoadTokenizer,
    Ping,
    Decode,
    Apply,
    ExportKv,
    ImportKv,
    Tokenize,
    Chat,
    GetPieces,
)


class TokenizerInfo(msgspec.Struct, frozen=True):
    """What a vocabulary says of itself; a token that does not exist is -1.

    ``end_tokens`` end an answer; ``control_tokens`` have no text.  ``add_bos`` says whether the
    model wants its BOS before a plain prompt.
    """

    n_vocab: int
    bos: int
    eos: int
    add_bos: bool
    add_eos: bool
    end_tokens: tuple[int, ...]
    control_tokens: tuple[int, ...]
    has_chat_template: bool


class Reply(msgspec.Struct, frozen=True):
    """Every reply has the number of its request."""

    id: int


class SliceLoaded(Reply, frozen=True, tag="slice_loaded"):
    """The slice is ready."""

    info: BackendInfo


class TokenizerLoaded(Reply, frozen=True, tag="tokenizer_loaded"):
    """The vocabulary is ready."""

    info: TokenizerInfo


class Done(Reply, frozen=True, tag="done"):
    """It is done; there is nothing to say."""


class OutputHeader(msgspec.Struct, frozen=True, array_like=True):
    """An output without its activations; ``rows`` is 0 without any."""

    rows: int
    sampled: tuple[Sampled, ...]


class Decoded(Reply, frozen=True, tag="decoded"):
    """Tail: the activations of all outputs (float32)."""

    outputs: tuple[OutputHeader, ...]


class ExportedKv(Reply, frozen=True, tag="exported_kv"):
    """Tail: keys and values layer by layer."""

    codec: str
    layers: tuple[LayerHeader, ...]


class TokenList(Reply, frozen=True, tag="tokens"):
    """Tail: tokens (int32)."""


class Text(Reply, frozen=True, tag="text"):
    """Tail: text in UTF-8."""


class PieceTable(Reply, frozen=True, tag="pieces"):
    """Tail: ``n`` lengths (int32), then the bytes of all tokens."""

    n: int


class Failed(Reply, frozen=True, tag="failed"):
    """The request was refused or failed; the runner lives."""

    error: ErrorInfo


AnyReply = (
    SliceLoaded
    | TokenizerLoaded
    | Done
    | Decoded
    | ExportedKv
    | TokenList
    | Text
    | PieceTable
    | Failed
)

REPLIES: Final[Codec[AnyReply]] = Codec(
    "runner reply",
    SliceLoaded,
    TokenizerLoaded,
    Done,
    Decoded,
    ExportedKv,
    TokenList,
    Text,
    PieceTable,
    Failed,
)

OPS_ENCODER: Final = msgspec.msgpack.Encoder()
OPS_DECODER: Final = msgspec.msgpack.Decoder(list[SequenceOp])
MESSAGES_DECODER: Final = msgspec.msgpack.Decoder(list[ChatMessage])

_I32: Final = np.dtype("<i4")
_F32: Final = np.dtype("<f4")


class _Cutter:
    """Cuts a tail into arrays; refuses to pass its end or to leave something over."""

    def __init__(self, tail: Tail) -> None:
        self._data = memoryview(tail)
        self._at = 0

    def take(self, nbytes: int) -> memoryview:
        if not 0 <= nbytes <= len(self._data) - self._at:
            raise _wrong_length()
        start, self._at = self._at, self._at + nbytes
        return self._data[start : self._at]

    def ints(self, n: int) -> Tokens:
        return np.frombuffer(self.take(n * _I32.itemsize), _I32)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _wrong_length()


def _wrong_length() -> CorruptData:
    return CorruptData("A runner message and its tail differ in length.", code="malformed_message")


def pack_steps(steps: Sequence[StepInput]) -> tuple[tuple[StepHeader, ...], bytes]:
    """Return the headers and the tail of a :class:`Decode`."""
    headers = tuple(
        StepHeader(
            s.seq,
            s.position,
            len(s.tokens),
            s.activations is not None,
            s.sample,
            s.drafts,
            s.parents,
        )
        for s in steps
    )
    pieces = [np.ascontiguousarray(s.tokens, _I32).data for s in steps]
    pieces += [
        np.ascontiguousarray(s.activations, _F32).data.cast("B")
        for s in steps
        if s.activations is not None
    ]
    return headers, b"".join(pieces)


def unpack_steps(headers: Sequence[StepHeader], tail: Tail, n_embd: int) -> list[StepInput]:
    """Return the steps; arrays are views of the tail.

    Raises :class:`CorruptData` (``malformed_message``) when the tail does not fit.
    """
    cut = _Cutter(tail)
    tokens = [cut.ints(h.n) for h in headers]
    steps = []
    for header, ids in zip(headers, tokens, strict=True):
        rows = None
        if header.activations:
            raw = cut.take(header.n * n_embd * _F32.itemsize)
            rows = np.frombuffer(raw, _F32).reshape(header.n, n_embd)
        steps.append(
            StepInput(
                header.seq,
                header.position,
                ids,
                rows,
                header.sample,
                header.drafts,
                header.parents,
            )
        )
    cut.finish()
    return steps


def pack_outputs(outputs: Sequence[StepOutput]) -> tuple[tuple[OutputHeader, ...], bytes]:
    """Return the headers and the tail of a :class:`Decoded`."""
    headers = tuple(
        OutputHeader(0 if o.activations is None else len(o.activations), o.sampled) for o in outputs
    )
    arrays = [o.activations for o in outputs if o.activations is not None]
    return headers, b"".join([np.ascontiguousarray(a, _F32).data.cast("B") for a in arrays])


def unpack_outputs(headers: Sequence[OutputHeader], tail: Tail, n_embd: int) -> list[StepOutput]:
    """Return the outputs; arrays are views of the tail.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    outputs = []
    for header in headers:
        rows = None
        if header.rows:
            raw = cut.take(header.rows * n_embd * _F32.itemsize)
            rows = np.frombuffer(raw, _F32).reshape(header.rows, n_embd)
        outputs.append(StepOutput(rows, header.sampled))
    cut.finish()
    return outputs


class PackedKv(NamedTuple):
    """KV without its bytes, and its bytes."""

    layers: tuple[LayerHeader, ...]
    tail: bytes


def pack_kv(kv: KvRange, tokens: Tokens | None = None) -> PackedKv:
    """Return the layer headers and the tail for KV, with ``tokens`` in front if there are any."""
    layers = tuple(LayerHeader(x.layer, len(x.keys), len(x.values)) for x in kv.layers)
    pieces = [b"" if tokens is None else np.ascontiguousarray(tokens, _I32).tobytes()]
    for layer in kv.layers:
        pieces += [layer.keys, layer.values]
    return PackedKv(layers, b"".join(pieces))


def unpack_kv(
    codec: str,
    start: int,
    stop: int,
    layers: Sequence[LayerHeader],
    tail: Tail,
    *,
    with_tokens: bool,
) -> tuple[KvRange, Tokens]:
    """Return KV and its tokens (none unless ``with_tokens``).

    Errors as for :func:`unpack_steps`.
    """
    cut = _Cutter(tail)
    tokens = cut.ints(max(0, stop - start) if with_tokens else 0)
    parts = tuple(
        LayerKv(x.layer, bytes(cut.take(x.keys)), bytes(cut.take(x.values))) for x in layers
    )
    cut.finish()
    return KvRange(codec, start, stop, parts), tokens


def pack_pieces(pieces: Sequence[bytes]) -> bytes:
    """Return the tail of a :class:`PieceTable`."""
    lengths = np.array([len(piece) for piece in pieces], _I32)
    return lengths.tobytes() + b"".join(pieces)


def unpack_pieces(n: int, tail: Tail) -> list[bytes]:
    """Return the bytes of each token.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    lengths = cut.ints(n)
    pieces = [bytes(cut.take(int(length))) for length in lengths]
    cut.finish()
    return pieces


def unpack_tokens(tail: Tail) -> Tokens:
    """Return the tokens of a tail that holds nothing else.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    tokens = cut.ints(memoryview(tail).nbytes // _I32.itemsize)
    cut.finish()
    return tokens
