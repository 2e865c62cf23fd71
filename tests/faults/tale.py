"""Hand-made histories, for tests of the validator: told in the order of time, right unless a test makes them wrong."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

from llorch import sse
from tests.faults.validator import judge

PROMISES = {
    "grace_s": 3.0, "early_grace_s": 10.0, "recovery_s": 4.0, "reconnect_s": 5.0, "offline_s": 2.0, "ttft_s": 3.0,
    "log_limit": 65_536, "settle_s": 30.0, "min_rate": 0.0,
}  # fmt: skip
POOLS = {
    "a/p0": {"node": "a", "model": "sim", "slots": 2, "obeys": False},
    "b/p0": {"node": "b", "model": "sim", "slots": 2, "obeys": False},
    "a/p1": {"node": "a", "model": "odd", "slots": 2, "obeys": True},
}
PIDS = {"a/p0": 10, "b/p0": 20, "a/p1": 11}
WHOLE = {pool: [2, 2, 0, True, "ready"] for pool in POOLS}


def text(tokens: int) -> str:
    return "".join(f"t{i} " for i in range(tokens))


def log(
    tokens: int, *, pool: str = "a/p0", attempt: int = 1, end: str | None = "length", error: str | None = None
) -> list[dict[str, Any]]:
    """The events of a native task's log, as a client notes them."""
    node, _, pool_id = pool.partition("/")
    told = [("started", {"node_id": node, "pool_id": pool_id, "attempt": attempt})]
    told += [("token", {"t": f"t{i} ", "i": i}) for i in range(tokens)]
    if error is not None:
        told.append(("error", {"code": error}))
    elif end is not None:
        digest = hashlib.sha256(text(tokens).encode()).hexdigest()
        told.append(("end", {"finish_reason": end, "tokens_out": tokens, "sha256": digest}))
    events, offset = [], 0
    for kind, data in told:
        size = len(sse.encode(kind, json.dumps(data), id="0" * 12))
        offset += size
        block = sse.encode(kind, json.dumps(data), id=f"{offset:012x}")
        events.append({"kind": kind, "id": offset, "size": size, "crc": zlib.crc32(block), "data": data})
    return events


class Tale:
    """`task` and `conn` are those of the last `task` and `send`."""

    def __init__(self) -> None:
        self.at = 100.0
        self.entries: list[dict[str, Any]] = []
        self.marker, self.conn = "k1", 0
        self.faults = 0
        self.note("run", seed=1, pools=POOLS, promises=PROMISES)

    def note(self, what: str, **fields: Any) -> Tale:
        self.at += 0.01
        self.entries.append({"at": self.at, "what": what, **fields})
        return self

    def wait(self, seconds: float) -> Tale:
        self.at += seconds
        return self

    def task(self, marker: str = "k1", form: str = "native", tokens: int = 3, **more: Any) -> Tale:
        self.marker, self.conn = marker, 0
        ask = {"model": "sim", "task_id": "id", "key": None, "deadline_s": None, "script": None, **more}
        return self.note("task", task=marker, form=form, tokens=tokens, **ask)

    def send(self, op: str = "post", after: int | None = None) -> Tale:
        self.conn += 1
        return self.note(
            "send", task=self.marker, conn=self.conn, op=op, after=None if after is None else f"{after:012x}"
        )

    def answer(self, status: int = 200, code: str | None = None, **more: Any) -> Tale:
        return self.note("answer", task=self.marker, conn=self.conn, op="post", status=status, code=code, **more)

    def ask(self, op: str, status: int, code: str | None = None) -> Tale:
        self.note("send", task=self.marker, conn=0, op=op)
        return self.note("answer", task=self.marker, conn=0, op=op, status=status, code=code)

    def show(self, events: list[dict[str, Any]]) -> Tale:
        for event in events:
            self.note("event", task=self.marker, conn=self.conn, **event)
        return self

    def chunks(self, tokens: int, end: str | None = "done", code: str | None = None) -> Tale:
        for i in range(tokens):
            self.note("chunk", task=self.marker, conn=self.conn, kind="text", text=f"t{i} ")
        if end is not None:
            self.note("chunk", task=self.marker, conn=self.conn, kind=end, code=code)
        return self

    def closed(self, how: str = "end") -> Tale:
        return self.note("closed", task=self.marker, conn=self.conn, how=how)

    def over(self, how: str = "terminal") -> Tale:
        return self.note("over", task=self.marker, how=how)

    def left(self, *, back: bool) -> Tale:
        return self.note("left", task=self.marker, back=back)

    def engine(
        self, step: str, pool: str = "a/p0", pid: int | None = None, marker: str | None = "", tokens: int = 0
    ) -> Tale:
        name = self.marker if marker == "" else marker
        return self.note("engine", pool=pool, pid=pid or PIDS[pool], step=step, marker=name, tokens=tokens)

    def fault(self, kind: str, target: str, for_s: float = 0.0, *, resent: bool = False) -> Tale:
        self.faults += 1
        self.note("fault", fault=self.faults, kind=kind, target=target, resent=resent)
        healed = {"at": self.at + for_s, "what": "healed", "fault": self.faults}
        self.entries.append(healed)
        return self

    def whole(self, tokens: int = 3, pool: str = "a/p0") -> Tale:
        """A native task from its first request to its end, with nothing wrong."""
        self.task(tokens=tokens).send().engine("arrived", pool).answer().show(log(tokens, pool=pool))
        return self.engine("finished", pool).closed().over()

    def end(self, **left: Any) -> Tale:
        self.wait(30.0).note("calm").note("stopped")
        engines = dict.fromkeys(POOLS, 1)
        final = {"pools": WHOLE, "queued": 0, "tasks": [], "engines": engines, "strangers": []}
        return self.note("final", **(final | left))

    def rules(self, **left: Any) -> list[str]:
        """The rules that are broken, each once for every time."""
        return [violation.rule for violation in judge(self.end(**left).entries).violations]
