"""Atomic writes, limits, permissions and the lock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyagent_node.base import files
from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound, Refused, Unavailable
from pyagent_node.base.files import (
    FileLock,
    check_private,
    create_exclusive,
    make_private_dir,
    map_os_error,
    read_limited,
    write_atomic,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@posix
def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "secret"
    for content in (b"one", b"", b"x" * 100_000):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    write_atomic(path, b"shown", mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["secret"]


@pytest.mark.parametrize("broken", ["sync_file", "sync_dir"])
def test_a_failure_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, broken, fail)
    with pytest.raises(Unavailable) as caught:
        write_atomic(path, b"new")
    assert caught.value.code == "disk_full"
    assert str(path) in str(caught.value)
    assert path.read_bytes() in (b"old", b"new")
    assert names(tmp_path) == ["file"]


def test_failed_rename_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    (path / "content").touch()
    with pytest.raises((Unavailable, Refused)):
        write_atomic(path, b"x")
    assert names(tmp_path) == ["directory"]


def test_exclusive_creation(tmp_path: Path) -> None:
    path = tmp_path / "file"
    barrier = threading.Barrier(8)
    won: list[int] = []

    def create(n: int) -> None:
        barrier.wait()
        if create_exclusive(path, str(n).encode() * 1000):
            won.append(n)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert path.read_bytes() == str(won[0]).encode() * 1000
    assert names(tmp_path) == ["file"]


def test_exclusive_creation_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "file"
    assert create_exclusive(path, b"one")
    assert not create_exclusive(path, b"two")
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o600


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(NotFound) as caught:
        read_limited(path, 10)
    assert caught.value.code == "file_not_found"
    path.write_bytes(b"0123456789")
    assert read_limited(path, 10) == b"0123456789"
    with pytest.raises(LimitExceeded) as too_large:
        read_limited(path, 9)
    assert too_large.value.code == "file_too_large"
    with pytest.raises(Unavailable):
        read_limited(tmp_path, 10)


@posix
def test_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"")
    check_private(path)
    path.chmod(0o640)
    with pytest.raises(Refused) as caught:
        check_private(path)
    assert caught.value.code == "file_readable_by_others"


def test_errors_are_mapped() -> None:
    assert map_os_error(PermissionError(13, "no"), "x", "writing").code == "file_not_permitted"
    assert map_os_error(OSError(30, "read-only"), "x", "writing").code == "file_not_permitted"
    assert map_os_error(OSError(5, "I/O"), "x", "writing").code == "disk_failed"


def test_directory_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        make_private_dir(tmp_path / "file" / "sub")


def test_lock_excludes_and_names_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with FileLock(path, "The home x"):
        with pytest.raises(Conflict) as caught:
            FileLock(path, "The home x").acquire()
        assert caught.value.code == "in_use"
        assert f"The home x is in use by process {os.getpid()}" in str(caught.value)
        assert caught.value.facts["pid"] == os.getpid()
    lock = FileLock(path, "x")
    lock.acquire()
    lock.release()
    lock.release()


def test_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from pyagent_node.base.files import FileLock;"
        f"FileLock(Path({str(path)!r}), 'x').acquire(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Conflict) as caught:
            FileLock(path, "x").acquire()
        assert caught.value.facts["pid"] == child.pid
    finally:
        child.kill()
        child.communicate()
    with FileLock(path, "x"):
        pass


def test_lock_file_with_junk_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"\xff" * 1000)
    with FileLock(path, "x"):
        assert path.read_bytes() == str(os.getpid()).encode()
