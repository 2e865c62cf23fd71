"""The GPUs of this machine, as NVML knows them.

Owns the inventory: one Gpu for each device, with every question guarded, for drivers answer only some of them on some
cards. No driver means no GPUs and one log line. `utilization` is from 0 to 1. Never chooses a GPU. Blocking, some
milliseconds: call it off the event loop. API: https://docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from llorch.logs import Log
from llorch.messages import Gpu

T = TypeVar("T")

log = Log("gpu")


class GpuInventory:
    """Asks NVML, through `library` (the module `pynvml` if not given). One thread at a time."""

    def __init__(self, library: Any = None) -> None:
        self._nvml = library
        self._usable: bool | None = None  # not yet asked

    def read(self, own_pids: Iterable[int] = ()) -> list[Gpu]:
        """The GPUs now. `own_pids`: memory of these processes is ours, all other is `vram_foreign_bytes`."""
        if not self._start():
            return []
        own = frozenset(own_pids)
        count = self._ask(self._nvml.nvmlDeviceGetCount) or 0
        driver = _text(self._ask(self._nvml.nvmlSystemGetDriverVersion))
        found = (self._read_one(index, driver, own) for index in range(count))
        return [gpu for gpu in found if gpu is not None]

    def close(self) -> None:
        if self._usable:
            self._usable = None
            self._ask(self._nvml.nvmlShutdown)

    def _start(self) -> bool:
        if self._usable is None:
            try:
                if self._nvml is None:
                    import pynvml

                    self._nvml = pynvml
                self._nvml.nvmlInit()
                self._usable = True
            except Exception as error:  # NVMLError, or whatever a broken driver's library does
                log.info("gpu.none", reason=type(error).__name__)
                self._usable = False
        return self._usable

    def _ask(self, question: Callable[..., T], *args: Any) -> T | None:
        try:
            return question(*args)
        except Exception:  # NVMLError of many kinds: this card does not tell
            return None

    def _read_one(self, index: int, driver: str | None, own: frozenset[int]) -> Gpu | None:
        nvml = self._nvml
        handle = self._ask(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            log.warning("gpu.unreadable", index=index)
            return None
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        mig = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, getattr(nvml, "NVML_TEMPERATURE_GPU", 0))
        used = int(memory.used) if memory is not None else 0
        return Gpu(
            index=index,
            uuid=_text(self._ask(nvml.nvmlDeviceGetUUID, handle)) or f"index-{index}",
            name=_text(self._ask(nvml.nvmlDeviceGetName, handle)) or "unknown",
            vram_total_bytes=int(memory.total) if memory is not None else 0,
            vram_used_bytes=used,
            vram_foreign_bytes=max(0, used - self._own_bytes(handle, own)),
            utilization=float(busy.gpu) / 100 if busy is not None else None,
            temperature_c=float(temperature) if temperature is not None else None,
            power_w=power_mw / 1000 if power_mw is not None else None,
            driver=driver,
            compute_capability=".".join(map(str, capability)) if capability else None,
            mig=bool(mig and mig[0]),
        )

    def _own_bytes(self, handle: Any, own: frozenset[int]) -> int:
        if not own:
            return 0
        running = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
        # usedGpuMemory is None where the driver hides it, as in containers.
        return sum(process.usedGpuMemory or 0 for process in running if process.pid in own)


def _text(value: object) -> str | None:
    """NVML's strings are bytes in some versions of the binding."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value[:256] if isinstance(value, str) else None


def pool_vram(device_mask: str | None, gpus: Sequence[Gpu]) -> tuple[int, int]:
    """(total, free) bytes of the GPUs in a pool's device mask: indices or UUIDs, as in CUDA_VISIBLE_DEVICES."""
    wanted = set((device_mask or "").split(","))
    chosen = [gpu for gpu in gpus if str(gpu.index) in wanted or gpu.uuid in wanted]
    total = sum(gpu.vram_total_bytes for gpu in chosen)
    return total, total - sum(gpu.vram_used_bytes for gpu in chosen)
