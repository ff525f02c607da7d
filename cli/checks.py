"""What ``doctor`` looks at on this machine, with or without a running daemon.

Each check returns findings and never raises; a finding that is not ``ok`` says what to do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from pyagent_node.base.errors import NotFound, PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.cli.output import size
from pyagent_node.inference.backend_names import AUTO, BackendState, choose, install_hint
from pyagent_node.inference.hardware import Hardware
from pyagent_node.node.api.schema import Check
from pyagent_node.node.config import Settings
from pyagent_node.node.home import Home

LOW_MEMORY = 1024 * MIB
LOW_DISK = 2048 * MIB
IMPORT_SECONDS = 60.0
CLOCK_SECONDS = 0.2
CLOCK_TOLERANCE = 0.1
BUILT_AFTER = 1_750_000_000.0
"""Unix time before which no installation of this program can be: an earlier clock is wrong."""

PARTS: tuple[tuple[str, str, str], ...] = (
    (
        "native module",
        "import pyagent_node.native as n; assert n.blake3(b'').hex().startswith('af1349b9f5');"
        "print('loaded, its hash is right')",
        "Build it again: `pip install .` in the source tree (needs cargo).",
    ),
    (
        "llama.cpp",
        "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__);"
        "llama_cpp.llama_backend_init()",
        "Install it again: `pip install --force-reinstall --no-cache-dir llama-cpp-python`.",
    ),
    (
        "GMP",
        "import fastecdsa.curve; print('fastecdsa with GMP')",
        "Install GMP (Debian: libgmp-dev, Fedora: gmp-devel, macOS: gmp), then fastecdsa again.",
    ),
    (
        "libp2p",
        "import libp2p, importlib.metadata as m; print('libp2p', m.version('libp2p'))",
        "Install it again: `pip install --force-reinstall libp2p`.",
    ),
)
"""(part, program that prints what is there, remedy): each is tried in a process of its own, since a
library for another processor kills the process that loads it."""


def ok(name: str, detail: str) -> Check:
    """Return a finding without fault."""
    return Check(name=name, result="ok", detail=detail)


def warning(name: str, detail: str, remedy: str) -> Check:
    """Return a finding that may hurt later."""
    return Check(name=name, result="warning", detail=detail, remedy=remedy)


def failed(name: str, detail: str, remedy: str) -> Check:
    """Return a finding that must be put right."""
    return Check(name=name, result="failed", detail=detail, remedy=remedy)


def check_parts() -> Iterator[Check]:
    """Import each compiled part in a process of its own."""
    yield ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, program, remedy in PARTS:
        try:
            done = subprocess.run(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=IMPORT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            yield failed(name, f"could not be tried: {error}", remedy)
            continue
        if done.returncode == 0:
            yield ok(name, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "there")
            continue
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"ended with status {done.returncode}"
        yield failed(name, reason[:300], remedy)


def check_backends(
    hardware: Hardware | None = None, states: Sequence[BackendState] | None = None
) -> Iterator[Check]:
    """Name the hardware, the backend that will be used and why, and what would be better."""
    from pyagent_node.inference.backends import survey  # noqa: PLC0415 - not for every verb
    from pyagent_node.inference.hardware import find_hardware  # noqa: PLC0415

    found = hardware or find_hardware()
    known = survey() if states is None else states
    gpus = ", ".join(gpu.name for gpu in found.gpus) or "no GPU"
    vectors = f" with {found.vectors}" if found.vectors else ""
    yield ok("hardware", f"{found.processor}, {found.cores} cores{vectors}; {gpus}")
    choice = choose(AUTO, known)
    by_name = {state.name: state for state in known}
    used = by_name[choice.name]
    others = [f"{s.name} {s.version}" for s in known if s.installed and s is not used]
    detail = f"{used.name} {used.version} on {used.device} ({choice.why})"
    if others:
        detail += f"; also installed: {', '.join(others)}"
    for gpu in found.gpus:
        wanted = gpu.backend
        if wanted is None or (wanted == choice.name and used.accelerated):
            continue
        if not gpu.driver:
            yield warning("backend", f"{detail}; the {gpu.name} has no driver", "Install it.")
            return
        if not by_name[wanted].installed:
            better = f"{install_hint(wanted)}, and models are computed on {gpu.name}."
            yield warning("backend", f"{detail}; {gpu.name} is not used", better)
            return
    yield ok("backend", detail)


def check_home(home: Home) -> Iterator[Check]:
    """Check that the home can be written and that its secrets are private."""
    place = home.root
    while not place.exists():
        place = place.parent
    if os.access(place, os.W_OK):
        yield ok("home", str(home.root))
    else:
        yield failed(
            "home",
            f"{place} cannot be written",
            "Give it to your user (chown), or set PYAGENT_HOME to another directory.",
        )
    secrets = [home.key_path, home.token_path, *home.meshes_dir.glob("*/*.key")]
    loose = [p for p in secrets if p.exists() and _is_loose(p)]
    if loose:
        names = " ".join(str(p) for p in loose)
        yield failed("key permissions", f"others can read {names}", f"chmod 600 {names}")
    else:
        yield ok("key permissions", "secrets are readable by you alone")


def _is_loose(path: Path) -> bool:
    return os.name == "posix" and bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def check_identity(home: Home, settings: Settings, now: Callable[[], float]) -> Iterator[Check]:
    """Check the node's key, its mesh and its certificate."""
    from pyagent_node.node.certificates import read_certificate  # noqa: PLC0415
    from pyagent_node.node.profiles import active_profile  # noqa: PLC0415

    if not home.key_path.exists():
        yield warning("identity", "this node has no key yet", "Run `pyagent-node init`.")
        return
    try:
        yield ok("identity", home.node_key().peer_id)
        profile = active_profile(home, settings.mesh)
    except NotFound as error:
        yield warning("mesh", error.message, error.remedy or "Run `pyagent-node up`.")
        return
    except PyAgentError as error:
        yield failed("identity", error.message, error.remedy or "See the file that is named.")
        return
    detail = f"{profile.genesis.name} ({profile.genesis.visibility}), {profile.role}"
    if profile.certificate:
        left = read_certificate(profile.certificate).expires - now()
        if left < 0:
            yield failed(
                "mesh", f"{detail}; the certificate has expired", "Join with a new ticket."
            )
            return
        detail += f"; certificate valid for {left / 86_400:.0f} days"
    yield ok("mesh", detail)


def check_clock(
    wall: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Check]:
    """Check that the wall clock is plausible and runs as fast as the monotonic one.

    Certificates and tickets are judged by the wall clock.
    """
    remedy = "Set the clock, and let NTP keep it (`timedatectl set-ntp true`)."
    began, steady = wall(), monotonic()
    wait(CLOCK_SECONDS)
    drift = (wall() - began) - (monotonic() - steady)
    if began < BUILT_AFTER:
        shown = time.strftime("%Y-%m-%d", time.gmtime(began))
        yield failed("clock", f"it says {shown}, which is long past", remedy)
    elif abs(drift) > CLOCK_TOLERANCE:
        yield warning("clock", f"the wall clock jumped by {drift:+.2f} s while we looked", remedy)
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)))


def check_resources(home: Home, settings: Settings) -> Iterator[Check]:
    """Check memory and disk."""
    memory = psutil.virtual_memory()
    detail = f"{size(memory.available)} of {size(memory.total)} free"
    if memory.available < LOW_MEMORY:
        yield warning("memory", detail, "Close other programs, or load smaller models.")
    else:
        yield ok("memory", detail)
    place = settings.models_dir(home)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < LOW_DISK:
        yield warning("disk", f"{size(free)} free in {place}", "Free some space or set model_dir.")
    else:
        yield ok("disk", f"{size(free)} free in {place}")


def check_ports(settings: Settings) -> Iterator[Check]:
    """Check that the addresses the daemon would listen on are free; only without a daemon."""
    wanted = [("api_port", settings.api_host, settings.api_port)]
    for address in settings.listen:
        parts = address.split("/")
        if len(parts) >= 5 and parts[1] in ("ip4", "ip6") and parts[3] == "tcp":
            wanted.append(("listen", parts[2], int(parts[4])))
    for key, host, port in wanted:
        problem = _bind_problem(host, port)
        name = f"port {port}"
        if problem is None:
            yield ok(name, f"{host} is free for the {'API' if key == 'api_port' else 'mesh'}")
        else:
            yield failed(
                name,
                f"{host}: {problem}",
                f"End what uses it, or change it: `pyagent-node config set {key} ...`.",
            )


def _bind_problem(host: str, port: int) -> str | None:
    if port == 0:
        return None
    family = socket.AF_INET
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            family = socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return None
