"""A download over a real TLS connection that breaks off half way."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from pathlib import Path

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pyagent_node.base.errors import Refused
from pyagent_node.inference.models import downloads
from pyagent_node.inference.models.downloads import download
from pyagent_node.inference.models.sources import HttpSource
from pyagent_node.inference.models.store import ModelStore

DATA = os.urandom(3_000_000)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


async def _serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Answer one request; without a range, only half of what was promised is sent."""
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError:  # a client that does not trust us
        return
    request = b""
    while b"\r\n\r\n" not in request:
        data = await stream.receive_some()
        if not data:
            return
        request += data
    start = 0
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"range: bytes="):
            start = int(line[13:-1])
    status = b"206 Partial Content" if start else b"200 OK"
    head = b'HTTP/1.1 %s\r\nETag: "x"\r\nContent-Length: %d\r\n' % (status, len(DATA) - start)
    if start:
        head += b"Content-Range: bytes %d-%d/%d\r\n" % (start, len(DATA) - 1, len(DATA))
    body = DATA[start:] if start else DATA[: len(DATA) // 2]
    await stream.send_all(head + b"\r\n" + body)
    await stream.aclose()


async def test_a_broken_connection_is_resumed(
    certificate: Path, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "RETRY_SECONDS", 0.001)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(certificate)
    theirs = ssl.create_default_context(cafile=certificate)
    listeners = await trio.open_ssl_over_tcp_listeners(0, ours, host="127.0.0.1")
    port = listeners[0].transport_listener.socket.getsockname()[1]
    nursery.start_soon(trio.serve_listeners, _serve, listeners)
    store = ModelStore(tmp_path / "models")
    target = tmp_path / "target"
    source = HttpSource(f"https://127.0.0.1:{port}/m.gguf")
    with trio.fail_after(20):
        await download(source, target, store, transport=httpx.AsyncHTTPTransport(verify=theirs))
    assert target.read_bytes() == DATA
    with trio.fail_after(20), pytest.raises(Refused) as caught:
        await download(source, tmp_path / "other", store)
    assert caught.value.code == "certificate_untrusted"
