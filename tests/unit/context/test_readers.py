"""Bytes become text: plain text in any usual encoding, HTML, PDF; what is none is refused."""

import io

import pytest

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    InvalidRequest,
    PyAgentError,
    Refused,
    Unsupported,
)
from pyagent_node.node import context_readers
from pyagent_node.node.context_readers import decode_text, kind_of, read_document

pypdf = pytest.importorskip("pypdf")
pytest.importorskip("selectolax")


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        ("Grüße\n".encode(), "Grüße\n", ""),
        (b"\xef\xbb\xbfbom", "bom", ""),
        ("Grüße".encode("utf-16"), "Grüße", ""),
        ("Grüße".encode("utf-32"), "Grüße", ""),
        ("Grüße an alle".encode("latin-1"), "Grüße an alle", "Windows-1252"),
        ("Grüße ".encode() * 9 + b"\xff", "Grüße " * 9 + "\ufffd", "1 places"),
        (b"a\x1b[31m" + b"red " * 9, "a [31m" + "red " * 9, ""),
    ],
)
def test_text_is_read(data: bytes, text: str, note: str) -> None:
    read = decode_text(data, "a.txt")
    assert read.text == text
    assert note in read.note


@pytest.mark.parametrize(
    "data",
    [b"ab\0cd", b"\x1f\x8b\x08" + bytes(range(1, 32)) * 4, bytes(range(0x80, 0xC0)) * 4],
)
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(Unsupported) as caught:
        decode_text(data, "a.bin")
    assert caught.value.code == "binary_file"


def test_what_begins_with_many_comments_is_told_at_once() -> None:
    comments = b"<!-- a -->\n" * 370
    assert kind_of(comments + b"x", "notes.md") == "text"
    assert kind_of(comments[:3300] + b"<html>", "notes.md") == "html"
    assert kind_of(b"<!-- a > b -- c -->\n <!DOCTYPE html>", "x") == "html"


async def test_html_without_scripts() -> None:
    page = (
        b"<!doctype html><html><head><title>The title</title><style>p{}</style></head><body>"
        b"<script>var x = 1;</script><h1>Head</h1><p>One <b>bold</b> word.</p><ul><li>first<li>"
        b"second</ul>&lt;tag&gt;</body></html>"
    )
    read = await read_document(page, "page")
    lines = [line for line in read.text.splitlines() if line]
    assert lines == ["The title", "Head", "One bold word.", "first", "second", "<tag>"]
    assert kind_of(b"plain", "a.html") == "html"
    assert kind_of(b"plain", "a.txt") == "text"
    broken = await read_document(b"<html><p>open <div><<< </span", "x.html")
    assert "open" in broken.text


def pdf(*, password: str | None = None) -> bytes:
    """Make a PDF of one page with a line of text."""
    from pypdf.generic import (
        DecodedStreamObject,
        DictionaryObject,
        NameObject,
    )

    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    content = DecodedStreamObject()
    content.set_data(b"BT /F1 12 Tf 20 100 Td (Whales sleep upright) Tj ET")
    page[NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


async def test_pdf_with_its_pages() -> None:
    read = await read_document(pdf(), "a.pdf")
    assert read.text.split("\n")[:2] == ["[page 1]", "Whales sleep upright"]


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (b"%PDF-1.4 nothing", CorruptData, "broken_document"),
        (pdf()[:300], CorruptData, "broken_document"),
        (pdf(password="secret"), Refused, "encrypted_document"),
        (b"<html></html>", InvalidRequest, "no_text"),
    ],
)
async def test_broken_files(data: bytes, kind: type[PyAgentError], code: str) -> None:
    with pytest.raises(kind) as caught:
        await read_document(data, "some name")
    assert caught.value.code == code
    assert "some name" in str(caught.value)


async def test_a_reader_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_readers, "EXTRACT_SECONDS", 0.0)
    with pytest.raises(DeadlineExceeded) as caught:
        await read_document(pdf(), "slow.pdf")
    assert caught.value.code == "document_too_slow"
