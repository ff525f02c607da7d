"""The ``Backend`` port: one loaded slice of a model and its sequences.

A backend runs inside a runner process and is synchronous.  A *sequence* is a slot ``0 <= seq <
n_seq`` with its own KV cells; positions count from 0 in each sequence.  Tokens always travel with
their activations, so that a tail can penalise repetition and KV can be keyed by content.

What a sequence gets never depends on the other sequences of a batch, to the bit.  Neighbouring
sequences are batched better: give out the lowest free slot first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.sharding.kv_codec import KvShape

Tokens = NDArray[np.int32]
Activations = NDArray[np.float32]

PREFILL_CHUNK: Final = 512
"""Prompts are cut at positions that are multiples of this, whoever else is served.

A plain process with the same batch size cuts there too, so its results can be equal to the bit.
"""
MAX_DECODE_ROWS: Final = 8
"""Up to so many rows count as decoding and may share a batch with other sequences."""
MAX_CALL_ROWS: Final = 32
"""Rows of several sequences that may be computed together, guesses included."""
MAX_DRAFTS: Final = 31
"""Guesses that one step may carry."""
KV_ROWS: Final = "rows/1/f16"
"""The cell format of all backends: rows in f16, head after head, keys rotated by position.

The numbers of a head lie as in the GGUF file of the model: of the architecture ``llama`` its
converter has moved the rows of the query and key matrices, so that neighbours (2i, 2i + 1) turn.
"""


class BackendInfo(msgspec.Struct, frozen=True):
    """What a loaded slice says of itself.

    ``kv_bytes_per_token`` is for the whole slice, ``memory_bytes`` the process's resident size
    after loading.  ``batch_invariant_widths`` are the batch widths whose logits (or
    activations) were bit-identical to width 1 in the self-test; ``kv_portable`` says whether an
    exported KV range loaded again with identical results.
    ``joint_shapes`` are pairs (sequences, rows of each) that may be computed together: each was
    bit-identical too, or is tried when it comes up.
    ``kv_shape`` are the rows of a layer, when all layers have such rows in f16.
    ``kv_codec`` names the cell format of its :class:`KvRange`, empty where KV is not portable.
    A prompt may be cut at multiples of ``prefill_cut``, with as many rows or more in each piece,
    and no bit changes; :data:`PREFILL_CHUNK` says that nothing better is known.
    ``exactness`` names the class of slices that compute the same bits: the promise of the same
    tokens for a seed holds among pipelines of the same classes (``docs/backends.md``).
    ``prunes`` says whether attention can be watched and cells given up (:class:`WatchSequence`,
    :class:`PruneSequence`).  ``n_ctx`` are the cells of a slot, and its positions unless it is
    pruned: then these are ``n_ctx_train``, those that the model was trained for (0: no more).
    """

    backend: str
    version: str
    device: str
    slice: Slice
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_seq: int
    threads: int
    kv_bytes_per_token: int
    memory_bytes: int
    batch_invariant_widths: tuple[int, ...]
    kv_portable: bool
    joint_shapes: tuple[tuple[int, int], ...] = ()
    kv_shape: KvShape | None = None
    kv_codec: str = ""
    prefill_cut: int = PREFILL_CHUNK
    exactness: str = ""
    prunes: bool = False
    n_ctx_train: int = 0

    @property
    def batch_invariant(self) -> bool:
        """Whether widths 1 to 8 all agreed."""
        return {1, 2, 4, 8} <= set(self.batch_invariant_widths)


class OpenSequence(msgspec.Struct, frozen=True, tag="open"):
    """Begin using an empty slot; ``sampling`` is given on a slice with the output head."""

    seq: int
    sampling: SamplingParams | None = None


class FreeSequence(msgspec.Struct, frozen=True, tag="free"):
    """Forget the slot's KV, history and sampling."""

    seq: int


class TrimSequence(msgspec.Struct, frozen=True, tag="trim"):
    """Drop the cells at positions ``[start, ...)``."""

    seq: int
    start: int


class CopySequence(msgspec.Struct, frozen=True, tag="copy"):
    """Make the cells ``[start, stop)`` of ``source`` visible in ``seq`` too."""

    seq: int
    source: int
    start: int
    stop: int


class ShiftSequence(msgspec.Struct, frozen=True, tag="shift"):
    """Add ``delta`` to the positions of the cells ``[start, stop)``."""

    seq: int
    start: int
    stop: int
    delta: int


class ResetSequences(msgspec.Struct, frozen=True, tag="reset"):
    """Free every slot, whatever it holds; a slice begins to serve somebody else."""


class WatchSequence(msgspec.Struct, frozen=True, tag="watch"):
    """Measure from now on where a sequence attends; what was measured of it before is forgotten.

    Of a call that decodes (up to :data:`MAX_DECODE_ROWS` rows) the first row counts, when ``every``
    positions have passed since the last one that did; of a longer piece of a prompt its last
    ``window`` rows do, every time.  With ``every`` 0 measuring ends.  No bit of what is computed
    changes, and steps that are not measured take no longer.
    """

    seq: int
    every: int = 1
    window: int = 32


class PruneSequence(msgspec.Struct, frozen=True, tag="prune"):
    """Give up all cells of a sequence but those at the positions ``keep``, and their memory.

    ``keep`` are ranges ``[start, stop)``, in order and apart, of positions that are held, the last
    one that is held among them.  Nothing moves: the positions of what is kept and the next one
    stay as they are.  What the sequence computes from now on is **not exact**: until it is empty
    again its cells can neither be exported, copied nor shifted, and it cannot be trimmed to a
    position before which cells were given up (:class:`Conflict`, ``kv_pruned``).

    Cells are given up in all layers of this slice; another slice of the model may keep others.
    """

    seq: int
    keep: tuple[tuple[int, int], ...]


SequenceOp = (
    OpenSequence
    | FreeSequence
    | TrimSequence
    | CopySequence
    | ShiftSequence
    | ResetSequences
    | WatchSequence
    | PruneSequence
)


class StepInput(msgspec.Struct, frozen=True):
    """Consecutive tokens of one sequence.

    ``tokens`` has shape (n,); ``activations`` has shape (n, n_embd) in float32, or is ``None`` when
    the slice starts at layer 0 *and* holds the whole model (it then looks embeddings up itself).
    ``sample`` asks a slice with the output head for the token after the last one.

    The last ``drafts`` tokens are guesses, at most :data:`MAX_DRAFTS`, with at least one token
    before them, in a sequence that is not empty.  A slice with the head that is asked to sample
    does so after the last token that is none, and after each guess that agrees with what it has
    sampled before; the sequence then ends after the guesses that agreed.  Other slices keep all.

    With ``parents`` the guesses form a tree (see ``trees``), behind at most
    :data:`MAX_DECODE_ROWS` tokens: guess number i follows the token at index ``parents[i]``.  The
    tokens that are sampled lead through it; other slices keep the principal path, and give
    activations for all.
    """

    seq: int
    position: int
    tokens: Tokens
    activations: Activations | None
    sample: bool
    drafts: int = 0
    parents: tuple[int, ...] = ()


class StepOutput(msgspec.Struct, frozen=True):
    """The outcome for one :class:`StepInput`.

    A slice without the output head gives ``activations`` of shape (n, n_embd), float32; a slice
    with it gives ``sampled`` when that was asked for, else neither.  ``sampled`` are the guesses
    that were right and one token more: those that single steps would have given, one by one.
    """

    activations: Activations | None = None
    sampled: tuple[Sampled, ...] = ()


class LayerKv(msgspec.Struct, frozen=True):
    """Keys and values of one layer for consecutive tokens, in the backend's own cell format.

    ``layer`` counts in the whole model; ``keys`` and ``values`` hold ``n_tokens`` rows each.
    """

    layer: int
    keys: bytes
    values: bytes


class KvRange(msgspec.Struct, frozen=True):
    """The KV of tokens ``[start, stop)`` of one sequence, one entry a layer of the slice.

    ``codec`` names the cell format; a backend refuses others.  :data:`KV_ROWS` is the one that
    all backends share.

    With ``kept`` there are rows for these positions only: ranges in order and apart, the last of
    them up to ``stop``.  A sequence that gets such cells counts as pruned, see
    :class:`PruneSequence`; the tokens that come with them are still those of all positions.
    """

    codec: str
    start: int
    stop: int
    layers: tuple[LayerKv, ...]
    kept: tuple[tuple[int, int], ...] = ()


class CellAttention(NamedTuple):
    """Where a sequence attended in the rows that were measured, see :class:`WatchSequence`.

    ``positions`` (int32) and the columns are those of the n cells that are there now.  ``mass``
    (float32, shape (layers of the slice, n)) sums over the rows the mean over the heads of the
    attention that a cell got, ``peak`` (float32, (n,)) the most that it got in any head of any
    layer.  ``seen`` (int32, (n,)) counts the rows that could see a cell: divide by it to compare
    old cells with new ones.  ``entropy`` (float32, (layers,)) is in nats, the mean over ``rows``
    rows and all heads, zeros without any.
    """

    positions: NDArray[np.int32]
    mass: NDArray[np.float32]
    peak: NDArray[np.float32]
    seen: NDArray[np.int32]
    entropy: NDArray[np.float32]
    rows: int


class KvUsage(msgspec.Struct, frozen=True):
    """What the cells of a sequence take.

    ``bytes`` are those of its ``cells``, ``resident`` what of the memory set aside for its slot is
    in the machine's memory now, ``None`` where the system does not say.
    """

    cells: int
    bytes: int
    resident: int | None
    pruned: bool


class Backend(Protocol):
    """One loaded slice.

    Errors: :class:`InvalidRequest` for arguments out of range, :class:`LimitExceeded`
    (``kv_full``) when no cell is free, :class:`Unsupported` for a foreign KV codec,
    :class:`CorruptData` for KV bytes that do not fit.  After any of these the sequences not named
    in the call are unchanged.
    """

    @property
    def info(self) -> BackendInfo:
        """What this slice says of itself."""
        ...

    def apply(self, op: SequenceOp) -> None:
        """Carry out one sequence operation."""
        ...

    def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Run the slice over ``steps`` (of distinct sequences) and return their outputs in order.

        A step begins where its sequence ends.  When one fails all named sequences are put back.
        Guesses never change a bit of what comes after them, right or wrong.
        """
        ...

    def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy the cells of tokens ``[start, stop)`` out, layer by layer."""
        ...

    def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Write cells into an empty sequence, or append them to one that ends at ``kv.start``.

        ``tokens`` are those the cells were made from, shape (stop - start,).
        """
        ...

    def attention(self, seq: int) -> CellAttention:
        """Return what was measured since the sequence is watched.

        Raises :class:`InvalidRequest` (``not_watched``).
        """
        ...

    def kv_usage(self, seq: int) -> KvUsage:
        """Return what the sequence's cells take."""
        ...

    def close(self) -> None:
        """Release the model; the backend cannot be used afterwards."""
        ...


Device = Literal["cpu", "cuda", "metal", "vulkan"]
