"""The table of settings: each key with its type, default, range and meaning.  Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Literal

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.limits import KIB, MAX_PEERS, MAX_SESSIONS, MIB
from pyagent_node.node.addresses import check_address
from pyagent_node.node.genesis import check_name
from pyagent_node.node.shaping import parse_shape
from pyagent_node.sharding.kv_codec import EXACT, LEVELS

Value = str | int | bool | float | tuple[str, ...]
Kind = Literal["text", "list", "integer", "number", "switch", "size"]

MAX_CONTEXT = 1 << 24
ON_BATTERY = ("less", "none", "full")
"""What a node on battery takes; see ``inference.power.share_of``."""
_SIZES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": KIB * MIB, "T": MIB * MIB}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?B)?", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?")
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_LIST_LIMIT = 64


class Option(msgspec.Struct, frozen=True):
    """One setting.  ``low`` and ``high`` bound a number, ``choices`` a text.

    ``check`` raises :class:`InvalidRequest` for one text (of a list: each of them).
    """

    key: str
    kind: Kind
    default: Value
    help: str
    low: float = 0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind == "switch":
            return "true or false"
        if self.kind == "text":
            return "a text on one line"
        if self.kind == "list":
            return f"a list of up to {_LIST_LIMIT} texts"
        noun = {"integer": "a whole number", "number": "a number"}.get(self.kind, "a size (4GiB)")
        if self.high == math.inf:
            return f"{noun} from {self.low:g}"
        return f"{noun} from {self.low:g} to {self.high:.15g}"

    def parse(self, raw: object) -> Value:
        """Return the typed value of ``raw``: a TOML value, or the text of a flag or variable.

        Raises :class:`InvalidRequest` (``bad_setting``) that names the allowed values.
        """
        try:
            value = self._typed(raw)
            self._check(value)
        except InvalidRequest as error:
            raise self._fault(raw, error.message) from None
        except ValueError:
            raise self._fault(raw, "that cannot be its value") from None
        return value

    def _fault(self, raw: object, why: str) -> InvalidRequest:
        return InvalidRequest(
            f"{self.key} is {str(raw)[:80]!r}: {why.rstrip('.')}.", code="bad_setting", key=self.key
        )

    def _typed(self, raw: object) -> Value:
        if self.kind == "switch":
            return _switch(raw)
        if self.kind == "list":
            return _texts(raw)
        if self.kind == "text":
            if not isinstance(raw, str) or len(raw) > 4 * KIB or not raw.isprintable():
                raise ValueError
            return raw
        if isinstance(raw, bool):
            raise ValueError
        if self.kind == "integer":
            return _integer(raw)
        if self.kind == "size":
            return _size(raw)
        if not isinstance(raw, int | float | str):
            raise ValueError
        return float(raw)

    def _check(self, value: Value) -> None:
        if self.choices and value not in self.choices:
            raise ValueError
        if isinstance(value, int | float) and not self.low <= value <= self.high:
            raise ValueError
        if self.check is not None:
            for text in value if isinstance(value, tuple) else (str(value),):
                self.check(text)


def _switch(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _texts(raw: object) -> tuple[str, ...]:
    if isinstance(raw, str):
        raw = [part.strip() for part in raw.split(",") if part.strip()]
    if not isinstance(raw, list | tuple) or len(raw) > _LIST_LIMIT:
        raise ValueError
    if not all(isinstance(item, str) for item in raw):
        raise ValueError
    return tuple(raw)


def _integer(raw: object) -> int:
    if isinstance(raw, str) and len(raw) <= 20:
        return int(raw)
    if not isinstance(raw, int):
        raise ValueError
    return raw


def _size(raw: object) -> int:
    if isinstance(raw, int):
        return raw
    match = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if match is None:
        raise ValueError
    return int(float(match[1]) * _SIZES[match[2].upper()])


def _node_name(text: str) -> None:
    if text:
        check_name(text, "a node")


def _listen(text: str) -> None:
    check_address(text, peer=False)


def _dial(text: str) -> None:
    check_address(text, peer=True)


def _host(text: str) -> None:
    if not _HOST.fullmatch(text):
        raise ValueError


def _origin(text: str) -> None:
    if not _ORIGIN.fullmatch(text):
        raise ValueError


OPTIONS: tuple[Option, ...] = (
    Option(
        "name", "text", "", "This node's name in the mesh; empty: the host's.", check=_node_name
    ),
    Option("mesh", "text", "", "The mesh to run: name or id; empty: the last created or joined."),
    Option(
        "listen",
        "list",
        ("/ip4/0.0.0.0/tcp/4810",),
        "Addresses to accept peers on; port 0 takes a free one.",
        check=_listen,
    ),
    Option(
        "announce",
        "list",
        (),
        "Addresses that peers can reach this node at, if they differ (port forwarding).",
        check=_listen,
    ),
    Option("bootstrap", "list", (), "Peers to dial besides the mesh's own.", check=_dial),
    Option("mdns", "switch", True, "Find peers of the mesh on the local network."),
    Option("max_peers", "integer", 64, "Peers connected at once.", low=1, high=MAX_PEERS),
    Option("api_host", "text", "127.0.0.1", "Address of the HTTP API."),
    Option("api_port", "integer", 4811, "Port of the HTTP API; 0 takes a free one.", high=65_535),
    Option(
        "api_token_required",
        "switch",
        False,
        "Ask for the bearer token on loopback too (elsewhere it is always asked for).",
    ),
    Option(
        "api_allowed_hosts",
        "list",
        (),
        "Names besides loopback ones that the HTTP API may be called by without a token.",
        check=_host,
    ),
    Option(
        "api_allowed_origins",
        "list",
        (),
        "Web origins (https://chat.example) whose pages may call the HTTP API.",
        check=_origin,
    ),
    Option(
        "log_level",
        "text",
        "info",
        "How much the daemon logs.",
        choices=("debug", "info", "warning", "error"),
    ),
    Option(
        "log_format",
        "text",
        "text",
        "Whether log lines are text or JSON objects.",
        choices=("text", "json"),
    ),
    Option(
        "threads",
        "integer",
        0,
        "Threads that compute, in each slice; 0: one for each physical core, with one left over.",
        high=1024,
    ),
    Option(
        "memory_limit",
        "size",
        0,
        "Memory that models may use; 0: what is free.",
        high=MIB * MIB * KIB,
    ),
    Option(
        "on_battery",
        "text",
        "less",
        "What this node takes on battery: less (nothing below 20%), none, or full.",
        choices=ON_BATTERY,
    ),
    Option(
        "kv_memory_bytes",
        "size",
        512 * MIB,
        "Memory for KV blocks of earlier prompts and of sessions of others; 0: keep none.",
        high=MIB * MIB * KIB,
    ),
    Option(
        "kv_disk_bytes",
        "size",
        2 * KIB * MIB,
        "Disk for KV blocks, in the home; 0: keep them in memory only.",
        high=MIB * MIB * KIB,
    ),
    Option(
        "kv_stream_bytes_per_second",
        "size",
        32 * MIB,
        "Bandwidth for KV blocks of running sessions on their way to standbys; 0: send none.",
        high=MIB * MIB,
    ),
    Option(
        "kv_level",
        "text",
        EXACT,
        "How KV blocks are kept and sent: f16 is exact, the others are smaller.",
        choices=LEVELS,
    ),
    Option(
        "context_landmarks",
        "switch",
        False,
        "Keep a smaller, lossy form of chunks' KV as well, for requests with a kv_budget.",
    ),
    Option(
        "context_disk_bytes",
        "size",
        8 * KIB * MIB,
        "Disk for texts and vectors of contexts, in the home; 0: keep none here.",
        high=MIB * MIB * KIB,
    ),
    Option(
        "context_bytes_per_second",
        "size",
        16 * MIB,
        "Bandwidth for parts of contexts that move between nodes in the background.",
        low=KIB,
        high=MIB * MIB,
    ),
    Option(
        "context_keep_seconds",
        "number",
        60.0,
        "How long chunks of replaced or removed documents stay, for questions under way.",
        low=1,
        high=86_400,
    ),
    Option(
        "context_encoder",
        "text",
        "minilm",
        "What embeds the texts of new contexts: minilm, or a GGUF embedding model of this node.",
    ),
    Option(
        "context_question_prefix",
        "text",
        "",
        "What a GGUF context_encoder wants before a question, such as 'query: '.",
    ),
    Option(
        "context_text_prefix",
        "text",
        "",
        "What a GGUF context_encoder wants before a text, such as 'passage: '.",
    ),
    Option("model_dir", "text", "", "Where models are kept; empty: in the home."),
    Option(
        "n_ctx",
        "integer",
        2048,
        "Default context length of a model in tokens.",
        low=32,
        high=MAX_CONTEXT,
    ),
    Option(
        "n_seq",
        "integer",
        8,
        "Default number of concurrent sessions of a model.",
        low=1,
        high=MAX_SESSIONS,
    ),
    Option(
        "speculation",
        "text",
        "auto",
        "Whether tokens are guessed ahead for requests that do not say.",
        choices=("none", "auto"),
    ),
    Option(
        "drafter",
        "text",
        "",
        "A model of this node that guesses tokens for larger ones of its family; empty: none.",
    ),
    Option(
        "ticket_hours",
        "number",
        24.0,
        "Default life of an invitation in hours.",
        low=1 / 60,
        high=8760,
    ),
    Option(
        "drain_seconds",
        "number",
        10.0,
        "How long a stopping daemon lets running answers finish.",
        high=3600,
    ),
    Option(
        "shape",
        "text",
        "",
        "Make the links of this node slow, for trying out: rtt=80ms,rate=50mbit,jitter=5ms.",
        check=parse_shape,
    ),
)
BY_KEY = {option.key: option for option in OPTIONS}
