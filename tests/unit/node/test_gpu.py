"""The GPU inventory over NVML libraries that answer everything, something, or nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llorch.node.gpu import GpuInventory, pool_vram

GB = 1024**3


class Nvml:
    """A library with two GPUs. Names in `broken` raise."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *broken: str | tuple[str, int]) -> None:
        self.broken = broken
        self.inits = self.shutdowns = 0

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlSystemGetDriverVersion": lambda: b"570.1",
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda _h: SimpleNamespace(total=80 * GB, used=30 * GB, free=50 * GB),
            "nvmlDeviceGetUtilizationRates": lambda _h: SimpleNamespace(gpu=37, memory=1),
            "nvmlDeviceGetPowerUsage": lambda _h: 250_500,
            "nvmlDeviceGetCudaComputeCapability": lambda _h: (9, 0),
            "nvmlDeviceGetMigMode": lambda _h: (0, 0),
            "nvmlDeviceGetTemperature": lambda _h, _kind: 61,
            "nvmlDeviceGetUUID": lambda h: f"GPU-{h}",
            "nvmlDeviceGetName": lambda _h: "H200",
            "nvmlDeviceGetComputeRunningProcesses": lambda _h: [
                SimpleNamespace(pid=10, usedGpuMemory=20 * GB),
                SimpleNamespace(pid=11, usedGpuMemory=None),
                SimpleNamespace(pid=12, usedGpuMemory=5 * GB),
            ],
        }

        def ask(*args: Any) -> Any:
            if name in self.broken or (name, *args) in self.broken:
                raise RuntimeError("not supported")
            if name == "nvmlInit":
                self.inits += 1
                return None
            if name == "nvmlShutdown":
                self.shutdowns += 1
                return None
            return answers[name](*args)

        return ask


def test_the_inventory_of_a_machine_with_two() -> None:
    library = Nvml()
    inventory = GpuInventory(library)
    first, second = inventory.read(own_pids=[10, 11])
    assert (first.index, first.uuid, first.name, first.driver) == (0, "GPU-0", "H200", "570.1")
    assert (first.vram_total_bytes, first.vram_used_bytes, first.vram_foreign_bytes) == (80 * GB, 30 * GB, 10 * GB)
    assert (first.utilization, first.temperature_c, first.power_w) == (0.37, 61.0, 250.5)
    assert (first.compute_capability, first.mig, second.index) == ("9.0", False, 1)
    inventory.read()
    assert library.inits == 1
    inventory.close()
    assert library.shutdowns == 1


def test_a_card_that_tells_little_is_still_there() -> None:
    silent = [name for name in dir(__import__("pynvml")) if name.startswith("nvmlDeviceGet")]
    silent = [name for name in silent if name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")]
    [first, _] = GpuInventory(Nvml(*silent)).read()
    assert (first.uuid, first.name, first.vram_total_bytes, first.utilization) == ("index-0", "unknown", 0, None)


def test_a_card_that_is_gone_does_not_hide_the_other() -> None:
    [only] = GpuInventory(Nvml(("nvmlDeviceGetHandleByIndex", 0))).read()
    assert only.index == 1


def test_no_driver_means_no_gpus_and_is_asked_once() -> None:
    library = Nvml("nvmlInit")
    inventory = GpuInventory(library)
    assert inventory.read() == [] == inventory.read()
    inventory.close()
    assert library.shutdowns == 0


def test_this_machine_can_be_asked() -> None:
    inventory = GpuInventory()
    assert isinstance(inventory.read(), list)
    inventory.close()


def test_the_memory_of_a_pool_is_that_of_its_gpus() -> None:
    gpus = GpuInventory(Nvml()).read()
    assert pool_vram("0,GPU-1", gpus) == (160 * GB, 100 * GB)
    assert pool_vram("1", gpus) == (80 * GB, 50 * GB)
    assert pool_vram(None, gpus) == pool_vram("", gpus) == (0, 0)
