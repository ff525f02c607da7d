"""TUN devices and network namespaces, as Linux's system calls have them.  Linux only."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

DEVICE: Final = "/dev/net/tun"
RUN_DIR: Final = "/run/netns"
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let this thread be in a named network namespace; sockets and children made in it stay there.

    The thread comes back at the end; when the kernel does not let it, the process must not go on,
    and the :class:`OSError` says so.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"{RUN_DIR}/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def open_tun(namespace: str, name: str) -> int:
    """Make a TUN device in a namespace and return its descriptor, which does not block.

    Each read is one IP packet that the namespace sends, each write one that it receives.  The
    device goes when the descriptor is closed.
    """
    import fcntl  # noqa: PLC0415  (Windows has none, and imports this to say so)

    with inside(namespace):
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor
