"""The GPUs of this machine: what there is, how full and how busy, and how much of it others hold.

Owns the inventory, of NVIDIA's (`gpu_nvml.py`) and AMD's (`gpu_amd.py`), and the thread in which drivers are asked: one
that hangs costs that thread, and whoever asks gets what was known last. No driver means no GPUs and one log line.
`utilization` is from 0 to 1. `vram_foreign_bytes` is memory of processes that are not ours; 0 where that can't be told.
Never chooses a GPU. Blocking, for some milliseconds and never longer than FIRST_WITHIN_S the first time and
READ_WITHIN_S later: call it off the event loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llorch.logs import Log
from llorch.messages import Gpu
from llorch.node import gpu_amd
from llorch.node.gpu_nvml import Held, Nvml, added

READ_WITHIN_S = 3.0  # less than what lies between two readings
FIRST_WITHIN_S = (
    30.0  # a driver that wakes up eight cards takes some seconds; who starts without them serves on the CPU
)
# The kernel's number for the namespace of processes that a machine boots into (PROC_PID_INIT_INO): NVML names
# processes as they are called there.
_HOST = "pid:[4026531836]"

log = Log("gpu")


class GpuInventory:
    """Asks NVML through `library` (the module `pynvml` if not given) and sysfs at `sysfs`. Any thread may call it."""

    def __init__(
        self,
        library: Any = None,
        *,
        sysfs: Path = gpu_amd.SYSFS,
        clock: Callable[[], float] = time.monotonic,
        within_s: float = READ_WITHIN_S,
        first_within_s: float = FIRST_WITHIN_S,
        host_pids: bool | None = None,
    ) -> None:
        self._nvml = Nvml(library, clock)
        self._sysfs = sysfs
        self._within_s, self._first_within_s = within_s, first_within_s
        self._host_pids = _names_are_the_hosts() if host_pids is None else host_pids
        self._last: list[Gpu] | None = None  # never read
        self._held: Held = {}
        self._thread = _DriverThread()
        self._asking = threading.Lock()
        self._stuck = False

    def read(self, own_pids: Iterable[int] = ()) -> list[Gpu]:
        """The GPUs now, or as last known while a driver hangs. `own_pids`: memory of these processes is ours; they
        have to be all of them (`process_tree.descendants`), for what an engine's child holds would else be foreign.
        """
        own = frozenset(own_pids)
        within_s = self._first_within_s if self._last is None else self._within_s
        if self._asking.acquire(timeout=within_s):
            try:
                self._thread.ask(lambda: self._read(own), within_s)
            except TimeoutError:
                if not self._stuck:
                    log.warning("gpu.stuck", within_s=within_s)
                self._stuck = True
            else:
                if self._stuck:
                    log.info("gpu.unstuck")
                self._stuck = False
            finally:
                self._asking.release()
        return list(self._last or ())

    def held_bytes(self, pids: Iterable[int]) -> int | None:
        """What these processes held of all GPUs, when `read` last asked with them among `own_pids`. None if they held
        nothing or if that can't be told, which is then no measurement.
        """
        held = self._held
        sizes = [held[pid] for pid in pids if pid in held]
        told = [size for size in sizes if size is not None]
        return sum(told) or None if len(told) == len(sizes) else None

    def close(self) -> None:
        """Let the driver go; one that hangs is left to the end of the process."""
        try:
            self._thread.ask(self._nvml.close, self._within_s)
        except TimeoutError:
            return
        self._thread.end()

    def _read(self, own: frozenset[int]) -> None:
        """In the driver's thread: what comes too late for who asked is there for the next."""
        nvidia, held = self._nvml.read(own, host_pids=self._host_pids)
        after = max((gpu.index for gpu in nvidia), default=-1) + 1
        amd, held_there = gpu_amd.read(own, root=self._sysfs, first_index=after)
        self._last, self._held = nvidia + amd, added((held, held_there))


class _DriverThread:
    """Does one thing at a time, in a thread that nothing waits for when the process ends."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._doing: Future[None] | None = None
        self._runs = False

    def ask(self, call: Callable[[], None], within_s: float) -> None:
        """Raises TimeoutError: at once, if it still hangs in what was asked before, and then does not ask again."""
        if self._doing is not None and not self._doing.done():
            raise TimeoutError
        self._doing = Future()
        if not self._runs:
            self._runs = True
            threading.Thread(target=self._run, name="gpu", daemon=True).start()
        self._calls.put((self._doing, call))
        self._doing.result(within_s)

    def end(self) -> None:
        if self._runs:
            self._runs = False
            self._calls.put(None)

    def _run(self) -> None:
        while (asked := self._calls.get()) is not None:
            future, call = asked
            try:
                call()
            except Exception as error:  # to whoever asked
                future.set_exception(error)
            else:
                future.set_result(None)


def _names_are_the_hosts() -> bool:
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == _HOST
    except OSError:
        return False


def pool_vram(device_mask: str | None, gpus: Sequence[Gpu]) -> tuple[int, int]:
    """(total, free) bytes of the GPUs in a pool's device mask: indices or UUIDs, as in CUDA_VISIBLE_DEVICES."""
    wanted = set((device_mask or "").split(","))
    chosen = [gpu for gpu in gpus if str(gpu.index) in wanted or gpu.uuid in wanted]
    total = sum(gpu.vram_total_bytes for gpu in chosen)
    return total, total - sum(gpu.vram_used_bytes for gpu in chosen)


def device_mask(wanted: Iterable[int], gpus: Sequence[Gpu]) -> str:
    """CUDA_VISIBLE_DEVICES for GPUs by their index here: MIG instances by UUID, as CUDA knows them by nothing else."""
    instances = {gpu.index: gpu.uuid for gpu in gpus if gpu.uuid.startswith("MIG-")}
    return ",".join(instances.get(index, str(index)) for index in wanted)
