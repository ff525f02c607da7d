"""The cipher of private networks, as libp2p's specification has it."""

from __future__ import annotations

import hashlib

import nacl.bindings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import ConfigError
from pyagent_node.node.mesh.psk import NONCE_BYTES, PskCipher
from pyagent_node.node.mesh.wire import StreamCipher

PSK = hashlib.sha256(b"a private network").digest()
PIECES = st.lists(st.binary(max_size=100), max_size=8)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut ``data`` as a network would: anywhere."""
    parts, at = [], 0
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return [*parts, data[at:]]


@given(PIECES, st.lists(st.integers(0, 40), max_size=20))
def test_what_one_side_sends_the_other_reads(pieces: list[bytes], sizes: list[int]) -> None:
    ours, theirs = PskCipher(PSK), PskCipher(PSK)
    wire = b"".join(ours.outgoing(piece) for piece in pieces)
    plain = b"".join(theirs.incoming(part) for part in cut(wire, sizes))
    assert plain == b"".join(pieces)


def test_the_wire_holds_a_nonce_and_then_xsalsa20() -> None:
    nonce = bytes(range(24))
    cipher = PskCipher(PSK, random_bytes=lambda size: nonce[:size])
    message = b"hello world, here is more than one block of sixty-four bytes" * 2
    wire = cipher.outgoing(message[:6]) + cipher.outgoing(message[6:])
    assert wire[:NONCE_BYTES] == nonce
    # libsodium's secret box is XSalsa20 from byte 32 on, after 16 bytes of authenticator.
    boxed = nacl.bindings.crypto_secretbox(message[32:], nonce, PSK)
    assert wire[NONCE_BYTES + 32 :] == boxed[16:]


def test_directions_and_connections_have_their_own_nonces() -> None:
    sent = {PskCipher(PSK).outgoing(b"the same words")[:NONCE_BYTES] for _ in range(20)}
    assert len(sent) == 20


def test_the_nonce_goes_out_once() -> None:
    cipher = PskCipher(PSK)
    assert len(cipher.outgoing(b"")) == NONCE_BYTES
    assert cipher.outgoing(b"") == b""
    assert len(cipher.outgoing(b"abc")) == 3


def test_another_key_reads_noise() -> None:
    wire = PskCipher(PSK).outgoing(b"/multistream/1.0.0\n" * 10)
    other = PskCipher(hashlib.sha256(b"another network").digest())
    plain = other.incoming(wire)
    assert len(plain) == 190
    assert b"multistream" not in plain
    assert b"multistream" not in wire


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"has {size} bytes") as caught:
        PskCipher(bytes(size))
    assert caught.value.code == "bad_psk"


def test_the_key_is_never_shown() -> None:
    key = b"this is a secret key of 32 bytes"
    assert "secret" not in repr(PskCipher(key))
    with pytest.raises(ConfigError) as caught:
        PskCipher(key + b"!")
    assert "secret" not in str(caught.value)


def test_it_is_the_cipher_that_a_wire_takes() -> None:
    cipher: StreamCipher = PskCipher(PSK)
    assert cipher.incoming(b"") == b""
