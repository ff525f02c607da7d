"""BLAKE3 of buffers, files and token chains."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node import native

from . import reference

TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=70).map(
    lambda tokens: np.array(tokens, np.int32)
)


def test_the_empty_digest_is_the_published_one() -> None:
    published = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert native.blake3(b"").hex() == published
    assert native.Blake3().hexdigest() == published


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 3073, 5120, 17_000])
def test_blake3_equals_the_reference(size: int) -> None:
    # The input of the authors' own test vectors: bytes counting to 250, over and over.
    data = bytes(i % 251 for i in range(size))
    assert native.blake3(data) == reference.blake3(data)


@given(st.lists(st.binary(max_size=1500), max_size=5))
def test_pieces_hash_like_the_whole(pieces: list[bytes]) -> None:
    hasher = native.Blake3()
    for piece in pieces:
        hasher.update(piece)
    whole = b"".join(pieces)
    assert hasher.digest() == reference.blake3(whole)
    assert hasher.digest() == native.blake3(whole)
    assert hasher.hexdigest() == hasher.digest().hex()


def test_any_contiguous_buffer_will_do() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    digest = native.blake3(array.tobytes())
    for same in (array, memoryview(array.tobytes()), bytearray(array.tobytes())):
        assert native.blake3(same) == digest


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("text", TypeError, "data must be bytes or another buffer, not str"),
        (None, TypeError, "not NoneType"),
        (np.zeros((4, 4))[:, 0], ValueError, "data must be a contiguous buffer"),
    ],
)
def test_what_is_no_buffer_is_named(data: object, error: type[Exception], words: str) -> None:
    for call in (native.blake3, native.Blake3().update):
        with pytest.raises(error, match=words):
            call(data)  # type: ignore[arg-type]


def test_threads_may_share_a_hasher() -> None:
    hasher = native.Blake3()
    piece = b"a" * 100_000
    threads = [threading.Thread(target=hasher.update, args=(piece,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hasher.digest() == native.blake3(piece * 4)


@given(st.binary(max_size=300), st.integers(1, 400))
def test_hash_file_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed"
    path.write_bytes(data)
    whole, chunks = native.hash_file(str(path), chunk)
    assert whole == native.blake3(data)
    parts = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    assert chunks == b"".join(map(native.blake3, parts))


def test_hash_file_reports_its_progress(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3_000_000))
    seen: list[int] = []
    native.hash_file(path, 1 << 20, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 3_000_000
    assert len(seen) >= 3


def test_an_error_in_the_progress_callback_ends_the_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3_000_000))
    calls = 0

    def stop(done: int) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.hash_file(str(path), 1 << 20, stop)
    assert calls == 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as caught:
        native.hash_file(str(missing), 1024)
    assert Path(caught.value.filename) == missing
    with pytest.raises(ValueError, match="not a regular file"):
        native.hash_file(str(tmp_path), 1024)
    with pytest.raises(ValueError, match="NUL byte"):
        native.hash_file("a\0b", 1024)


@pytest.mark.parametrize("chunk", [0, -1, 2**40 + 1, 2**70])
def test_chunk_sizes_out_of_range_are_refused(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="chunk_bytes"):
        native.hash_file(str(path), chunk)
    assert native.hash_file(str(path), 1) == (native.blake3(b""), b"")


def test_a_file_of_too_many_chunks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20))
    assert len(native.hash_file(path, 1)[1]) == 32 * 2**20
    with path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match="more than 1048576 chunks of 1 bytes"):
        native.hash_file(path, 1)
    assert len(native.hash_file(path, 2)[1]) == 32 * (2**19 + 1)


@given(st.binary(min_size=32, max_size=32), TOKENS, st.integers(1, 20))
def test_hash_chain_equals_the_reference(parent: bytes, tokens: np.ndarray, block: int) -> None:
    assert native.hash_chain(parent, tokens, block) == reference.hash_chain(parent, tokens, block)


@given(TOKENS, st.integers(1, 8), st.integers(0, 8))
def test_a_chain_can_be_carried_on(tokens: np.ndarray, block: int, blocks: int) -> None:
    cut = blocks * block
    first = native.hash_chain(bytes(32), tokens[:cut], block)
    rest = native.hash_chain(first[-32:] or bytes(32), tokens[cut:], block)
    assert first + rest == native.hash_chain(bytes(32), tokens, block)


@pytest.mark.parametrize(
    ("parent", "tokens", "block", "error", "words"),
    [
        (bytes(31), np.zeros(4, np.int32), 2, ValueError, "parent has 31 bytes"),
        (bytes(32), np.zeros(4, np.int64), 2, TypeError, "tokens must be .* of int32, not .*int64"),
        (bytes(32), np.zeros((2, 2), np.int32), 2, TypeError, "not a 2-dimensional array"),
        (bytes(32), np.zeros(8, np.int32)[::2], 2, ValueError, "tokens must be contiguous"),
        (bytes(32), [1, 2], 2, TypeError, "not list"),
        (bytes(32), np.zeros(4, np.int32), 0, ValueError, "block is 0"),
        (bytes(32), np.zeros(4, np.int32), -1, ValueError, "block must lie between"),
        (bytes(32), np.zeros(4, np.int32), 2.5, TypeError, "block must be an integer, not float"),
    ],
)
def test_bad_chains_are_refused(
    parent: bytes, tokens: object, block: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        native.hash_chain(parent, tokens, block)  # type: ignore[arg-type]
