"""Types of the Rust module in ``native/src``; a test checks the one against the other."""

from collections.abc import Callable
from os import PathLike
from typing import final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__all__ = [
    "Blake3",
    "TensorTap",
    "XSalsa20",
    "blake3",
    "gumbel",
    "hash_chain",
    "hash_file",
    "sample",
]

@final
class Blake3:
    """BLAKE3 of data that comes in pieces."""

    def __new__(cls) -> Blake3: ...
    def update(self, data: Buffer, /) -> None:
        """Add the bytes of a buffer."""

    def digest(self) -> bytes:
        """The digest (32 bytes) of everything added so far."""

    def hexdigest(self) -> str:
        """The digest of everything added so far, as 64 hexadecimal digits."""

@final
class TensorTap:
    """Copies one tensor out of every llama.cpp graph that runs while the tap is armed.

    ``name`` is the tensor's exact name (``"l_out-9"``), ``capacity`` the most floats that an armed
    array may hold.  The keyword arguments are the addresses of ``ggml_get_name``, ``ggml_nbytes``
    and ``ggml_backend_tensor_get`` in the library that runs the graph; a wrong address crashes the
    process.  Give :attr:`callback` and :attr:`user_data` to the context as ``cb_eval`` and
    ``cb_eval_user_data``, and keep the tap alive for as long as the context.

    The callback runs without the interpreter lock.  A tap that is not armed asks for nothing and
    costs next to nothing.
    """

    def __new__(
        cls, name: str, capacity: int, *, get_name: int, nbytes: int, tensor_get: int
    ) -> TensorTap: ...
    @property
    def callback(self) -> int:
        """The address of the callback, for ``cb_eval``."""

    @property
    def user_data(self) -> int:
        """The address to give as ``cb_eval_user_data``."""

    @property
    def capacity(self) -> int:
        """The most floats that an armed array may hold."""

    def arm(self, out: NDArray[np.float32], /) -> None:
        """Send what the tap sees from now on into ``out`` (C-contiguous, writable), from its start.

        A batch that runs as several graphs is appended piece by piece.  Arming again starts
        anew.  Do not read or write ``out`` while a graph runs.
        """

    def collect(self) -> int:
        """Disarm; return how many floats were written since ``arm``.

        Returns -1 when some tensor did not fit.  Raises ``ValueError`` when the tap is not armed.
        """

@final
class XSalsa20:
    """The XSalsa20 stream cipher (Bernstein, "Extending the Salsa20 nonce"), one direction of it.

    ``key`` has 32 bytes, ``nonce`` 24.
    """

    def __new__(cls, key: Buffer, nonce: Buffer) -> XSalsa20: ...
    def apply(self, data: Buffer, /) -> bytes:
        """Encrypt or decrypt (the same thing) the next bytes of the stream."""

def blake3(data: Buffer, /) -> bytes:
    """The BLAKE3 digest (32 bytes) of a buffer."""

def hash_file(
    path: str | PathLike[str], chunk_bytes: int, progress: Callable[[int], object] | None = None
) -> tuple[bytes, bytes]:
    """Return the BLAKE3 digest of a file, and the digests of its chunks, concatenated.

    Every chunk but the last has ``chunk_bytes`` bytes; an empty file has no chunk.  ``progress`` is
    called with the bytes done so far about once a mebibyte; what it raises ends the work and is
    passed on, and so are signals such as Ctrl-C.  Raises ``OSError`` (with the file's name) when
    the file cannot be read, ``ValueError`` when it is not a regular file, ``chunk_bytes`` is out
    of range or there are more than 2**20 chunks.
    """

def hash_chain(parent: Buffer, tokens: NDArray[np.int32], block: int) -> bytes:
    """Return the hash chain of the whole blocks of ``tokens``, as concatenated digests.

    Each digest is BLAKE3 of the digest before it (``parent``, 32 bytes, for the first) followed by
    the block's ``block`` tokens as little-endian 32-bit integers.  Tokens after the last whole
    block do not count.
    """

def gumbel(seed: int, position: int, n: int) -> NDArray[np.float64]:
    """Return the Gumbel noise of the tokens ``0 <= token < n`` at a position.

    ``seed`` and ``position`` are unsigned 64-bit integers, ``n`` is at most 2**24.  The generator
    is Philox4x32-10 (Salmon et al., SC 2011) with the seed as key (low word first) and the counter
    ``(token // 2, position low word, position high word, 0)``.  An even token takes the first two
    output words, an odd one the last two, as one number with its first word on top; the upper 52
    bits ``b`` of that give ``u = (b + 0.5) / 2**52``, and the noise is ``-ln(-ln(u))``: the same
    bits on every platform.
    """

def sample(
    logits: NDArray[np.float32],
    history: NDArray[np.int32],
    position: int,
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    bias_tokens: NDArray[np.int32],
    bias_values: NDArray[np.float32],
    top_logprobs: int,
) -> tuple[int, float, list[tuple[int, float]]]:
    """Choose the token at ``position``, as a function of the arguments alone.

    ``logits`` has one entry a token, finite or -inf (never to be chosen); ``history`` holds the
    session's tokens so far.  All arithmetic is in doubles, in a fixed order, and gives the same
    token on every platform.  The steps:

    1. ``bias_values`` are added to the logits of ``bias_tokens``.
    2. For each distinct token of the history: a positive logit is divided by
       ``repetition_penalty``, another one multiplied; then ``frequency_penalty`` times its
       occurrences is taken off, then ``presence_penalty``.
    3. ``temperature == 0`` ends here with the argmax.  Otherwise a token's log-weight is
       ``(x - max x) / temperature`` and its weight the exponential of that.
    4. ``top_k`` (0 = off) keeps the k highest logits.
    5. ``top_p`` (1 = off) keeps the fewest highest logits whose weights add up to at least
       ``top_p`` of the weight of all that step 4 left; always at least one.
    6. ``min_p`` (0 = off) keeps the tokens whose weight is at least ``min_p`` (the highest is 1).
    7. The token with the highest sum of log-weight and :func:`gumbel` noise wins.

    Ties go to the lowest token.  ``top_logprobs == -1`` returns ``(token, nan, [])``; otherwise the
    second element is the log-probability of the token and the third the ``top_logprobs`` likeliest
    tokens with theirs, likeliest first (fewer when fewer have a finite logit), all of the
    softmax of ``logits`` as given, before any step.

    Raises ``ValueError`` for a value out of range (NaN or +inf logits, no logits, nothing but -inf,
    a token outside the vocabulary, a parameter outside its range) and ``TypeError`` for a wrong
    type.
    """
