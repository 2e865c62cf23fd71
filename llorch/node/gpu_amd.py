"""The AMD GPUs of this machine, as the kernel's amdgpu driver tells of them in sysfs.

Owns the reading of those files, each of which may be missing: memory, how busy, temperature, power; and of the memory
that compute processes hold (KFD). Never asks a library of ROCm. `root` is where sysfs is mounted.
Formats: Documentation/gpu/amdgpu (driver-misc, thermal) and Documentation/ABI of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from llorch.messages import Gpu
from llorch.node.gpu_nvml import Held, added, foreign_bytes

SYSFS = Path("/sys")
AMD = "0x1002"  # PCI vendor
LEAST_BYTES = 1 << 30  # of memory: less is what a CPU's own graphics set aside of the RAM, and holds no model
MAX_CHARS = 4096
_CARD = re.compile(r"card[0-9]+")  # and not card0-DP-1, which is a socket of it
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def read(own: Collection[int] = (), *, root: Path = SYSFS, first_index: int = 0) -> tuple[list[Gpu], Held]:
    """In the order of their places on the bus, and the address there is their `uuid`; and what our processes hold of
    all of them. `own`: as for `Nvml.read`.
    """
    devices = {}
    for card in _entries(root / "class" / "drm"):
        device = card / "device"
        address = _address(device)
        if _CARD.fullmatch(card.name) and address and _line(device / "vendor") == AMD:
            devices[address] = device
    large = [address for address in sorted(devices) if _memory(devices[address]) >= LEAST_BYTES]
    if not large:
        return [], {}
    shares = _shares(root, own)
    driver = _line(root / "module" / "amdgpu" / "version")
    gpus = [
        _gpu(first_index + place, address, devices[address], f"amdgpu {driver}" if driver else "amdgpu").model_copy(
            update={"vram_foreign_bytes": _foreign(devices[address], shares, address, frozenset(own))}
        )
        for place, address in enumerate(large)
    ]
    return gpus, added(shares[address] for address in large if address in shares) if shares else {}


def _gpu(index: int, address: str, device: Path, driver: str) -> Gpu:
    busy = _number(device / "gpu_busy_percent")
    temperature = power = None
    for sensors in _entries(device / "hwmon"):
        temperature = _number(sensors / "temp1_input") if temperature is None else temperature
        for name in ("power1_average", "power1_input"):  # over a while; at this moment, on newer cards
            power = _number(sensors / name) if power is None else power
    return Gpu(
        index=index,
        uuid=address,
        name=_line(device / "product_name") or f"AMD GPU {_line(device / 'device') or ''}".rstrip(),
        vram_total_bytes=_memory(device),
        vram_used_bytes=_number(device / "mem_info_vram_used") or 0,
        utilization=min(busy, 100) / 100 if busy is not None else None,
        temperature_c=temperature / 1000 if temperature is not None else None,
        power_w=power / 1_000_000 if power is not None else None,
        driver=driver,
    )


def _foreign(device: Path, shares: dict[str, Held] | None, address: str, own: frozenset[int]) -> int:
    held = None if shares is None else shares.get(address, {})
    return foreign_bytes(_number(device / "mem_info_vram_used") or 0, held, own) or 0


def _shares(root: Path, own: Collection[int]) -> dict[str, Held] | None:
    """What our processes hold, by a GPU's address. None if the driver knows none of them: they may compute by other
    ways than KFD (Vulkan), or are named otherwise outside of this container.
    """
    kfd = root / "class" / "kfd" / "kfd"
    ours = [pid for pid in own if (kfd / "proc" / str(pid)).is_dir()]
    if not ours:
        return None
    shares: dict[str, Held] = {}
    for node in _entries(kfd / "topology" / "nodes"):
        gpu_id = _line(node / "gpu_id")
        properties = dict(re.findall(r"^(\w+) (\d+)$", _text(node / "properties"), re.MULTILINE))
        if gpu_id and gpu_id != "0" and "location_id" in properties:
            place = int(properties["location_id"])  # bus, device and function, as PCI has them
            domain, function = int(properties.get("domain", 0)), place & 7
            address = f"{domain:04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{function}"
            shares[address] = {pid: _number(kfd / "proc" / str(pid) / f"vram_{gpu_id}") or 0 for pid in ours}
    return shares


def _memory(device: Path) -> int:
    return _number(device / "mem_info_vram_total") or 0


def _address(device: Path) -> str | None:
    found = re.search(r"^PCI_SLOT_NAME=(\S+)$", _text(device / "uevent"), re.MULTILINE)
    return found[1] if found and _ADDRESS.fullmatch(found[1]) else None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_CHARS).decode("utf-8", "replace")
    except OSError:  # not of this card, not to us, or it sleeps
        return ""


def _line(path: Path) -> str:
    return _text(path).strip()[:256]


def _number(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
