"""What a node says of itself: the bodies of registrations and heartbeats, and what has changed between two of them.

Owns which changes are worth a message of their own. Figures that never stand still (utilization, offsets, speeds)
travel with the full beats. Pure: facts come in, dicts go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
Key = str | tuple[str, int]

_RESTLESS: Mapping[str, frozenset[str]] = {
    "pools": frozenset({"vram_free_bytes", "kv_usage", "prompt_tps", "decode_tps"}),
    "gpus": frozenset({"vram_used_bytes", "vram_foreign_bytes", "utilization", "temperature_c", "power_w"}),
    "catalog": frozenset(),  # progress is told once a second, and only while something is staged
    "tasks": frozenset({"offset", "tokens_out"}),
}


def _key(kind: str, entry: Entry) -> Key:
    if kind == "tasks":
        return (entry["task_id"], entry["attempt"])
    return str(entry[{"pools": "pool_id", "gpus": "uuid", "catalog": "id"}[kind]])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a control may know of a node at one moment, by the keys of the contract."""

    draining: bool
    entries: Mapping[str, Mapping[Key, Entry]]


def snapshot(
    *, draining: bool, pools: Iterable[Entry], gpus: Iterable[Entry], catalog: Iterable[Entry], tasks: Iterable[Entry]
) -> Snapshot:
    lists = {"pools": pools, "gpus": gpus, "catalog": catalog, "tasks": tasks}
    return Snapshot(
        draining, {kind: {_key(kind, entry): entry for entry in entries} for kind, entries in lists.items()}
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """What stays the same for the life of a node process."""

    node_id: str
    boot_id: str
    version: str
    cpu_cores: int
    ram_bytes: int
    address: str | None = None
    zone: str | None = None
    cost_weight: float = 1.0


def register(identity: Identity, now: Snapshot) -> dict[str, Any]:
    message: dict[str, Any] = {
        "node_id": identity.node_id,
        "boot_id": identity.boot_id,
        "address": identity.address,
        "version": identity.version,
        "zone": identity.zone,
        "cost_weight": identity.cost_weight,
        "draining": now.draining,
        "pools": list(now.entries["pools"].values()),
        "capabilities": {
            "gpus": list(now.entries["gpus"].values()),
            "cpu_cores": identity.cpu_cores,
            "ram_bytes": identity.ram_bytes,
        },
        "catalog": list(now.entries["catalog"].values()),
        "tasks": list(now.entries["tasks"].values()),
    }
    return {name: value for name, value in message.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Beat:
    """What goes with every heartbeat. `timestamp` is for people."""

    lease_id: str
    boot_id: str
    seq: int
    timestamp: str
    rtt_ms: float | None = None


def _envelope(beat: Beat, now: Snapshot) -> dict[str, Any]:
    message: dict[str, Any] = {
        "lease_id": beat.lease_id,
        "boot_id": beat.boot_id,
        "seq": beat.seq,
        "timestamp": beat.timestamp,
        "draining": now.draining,
    }
    if beat.rtt_ms is not None:
        message["rtt_ms"] = beat.rtt_ms
    return message


def full(beat: Beat, now: Snapshot) -> dict[str, Any]:
    return _envelope(beat, now) | {kind: list(entries.values()) for kind, entries in now.entries.items()}


def delta(beat: Beat, before: Snapshot, now: Snapshot) -> dict[str, Any] | None:
    """The entries that have changed, whole, and those that are gone; None if there is nothing to say."""
    changes = {kind: _changes(kind, before.entries[kind], now.entries[kind]) for kind in now.entries}
    said = {kind: entries for kind, entries in changes.items() if entries}
    if not said and before.draining == now.draining:
        return None
    return _envelope(beat, now) | {"delta": True} | said


def _changes(kind: str, before: Mapping[Key, Entry], now: Mapping[Key, Entry]) -> list[dict[str, Any]]:
    restless = _RESTLESS[kind]
    changed = [dict(entry) for key, entry in now.items() if key not in before or _differs(before[key], entry, restless)]
    return changed + [{**entry, "gone": True} for key, entry in before.items() if key not in now]


def _differs(before: Entry, now: Entry, restless: frozenset[str]) -> bool:
    """True if something differs besides the figures that never stand still."""
    if before is now or before == now:
        return False
    names = (before.keys() | now.keys()) - restless
    return any(before.get(name) != now.get(name) for name in names)
