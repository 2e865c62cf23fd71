"""The NVIDIA GPUs of this machine, as their driver tells of them through NVML.

Owns the questions, each guarded, for drivers answer only some of them on some cards; what an answer means for a card
(it is lost, it is divided into MIG instances, its memory is held by others); and that a driver that fails is begun anew
after a pause. Never limits how long an answer takes: see `gpu.py`. One thread at a time.
API: https://docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from llorch.logs import Log
from llorch.messages import Gpu

RETRY_S = 30.0  # between two beginnings: a driver that is being reloaded takes some seconds, and none costs a search
MAX_INSTANCES = 8  # of one GPU: seven, by today's hardware
MAX_PROCESSES = 4096  # of one GPU
# NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED: it has fallen off the bus, or nothing works on it until a reset.
_LOST = frozenset({15, 16})

Held = Mapping[int, int | None]
Question = Callable[..., Any]
T = TypeVar("T")

log = Log("gpu")


class _GpuLost(Exception):
    pass


class Nvml:
    """`library`: the module `pynvml` if not given. `clock` gives seconds that only grow."""

    def __init__(self, library: Any, clock: Callable[[], float]) -> None:
        self._nvml = library
        self._clock = clock
        self._begun = False
        self._retry_at: float | None = None
        self._said: dict[int | str, str] = {}  # by a GPU's index, or for all: so that what goes on is told once

    def read(self, own: frozenset[int], *, host_pids: bool) -> tuple[list[Gpu], Held]:
        """The GPUs, and what each process holds of all of them. `own`: memory of these processes is ours. `host_pids`:
        they are named as the driver names them; where they are not, as in most containers, nobody can tell ours from
        others' as long as there is any of ours.
        """
        count = self._count()
        if not count:
            return [], {}
        driver = _text(self._try(self._nvml.nvmlSystemGetDriverVersion))
        cards = [card for index in range(count) for card in self._card(index, count, driver)]
        if cards:
            self._told("driver", None)
        else:
            self._end("no GPU answers")
        known = host_pids or any(own & (held or {}).keys() for _, held in cards)
        gpus = [self._with_foreign(gpu, held if known else None, own) for gpu, held in cards]
        return gpus, added(held for _, held in cards if held) if known else {}

    def close(self) -> None:
        if self._begun:
            self._begun = False
            self._try(self._nvml.nvmlShutdown)

    # ------------------------------------------------------------ the driver

    def _count(self) -> int:
        """How many GPUs there are; a driver that does not say so is begun anew: at once, and then after pauses."""
        was_begun = self._begun
        for _ in range(2):
            if not self._begin():
                return 0
            count = self._try(self._nvml.nvmlDeviceGetCount)
            if count is not None:
                return int(count)
            self._end("the driver does not answer")
            if not was_begun:
                break
            self._retry_at = None  # it was reloaded, perhaps, and then answers whoever asks anew
        self._retry_at = self._clock() + RETRY_S
        return 0

    def _begin(self) -> bool:
        if self._begun:
            return True
        if self._retry_at is not None and self._clock() < self._retry_at:
            return False
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
        except Exception as error:  # NVMLError, or whatever a broken driver's library does
            self._retry_at = self._clock() + RETRY_S
            self._told("driver", type(error).__name__, quietly=not self._said)
            return False
        self._begun = True
        return True

    def _end(self, reason: str) -> None:
        self.close()
        self._retry_at = self._clock() + RETRY_S
        self._told("driver", reason)

    def _told(self, of: int | str, reason: str | None, *, quietly: bool = False) -> None:
        """Log what has changed. `quietly`: a machine without a driver is nothing to warn of."""
        if reason == self._said.get(of):
            return
        index = of if isinstance(of, int) else None
        if reason is None:
            del self._said[of]
            log.info("gpu.answers_again", index=index)
        else:
            self._said[of] = reason
            if quietly:
                log.info("gpu.none", reason=reason)
            else:
                log.warning("gpu.unreadable", index=index, reason=reason)

    def _ask(self, question: Question, *args: Any) -> Any:
        """None if this card does not tell. Raises _GpuLost."""
        try:
            return question(*args)
        except Exception as error:  # NVMLError of many kinds
            if getattr(error, "value", None) in _LOST:
                raise _GpuLost from None
            return None

    def _try(self, question: Question, *args: Any) -> Any:
        try:
            return self._ask(question, *args)
        except _GpuLost:
            return None

    # ------------------------------------------------------------ one card

    def _card(self, index: int, count: int, driver: str | None) -> list[tuple[Gpu, Held | None]]:
        """The GPU, or the instances that it is divided into; with who holds how much of its memory, None if that is
        not told. Nothing if it is lost.
        """
        try:
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                self._told(index, "it does not answer")
                return []
            whole = self._gpu(index, handle, driver)
            cards = self._instances(whole, handle, count) if whole.mig else []
            cards = cards or [(whole, self._held(handle))]
        except _GpuLost:
            self._told(index, "it is lost")
            return []
        self._told(index, None)
        return cards

    def _gpu(self, index: int, handle: Any, driver: str | None) -> Gpu:
        nvml = self._nvml
        total, used = self._memory(handle)
        busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        capability = self._ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        mig = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, getattr(nvml, "NVML_TEMPERATURE_GPU", 0))
        return Gpu(
            index=index,
            uuid=_text(self._ask(nvml.nvmlDeviceGetUUID, handle)) or f"index-{index}",
            name=_text(self._ask(nvml.nvmlDeviceGetName, handle)) or "unknown",
            vram_total_bytes=total,
            vram_used_bytes=used,
            utilization=float(busy.gpu) / 100 if busy is not None else None,
            temperature_c=float(temperature) if temperature is not None else None,
            power_w=power_mw / 1000 if power_mw is not None else None,
            driver=driver,
            compute_capability=".".join(map(str, capability)) if capability else None,
            mig=bool(mig and mig[0]),
        )

    def _instances(self, whole: Gpu, handle: Any, count: int) -> list[tuple[Gpu, Held | None]]:
        """The MIG instances, numbered after all GPUs, so that each number stays. CUDA knows them by UUID alone."""
        found: list[tuple[Gpu, Held | None]] = []
        most = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        for place in range(min(int(most), MAX_INSTANCES)):
            instance = self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
            uuid = _text(self._ask(self._nvml.nvmlDeviceGetUUID, instance)) if instance is not None else None
            if uuid is None:
                continue  # places stay free
            total, used = self._memory(instance)
            changes = {
                "index": count + whole.index * MAX_INSTANCES + place,
                "uuid": uuid,
                "name": _text(self._ask(self._nvml.nvmlDeviceGetName, instance)) or f"{whole.name} MIG",
                "vram_total_bytes": total,
                "vram_used_bytes": used,
                "utilization": None,  # told of the whole GPU only
            }
            found.append((whole.model_copy(update=changes), self._held(instance)))
        return found

    def _memory(self, handle: Any) -> tuple[int, int]:
        """(total, used) of what programs can have: what the driver keeps for itself is in neither, where it tells."""
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle, version) if version is not None else None
        if memory is None:
            memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        if memory is None:
            return 0, 0
        return int(memory.total) - int(getattr(memory, "reserved", 0)), int(memory.used)

    def _held(self, handle: Any) -> Held | None:
        """Bytes by process; None for one of which they are hidden."""
        lists = [
            self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle),
            self._ask(self._nvml.nvmlDeviceGetGraphicsRunningProcesses, handle),
        ]
        if lists == [None, None]:
            return None
        held: dict[int, int | None] = {}
        for process in [process for running in lists for process in (running or ())[:MAX_PROCESSES]]:
            used, before = process.usedGpuMemory, held.get(process.pid, 0)  # one may be in both
            held[process.pid] = None if used is None or before is None else max(int(used), before)
        return held

    def _with_foreign(self, gpu: Gpu, held: Held | None, own: frozenset[int]) -> Gpu:
        foreign = foreign_bytes(gpu.vram_used_bytes, held, own)
        if foreign is None and "shares" not in self._said:
            self._said["shares"] = "hidden"
            log.info("gpu.shares_hidden", index=gpu.index)
        return gpu.model_copy(update={"vram_foreign_bytes": foreign or 0})


def foreign_bytes(used: int, held: Held | None, own: frozenset[int]) -> int | None:
    """What others hold of a GPU's memory. None if nobody can tell: then none is claimed to be foreign, for a pool that
    yields to its GPU's owner would yield to itself.
    """
    if not own:
        return used
    ours = [] if held is None else [size for pid, size in held.items() if pid in own]
    if held is None or None in ours:
        return None
    return max(0, used - sum(size or 0 for size in ours))


def added(shares: Iterable[Held]) -> Held:
    """What each process holds of several GPUs; None if one of them hides it."""
    held: dict[int, int | None] = {}
    for share in shares:
        for pid, size in share.items():
            before = held.get(pid, 0)
            held[pid] = None if size is None or before is None else before + size
    return held


def _text(value: object) -> str | None:
    """NVML's strings are bytes in some versions of the binding."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value[:256] if isinstance(value, str) and value else None
