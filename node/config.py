"""Settings: flag > environment (``PYAGENT_<KEY>``) > ``config.toml`` > default.

Each value knows its source.  ``config.toml`` is flat: ``key = value`` lines.  Unknown keys, wrong
types and values out of range are a :class:`ConfigError` that names the file or variable, the key
and the allowed values.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec

from pyagent_node.base.errors import ConfigError, InvalidRequest, NotFound
from pyagent_node.base.files import read_limited, write_atomic
from pyagent_node.node.home import Home
from pyagent_node.node.options import BY_KEY, OPTIONS, Option, Value

ENV_PREFIX = "PYAGENT_"
_MAX_CONFIG = 65_536


class Sourced(msgspec.Struct, frozen=True):
    """One setting as ``config show`` prints it."""

    key: str
    value: Value
    source: str
    help: str
    allowed: str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting, typed; the meanings are in :data:`~pyagent_node.node.options.OPTIONS`.

    ``sources`` says for each key where its value came from: ``"flag"``, ``"PYAGENT_..."``, the
    path of the file, or ``"default"``.
    """

    name: str
    mesh: str
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]
    mdns: bool
    max_peers: int
    api_host: str
    api_port: int
    api_token_required: bool
    api_allowed_hosts: tuple[str, ...]
    api_allowed_origins: tuple[str, ...]
    log_level: str
    log_format: str
    threads: int
    memory_limit: int
    on_battery: str
    kv_memory_bytes: int
    kv_disk_bytes: int
    kv_stream_bytes_per_second: int
    kv_level: str
    context_landmarks: bool
    context_disk_bytes: int
    context_bytes_per_second: int
    context_keep_seconds: float
    context_encoder: str
    context_question_prefix: str
    context_text_prefix: str
    model_dir: str
    n_ctx: int
    n_seq: int
    speculation: str
    drafter: str
    ticket_hours: float
    drain_seconds: float
    shape: str
    sources: dict[str, str]

    @property
    def node_name(self) -> str:
        """The name of this node: the setting, or one made of the host's name."""
        return self.name or host_name()

    @property
    def api_is_local(self) -> bool:
        """Whether the HTTP API listens on loopback only."""
        if self.api_host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.api_host).is_loopback
        except ValueError:
            return False

    @property
    def api_needs_token(self) -> bool:
        """Whether every request to the HTTP API must carry the bearer token."""
        return self.api_token_required or not self.api_is_local

    def models_dir(self, home: Home) -> Path:
        """Where models are kept."""
        return Path(self.model_dir).expanduser() if self.model_dir else home.models_dir

    def show(self) -> list[Sourced]:
        """Return every setting with its source, in the order of the table."""
        return [
            Sourced(o.key, getattr(self, o.key), self.sources[o.key], o.help, o.allowed)
            for o in OPTIONS
        ]


def host_name() -> str:
    """Return the host's name as a valid node name."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().split(".")[0])[:63].lstrip("-.")
    return name or "node"


def load_settings(
    home: Home,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Return the settings in force.

    ``flags`` maps keys to values of the command line; ``None`` values count as not given.
    Raises :class:`ConfigError` (``bad_setting``, ``unknown_setting``, ``bad_config_file``).
    """
    file = read_config(home.config_path)
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    for key in given:
        _option(key, "the command line")
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for option in OPTIONS:
        variable = ENV_PREFIX + option.key.upper()
        raw: object
        if option.key in given:
            raw, source = given[option.key], "flag"
        elif variable in environ:
            raw, source = environ[variable], variable
        elif option.key in file:
            raw, source = file[option.key], str(home.config_path)
        else:
            values[option.key] = option.default
            sources[option.key] = "default"
            continue
        values[option.key] = _parse(option, raw, source)
        sources[option.key] = source
    return msgspec.convert({**values, "sources": sources}, Settings)


def read_config(path: Path) -> dict[str, object]:
    """Return the keys of ``config.toml``, checked; a missing file has none."""
    try:
        data = read_limited(path, _MAX_CONFIG)
    except NotFound:
        return {}
    try:
        file = cast("dict[str, object]", tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}.",
            code="bad_config_file",
            remedy="Correct it, or move it away to go back to the defaults.",
            path=str(path),
        ) from None
    for key, raw in file.items():
        _parse(_option(key, str(path)), raw, str(path))
    return file


def change_setting(home: Home, key: str, text: str | None) -> None:
    """Set ``key`` in ``config.toml`` to the value written as ``text``, or remove it (``None``).

    Comments and the order of the lines are kept.  Raises :class:`ConfigError`.
    """
    path = home.config_path
    option = _option(key, "the command line")
    before = read_config(path)
    value = None if text is None else _parse(option, text, "the command line")
    after = {k: v for k, v in before.items() if k != key}
    if value is not None:
        after[key] = list(value) if isinstance(value, tuple) else value
    old = read_limited(path, _MAX_CONFIG).decode() if path.exists() else ""
    new = _edit(old, key, None if value is None else f"{key} = {_toml(value)}")
    if not _reads_as(new, after):
        raise ConfigError(
            f"{path} is laid out in a way that cannot be edited safely.",
            code="bad_config_file",
            remedy=f"Change {key} in it by hand.",
            path=str(path),
        )
    write_atomic(path, new.encode())


def _reads_as(text: str, expected: Mapping[str, object]) -> bool:
    try:
        return tomllib.loads(text) == expected
    except tomllib.TOMLDecodeError:
        return False


def _edit(text: str, key: str, line: str | None) -> str:
    """Replace the assignment of a top-level ``key``, which may span lines, by ``line``."""
    lines = text.rstrip("\n").split("\n") if text else []
    start = next((i for i, s in enumerate(lines) if re.match(rf"\s*{key}\s*=", s)), None)
    added = [] if line is None else [line]
    if start is None:
        return "\n".join([*lines, *added, ""])
    for stop in range(start + 1, len(lines) + 1):
        try:
            tomllib.loads("\n".join(lines[start:stop]))
        except tomllib.TOMLDecodeError:
            continue
        return "\n".join([*lines[:start], *added, *lines[stop:], ""])
    return text


def _toml(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _option(key: str, where: str) -> Option:
    option = BY_KEY.get(key)
    if option is None:
        close = difflib.get_close_matches(key, BY_KEY, n=1)
        raise ConfigError(
            f"{where}: there is no setting {key[:64]!r}.",
            code="unknown_setting",
            remedy=f"Did you mean {close[0]!r}?" if close else "The keys: " + ", ".join(BY_KEY),
            key=key[:64],
        )
    return option


def _parse(option: Option, raw: object, source: str) -> Value:
    try:
        return option.parse(raw)
    except InvalidRequest as error:
        raise ConfigError(
            f"{source}: {error.message}",
            code="bad_setting",
            remedy=f"{option.key} takes {option.allowed}.",
            key=option.key,
        ) from None
