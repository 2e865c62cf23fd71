"""A thousand admissions a second for a minute, over TLS, with tokens, a node by its certificate, and nothing left out.

    python -m tests.bench.admissions [--rate 1000] [--duration 60] [--connections 64] [--engine URL] [--ramp] [--json]

Starts a control with TLS (on loopback too, with an authority of its own) and a node that has joined it with a join
token, whose link shows its certificate; both on core 0. In front of the node stands an engine, on core 1 with the load:
by default the stand-in of tests/bench/engine.py, which answers at once. `--engine URL`: any OpenAI-compatible server.

The load is open: requests are due at their rate, whatever became of those before. Each goes out on one of the
connections that is free, which are kept; if none is, it waits for one. Its latency counts from when it was due until
its whole answer was read, so a control that stalls makes all of those late that were due meanwhile. Every answer is
compared with what the engine says. `--stream`: as streams; `--tokens`: how long.

Figures: requests, errors by kind, latency from due to the head and to the end, CPU of control and node per request
(of /proc/PID/stat), RSS, and how many cores others on this machine took meanwhile. `--ramp`: afterwards rates that grow
by a quarter, 10 s each, until one is not sustained: an error, p99 over the limit, or requests that were due and not
answered at the end. Told is the last that was.

Limits: on a machine of two cores the load generator and the engine share one, and whatever else runs there is measured
too. Timers of uvloop are of 1 ms, so a request may go out as much late, which counts as latency. One client token and
one body; the bodies are small.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from tests.bench import engine
from tests.bench.clients import Answer, Connection, connect, post
from tests.bench.figures import Required, report, spread, table
from tests.bench.roles import Cluster, Meter, Role, clean_env, cluster, node_settings, pin

PATH = "/v1/chat/completions"
POOLS, SLOTS = 50, 64
MOST_MS = 25.0  # p99
WARM_UP_S = 2.0
LEFT_WITHIN_S = 10.0  # for answers to what was sent, after the last was due
RAMP_S, RAMP_BY, MOST_STEPS = 10.0, 1.25, 12
WRONG, UNANSWERED = "wrong answer", "not answered"


@dataclass
class Run:
    """What one rate came to. Times are seconds."""

    rate: float
    duration_s: float
    sent: int = 0
    late: list[float] = field(default_factory=list)  # from due to the end
    headed: list[float] = field(default_factory=list)  # from due to the head
    errors: Counter[str] = field(default_factory=Counter)
    cpu_s: dict[str, float] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)

    @property
    def sustained(self) -> bool:
        p99 = spread(self.late, scale=1e3)["p99"]
        return not self.errors and p99 is not None and p99 <= MOST_MS

    def figures(self) -> dict[str, Any]:
        done = len(self.late) or 1
        return {
            "rate": self.rate, "requests": self.sent, "answered": len(self.late), "errors": self.errors.total(),
            "errors_by_kind": dict(self.errors), "latency_ms": spread(self.late, scale=1e3, digits=2),
            "head_ms": spread(self.headed, scale=1e3, digits=2),
            "cpu_us_per_request": {name: round(spent / done * 1e6, 1) for name, spent in self.cpu_s.items()},
            "cores": self.cores,
        }  # fmt: skip


class Load:
    """Requests at a rate over kept connections."""

    def __init__(self, request: bytes, stream: bool, tokens: int) -> None:
        self._request = request
        self._stream = stream
        self._text = engine.text_of(tokens).encode()
        self._first: bytes | None = None  # an answer that was looked at; the others are to be the same
        self._free: deque[Connection] = deque()
        self._due: deque[float] = deque()
        self._under_way = 0
        self._run: Run | None = None
        self._lost = 0

    async def open(self, running: Cluster, connections: int, context: Any) -> None:
        for _ in range(connections):
            self._free.append(await connect(running.port, context, self._done))

    def close(self) -> None:
        while self._free:
            self._free.popleft().close()

    async def run(self, rate: float, duration_s: float) -> Run:
        run = self._run = Run(rate, duration_s)
        began = time.monotonic()
        count = round(rate * duration_s)
        while run.sent < count:
            now = time.monotonic()
            due = min(count, int((now - began) * rate) + 1)
            while run.sent < due:
                self._due.append(began + run.sent / rate)
                run.sent += 1
            self._send()
            if run.sent < count:
                await asyncio.sleep(max(0.0, began + run.sent / rate - time.monotonic()))
        until = time.monotonic() + LEFT_WITHIN_S
        while (self._under_way or self._due) and time.monotonic() < until and (self._free or self._under_way):
            await asyncio.sleep(0.01)
        run.errors[UNANSWERED] += self._under_way + len(self._due)
        run.errors = +run.errors
        self._run = None
        self._due.clear()
        return run

    def _send(self) -> None:
        while self._due and self._free:
            connection = self._free.popleft()
            self._under_way += 1
            connection.ask(self._request, self._due.popleft())

    def _done(self, connection: Connection, answer: Answer) -> None:
        self._under_way -= 1
        if connection.open:
            self._free.append(connection)
        run = self._run
        if run is None:
            return
        kind = answer.kind or (None if self._right(bytes(answer.body)) else WRONG)
        if kind is not None:
            run.errors[kind] += 1
        else:
            run.late.append(answer.ended_at - answer.due)
            run.headed.append(answer.began_at - answer.due)
        self._send()

    def _right(self, body: bytes) -> bool:
        if body == self._first:
            return True
        said = b"".join(part.partition(b'"')[0] for part in body.split(b'"content":"')[1:])
        if said != self._text or (self._stream and not body.endswith(b"data: [DONE]\n\n")):
            return False
        self._first = body
        return True


async def measure(running: Cluster, asked: argparse.Namespace) -> tuple[Run, list[Run]]:
    context = running.client_context()
    await asyncio.to_thread(running.wait_until_bound, POOLS, context)
    body = {
        "model": engine.MODEL, "messages": [{"role": "user", "content": "go"}], "max_tokens": asked.tokens,
        "stream": asked.stream,
    }  # fmt: skip
    load = Load(post(PATH, body, running.token), asked.stream, asked.tokens)
    await load.open(running, asked.connections, context)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    steps: list[Run] = []
    try:
        await load.run(min(asked.rate, 200.0), WARM_UP_S)
        main_run = await _with_cpu(load, running, asked.rate, asked.duration)
        rate = asked.rate
        while asked.ramp and len(steps) < MOST_STEPS and (steps[-1].sustained if steps else main_run.sustained):
            rate *= RAMP_BY
            steps.append(await _with_cpu(load, running, rate, RAMP_S))
    finally:
        load.close()
    return main_run, steps


async def _with_cpu(load: Load, running: Cluster, rate: float, duration_s: float) -> Run:
    meter = Meter(running.roles)
    run = await load.run(rate, duration_s)
    run.cores = meter.cores()
    run.cpu_s = {name: spent for name, spent in meter.seconds().items() if name != "others"}
    return run


def start(running: Cluster, url: str | None, interval_ms: float = 0.0) -> None:
    """An engine on core 1, unless there is one at `url`; a control and a node on core 0, which has 50 pools of it."""
    if url is None:
        words = ["--interval-ms", str(interval_ms)]
        stand_in = Role(
            running.folder, "engine", words, clean_env(), module="tests.bench.engine", cores=pin(1)
        )  # fmt: skip
        running.roles.append(stand_in)
        url = stand_in.ready()
    running.start_control()
    running.start_node(node_settings(url, engine.MODEL, POOLS, SLOTS, lambda _number: engine.MODEL))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=1_000.0, help="requests a second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--engine", help=f"an OpenAI-compatible server that has {engine.MODEL}; without: the stand-in")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--plain", action="store_true", help="without TLS, to see what it costs")
    parser.add_argument("--profile", help="a folder: both roles run under cProfile, and leave their figures there")
    parser.add_argument("--ramp", action="store_true", help="afterwards, the highest rate that is sustained")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    import uvloop

    asked = arguments()
    with cluster(tls=not asked.plain, profile=asked.profile) as running:
        own = pin(1)
        if own is not None:
            os.sched_setaffinity(0, own)
        start(running, asked.engine)
        main_run, steps = uvloop.run(measure(running, asked))
        memory = {f"{role.name}_rss_mb": round(role.rss() / 1e6, 1) for role in (running.control, running.node)}
    figures = main_run.figures() | memory
    if asked.ramp:
        figures["ramp"] = [step.figures() for step in steps]
        held = [step.rate for step in [main_run, *steps] if step.sustained]
        figures["sustained_rate"] = max(held, default=None)
    latency = figures["latency_ms"]
    text = table(
        ("requests", "rate/s", "errors", "p50 ms", "p99 ms", "max ms", "control us/req", "node us/req", "others"),
        [
            (
                step.sent, step.rate, step.errors.total(), *step.figures()["latency_ms"].values(),
                step.figures()["cpu_us_per_request"]["control"], step.figures()["cpu_us_per_request"]["node"],
                step.cores["others"],
            )
            for step in [main_run, *steps]
        ],
    )  # fmt: skip
    text += "\nothers: cores that the rest of this machine took"
    text += f"\nRSS: control {memory['control_rss_mb']} MB, node {memory['node_rss_mb']} MB"
    text += "".join(f"\n{count} x {kind}" for kind, count in main_run.errors.items())
    required = [
        Required("errors", figures["errors"], 0),
        Required("p99 from due to the end of the answer", latency["p99"], MOST_MS, "ms"),
    ]
    return report("admissions", vars(asked), figures, required, text, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
