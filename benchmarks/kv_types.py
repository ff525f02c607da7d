"""What ``bench kv`` measures, as it is stored."""

from __future__ import annotations

import msgspec


class CodecJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: so many texts, each with KV of ``prefix`` tokens and ``scored`` after it."""

    path: str
    texts: int
    prefix: int
    scored: int
    rounds: int
    threads: int = 0


class CodecRow(msgspec.Struct, frozen=True, kw_only=True):
    """One level of the codec, on the KV of real text.

    ``ratio`` is bytes in f16 over bytes encoded, ``bytes_per_token`` those of one layer.  Speeds
    are of bytes in f16 over processor time of the one thread, the median of the rounds.
    ``key_error`` and ``value_error`` are root mean squares of what is off in parts of those of the
    numbers themselves.
    """

    level: str
    ratio: float
    bytes_per_token: float
    encode_mb_per_second: float
    decode_mb_per_second: float
    key_error: float
    value_error: float


class QualityRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the KV of a prefix being kept in some form costs the text after it.

    ``how`` is "codec" (a level of ours, for the prefix) or "llama.cpp" (its own type of KV, for all
    tokens).  ``cost`` is the growth of the perplexity against f16, ``cost_error`` its standard
    error over the scored tokens, ``divergence`` the mean KL divergence of the distributions of the
    next token from those with f16, in nats.
    """

    how: str
    kind: str
    ratio: float
    bytes_per_token: float
    perplexity: float
    cost: float
    cost_error: float
    divergence: float


class CodecResult(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; ``texts`` names them."""

    texts: tuple[str, ...]
    scored_tokens: int
    codec: tuple[CodecRow, ...]
    quality: tuple[QualityRow, ...]


class ReuseRow(msgspec.Struct, frozen=True, kw_only=True):
    """The first token behind a prefix that somebody had asked for before; medians, in milliseconds.

    ``recompute_ms``: nothing is reused.  ``local_ms``: every rank has the blocks of its layers.
    ``remote_ms``: every rank gets them from another node.  ``local_cached`` and ``remote_cached``
    are the tokens of the prompt that did not have to be computed.

    ``remote_ms`` leaves the ``choice`` to the cost model: "fetch", "compute", or "part" for some of
    both.  ``fetch_ms`` is with everything fetched whatever the model says (the same answers, where
    it fetched everything by itself), so ``better`` is the faster of that and of ``recompute_ms``,
    and ``ratio`` is ``remote_ms`` over its time.  ``identical`` says whether all answers had the
    tokens of the computed ones.
    """

    level: str
    link: str
    prompt_tokens: int
    recompute_ms: float
    local_ms: float
    remote_ms: float
    local_cached: int
    remote_cached: int
    fetch_ms: float
    choice: str
    better: str
    ratio: float
    identical: bool


class KvReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures with what they depend on."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    prefix: int
    scored: int
    result: CodecResult | None
    reuse: tuple[ReuseRow, ...]
