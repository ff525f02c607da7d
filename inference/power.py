"""What this machine runs on: mains or battery, told to save power, slowed down by heat.

Linux tells by files, other systems through psutil (the battery only).  What a node makes of it is
its own decision: :func:`share_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Protocol

import psutil

from pyagent_node.inference.machine import Power

LOW_CHARGE: Final = 20.0
"""Percent below which a node on battery takes no work."""
HALF: Final = 0.5
"""What a node that saves power, or is slowed down by heat, counts for."""

_SUPPLY: Final = Path("sys/class/power_supply")
_ZONES: Final = Path("sys/class/thermal")
_PROFILE: Final = Path("sys/firmware/acpi/platform_profile")
_FREQUENCY: Final = Path("sys/devices/system/cpu/cpu0/cpufreq")
_OWN_GOVERNOR: Final = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Drivers whose governor ``powersave`` is the ordinary one."""
_POINTS: Final = 12


Supply = Literal["mains", "battery"]


class Battery(Protocol):
    """What psutil says of one; ``percent`` may be unknown."""

    percent: float | None
    power_plugged: bool | None


def share_of(power: Power, wish: str) -> float:
    """Return the share of its speed that a node counts for, under the setting ``on_battery``.

    ``less``: half on battery, nothing below :data:`LOW_CHARGE`; ``none``: nothing on battery;
    ``full``: all of it, whatever it runs on.  A node that saves power or is too hot counts half.
    """
    if wish == "full":
        return 1.0
    share = HALF if power.saver or power.throttled else 1.0
    if power.supply != "battery":
        return share
    low = power.charge is not None and power.charge < LOW_CHARGE
    return 0.0 if wish == "none" or low else min(share, HALF)


def _system_battery() -> Battery | None:
    look: Callable[[], Battery | None] | None = getattr(psutil, "sensors_battery", None)
    try:
        return look() if look is not None else None
    except (OSError, RuntimeError, ValueError, psutil.Error):
        return None


def read_power(
    root: Path = Path("/"), battery: Callable[[], Battery | None] = _system_battery
) -> Power:
    """Look at this machine, or at ``root`` in its place; never raises."""
    supply, charge = _supplies(root / _SUPPLY)
    if supply is None and (told := battery()) is not None:
        supply = "battery" if told.power_plugged is False else "mains"
        percent = told.percent
        charge = percent if percent is not None and math.isfinite(percent) else None
    return Power(supply or "unknown", charge, _saves(root), _throttled(root / _ZONES))


def _supplies(folder: Path) -> tuple[Supply | None, float | None]:
    """Return what supplies the machine and how full its batteries are; ``None``: not told."""
    charges: list[float] = []
    plugged = discharging = False
    for each in _listed(folder):
        kind = _text(each / "type")
        if _text(each / "scope") == "Device":  # a mouse's, not ours
            continue
        if kind == "Battery":
            if (charge := _number(each / "capacity")) is not None:
                charges.append(charge)
            discharging |= _text(each / "status") == "Discharging"
        elif kind in ("Mains", "USB", "Wireless"):
            plugged |= _text(each / "online") == "1"
    charge = sum(charges) / len(charges) if charges else None
    if discharging and not plugged:
        return "battery", charge
    return ("mains" if plugged or charges else None), charge


def _saves(root: Path) -> bool:
    if _text(root / _PROFILE) == "low-power":
        return True
    folder = root / _FREQUENCY
    if _text(folder / "energy_performance_preference") == "power":
        return True
    ordinary = _text(folder / "scaling_driver") in _OWN_GOVERNOR
    return _text(folder / "scaling_governor") == "powersave" and not ordinary


def _throttled(folder: Path) -> bool:
    """Whether a zone is as hot as the point from which the system slows processors down."""
    for zone in _listed(folder):
        heat = _number(zone / "temp") if zone.name.startswith("thermal_zone") else None
        if heat is None:
            continue
        for point in range(_POINTS):
            limit = _number(zone / f"trip_point_{point}_temp")
            passive = _text(zone / f"trip_point_{point}_type") == "passive"
            if passive and limit is not None and 0 < limit <= heat:
                return True
    return False


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        with path.open("r", errors="replace") as file:
            return file.read(256).strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
