"""Fifty nodes at one control, with five hundred streams over them.

    python -m tests.bench.nodes [--nodes 50] [--pools 4] [--streams 500] [--tokens 300] [--interval-ms 100] [--json]

A real control on core 0; on core 1 one process with all nodes (tests/bench/scripted_node.py: they register, hold their
links, beat every 10 s with whole reports, the first time evenly over the interval) and all clients. Pool k of each node
serves model k, so every model is on all nodes. Clients ask for one model after the other, for streams at `/v1`, each on
a connection of its own, opened evenly over the ramp. Every answer has to have all of its tokens and to end in [DONE].

Figures of the time in which all streams are open: CPU of the control in all and per token, and the one-way delay of
each token from the node's write to the client's read, by the time that the token carries. Of the whole run: RSS of the
control, how long it handles a heartbeat (its own /metrics: mean, and the bucket in which 99 % end) and the round trips
of beats as the nodes see them.

Limits: nodes and clients share one loop on one core. What that loop is late by is in the delays too, and stamps are
made before the write. Without TLS. Engines, logs and reports of real nodes are not there: this is the control's side.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.bench.clients import Answer, Connection, connect, post
from tests.bench.figures import Required, report, spread, table
from tests.bench.roles import Cluster, Meter, cluster, pin
from tests.bench.scripted_node import DONE, Plan, ScriptedNode

PATH = "/v1/chat/completions"
SLOTS = 8  # of each pool
MB = 1_000_000
LOOK_EVERY_S = 0.25
ENDED_WITHIN_S = 60.0
HANDLING = "llorch_heartbeat_handling_seconds"
NOT_WHOLE, UNENDED = "not whole", "not ended"
_STAMP = re.compile(rb'"content":"(\d+)"')


@dataclass
class Mark:
    """A moment: what the control had spent, and how many tokens had come."""

    at: float
    cpu_s: float
    tokens: int


@dataclass
class Seen:
    tokens: int = 0
    open: int = 0
    ended: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    delays_ns: array[int] = field(default_factory=lambda: array("q"))  # while all were open
    all_open: Mark | None = None
    first_end: Mark | None = None


class Clients:
    def __init__(self, running: Cluster, plan: Plan, streams: int, ramp_s: float) -> None:
        self.seen = Seen()
        self._running = running
        self._plan = plan
        self._streams = streams
        self._ramp_s = ramp_s

    def _mark(self) -> Mark:
        return Mark(time.monotonic(), self._running.control.cpu_s(), self.seen.tokens)

    async def run(self) -> None:
        began = time.monotonic()
        under_way = set()
        for number in range(self._streams):
            wait_s = began + self._ramp_s * number / self._streams - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            model = self._plan.models[number % len(self._plan.models)]
            under_way.add(asyncio.create_task(self._one(model)))
        takes_s = self._plan.tokens * self._plan.interval_s
        _, unended = await asyncio.wait(under_way, timeout=takes_s + ENDED_WITHIN_S)
        self.seen.errors[UNENDED] += len(unended)
        for task in unended:
            task.cancel()
        self.seen.errors = +self.seen.errors

    async def _one(self, model: str) -> None:
        seen, ended = self.seen, asyncio.get_running_loop().create_future()
        opened = False

        def heard(piece: bytes) -> None:
            nonlocal opened
            now = time.monotonic_ns()
            if not opened:
                opened = True
                seen.open += 1
                if seen.open == self._streams:
                    seen.all_open = self._mark()
            steady = seen.all_open is not None and seen.first_end is None
            for stamp in _STAMP.findall(piece):
                seen.tokens += 1
                if steady:
                    seen.delays_ns.append(now - int(stamp))

        def done(_connection: Connection, answer: Answer) -> None:
            seen.open -= opened
            if seen.first_end is None and seen.all_open is not None:
                seen.first_end = self._mark()
            if not ended.done():
                ended.set_result(answer)

        try:
            connection = await connect(self._running.port, None, done, heard)
        except (OSError, TimeoutError) as error:
            seen.errors[f"no connection: {type(error).__name__}"] += 1
            return
        body = {"model": model, "messages": [{"role": "user", "content": "go"}], "stream": True}
        connection.ask(post(PATH, body, self._running.token), time.monotonic())
        try:
            answer = await ended
        finally:
            connection.close()
        whole = answer.body.count(b'"content":"') == self._plan.tokens and answer.body.endswith(DONE)
        kind = answer.kind or (None if whole else NOT_WHOLE)
        if kind is not None:
            seen.errors[kind] += 1
        else:
            seen.ended += 1


async def measure(running: Cluster, asked: argparse.Namespace) -> dict[str, Any]:
    models = tuple(f"model-{number}" for number in range(asked.pools))
    plan = Plan(models, SLOTS, asked.tokens, asked.interval_ms / 1_000)
    nodes = [ScriptedNode(f"node-{number:03}", running.port, running.node_token, plan) for number in range(asked.nodes)]
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    control = running.control
    idle = control.rss()
    try:
        for number, node in enumerate(nodes):
            await node.join(10.0 * number / len(nodes))
        await asyncio.to_thread(running.wait_until_bound, asked.nodes * asked.pools, None)
        joined = peak = control.rss()
        clients = Clients(running, plan, asked.streams, asked.ramp)
        meter = Meter(running.roles)
        run = asyncio.create_task(clients.run())
        while not run.done():
            await asyncio.wait((run,), timeout=LOOK_EVERY_S)
            peak = max(peak, control.rss())
        await run
        cores = meter.cores()
        metrics = (await asyncio.to_thread(running.get, "/metrics", None)).decode()
    finally:
        for node in nodes:
            await node.close()
    beats = [rtt for node in nodes for rtt in node.beats_s]
    faults = Counter(kind for node in nodes for kind in node.refused)
    faults += Counter(f"link: {node.lost}" for node in nodes if node.lost is not None)
    figures = _figures(clients.seen, asked)
    figures |= {
        "rss_mb": {name: round(size / MB, 1) for name, size in (("idle", idle), ("joined", joined), ("peak", peak))},
        "heartbeat_handling_ms": handling_ms(metrics), "heartbeat_rtt_ms": spread(beats, scale=1e3, digits=2),
        "beats": len(beats), "cores": cores,
    }  # fmt: skip
    figures["errors"] += faults.total()
    figures["errors_by_kind"] |= dict(faults)
    return figures


def _figures(seen: Seen, asked: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "nodes": asked.nodes, "pools": asked.nodes * asked.pools, "streams": asked.streams, "ended_whole": seen.ended,
        "tokens": seen.tokens, "errors": seen.errors.total(), "errors_by_kind": dict(seen.errors),
        "delay_ms": spread(seen.delays_ns, scale=1e-6, digits=2), "steady": None,
    }  # fmt: skip
    if seen.all_open is not None and seen.first_end is not None:
        took_s, tokens = seen.first_end.at - seen.all_open.at, seen.first_end.tokens - seen.all_open.tokens
        spent = seen.first_end.cpu_s - seen.all_open.cpu_s
        figures["steady"] = {
            "seconds": round(took_s, 1), "tokens_per_s": round(tokens / took_s), "control_cpu_s": round(spent, 2),
            "control_cores": round(spent / took_s, 3), "control_us_per_token": round(spent / max(1, tokens) * 1e6, 1),
        }  # fmt: skip
    return figures


def handling_ms(metrics: str) -> dict[str, float | None]:
    """Of the control's own histogram: the mean, and the smallest bound below which 99 % lie."""
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith(HANDLING))
    count, total = float(values.get(f"{HANDLING}_count", 0)), float(values.get(f"{HANDLING}_sum", 0))
    bounds = {
        float(name.partition('le="')[2].partition('"')[0]): float(below)
        for name, below in values.items()
        if name.startswith(f"{HANDLING}_bucket")
    }
    within = next((bound for bound, below in sorted(bounds.items()) if count and below >= 0.99 * count), None)
    return {
        "count": count, "mean": round(total / count * 1e3, 3) if count else None,
        "p99_at_most": None if within is None else within * 1e3,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--pools", type=int, default=4, help="of each node")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--interval-ms", type=float, default=100.0, help="between two tokens of a stream")
    parser.add_argument("--ramp", type=float, default=5.0, help="seconds")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    import uvloop

    asked = arguments()
    with cluster() as running:
        own = pin(1)
        if own is not None:
            os.sched_setaffinity(0, own)
        running.start_control()
        figures = uvloop.run(measure(running, asked))
    steady, delay, beat = figures["steady"] or {}, figures["delay_ms"], figures["heartbeat_handling_ms"]
    rows = [
        ("all streams open, s", steady.get("seconds")),
        ("tokens/s then", steady.get("tokens_per_s")),
        ("control: cores then", steady.get("control_cores")),
        ("control: us of CPU a token then", steady.get("control_us_per_token")),
        *((f"delay of a token {name}, ms", value) for name, value in delay.items()),
        *((f"control: RSS {name}, MB", value) for name, value in figures["rss_mb"].items()),
        ("others on this machine: cores", figures["cores"]["others"]),
        ("heartbeats", figures["beats"]),
        ("handling one: mean, ms", beat["mean"]),
        ("handling one: p99 at most, ms", beat["p99_at_most"]),
        *((f"round trip of a heartbeat {name}, ms", value) for name, value in figures["heartbeat_rtt_ms"].items()),
    ]
    text = table(("", f"{asked.nodes} nodes"), rows)
    text += f"\nstreams: {asked.streams}, whole {figures['ended_whole']}"
    text += "".join(f"\n{count} x {kind}" for kind, count in figures["errors_by_kind"].items())
    required = [Required("errors", figures["errors"], 0)]
    return report("nodes", vars(asked), figures, required, text, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
