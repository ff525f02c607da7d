"""PySyncObj's ``SyncObj`` class, cut off from the process around it.

PySyncObj 0.3.17 reads the clock and the random generator from the globals of its module, unpickles
whatever a peer or a file holds, and opens pipes and pollers.  This module executes a **private
copy** of ``pysyncobj.syncobj`` in which each of those names is something of ours: clock and
generator are the ones of the :class:`Seams` in force, and ``pickle`` refuses.  So a path that was
overlooked fails loudly instead of running what a peer sent.  The copy is never put into
``sys.modules``; a program that uses PySyncObj for itself is not touched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from pyagent_node.base.errors import Unsupported

VERSION = "0.3.17"
"""The one version whose inner workings the adapter knows."""


class Seams:
    """What one node's ``SyncObj`` may know of the world.

    ``now`` is its time in seconds, ``draw`` what its random generator returns, in [0, 1).
    """

    __slots__ = ("draw", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.draw = 0.0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Answer for the clock and the generator while a method of ``SyncObj`` runs."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: ContextVar[Seams] = ContextVar("seams")


class _Pickle:
    """Stands where PySyncObj looks for ``pickle``."""

    def __getattr__(self, name: str) -> NoReturn:
        raise Unsupported(f"PySyncObj tried to use pickle.{name}.", code="pickle_refused")


class _Poller:
    """Stands for PySyncObj's socket poller: there are no sockets."""

    def poll(self, timeout: float) -> None:
        """Return at once."""


class _Serializer:
    """Stands for PySyncObj's snapshot writer, which pickles and may fork."""

    def __init__(self, *_settings: object) -> None:
        """Ignore the settings."""


class _Names:
    """Stands for PySyncObj's DNS cache, which is one for the whole process."""

    def setTimeouts(self, *_seconds: float) -> None:  # noqa: N802
        """Do nothing."""

    def setPreferredAddrFamily(self, _family: str | None) -> None:  # noqa: N802
        """Do nothing."""


def _now() -> float:
    return _active.get().now


def _draw() -> float:
    return _active.get().draw


def _no_sleep(_seconds: float) -> NoReturn:
    raise AssertionError("SyncObj must not sleep: its transport is always ready")


def _given(value: object) -> object:
    return value


@cache
def stock() -> ModuleType:
    """Return the private copy of ``pysyncobj.syncobj``.

    Raises :class:`Unsupported` (``pysyncobj_missing``, ``pysyncobj_version``).
    """
    try:
        found = importlib.metadata.version("pysyncobj")
    except importlib.metadata.PackageNotFoundError:
        raise Unsupported(
            "PySyncObj is not installed.",
            code="pysyncobj_missing",
            remedy=f"Run `pip install pysyncobj=={VERSION}`.",
        ) from None
    if found != VERSION:
        raise Unsupported(
            f"PySyncObj {found} is installed; the engine knows the inner workings of {VERSION}.",
            code="pysyncobj_version",
            remedy=f"Run `pip install pysyncobj=={VERSION}`.",
        )
    spec = importlib.util.find_spec("pysyncobj.syncobj")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    replaced: dict[str, Any] = {
        "monotonicTime": _now,
        "random": SimpleNamespace(random=_draw),
        "time": SimpleNamespace(sleep=_no_sleep),
        "pickle": _Pickle(),
        "createPoller": lambda _type: _Poller(),
        "PIPE_NOTIFIER_ENABLED": False,
        "Serializer": _Serializer,
        "globalDnsResolver": _Names,
        "createJournal": _given,
    }
    for name, value in replaced.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module
