"""What a node finds out about its machine: threads, power, GPU memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from pyagent_node.base.limits import MIB
from pyagent_node.cli.compute_checks import check_cards, check_power, check_speeds
from pyagent_node.inference.backend_names import BackendState
from pyagent_node.inference.call_times import FEWEST, CallTimes
from pyagent_node.inference.device_memory import device_memories, parse_cards
from pyagent_node.inference.machine import DeviceMemory, Power
from pyagent_node.inference.power import read_power, share_of
from pyagent_node.inference.threads import best_threads, choose_threads, cpu_quota


class Battery(NamedTuple):
    percent: float | None
    power_plugged: bool | None


def write(root: Path, **files: str) -> None:
    """Write files; ``__`` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("processors", "cores", "quota", "threads"),
    [
        (1, 1, None, 1),
        (2, 2, None, 1),
        (2, 1, None, 1),
        (4, 4, None, 3),
        (8, 4, None, 4),
        (16, 8, 2.0, 1),
        (16, 8, 2.9, 1),
        (16, 8, 4.0, 3),
        (16, 8, 12.0, 8),
        (16, 8, 0.1, 1),
        (4, 99, None, 3),
        (0, 0, None, 1),
    ],
)
def test_threads_are_physical_cores_with_something_left(
    processors: int, cores: int, quota: float | None, threads: int
) -> None:
    assert choose_threads(processors, cores, quota).threads == threads


def test_a_quota_is_found_in_our_group_or_one_around_it(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    write(tmp_path, sys__fs__cgroup__cpu__x="")
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == 1.5
    write(tmp_path, proc__self__cgroup="0::/user/app")
    for name, text in (("", "max 100000"), ("user/", "100000 100000"), ("user/app/", "nonsense")):
        path = tmp_path / f"sys/fs/cgroup/{name}cpu.max"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpu_quota(tmp_path) == 1.0
    assert best_threads().threads >= 1


def test_power_is_read_from_the_kernel(tmp_path: Path) -> None:
    assert read_power(tmp_path, lambda: None) == Power()
    write(
        tmp_path,
        sys__class__power_supply__BAT0__type="Battery",
        sys__class__power_supply__BAT0__status="Discharging",
        sys__class__power_supply__BAT0__capacity="41",
        sys__class__power_supply__mouse__type="Battery",
        sys__class__power_supply__mouse__scope="Device",
        sys__class__power_supply__mouse__capacity="3",
        sys__class__power_supply__AC__type="Mains",
        sys__class__power_supply__AC__online="0",
    )
    assert read_power(tmp_path) == Power("battery", 41.0)
    write(tmp_path, sys__class__power_supply__AC__online="1")
    assert read_power(tmp_path) == Power("mains", 41.0)
    write(
        tmp_path,
        sys__firmware__acpi__platform_profile="low-power",
        sys__class__thermal__thermal_zone0__temp="95000",
        sys__class__thermal__thermal_zone0__trip_point_0_temp="105000",
        sys__class__thermal__thermal_zone0__trip_point_0_type="critical",
        sys__class__thermal__thermal_zone0__trip_point_1_temp="90000",
        sys__class__thermal__thermal_zone0__trip_point_1_type="passive",
    )
    assert read_power(tmp_path) == Power("mains", 41.0, saver=True, throttled=True)
    write(tmp_path, sys__class__power_supply__BAT0__capacity="much")
    assert read_power(tmp_path).charge is None


def test_the_ordinary_governor_of_a_driver_saves_nothing(tmp_path: Path) -> None:
    folder = "sys__devices__system__cpu__cpu0__cpufreq__"
    write(tmp_path, **{f"{folder}scaling_governor": "powersave"})
    assert read_power(tmp_path, lambda: None).saver
    write(tmp_path, **{f"{folder}scaling_driver": "intel_pstate"})
    assert not read_power(tmp_path, lambda: None).saver


def test_elsewhere_psutil_tells_of_the_battery(tmp_path: Path) -> None:
    assert read_power(tmp_path, lambda: Battery(55.0, False)) == Power("battery", 55.0)
    assert read_power(tmp_path, lambda: Battery(None, True)) == Power("mains", None)
    assert read_power(tmp_path, lambda: Battery(float("nan"), None)) == Power("mains", None)


@pytest.mark.parametrize(
    ("power", "less", "none"),
    [
        (Power(), 1.0, 1.0),
        (Power("mains", 5.0), 1.0, 1.0),
        (Power("battery", 80.0), 0.5, 0.0),
        (Power("battery", 19.0), 0.0, 0.0),
        (Power("battery", None), 0.5, 0.0),
        (Power("mains", saver=True), 0.5, 0.5),
        (Power(throttled=True), 0.5, 0.5),
    ],
)
def test_what_a_node_counts_for(power: Power, less: float, none: float) -> None:
    assert share_of(power, "less") == less
    assert share_of(power, "none") == none
    assert share_of(power, "full") == 1.0


def test_the_drivers_program_tells_of_the_first_card() -> None:
    assert parse_cards("81559, 80000\n24576, 24000\n") == [
        DeviceMemory("vram", 81559 * MIB, 80000 * MIB)
    ]
    for text in ("", "N/A, N/A", "100, 200", "-1, 5", "1\n2", "9" * 40 + ", 1"):
        assert parse_cards(text) == []
    cuda = [BackendState("torch", "2.9", "cuda")]
    assert device_memories(cuda, lambda: "100, 60")[1] == DeviceMemory("vram", 100 * MIB, 60 * MIB)
    assert len(device_memories([BackendState("torch", "", "cuda")], lambda: "100, 60")) == 1


def test_times_are_told_when_there_are_enough() -> None:
    times = CallTimes()
    for _ in range(FEWEST - 1):
        times.took(1, 0.01)
    times.took(4, 99.0)
    assert times.token_seconds is None
    times.took(1, 5.0)
    assert times.token_seconds == 0.01
    times.took(32, 0.32)
    assert times.prompt_seconds is None
    times.took(16, 0.16)
    assert times.prompt_seconds == pytest.approx(0.01)
    times.clear()
    assert times.token_seconds is None


def test_doctor_says_what_the_machine_runs_on_and_what_that_means() -> None:
    assert [c.result for c in check_power(Power(), "less")] == ["ok"]
    low = next(iter(check_power(Power("battery", 12.0), "less")))
    assert low.detail == "on battery, charged to 12%: this node takes no work that others could do"
    assert low.remedy == "Plug it in, or `pyagent-node config set on_battery full`."
    hot = next(iter(check_power(Power("mains", throttled=True), "less")))
    assert "slowed down by heat: this node counts for 50%" in hot.detail
    assert next(iter(check_power(Power("battery", 12.0), "full"))).result == "ok"
    cards = [DeviceMemory("ram", 2, 1), DeviceMemory("vram", 2_000_000, 1_000_000)]
    assert [c.detail for c in check_cards(cards)] == ["1.0 MB of 2.0 MB free"]
    states = [BackendState("llama.cpp", "0.3", "cpu"), BackendState("torch", "", "cpu")]
    told = [c.detail for c in check_speeds(states, [])]
    assert told[0].endswith("not measured yet: loading a model does that")
    assert told[1] == "not installed. Install it: pip install 'pyagent-node[torch]'"
