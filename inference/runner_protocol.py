"""What a daemon and its runner processes say to each other, over the frames of ``base.wire``.

The daemon writes requests to the runner's standard input, one at a time, and reads one reply each
from its standard output; ``id`` pairs them.  The first request loads the model.  Arrays travel in
the tail, little-endian, one after the other, with their lengths in the header (``runner_packing``).
End of input ends the runner.
"""

from __future__ import annotations

from typing import Final

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Slice
from pyagent_node.base.wire import Codec
from pyagent_node.inference.backend import BackendInfo, KvUsage, SequenceOp
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.sampling import Sampled

Tail = bytes | bytearray | memoryview


class Request(msgspec.Struct, frozen=True):
    """Every request has a number, counting up."""

    id: int


class LoadSlice(Request, frozen=True, tag="load_slice"):
    """Become the runner of a slice; ``backend`` is one of ``backends.CHOICES``."""

    path: str
    slice: Slice
    n_ctx: int
    n_seq: int
    threads: int
    backend: str = "llama.cpp"


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
    kept: tuple[tuple[int, int], ...] = ()


class GetAttention(Request, frozen=True, tag="get_attention"):
    """Ask where a watched sequence attended."""

    seq: int


class GetKvUsage(Request, frozen=True, tag="get_kv_usage"):
    """Ask what a sequence's cells take."""

    seq: int


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
    | GetAttention
    | GetKvUsage
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
    GetAttention,
    GetKvUsage,
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


class AttentionReport(Reply, frozen=True, tag="attention"):
    """Tail: positions, seen (int32, ``n``), peak (``n``), entropy (``layers``), mass (both)."""

    n: int
    layers: int
    rows: int


class KvUsageReport(Reply, frozen=True, tag="kv_usage"):
    """What a sequence's cells take."""

    usage: KvUsage


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
    | AttentionReport
    | KvUsageReport
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
    AttentionReport,
    KvUsageReport,
    TokenList,
    Text,
    PieceTable,
    Failed,
)

OPS_ENCODER: Final = msgspec.msgpack.Encoder()
OPS_DECODER: Final = msgspec.msgpack.Decoder(list[SequenceOp])
MESSAGES_DECODER: Final = msgspec.msgpack.Decoder(list[ChatMessage])
