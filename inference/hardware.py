"""What this machine could compute with, as far as it shows without any driver's library."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

import msgspec

from pyagent_node.inference.backend_names import BackendName

_NVIDIA: Final = Path("proc/driver/nvidia/gpus")
_DRM: Final = Path("sys/class/drm")
_VENDORS: Final = {"0x1002": "AMD", "0x10de": "NVIDIA", "0x8086": "Intel"}
_FLAGS: Final = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))


class Gpu(msgspec.Struct, frozen=True):
    """A graphics processor; ``backend`` computes on it, ``None`` where nothing of ours does.

    ``driver`` says whether its driver is there.
    """

    name: str
    backend: BackendName | None
    driver: bool = True


class Hardware(msgspec.Struct, frozen=True):
    """``vectors`` are the widest vector instructions that are known, or empty."""

    processor: str
    cores: int
    vectors: str
    gpus: tuple[Gpu, ...]


def find_hardware(root: Path = Path("/"), system: str | None = None) -> Hardware:
    """Look at this machine, or at ``root`` in its place; never raises."""
    system = system or platform.system()
    if system == "Darwin":
        apple = platform.machine() == "arm64"
        gpus = (Gpu("Apple's GPU", "mlx"),) if apple else ()
        return Hardware(
            platform.processor() or "unknown", os.cpu_count() or 1, "NEON" if apple else "", gpus
        )
    info = _read(root / "proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    flags = set(info.split())
    vectors = next((shown for flag, shown in _FLAGS if flag in flags), "")
    processor = names[0] if names else platform.processor() or platform.machine() or "unknown"
    return Hardware(processor, os.cpu_count() or 1, vectors, (*_nvidia(root), *_others(root)))


def _nvidia(root: Path) -> tuple[Gpu, ...]:
    """Return NVIDIA's GPUs as their driver lists them."""
    found: list[Gpu] = []
    for folder in _listed(root / _NVIDIA):
        text = _read(folder / "information")
        model = next((x for x in text.splitlines() if x.startswith("Model:")), "Model: NVIDIA GPU")
        found.append(Gpu(model.partition(":")[2].strip()[:80], "torch"))
    return tuple(found)


def _others(root: Path) -> tuple[Gpu, ...]:
    """Return the graphics cards that the kernel shows; NVIDIA's only where its driver is not."""
    driven = (root / _NVIDIA).is_dir()
    found: list[Gpu] = []
    for folder in _listed(root / _DRM):
        if "-" in folder.name or not folder.name.startswith("card"):
            continue
        vendor = _VENDORS.get(_read(folder / "device/vendor").strip())
        if vendor is None or (vendor == "NVIDIA" and driven):
            continue
        nvidia = vendor == "NVIDIA"
        found.append(Gpu(f"{vendor} GPU", "torch" if nvidia else None, driver=not nvidia))
    return tuple(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        with path.open("r", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""
