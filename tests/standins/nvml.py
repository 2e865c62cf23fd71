"""A stand-in for NVML's Python binding: the questions that llorch asks, answered from cards that tests change.

Not the real library, and no GPU is behind it. Errors carry NVML's own numbers in `value`, as `pynvml.NVMLError` does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GB = 1024**3
UNINITIALIZED, NOT_SUPPORTED, NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED = 1, 3, 6, 9, 15, 16
NAMES = {
    UNINITIALIZED: "Uninitialized", NOT_SUPPORTED: "NotSupported", NOT_FOUND: "NotFound",
    DRIVER_NOT_LOADED: "DriverNotLoaded", GPU_IS_LOST: "GpuIsLost", RESET_REQUIRED: "ResetRequired",
}  # fmt: skip


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


ERRORS = {value: type(f"NVMLError_{name}", (NVMLError,), {}) for value, name in NAMES.items()}


def error(value: int) -> NVMLError:
    return ERRORS[value](value)


@dataclass
class Card:
    """`running`, `drawing`: (pid, bytes or None) of processes that compute, and that draw. `fails`: by question."""

    uuid: str = "GPU-0"
    name: str = "H200"
    total: int = 80 * GB
    used: int = 30 * GB
    reserved: int = 0
    running: Sequence[tuple[int, int | None]] = ()
    drawing: Sequence[tuple[int, int | None]] = ()
    instances: Sequence[Card | None] = ()
    mig: bool = False
    fails: dict[str, int] = field(default_factory=dict)
    lost: bool = False


class StandInNvml:
    """`loaded`: there is a driver. A reload ends what was begun before it. `hang()` blocks who asks until `go_on()`."""

    NVML_TEMPERATURE_GPU = 0
    nvmlMemory_v2 = 2

    def __init__(self, *cards: Card) -> None:
        self.cards = list(cards)
        self.loaded = True
        self.begun = False
        self.inits = self.shutdowns = 0
        self.fails: dict[str, int] = {}
        self._free = threading.Event()
        self._free.set()
        self.asked_while_hanging = 0

    def reload(self) -> None:
        self.begun = False

    def hang(self) -> None:
        self._free.clear()

    def go_on(self) -> None:
        self._free.set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or not hasattr(_Answers, name):
            raise AttributeError(name)

        def ask(*args: Any) -> Any:
            if not self._free.is_set():
                self.asked_while_hanging += 1
                self._free.wait()
            card = args[0] if args and isinstance(args[0], Card) else None
            if not self.loaded:
                raise error(DRIVER_NOT_LOADED)
            if name != "nvmlInit" and not self.begun:
                raise error(UNINITIALIZED)
            if card is not None and card.lost:
                raise error(GPU_IS_LOST)
            for fails in (self.fails, card.fails if card else {}):
                if name in fails:
                    raise error(fails[name])
            return getattr(_Answers, name)(self, *args)

        return ask


class _Answers:
    @staticmethod
    def nvmlInit(lib: StandInNvml) -> None:
        lib.inits += 1
        lib.begun = True

    @staticmethod
    def nvmlShutdown(lib: StandInNvml) -> None:
        lib.shutdowns += 1
        lib.begun = False

    @staticmethod
    def nvmlDeviceGetCount(lib: StandInNvml) -> int:
        return len(lib.cards)

    @staticmethod
    def nvmlSystemGetDriverVersion(_lib: StandInNvml) -> bytes:
        return b"570.1"

    @staticmethod
    def nvmlDeviceGetHandleByIndex(lib: StandInNvml, index: int) -> Card:
        card = lib.cards[index]
        if "nvmlDeviceGetHandleByIndex" in card.fails:
            raise error(card.fails["nvmlDeviceGetHandleByIndex"])
        return card

    @staticmethod
    def nvmlDeviceGetMemoryInfo(_lib: StandInNvml, card: Card, version: int | None = None) -> Any:
        if version is None:  # which counts as used what the driver keeps for itself
            return SimpleNamespace(total=card.total, used=card.used + card.reserved)
        if "v2" in card.fails:
            raise error(card.fails["v2"])
        return SimpleNamespace(total=card.total, used=card.used, reserved=card.reserved)

    @staticmethod
    def nvmlDeviceGetUtilizationRates(_lib: StandInNvml, _card: Card) -> Any:
        return SimpleNamespace(gpu=37, memory=1)

    @staticmethod
    def nvmlDeviceGetPowerUsage(_lib: StandInNvml, _card: Card) -> int:
        return 250_500

    @staticmethod
    def nvmlDeviceGetCudaComputeCapability(_lib: StandInNvml, _card: Card) -> tuple[int, int]:
        return (9, 0)

    @staticmethod
    def nvmlDeviceGetMigMode(_lib: StandInNvml, card: Card) -> list[int]:
        return [int(card.mig), int(card.mig)]

    @staticmethod
    def nvmlDeviceGetMaxMigDeviceCount(_lib: StandInNvml, card: Card) -> int:
        return len(card.instances)

    @staticmethod
    def nvmlDeviceGetMigDeviceHandleByIndex(_lib: StandInNvml, card: Card, index: int) -> Card:
        instance = card.instances[index]
        if instance is None:
            raise error(NOT_FOUND)
        return instance

    @staticmethod
    def nvmlDeviceGetTemperature(_lib: StandInNvml, _card: Card, _kind: int) -> int:
        return 61

    @staticmethod
    def nvmlDeviceGetUUID(_lib: StandInNvml, card: Card) -> str:
        return card.uuid

    @staticmethod
    def nvmlDeviceGetName(_lib: StandInNvml, card: Card) -> bytes:
        return card.name.encode()

    @staticmethod
    def nvmlDeviceGetComputeRunningProcesses(_lib: StandInNvml, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.running]

    @staticmethod
    def nvmlDeviceGetGraphicsRunningProcesses(_lib: StandInNvml, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.drawing]
