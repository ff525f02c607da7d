"""Set up a clone: check the system, make ``.venv``, install what is locked, build the module.

Run by ``make`` with any Python 3.11 or newer; needs nothing but the standard library.  Each step
leaves a stamp (a digest of what it was made from), so that a second run only compares stamps.
``--dev`` adds the tools that ``make test`` needs, ``--torch`` an environment with torch beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterable
from pathlib import Path

from system_needs import SetupError, brew_prefixes, check_system

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = VENV / ".pyagent-stamps.json"
TORCH_VENV = ROOT / ".venv-torch"
REQUIREMENTS = ROOT / "requirements"
PACKAGES = (
    "base",
    "native",
    "consensus",
    "sharding",
    "inference",
    "node",
    "cli",
    "benchmarks",
    "simulations",
)
"""The top-level folders that are the packages ``pyagent_node.<folder>``."""

NOTES = {
    "llama-cpp-python": "compiles llama.cpp, about 5 minutes on 2 cores, once for each machine",
    "pyagent-node": "compiles the Rust module",
}


# --- showing what goes on --------------------------------------------------------------------


class Progress:
    """One step's life on the terminal: a ticking line on a TTY, plain lines in a log."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.started = time.monotonic()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        print(f"==> {self.title}", end="" if self.live else "\n", flush=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop.set()
        self._thread.join()
        word = "failed" if kind else "done"
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}==> {self.title}: {word} in {self.seconds()}", flush=True)

    def seconds(self) -> str:
        """Return the elapsed time in words."""
        passed = int(time.monotonic() - self.started)
        return f"{passed // 60} min {passed % 60:02d} s" if passed >= 60 else f"{passed} s"

    def _tick(self) -> None:
        while not self._stop.wait(1.0 if self.live else 30.0):
            if self.live:
                width = shutil.get_terminal_size().columns
                line = f"==> {self.title} [{self.seconds()}] {self.detail}"
                print(f"\r\033[K{line[: width - 1]}", end="", flush=True)
            else:
                print(f"    ... {self.seconds()} {self.detail}", flush=True)

    def read(self, line: str) -> None:
        """Take the step's own output and keep what tells how far it is."""
        if match := re.match(r"\s*\[(\d+)/(\d+)\]", line):
            package = self.detail.split(":")[0]
            self.detail = f"{package}: {match[1]} of {match[2]} files"
        elif match := re.match(r"\s*Building wheels? for ([\w.-]+) \(", line):
            self._announce(match[1])
        elif match := re.match(r"\s*(Collecting|Downloading|Installing collected) ?(\S*)", line):
            self.detail = f"{match[1].lower()} {match[2]}".strip()

    def _announce(self, package: str) -> None:
        self.detail = package
        note = NOTES.get(package)
        if note:
            self.detail = f"{package} ({note})"
            if not self.live:
                print(f"    building {package}: {note}", flush=True)


def run(progress: Progress, command: list[str], environment: dict[str, str]) -> None:
    """Run one command quietly; on failure print the end of its output and raise."""
    tail: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress.read(line)
                tail.append(line)
                del tail[:-60]
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise SetupError(
            f"This command failed ({process.returncode}): {shlex.join(command)}\n\n" + "".join(tail)
        )


# --- the steps -------------------------------------------------------------------------------


def venv_python() -> Path:
    """Return the interpreter inside the virtual environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest_of(paths: Iterable[Path], *words: str) -> str:
    """Return a digest of the names and contents of files, and of ``words``."""
    state = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        state.update(f"{path.relative_to(ROOT)}\0".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def native_sources() -> list[Path]:
    """Return what the native module and the package's metadata are built from."""
    files = [ROOT / name for name in ("Cargo.toml", "Cargo.lock", "pyproject.toml")]
    files.append(REQUIREMENTS / "build.txt")
    for pattern in ("*.rs", "*.proto", "Cargo.toml"):
        files += (ROOT / "native").rglob(pattern)
    return files


def read_stamps() -> dict[str, str]:
    """Return the stamps of an earlier run; none when there are none or they are damaged."""
    try:
        found = json.loads(STAMPS.read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def write_stamp(name: str, value: str) -> None:
    """Record that step ``name`` was done for inputs with digest ``value``."""
    stamps = read_stamps() | {name: value}
    fresh = STAMPS.with_suffix(".new")
    fresh.write_text(json.dumps(stamps, indent=1) + "\n")
    fresh.replace(STAMPS)


def build_environment() -> dict[str, str]:
    """Return the environment for pip, with Homebrew's headers where they are."""
    environment = dict(os.environ)
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    environment["PIP_ROOT_USER_ACTION"] = "ignore"
    environment.pop("PYTHONPATH", None)
    for variable, folder in (("CPATH", "include"), ("LIBRARY_PATH", "lib")):
        extra = [str(p / folder) for p in brew_prefixes()]
        joined = [environment[variable]] if environment.get(variable) else []
        if extra:
            environment[variable] = os.pathsep.join(joined + extra)
    return environment


def make_venv() -> bool:
    """Create the virtual environment unless a usable one is there; return whether it was made."""
    if venv_python().exists():
        works = subprocess.run(
            [str(venv_python()), "-c", "import pip"], check=False, capture_output=True
        )
        if works.returncode == 0:
            return False
    with Progress(f"virtual environment (.venv, Python {sys.version.split()[0]})"):
        venv.EnvBuilder(with_pip=True, clear=True).create(VENV)
    return True


def link_typing() -> None:
    """Link the packages under one folder, where type checkers find ``pyagent_node.*``.

    Trio is linked too: a dependency brings stubs of an old trio, which would hide its own types.
    """
    place = ROOT / "build" / "typing" / "pyagent_node"
    if place.is_symlink():
        place.unlink()
    place.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        _link(place / name, Path("..", "..", "..", name))
    for found in VENV.glob("lib/python3*/site-packages/trio"):
        _link(place.parent / "trio", Path("..", "..", found.relative_to(ROOT)))


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink() or link.readlink() != target:
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)


def pip(*arguments: str) -> list[str]:
    """Return a pip command line of the virtual environment."""
    return [str(venv_python()), "-m", "pip", "install", "--no-input", *arguments]


def install(dev: bool) -> None:
    """Bring the virtual environment up to date, doing only what changed."""
    environment = build_environment()
    stamps = read_stamps()
    build = REQUIREMENTS / "build.txt"
    wanted = digest_of([build])
    if stamps.get("build") != wanted:
        with Progress("build tools") as progress:
            run(progress, pip("--upgrade", "--require-hashes", "-r", str(build)), environment)
        write_stamp("build", wanted)
    lock = REQUIREMENTS / ("lock-dev.txt" if dev else "lock.txt")
    wanted = digest_of([lock])
    # The development lock holds everything of the other, so it satisfies both.
    both = digest_of([REQUIREMENTS / "lock-dev.txt"])
    if stamps.get("lock") not in (wanted, both):
        with Progress("locked dependencies") as progress:
            pinned = ("--build-constraint", str(REQUIREMENTS / "build-constraints.txt"))
            run(progress, pip("-v", *pinned, "--require-hashes", "-r", str(lock)), environment)
        write_stamp("lock", wanted)
    wanted = digest_of(native_sources(), str(ROOT))
    if stamps.get("native") != wanted or not list((ROOT / "native").glob("_native.abi3.*")):
        with Progress("native module") as progress:
            progress.detail = f"pyagent-node ({NOTES['pyagent-node']})"
            for stale in (ROOT / "native").glob("_native.cpython-*"):
                stale.unlink()  # would be imported before the one that is built here
            flags = ("-v", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
            run(progress, pip(*flags), environment)
        write_stamp("native", wanted)
    link_typing()


def install_torch() -> None:
    """Make ``.venv-torch``: torch (about 5 GB), and everything of ``.venv`` behind it.

    It is uv that installs: it links files from its cache, which takes seconds when they are there.
    pip does where uv cannot, as behind settings that only pip knows.
    """
    lock = REQUIREMENTS / "lock-torch.txt"
    stamp = TORCH_VENV / "pyagent-stamp"
    wanted = digest_of([lock], sys.version, str(ROOT))
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = TORCH_VENV / venv_python().relative_to(VENV)
    uv = venv_python().parent / "uv"
    with Progress("torch (.venv-torch, about 5 GB)") as progress:
        venv.EnvBuilder(with_pip=True, clear=True).create(TORCH_VENV)
        pinned = ("--require-hashes", "-r", str(lock))
        environment = build_environment()
        try:
            target = ("--python", str(python))
            run(progress, [str(uv), "pip", "install", *target, *pinned], environment)
        except (SetupError, OSError):
            run(
                progress,
                [str(python), "-m", "pip", "install", "--no-input", "-v", *pinned],
                environment,
            )
        folder = "Lib/site-packages" if os.name == "nt" else "lib/python3*/site-packages"
        (behind,), (own,) = VENV.glob(folder), TORCH_VENV.glob(folder)
        # the name sorts last: what is in .venv-torch itself comes first
        link = f"import site; site.addsitedir({str(behind)!r})\n"
        (own / "zz-pyagent.pth").write_text(link)
        stamp.write_text(wanted)


def main() -> int:
    """Run the set-up; return the exit status."""
    parser = argparse.ArgumentParser(description="Set up this clone of pyagent-node.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests need")
    parser.add_argument("--torch", action="store_true", help="also make .venv-torch")
    parser.add_argument("--check", action="store_true", help="only check the system's packages")
    arguments = parser.parse_args()
    try:
        if arguments.check or not read_stamps().get("native"):
            check_system()
        if not arguments.check:
            if make_venv():
                STAMPS.unlink(missing_ok=True)
            install(arguments.dev)
            if arguments.torch:
                install_torch()
    except SetupError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
