"""Keys, peer ids and signed statements."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, InvalidRequest, Refused
from pyagent_node.node.identity import (
    NodeKey,
    peer_id_of,
    public_key_of,
    seal,
    sealed_payload,
    unseal,
    verify,
)


@given(seed=st.binary(min_size=32, max_size=32))
def test_peer_id_is_libp2ps(seed: bytes) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    expected = ID.from_pubkey(create_new_key_pair(seed).public_key).to_base58()
    key = NodeKey(seed)
    assert key.peer_id == expected
    assert public_key_of(key.peer_id) == key.public_key
    assert peer_id_of(key.public_key) == key.peer_id
    assert key.seed == seed


def test_key_file_is_private_and_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    key = NodeKey.load_or_create(path)
    assert NodeKey.load_or_create(path).peer_id == key.peer_id
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert [p.name for p in path.parent.iterdir()] == ["node.key"]


def test_key_created_by_many_at_once_is_one_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    barrier = threading.Barrier(8)
    ids: list[str] = []

    def create() -> None:
        barrier.wait()
        ids.append(NodeKey.load_or_create(path).peer_id)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="modes are not Windows's way")
def test_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    NodeKey.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(Refused) as caught:
        NodeKey.load(path)
    assert caught.value.code == "file_readable_by_others"
    assert "chmod 600" in str(caught.value)


RSA_LIKE = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIGVhZA==\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 100, RSA_LIKE])
def test_damaged_key_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(CorruptData) as caught:
        NodeKey.load(path)
    assert caught.value.code == "bad_key_file"
    assert str(path) in str(caught.value)


def test_repr_shows_no_secret() -> None:
    key = NodeKey(bytes(range(32)))
    assert repr(key) == f"NodeKey({key.peer_id})"
    assert key.seed.hex() not in repr(key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        "1" * 52,
        "0OIl" * 13,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "é" * 52,
    ],
)
def test_bad_peer_ids(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        public_key_of(text)
    assert caught.value.code == "bad_peer_id"
    assert not verify(text, bytes(64), b"")  # type: ignore[arg-type]


def test_statements() -> None:
    key, other = NodeKey.generate(), NodeKey.generate()
    sealed = seal(key, b"kind v1\0", b"payload")
    assert sealed_payload(sealed) == b"payload"
    assert unseal(sealed, b"kind v1\0", key.peer_id) == b"payload"
    assert unseal(sealed, b"kind v2\0", key.peer_id) is None
    assert unseal(sealed, b"kind v1\0", other.peer_id) is None


@given(data=st.binary(max_size=200))
def test_garbage_is_no_statement(data: bytes) -> None:
    with pytest.raises(CorruptData):
        sealed_payload(data)


@given(st.data())
def test_every_changed_byte_is_noticed(data: st.DataObject) -> None:
    key = NodeKey(bytes(32))
    sealed = bytearray(seal(key, b"k\0", b"some payload"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CorruptData):
        assert unseal(bytes(sealed), b"k\0", key.peer_id) is None


@pytest.mark.slow
def test_public_interface_does_not_import_libp2p() -> None:
    modules = ["identity", "genesis", "certificates", "tickets", "home", "profiles", "config"]
    modules += ["membership", "joining", "registrar"]
    code = "import sys\n" + "\n".join(f"import pyagent_node.node.{m}" for m in modules)
    code += "\nassert not [m for m in sys.modules if m.split('.')[0] in ('libp2p', 'multiaddr')]"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, timeout=60)
