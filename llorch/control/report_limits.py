"""How much one node may have this control remember, and how many nodes may come from one place.

A report is bounded by its own form, but deltas add up, and a token that registers one node registers many. Owns what
each node's reports amount to, and the refusal (INVALID_REQUEST, naming the field) of one that is too much: nothing of
it is taken over then. Never holds a report itself. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from llorch.control.nodes import Node
from llorch.errors import Code, LlorchError, invalid
from llorch.messages import Gpu, Heartbeat, ModelReport, PoolReport, Register, TaskReport

# Of one node. Numbers of entries are those that a whole report may have.
MOST_POOLS = 256
MOST_GPUS = 64
MOST_MODELS = 4_096
MOST_TASKS = 8_192
NODE_REPORTS_BYTES = 16 * 1024 * 1024  # MOST_TASKS as llorch nodes report them are some 13 MB
MOST_NODES = 1_000  # in all: twenty times what one control is for
# Of all nodes from one address: as many as a large cluster has behind one NAT.
MOST_NODES_PER_PEER = 128
PEER_REPORTS_BYTES = 96 * 1024 * 1024  # 50 nodes with 1,000 tasks each; all that one machine can make a control hold

ENTRY_BYTES = 768  # what an object costs beside its texts, measured: from 480 (a replica) to 1,600 (a pool)
TEXT_BYTES = 56  # what a text costs beside its characters

Key = Any
_MOST: Mapping[str, int] = {"pools": MOST_POOLS, "gpus": MOST_GPUS, "catalog": MOST_MODELS, "tasks": MOST_TASKS}


def weight(value: object) -> int:
    """About how many bytes a report takes in memory: its texts, and each of its objects."""
    if isinstance(value, str):
        return TEXT_BYTES + len(value)
    if isinstance(value, BaseModel):
        return ENTRY_BYTES + sum(weight(each) for each in value.__dict__.values())
    return sum(map(weight, value)) if isinstance(value, list) else 0


class _Held:
    """What one node's reports amount to: of each kind, the entries and their weights."""

    __slots__ = ("entries", "peer", "total")

    def __init__(self, peer: str | None) -> None:
        self.peer = peer
        self.entries: dict[str, dict[Key, int]] = {kind: {} for kind in _MOST}
        self.total = 0


Report = Iterable[PoolReport] | Iterable[Gpu] | Iterable[ModelReport] | Iterable[TaskReport]


def _key(entry: Any) -> Key:
    if isinstance(entry, TaskReport):
        return entry.task_id, entry.attempt
    return entry.pool_id if isinstance(entry, PoolReport) else entry.uuid if isinstance(entry, Gpu) else entry.id


def reports_of(message: Register | Heartbeat) -> dict[str, Report | None]:
    """The lists of a registration or a beat, by the names that refusals use."""
    gpus = message.capabilities.gpus if isinstance(message, Register) else message.gpus
    return {"pools": message.pools, "gpus": gpus, "catalog": message.catalog, "tasks": message.tasks}


def one_too_many(others: Sequence[Node], peer: str | None) -> str | None:
    """Which node leaves for one more from `peer`: the one that has been offline longest; None if there is room.

    Raises NO_CAPACITY if there is none: who registers nodes from one address without end finds none of the others'
    places.
    """
    from_there = [node for node in others if node.peer == peer] if peer is not None else []
    for crowd, most, where, hint in (
        (
            from_there,
            MOST_NODES_PER_PEER,
            "from this address",
            "remove those that are gone: DELETE /v2/nodes/{node_id}",
        ),
        (others, MOST_NODES, "here", "run a second control for the others"),
    ):
        if len(crowd) < most:
            continue
        offline = [(node.offline_since, node.node_id) for node in crowd if node.offline_since is not None]
        if not offline:
            raise LlorchError(
                Code.NO_CAPACITY, f"{most} nodes are registered {where}, the most there may be", hint=hint
            )
        return min(offline)[1]
    return None


class ReportLimits:
    """Ask `admit` before a report is taken over, and tell `forget` when a node is no longer known."""

    def __init__(self) -> None:
        self._of: dict[str, _Held] = {}
        self._by_peer: Counter[str | None] = Counter()

    def admit(
        self,
        node_id: str,
        peer: str | None,
        reports: Mapping[str, Report | None],
        *,
        whole: bool,
        merge: bool = False,
    ) -> None:
        """Raises INVALID_REQUEST naming the field that is too much, and counts nothing then.

        `whole`: the lists are all there is. `merge`: fields that an entry lacks stay, so it may weigh more than it
        says; it counts as the heavier of the two, which is less than the truth by the few fields that are long.
        Tasks are not too many: the oldest are forgotten, here as where they are kept (`task_reports`).
        """
        held = self._of.get(node_id)
        before = held.entries if held is not None else {kind: {} for kind in _MOST}
        after = {
            kind: before[kind] if listed is None else _next(before[kind], listed, whole=whole, merge=merge)
            for kind, listed in ((kind, reports.get(kind)) for kind in _MOST)
        }
        while len(after["tasks"]) > MOST_TASKS:
            del after["tasks"][next(iter(after["tasks"]))]
        for kind, entries in after.items():
            if len(entries) > _MOST[kind]:
                raise invalid(f"{kind}: this node reports {len(entries)}, at most {_MOST[kind]}", param=kind)
        totals = {kind: sum(entries.values()) for kind, entries in after.items()}
        total, was = sum(totals.values()), held.total if held is not None else 0
        heaviest = max(totals, key=lambda kind: totals[kind])
        if total > NODE_REPORTS_BYTES:
            raise invalid(
                f"{heaviest}: all that this node reports is over {NODE_REPORTS_BYTES >> 20} MiB", param=heaviest
            )
        others = self._by_peer[peer] - (was if held is not None and held.peer == peer else 0)
        if peer is not None and total > was and others + total > PEER_REPORTS_BYTES:
            raise invalid(
                f"{heaviest}: all that the nodes of this address report is over {PEER_REPORTS_BYTES >> 20} MiB",
                param=heaviest,
            )
        self.forget(node_id)
        held = self._of[node_id] = _Held(peer)
        held.entries, held.total = after, total
        self._by_peer[peer] += total

    def forget(self, node_id: str) -> None:
        held = self._of.pop(node_id, None)
        if held is not None:
            self._by_peer[held.peer] -= held.total
            if not self._by_peer[held.peer]:
                del self._by_peer[held.peer]

    def total(self, node_id: str) -> int:
        held = self._of.get(node_id)
        return 0 if held is None else held.total


def _next(before: dict[Key, int], listed: Iterable[Any], *, whole: bool, merge: bool) -> dict[Key, int]:
    after = {} if whole else dict(before)
    for entry in listed:
        key = _key(entry)
        if entry.gone:
            after.pop(key, None)
        else:
            after[key] = max(weight(entry), before.get(key, 0)) if merge else weight(entry)
    return after
