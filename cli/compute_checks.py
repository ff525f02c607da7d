"""What ``doctor`` says of computing here: threads, power, GPU memory, and each backend's speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from pyagent_node.cli.checks import ok, warning
from pyagent_node.cli.output import size
from pyagent_node.inference.backend_names import BackendState, install_hint
from pyagent_node.inference.machine import DeviceMemory, Power
from pyagent_node.inference.power import share_of
from pyagent_node.node.api.schema import Check
from pyagent_node.node.config import Settings
from pyagent_node.node.home import Home
from pyagent_node.node.speed_records import SpeedRecord, read_speeds

DEVICES: Mapping[str, str] = {
    "cpu": "the processor",
    "cuda": "the NVIDIA GPU",
    "mps": "Apple's GPU",
    "metal": "Apple's GPU",
}


def check_computing(home: Home, settings: Settings) -> Iterator[Check]:
    """Look at this machine and at what its daemon has measured."""
    from pyagent_node.inference.backends import survey  # noqa: PLC0415 - not for every verb
    from pyagent_node.inference.device_memory import device_memories  # noqa: PLC0415
    from pyagent_node.inference.power import read_power  # noqa: PLC0415
    from pyagent_node.inference.threads import best_threads  # noqa: PLC0415

    states = survey()
    threads, why = best_threads()
    if settings.threads:
        yield ok(
            "threads", f"{settings.threads} in each slice, as set ({threads} by itself: {why})"
        )
    else:
        yield ok("threads", f"{threads} in each slice ({why})")
    yield from check_power(read_power(), settings.on_battery)
    yield from check_cards(device_memories(states))
    yield from check_speeds(states, list(read_speeds(home.speeds_path).values()))


def check_power(power: Power, wish: str) -> Iterator[Check]:
    """Say what the machine runs on and what that means for the layers that it gets."""
    words = {"mains": "mains", "battery": "on battery", "unknown": "the system does not say"}
    found = [words[power.supply]]
    if power.charge is not None:
        found.append(f"charged to {power.charge:.0f}%")
    found += ["saves power"] * power.saver + ["slowed down by heat"] * power.throttled
    detail, share = ", ".join(found), share_of(power, wish)
    if share == 1:
        yield ok("power", detail)
        return
    means = "takes no work that others could do" if share == 0 else f"counts for {share:.0%}"
    remedies = ["plug it in"] * (power.supply == "battery")
    remedies += ["end the power saving"] * power.saver + ["let it cool"] * power.throttled
    remedy = f"{', '.join(remedies)}, or `pyagent-node config set on_battery full`."
    yield warning("power", f"{detail}: this node {means}", remedy[0].upper() + remedy[1:])


def check_cards(memories: Sequence[DeviceMemory]) -> Iterator[Check]:
    """Say what memory models can lie in besides the machine's."""
    for memory in memories:
        if memory.kind == "vram":
            shown = f"{size(memory.free_bytes)} of {size(memory.total_bytes)} free"
            yield ok("GPU memory", shown)
        elif memory.kind == "unified":
            yield ok("GPU memory", "the machine's own: processor and GPU share it")


def check_speeds(states: Sequence[BackendState], records: Sequence[SpeedRecord]) -> Iterator[Check]:
    """Say what each backend would compute on, and how fast it was measured to be."""
    for state in states:
        name = f"backend {state.name}"
        if not state.installed:
            yield ok(name, f"not installed. {install_hint(state.name)}")
            continue
        found = [each for each in records if each.backend == state.name]
        detail = f"{state.version}, on {DEVICES.get(state.device, state.device)}"
        if not found:
            yield ok(name, f"{detail}; not measured yet: loading a model does that")
            continue
        decode = statistics.median(each.decode for each in found)
        detail += f"; reads {decode / 1e9:.1f} GB of weights a second"
        prefill = [each.prefill for each in found if each.prefill]
        if prefill:
            detail += f", {statistics.median(prefill) / 1e9:.0f} GFLOPS in prompts"
        models = len({each.model for each in found})
        what = f"{len(found)} slice{'s' * (len(found) != 1)} of {models}"
        yield ok(name, f"{detail} (medians of {what} model{'s' * (models != 1)})")
