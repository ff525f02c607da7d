"""``doctor`` names the hardware, what computes, and what would compute better."""

from __future__ import annotations

from pathlib import Path

from pyagent_node.cli.checks import check_backends
from pyagent_node.inference.backend_names import BackendState
from pyagent_node.inference.hardware import Gpu, Hardware, find_hardware

LLAMA = BackendState("llama.cpp", "0.3", "cpu")
NO_TORCH, NO_MLX = BackendState("torch", "", "cpu"), BackendState("mlx", "", "cpu")
TORCH, MLX = BackendState("torch", "2.9", "cuda"), BackendState("mlx", "0.32", "metal")
CARD, APPLE = Gpu("GeForce RTX 4090", "torch"), Gpu("Apple's GPU", "mlx")


def told(gpus: tuple[Gpu, ...], *states: BackendState) -> tuple[str, str, str]:
    hardware, backend = check_backends(Hardware("A processor", 8, "AVX2", gpus), states)
    assert hardware.result == "ok"
    assert hardware.detail.startswith("A processor, 8 cores with AVX2; ")
    return backend.result, backend.detail, backend.remedy or ""


def test_a_plain_machine_uses_llama_cpp() -> None:
    result, detail, _ = told((), LLAMA, NO_TORCH, NO_MLX)
    assert result == "ok"
    assert detail == "llama.cpp 0.3 on cpu (the fastest on a processor)"


def test_what_is_installed_and_accelerated_is_used() -> None:
    assert told((CARD,), LLAMA, TORCH, NO_MLX)[:2] == (
        "ok",
        "torch 2.9 on cuda (it computes on cuda); also installed: llama.cpp 0.3",
    )
    assert told((APPLE,), LLAMA, NO_TORCH, MLX)[0] == "ok"


def test_a_card_that_is_not_used_is_told_with_what_to_install() -> None:
    result, detail, remedy = told((CARD,), LLAMA, NO_TORCH, NO_MLX)
    assert result == "warning"
    assert "GeForce RTX 4090 is not used" in detail
    assert "pip install 'pyagent-node[torch]'" in remedy
    result, _, remedy = told((APPLE,), LLAMA, NO_TORCH, NO_MLX)
    assert result == "warning"
    assert "pyagent-node[mlx]" in remedy


def test_a_card_without_a_driver_and_one_that_nothing_computes_on() -> None:
    result, detail, _ = told((Gpu("NVIDIA GPU", "torch", driver=False),), LLAMA, NO_TORCH, NO_MLX)
    assert (result, "has no driver" in detail) == ("warning", True)
    assert told((Gpu("Intel GPU", None),), LLAMA, NO_TORCH, NO_MLX)[0] == "ok"


def test_hardware_is_read_from_the_kernel(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/cpuinfo", "model name\t: Old One\nflags\t\t: sse avx2\n")
    write("sys/class/drm/card0/device/vendor", "0x8086\n")
    write("sys/class/drm/card0-HDMI/device/vendor", "0x8086\n")
    write("sys/class/drm/card1/device/vendor", "0x10de\n")
    found = find_hardware(tmp_path, "Linux")
    assert (found.processor, found.vectors) == ("Old One", "AVX2")
    assert found.gpus == (Gpu("Intel GPU", None), Gpu("NVIDIA GPU", "torch", driver=False))
    write("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t GeForce\nIRQ: 1\n")
    found = find_hardware(tmp_path, "Linux")
    assert found.gpus == (Gpu("GeForce", "torch"), Gpu("Intel GPU", None))
    assert find_hardware(tmp_path / "nothing", "Linux").gpus == ()


def test_this_machine_is_described() -> None:
    hardware, backend = check_backends()
    assert hardware.detail
    assert "llama.cpp" in backend.detail
