"""The set-up script: what it misses, what it says, what it does only once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("bootstrap")


@pytest.fixture
def needs(bootstrap: ModuleType) -> ModuleType:
    return importlib.import_module("system_needs")


def test_this_machine_has_what_is_needed(needs: ModuleType) -> None:
    needs.check_system()


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("apt-get", "apt-get install -y libgmp-dev"),
        ("dnf", "dnf install -y gmp-devel"),
        ("brew", "brew install gmp"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    tool: str, command: str, needs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "has_header", lambda *_: False)
    monkeypatch.setattr(
        needs.shutil, "which", lambda name: f"/usr/bin/{name}" if name in (tool, "cc") else None
    )
    monkeypatch.setattr(needs, "compiler", lambda _: ["cc"])
    with pytest.raises(needs.SetupError, match=r"Missing: the GMP headers \(gmp.h\)") as info:
        needs.check_system()
    assert command in str(info.value)


def test_without_a_known_package_manager_every_name_is_told(
    needs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "cargo_version", lambda: None)
    monkeypatch.setattr(needs.shutil, "which", lambda _: None)
    monkeypatch.setattr(needs, "compiler", lambda _: ["cc"])
    monkeypatch.setattr(needs, "has_header", lambda *_: True)
    with pytest.raises(needs.SetupError, match="cargo") as info:
        needs.check_system()
    assert "brew install rust" in str(info.value)


def test_an_old_cargo_is_refused(needs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "cargo_version", lambda: (1, 63))
    with pytest.raises(needs.SetupError, match=r"cargo 1\.63 is too old; 1\.\d+"):
        needs.check_system()


def test_cargo_needed_is_what_the_crate_says(needs: ModuleType) -> None:
    text = (ROOT / "native" / "Cargo.toml").read_text()
    major, minor = needs.CARGO_NEEDED
    assert f'rust-version = "{major}.{minor}"' in text


def test_packages_are_those_of_the_project(bootstrap: ModuleType) -> None:
    linked = {p.name for p in (ROOT / "build" / "typing" / "pyagent_node").iterdir()}
    assert linked == set(bootstrap.PACKAGES)


def test_progress_reads_what_pip_prints(bootstrap: ModuleType) -> None:
    progress = bootstrap.Progress("step")
    progress.live = True
    progress.read("  Building wheel for llama-cpp-python (pyproject.toml): started\n")
    assert "about 5 minutes" in progress.detail
    progress.read("  [120/240] Building CXX object x.o\n")
    assert progress.detail.endswith("120 of 240 files")
    progress.read("Collecting numpy==2.0\n")
    assert "numpy" in progress.detail
    progress.read("\x00 odd [ / ] line\n")


def test_a_failing_command_shows_its_end(bootstrap: ModuleType) -> None:
    code = "print('first'); print('reason'); raise SystemExit(3)"
    with pytest.raises(bootstrap.SetupError, match=r"failed \(3\)") as info:
        bootstrap.run(bootstrap.Progress("x"), [sys.executable, "-c", code], dict(os.environ))
    assert "reason" in str(info.value)


def test_damaged_stamps_count_as_none(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "STAMPS", tmp_path / "stamps.json")
    assert bootstrap.read_stamps() == {}
    (tmp_path / "stamps.json").write_text("{half")
    assert bootstrap.read_stamps() == {}
    bootstrap.write_stamp("lock", "abc")
    assert bootstrap.read_stamps() == {"lock": "abc"}


def test_make_names_a_missing_python() -> None:
    done = subprocess.run(
        ["make", "PYTHON=", "python-found"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "no Python 3.11 or newer was found" in done.stderr


def test_make_help_lists_the_two_commands() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "make demo" in done.stdout
    assert "make test" in done.stdout
