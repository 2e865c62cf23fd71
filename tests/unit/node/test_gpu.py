"""The GPU inventory over a stand-in for NVML that answers everything, something, nothing, or not at all; and over a
folder that reads like sysfs. There is no GPU behind either."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from llorch.node.gpu import GpuInventory, device_mask, pool_vram
from llorch.node.gpu_nvml import RETRY_S
from tests.standins.nvml import (
    GB,
    GPU_IS_LOST,
    NOT_SUPPORTED,
    RESET_REQUIRED,
    UNINITIALIZED,
    Card,
    StandInNvml,
)

NOWHERE = Path("/nowhere")
SILENT_DRIVER_S = 0.05


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "llorch")
    return caplog


def inventory(library: Any, **more: Any) -> GpuInventory:
    return GpuInventory(library, **{"host_pids": True, "sysfs": NOWHERE} | more)


def two() -> StandInNvml:
    return StandInNvml(Card(), Card(uuid="GPU-1"))


def said(log: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in log.records if record.getMessage().startswith(event)]


# ---------------------------------------------------------------- what there is


def test_the_inventory_of_a_machine_with_two() -> None:
    library = two()
    gpus = inventory(library)
    first, second = gpus.read()
    assert (first.index, first.uuid, first.name, first.driver) == (0, "GPU-0", "H200", "570.1")
    assert (first.vram_total_bytes, first.vram_used_bytes, first.vram_foreign_bytes) == (80 * GB, 30 * GB, 30 * GB)
    assert (first.utilization, first.temperature_c, first.power_w) == (0.37, 61.0, 250.5)
    assert (first.compute_capability, first.mig, second.index, second.uuid) == ("9.0", False, 1, "GPU-1")
    gpus.read()
    assert library.inits == 1
    gpus.close()
    assert library.shutdowns == 1


def test_a_card_that_tells_little_is_still_there() -> None:
    silent = [name for name in dir(__import__("pynvml")) if name.startswith("nvmlDeviceGet")]
    silent.remove("nvmlDeviceGetHandleByIndex")
    [first, _] = inventory(StandInNvml(Card(fails=dict.fromkeys(silent, NOT_SUPPORTED)), Card())).read([1])
    assert (first.uuid, first.name, first.vram_total_bytes, first.utilization) == ("index-0", "unknown", 0, None)


def test_what_the_driver_keeps_for_itself_is_neither_there_nor_used() -> None:
    [gpu] = inventory(StandInNvml(Card(reserved=GB))).read()
    assert (gpu.vram_total_bytes, gpu.vram_used_bytes) == (79 * GB, 30 * GB)
    [gpu] = inventory(StandInNvml(Card(reserved=GB, fails={"v2": NOT_SUPPORTED}))).read()  # an older driver
    assert (gpu.vram_total_bytes, gpu.vram_used_bytes) == (80 * GB, 31 * GB)


def test_a_full_gpu_has_nothing_free() -> None:
    [gpu] = inventory(StandInNvml(Card(used=80 * GB))).read()
    assert pool_vram("0", [gpu]) == (80 * GB, 0)


def test_this_machine_can_be_asked() -> None:
    gpus = GpuInventory()
    assert isinstance(gpus.read(), list)
    gpus.close()


def test_the_memory_of_a_pool_is_that_of_its_gpus() -> None:
    gpus = inventory(two()).read()
    assert pool_vram("0,GPU-1", gpus) == (160 * GB, 100 * GB)
    assert pool_vram("1", gpus) == (80 * GB, 50 * GB)
    assert pool_vram(None, gpus) == pool_vram("", gpus) == (0, 0)


# ---------------------------------------------------------------- a GPU in parts


def test_the_instances_of_a_divided_gpu_stand_for_it() -> None:
    parts = (Card("MIG-a", "H200 MIG 1g.18gb", 10 * GB, GB, running=[(7, GB)]), None, Card("MIG-b", "", 20 * GB, 0))
    library = StandInNvml(Card(uuid="GPU-0"), Card(uuid="GPU-1", mig=True, instances=parts), Card(uuid="GPU-2"))
    gpus = inventory(library).read([7])
    assert [(gpu.index, gpu.uuid, gpu.mig) for gpu in gpus] == [
        (0, "GPU-0", False), (3 + 8, "MIG-a", True), (3 + 10, "MIG-b", True), (2, "GPU-2", False),
    ]  # fmt: skip
    _, part, other, _ = gpus
    assert (part.name, part.vram_total_bytes, part.vram_foreign_bytes, part.utilization) == (
        "H200 MIG 1g.18gb", 10 * GB, 0, None,
    )  # fmt: skip
    assert (part.temperature_c, part.compute_capability, other.name) == (61.0, "9.0", "H200 MIG")
    assert device_mask([0, 13, 2], gpus) == "0,MIG-b,2"


def test_a_gpu_that_is_to_be_divided_and_is_not_yet_is_there_as_a_whole() -> None:
    [gpu] = inventory(StandInNvml(Card(mig=True, instances=(None, None)))).read()
    assert (gpu.uuid, gpu.mig) == ("GPU-0", True)


# ---------------------------------------------------------------- others' memory


def foreign(card: Card, own: list[int], **more: Any) -> int:
    return inventory(StandInNvml(card), **more).read(own)[0].vram_foreign_bytes


def test_memory_of_processes_that_are_not_ours_is_foreign() -> None:
    card = Card(running=[(10, 20 * GB), (12, 5 * GB)], drawing=[(11, GB)])
    assert foreign(card, [10]) == 10 * GB
    assert foreign(card, [10, 11]) == 9 * GB
    assert foreign(card, [99]) == 30 * GB  # an engine of ours that is not on this GPU
    assert foreign(card, []) == 30 * GB


def test_who_computes_and_draws_is_counted_once() -> None:
    assert foreign(Card(running=[(10, 20 * GB)], drawing=[(10, 20 * GB)]), [10]) == 10 * GB


def test_more_than_is_used_is_not_less_than_nothing() -> None:
    assert foreign(Card(running=[(10, 50 * GB)]), [10]) == 0


@pytest.mark.parametrize(
    "card",
    [
        Card(running=[(10, None), (12, 5 * GB)]),
        Card(running=[(10, 5 * GB)], drawing=[(10, None)]),
        Card(fails=dict.fromkeys([f"nvmlDeviceGet{kind}RunningProcesses" for kind in ("Compute", "Graphics")], 3)),
    ],
    ids=["its figure", "one of its figures", "who is there"],
)
def test_where_the_driver_hides_figures_of_ours_nothing_is_claimed_to_be_foreign(
    card: Card, log: pytest.LogCaptureFixture
) -> None:
    gpus = inventory(StandInNvml(card))
    assert [gpus.read([10])[0].vram_foreign_bytes for _ in range(3)] == [0, 0, 0]
    assert len(said(log, "gpu.shares_hidden")) == 1
    assert foreign(card, []) == 30 * GB  # nothing of ours is there


def test_in_a_container_that_names_processes_otherwise_nothing_is_claimed_to_be_foreign() -> None:
    card = Card(running=[(4711, 20 * GB)])
    assert foreign(card, [10], host_pids=False) == 0
    assert foreign(card, [], host_pids=False) == 30 * GB
    assert foreign(card, [4711], host_pids=False) == 10 * GB  # a driver that knows the names in here


def test_what_an_engine_holds_is_that_of_its_processes_on_all_gpus() -> None:
    library = StandInNvml(Card(running=[(10, 20 * GB), (12, GB)]), Card(running=[(10, 2 * GB), (11, GB), (13, None)]))
    gpus = inventory(library)
    assert gpus.held_bytes([10]) is None  # not asked yet
    gpus.read([10, 11])
    assert gpus.held_bytes([10, 11, 99]) == 23 * GB
    assert gpus.held_bytes([99]) is gpus.held_bytes([]) is gpus.held_bytes([10, 13]) is None
    elsewhere = inventory(library, host_pids=False)
    elsewhere.read([99])
    assert elsewhere.held_bytes([10]) is None  # another's, of the same number outside of this container


# ---------------------------------------------------------------- drivers that fail


def test_no_driver_means_no_gpus_and_is_said_once(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    library = two()
    library.loaded = False
    gpus = inventory(library, clock=clock)
    assert gpus.read() == [] == gpus.read()
    clock.now += RETRY_S
    assert gpus.read() == []
    assert said(log, "gpu.") == ["gpu.none reason=NVMLError_DriverNotLoaded"]
    library.loaded = True
    assert gpus.read() == []  # not asked again yet
    clock.now += RETRY_S
    assert len(gpus.read()) == 2
    gpus.close()


def test_without_a_driver_nothing_is_shut_down() -> None:
    library = two()
    library.loaded = False
    gpus = inventory(library)
    gpus.read()
    gpus.close()
    assert library.shutdowns == 0


def test_a_driver_that_was_reloaded_is_asked_anew_at_once(clock: Clock) -> None:
    library = two()
    gpus = inventory(library, clock=clock)
    gpus.read()
    library.reload()
    assert len(gpus.read()) == 2
    assert library.inits == 2


def test_a_driver_that_is_gone_is_looked_for_after_pauses(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    library = two()
    gpus = inventory(library, clock=clock)
    gpus.read()
    library.loaded = False
    assert gpus.read() == [] == gpus.read()
    library.loaded = True
    assert gpus.read() == []
    clock.now += RETRY_S
    assert len(gpus.read()) == 2
    assert [line.split()[0] for line in said(log, "gpu.")][-1] == "gpu.answers_again"
    assert 1 <= len(said(log, "gpu.unreadable")) <= 2


def test_a_driver_that_begins_and_then_says_nothing_is_not_begun_over_and_over(clock: Clock) -> None:
    library = two()
    library.fails["nvmlDeviceGetCount"] = UNINITIALIZED
    gpus = inventory(library, clock=clock)
    for _ in range(5):
        assert gpus.read() == []
    assert (library.inits, library.shutdowns) == (1, 1)


@pytest.mark.parametrize("value", [GPU_IS_LOST, RESET_REQUIRED])
@pytest.mark.parametrize(
    "question", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"]
)
def test_a_gpu_that_is_lost_does_not_hide_the_other(value: int, question: str, log: pytest.LogCaptureFixture) -> None:
    library = two()
    gpus = inventory(library)
    assert len(gpus.read()) == 2
    library.cards[0].fails[question] = value
    for _ in range(3):
        [only] = gpus.read()
        assert (only.index, only.uuid) == (1, "GPU-1")
    assert said(log, "gpu.") == ['gpu.unreadable index=0 reason="it is lost"']
    library.cards[0].fails.clear()
    assert len(gpus.read()) == 2
    assert said(log, "gpu.")[1:] == ["gpu.answers_again index=0"]


def test_a_machine_whose_only_gpu_is_lost_says_so_once(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    library = StandInNvml(Card())
    gpus = inventory(library, clock=clock)
    gpus.read()
    library.cards[0].lost = True
    for _ in range(4):
        assert gpus.read() == []
        clock.now += RETRY_S
    assert len(said(log, "gpu.")) == 2
    library.cards[0].lost = False
    assert len(gpus.read()) == 1


# ---------------------------------------------------------------- a driver that hangs


def test_a_driver_that_hangs_leaves_what_was_known_and_is_not_asked_again(log: pytest.LogCaptureFixture) -> None:
    library = two()
    gpus = inventory(library, within_s=SILENT_DRIVER_S)
    before = gpus.read()
    threads = threading.active_count()
    library.hang()
    try:
        assert [gpus.read() for _ in range(20)] == [before] * 20
        assert library.asked_while_hanging == 1
        assert gpus._thread._calls.empty()
        assert threading.active_count() == threads
        assert len(said(log, "gpu.stuck")) == 1
        gpus.close()
        assert library.shutdowns == 0
    finally:
        library.cards.pop()
        library.go_on()
    pause = threading.Event()
    for _ in range(10_000):
        if len(gpus.read()) == 1:  # the answer that came too late, or the next one
            break
        pause.wait(0.001)
    assert len(gpus.read()) == 1
    assert len(said(log, "gpu.unstuck")) == 1
    gpus.close()


def test_a_driver_that_hangs_from_the_start_means_no_gpus() -> None:
    library = two()
    library.hang()
    gpus = inventory(library, first_within_s=SILENT_DRIVER_S)
    try:
        assert gpus.read() == []
    finally:
        library.go_on()


def test_the_first_time_a_driver_may_take_long() -> None:
    library = two()
    library.hang()
    gpus = inventory(library, within_s=0.0, first_within_s=30.0)
    threading.Timer(SILENT_DRIVER_S, library.go_on).start()
    assert len(gpus.read()) == 2


def test_an_error_of_our_own_reaches_who_asks() -> None:
    class Broken(StandInNvml):
        def __getattr__(self, name: str) -> Any:
            if name == "nvmlDeviceGetCount":
                return lambda: "many"
            return super().__getattr__(name)

    gpus = inventory(Broken())
    with pytest.raises(ValueError):
        gpus.read()


# ---------------------------------------------------------------- AMD


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def amd(root: Path, card: int, address: str, **files: str) -> None:
    device = root / "devices" / address
    told = {
        "vendor": "0x1002\n", "device": "0x744c\n", "uevent": f"DRIVER=amdgpu\nPCI_SLOT_NAME={address}\n",
        "mem_info_vram_total": f"{48 * GB}\n", "mem_info_vram_used": f"{6 * GB}\n", "gpu_busy_percent": "25\n",
        "product_name": "Radeon PRO W7900\n", "hwmon/hwmon3/temp1_input": "54000\n",
        "hwmon/hwmon3/power1_average": "120000000\n",
    } | {name.replace("__", "/"): text for name, text in files.items()}  # fmt: skip
    write(device, told)
    link = root / "class" / "drm" / f"card{card}" / "device"
    link.parent.mkdir(parents=True)
    link.symlink_to(device)


def read_amd(root: Path, own: list[int] | None = None, library: StandInNvml | None = None) -> list[Any]:
    if library is None:
        library = StandInNvml()
        library.loaded = False
    return GpuInventory(library, sysfs=root, host_pids=True).read(own or [])


def test_amd_gpus_are_read_from_sysfs(tmp_path: Path) -> None:
    amd(tmp_path, 1, "0000:03:00.0")
    amd(tmp_path, 0, "0000:43:00.0", product_name="", hwmon__hwmon3__power1_average="")
    write(tmp_path, {"class/drm/card1-DP-1/status": "connected\n", "module/amdgpu/version": "6.10.5\n"})
    first, second = read_amd(tmp_path)
    assert (first.index, first.uuid, first.name, first.driver) == (
        0,
        "0000:03:00.0",
        "Radeon PRO W7900",
        "amdgpu 6.10.5",
    )
    assert (first.vram_total_bytes, first.vram_used_bytes, first.vram_foreign_bytes) == (48 * GB, 6 * GB, 6 * GB)
    assert (first.utilization, first.temperature_c, first.power_w) == (0.25, 54.0, 120.0)
    assert (second.index, second.uuid, second.name, second.power_w) == (1, "0000:43:00.0", "AMD GPU 0x744c", None)


@pytest.mark.parametrize("missing", ["gpu_busy_percent", "mem_info_vram_used", "hwmon/hwmon3/temp1_input", "device"])
def test_an_amd_gpu_that_tells_little_is_still_there(tmp_path: Path, missing: str) -> None:
    amd(tmp_path, 0, "0000:03:00.0")
    (tmp_path / "devices" / "0000:03:00.0" / missing).unlink()
    [gpu] = read_amd(tmp_path)
    assert gpu.vram_total_bytes == 48 * GB


def test_what_is_no_amd_gpu_that_could_hold_a_model_is_left_out(tmp_path: Path) -> None:
    amd(tmp_path, 0, "0000:03:00.0", vendor="0x8086\n")
    amd(tmp_path, 1, "0000:04:00.0", mem_info_vram_total=f"{GB // 2}\n")
    amd(tmp_path, 2, "0000:05:00.0", mem_info_vram_total="-\n")
    amd(tmp_path, 3, "0000:06:00.0", uevent="DRIVER=amdgpu\n")
    assert read_amd(tmp_path) == []


def test_amd_gpus_are_numbered_after_those_of_nvidia(tmp_path: Path) -> None:
    amd(tmp_path, 0, "0000:03:00.0")
    assert [(gpu.index, gpu.uuid) for gpu in read_amd(tmp_path, library=two())] == [
        (0, "GPU-0"), (1, "GPU-1"), (2, "0000:03:00.0"),
    ]  # fmt: skip


def test_what_our_processes_hold_of_an_amd_gpu_is_not_foreign(tmp_path: Path) -> None:
    amd(tmp_path, 0, "0000:43:00.0")
    kfd = "class/kfd/kfd"
    write(
        tmp_path,
        {
            f"{kfd}/topology/nodes/0/gpu_id": "0\n",
            f"{kfd}/topology/nodes/1/gpu_id": "51545\n",
            f"{kfd}/topology/nodes/1/properties": f"cpu_cores_count 0\nlocation_id {0x43 << 8}\ndomain 0\n",
            f"{kfd}/proc/10/vram_51545": f"{4 * GB}\n",
            f"{kfd}/proc/11/vram_51545": f"{GB}\n",
        },
    )
    assert [gpu.vram_foreign_bytes for gpu in read_amd(tmp_path, [10])] == [2 * GB]
    assert [gpu.vram_foreign_bytes for gpu in read_amd(tmp_path, [10, 11, 12])] == [GB]
    assert [gpu.vram_foreign_bytes for gpu in read_amd(tmp_path, [12])] == [0]  # of ours nothing is told
    gpus = inventory(two(), sysfs=tmp_path)
    gpus.read([10, 11])
    assert gpus.held_bytes([10, 11]) == 5 * GB


def test_without_sysfs_there_is_no_amd_gpu() -> None:
    assert read_amd(NOWHERE) == []
