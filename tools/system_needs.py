"""What the system must have before a clone can be set up, and the command that brings it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_NEEDED = (3, 11)
CARGO_NEEDED = (1, 85)


class SetupError(Exception):
    """A step failed; the text says what to do."""


@dataclass(frozen=True)
class Need:
    """One thing from the system's packages: how to see whether it is there, what brings it."""

    name: str
    present: Callable[[], bool]
    apt: str
    dnf: str
    brew: str


def python_include() -> Path:
    """Return the folder that must hold ``Python.h``."""
    return Path(sysconfig.get_paths()["include"])


def has_module(name: str) -> bool:
    """Whether this Python can import ``name`` (Debian splits venv and ensurepip off)."""
    code = f"import {name}"
    return (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode
        == 0
    )


def compiler(kind: str) -> list[str] | None:
    """Return the C (``CC``) or C++ (``CXX``) compiler's command, or ``None``."""
    named = os.environ.get(kind)
    if named:
        command = shlex.split(named)
        return command if command and shutil.which(command[0]) else None
    for name in ("cc", "gcc", "clang") if kind == "CC" else ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def has_header(header: str, folders: Iterable[Path]) -> bool:
    """Whether the C compiler finds ``header``, also looking in ``folders``."""
    command = compiler("CC")
    if command is None:
        return True  # the missing compiler is reported; the header cannot be judged without it
    for folder in folders:
        command += ["-I", str(folder)]
    flags = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CFLAGS", ""))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.c")
        source.write_text(f"#include <stdio.h>\n#include <{header}>\nint main(void){{return 0;}}\n")
        command += [*flags, "-fsyntax-only", str(source)]
        return (
            subprocess.run(command, check=False, capture_output=True, cwd=scratch).returncode == 0
        )


def brew_prefixes() -> list[Path]:
    """Folders where Homebrew and MacPorts put headers and libraries."""
    found = [Path("/opt/homebrew"), Path("/usr/local"), Path("/opt/local")]
    return [p for p in found if sys.platform == "darwin" and (p / "include").is_dir()]


def cargo_version() -> tuple[int, int] | None:
    """Return cargo's version, or ``None`` when there is no cargo."""
    try:
        found = subprocess.run(
            ["cargo", "--version"], check=False, capture_output=True, text=True, cwd=ROOT
        )
    except OSError:
        return None
    match = re.search(r"(\d+)\.(\d+)", found.stdout)
    return (int(match[1]), int(match[2])) if match else None


RUSTUP = "a current Rust from https://rustup.rs (the system's own package may be too old)"


def needs() -> list[Need]:
    """Everything that must come from the system."""
    prefixes = [p / "include" for p in brew_prefixes()]
    return [
        Need(
            "Python's venv and ensurepip modules",
            lambda: has_module("venv, ensurepip"),
            f"python{sys.version_info[0]}.{sys.version_info[1]}-venv",
            "python3",
            "python@3.13",
        ),
        Need(
            "Python's headers (Python.h)",
            (python_include() / "Python.h").is_file,
            f"python{sys.version_info[0]}.{sys.version_info[1]}-dev",
            "python3-devel",
            "python@3.13",
        ),
        Need("a C compiler", lambda: compiler("CC") is not None, "build-essential", "gcc", "gcc"),
        Need(
            "a C++ compiler",
            lambda: compiler("CXX") is not None,
            "build-essential",
            "gcc-c++",
            "gcc",
        ),
        Need(
            "the GMP headers (gmp.h)",
            lambda: has_header("gmp.h", prefixes),
            "libgmp-dev",
            "gmp-devel",
            "gmp",
        ),
        Need("cargo", lambda: cargo_version() is not None, "cargo", "cargo", "rust"),
    ]


def install_command(missing: list[Need]) -> str | None:
    """Return the command that installs ``missing`` with this system's package manager."""
    sudo = "" if sys.platform == "darwin" or os.geteuid() == 0 else "sudo "
    for tool, attribute in (("apt-get", "apt"), ("dnf", "dnf"), ("brew", "brew")):
        if shutil.which(tool):
            names = sorted({getattr(need, attribute) for need in missing})
            yes = " -y" if tool != "brew" else ""
            return f"{sudo}{tool} install{yes} {' '.join(names)}"
    return None


def check_system() -> None:
    """Raise :class:`SetupError` naming everything that is missing and the command for it."""
    if sys.version_info < PYTHON_NEEDED:
        raise SetupError(
            f"Python {sys.version.split()[0]} is too old; 3.11 or newer is needed."
            " Name another with: make PYTHON=/path/to/python3.12 ..."
        )
    missing = [need for need in needs() if not need.present()]
    if missing:
        lines = [f"Missing: {', '.join(need.name for need in missing)}."]
        command = install_command(missing)
        if command:
            lines.append(f"Install with:\n\n    {command}\n")
        else:
            for manager in ("apt", "dnf", "brew"):
                names = sorted({getattr(need, manager) for need in missing})
                lines.append(f"    {manager} install {' '.join(names)}")
        raise SetupError("\n".join(lines))
    version = cargo_version()
    if version is not None and version < CARGO_NEEDED:
        raise SetupError(
            f"cargo {version[0]}.{version[1]} is too old;"
            f" {CARGO_NEEDED[0]}.{CARGO_NEEDED[1]} or newer is needed: install {RUSTUP}."
        )
