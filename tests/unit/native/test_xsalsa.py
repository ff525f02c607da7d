"""The cipher of private networks."""

from __future__ import annotations

import nacl.bindings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node import native

from . import reference

KEYS = st.binary(min_size=32, max_size=32)
NONCES = st.binary(min_size=24, max_size=24)

# The key and nonce of Bernstein's "Cryptography in NaCl" (section 9), and the first bytes of the
# key stream that the paper prints for them.
NACL_KEY = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
NACL_NONCE = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
NACL_STREAM = bytes.fromhex("eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880")


def test_the_published_key_stream() -> None:
    assert native.XSalsa20(NACL_KEY, NACL_NONCE).apply(bytes(32)) == NACL_STREAM


@given(KEYS, NONCES, st.binary(max_size=200))
def test_it_equals_the_reference(key: bytes, nonce: bytes, data: bytes) -> None:
    assert native.XSalsa20(key, nonce).apply(data) == reference.xsalsa20(key, nonce, data)


@given(KEYS, NONCES, st.binary(max_size=200))
def test_it_equals_libsodium(key: bytes, nonce: bytes, data: bytes) -> None:
    # libsodium's secret box is XSalsa20 from byte 32 on, after 16 bytes of authenticator.
    boxed = nacl.bindings.crypto_secretbox(data, nonce, key)
    assert native.XSalsa20(key, nonce).apply(bytes(32) + data)[32:] == boxed[16:]


@given(KEYS, NONCES, st.lists(st.binary(max_size=150), max_size=6))
def test_pieces_carry_on_where_the_last_one_ended(
    key: bytes, nonce: bytes, pieces: list[bytes]
) -> None:
    cipher = native.XSalsa20(key, nonce)
    out = b"".join(cipher.apply(piece) for piece in pieces)
    assert out == native.XSalsa20(key, nonce).apply(b"".join(pieces))
    assert native.XSalsa20(key, nonce).apply(out) == b"".join(pieces)


def test_a_large_buffer_is_the_same_as_small_ones() -> None:
    data = bytes(range(256)) * 400
    cipher = native.XSalsa20(NACL_KEY, NACL_NONCE)
    small = b"".join(cipher.apply(data[i : i + 1000]) for i in range(0, len(data), 1000))
    assert native.XSalsa20(NACL_KEY, NACL_NONCE).apply(bytearray(data)) == small


@pytest.mark.parametrize(
    ("key", "nonce", "error", "words"),
    [
        (bytes(31), bytes(24), ValueError, "key has 31 bytes; XSalsa20 takes 32"),
        (bytes(32), bytes(8), ValueError, "nonce has 8 bytes; XSalsa20 takes 24"),
        ("k" * 32, bytes(24), TypeError, "key must be bytes"),
        (bytes(32), None, TypeError, "nonce must be bytes"),
    ],
)
def test_bad_keys_are_refused(
    key: object, nonce: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        native.XSalsa20(key, nonce)  # type: ignore[arg-type]


def test_the_key_is_never_shown() -> None:
    key = b"this is a secret key of 32 bytes"
    cipher = native.XSalsa20(key, bytes(24))
    assert "secret" not in repr(cipher)
    with pytest.raises(ValueError, match="33 bytes") as caught:
        native.XSalsa20(key + b"!", bytes(24))
    assert "secret" not in str(caught.value)
