"""Two thousand streams open at once: do all end whole, and what do they cost in memory?

    python -m tests.bench.streams [--streams 2000] [--tokens 60] [--interval-ms 500] [--ramp 10] [--tls] [--json]

A control and a node on core 0, the stand-in engine and the clients on core 1, as in tests/bench/admissions.py. Streams
are opened evenly over the ramp, each by a client of its own on a connection of its own, and have so many tokens at
that interval; with the defaults all of them are open for some 20 s. Every answer is compared with what the engine says,
token by token, and has to end in [DONE].

Memory: RSS of control and node after their start with nothing to do (`idle`), the most that was seen while streams ran
(`peak`, looked at four times a second), and `--after` seconds after the last has ended; PSS once, when all were open.
At its peak a node holds the logs of all streams: their bytes, as the clients were sent them, are told and subtracted.
Without TLS unless asked for: each connection of a client with TLS has buffers of its own in the control.

The time to a first token counts from the request, on a connection that is open.

Starts: from exec to the ready line of a control in a new data directory, five times after one that is not counted, and
its RSS then.

Limits: RSS of two processes counts the pages that they share twice. A log has up to an eighth more memory than bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import engine
from tests.bench.admissions import POOLS, start
from tests.bench.clients import Answer, Connection, connect, post
from tests.bench.figures import Required, report, spread, table
from tests.bench.roles import Cluster, Meter, Role, cluster, pin, pss, rss

PATH = "/v1/chat/completions"
LOOK_EVERY_S = 0.25
STARTS = 5
ENDED_WITHIN_S = 60.0  # after the last should have
MB = 1_000_000
MOST_GROWTH_MB, MOST_IDLE_MB, MOST_START_S = 150.0, 80.0, 1.0
NOT_WHOLE, UNENDED = "not whole", "not ended"


@dataclass
class Seen:
    """What became of the streams. `open`: those whose head has come and whose end has not."""

    open: int = 0
    most_open: int = 0
    body_bytes: int = 0
    ended: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)


class Streams:
    def __init__(self, running: Cluster, asked: argparse.Namespace) -> None:
        self.seen = Seen()
        self._running = running
        self._asked = asked
        self._context = running.client_context()
        self._request = post(
            PATH,
            {
                "model": engine.MODEL, "messages": [{"role": "user", "content": "go"}], "max_tokens": asked.tokens,
                "stream": True,
            },
            running.token,
        )  # fmt: skip
        self._text = engine.text_of(asked.tokens)

    async def run(self) -> None:
        """Open them, evenly over the ramp, and wait for their ends."""
        began, count = time.monotonic(), self._asked.streams
        under_way: set[asyncio.Task[None]] = set()
        for number in range(count):
            wait_s = began + self._asked.ramp * number / count - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(self._one())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        takes_s = self._asked.tokens * self._asked.interval_ms / 1_000
        _, unended = await asyncio.wait(under_way, timeout=takes_s + ENDED_WITHIN_S)
        self.seen.errors[UNENDED] += len(unended)
        for task in unended:
            task.cancel()
        self.seen.errors = +self.seen.errors

    async def _one(self) -> None:
        seen, ended = self.seen, asyncio.get_running_loop().create_future()
        headed = False

        def heard(piece: bytes) -> None:
            nonlocal headed
            seen.body_bytes += len(piece)
            if not headed:
                headed = True
                seen.first_s.append(time.monotonic() - due)
                seen.open += 1
                seen.most_open = max(seen.most_open, seen.open)

        def done(_connection: Connection, answer: Answer) -> None:
            seen.open -= headed
            if not ended.done():
                ended.set_result(answer)

        try:
            connection = await connect(self._running.port, self._context, done, heard)
        except (OSError, TimeoutError) as error:
            seen.errors[f"no connection: {type(error).__name__}"] += 1
            return
        due = time.monotonic()
        connection.ask(self._request, due)
        try:
            answer = await ended
        finally:
            connection.close()
        kind = answer.kind or (None if self._whole(bytes(answer.body)) else NOT_WHOLE)
        if kind is not None:
            seen.errors[kind] += 1
        else:
            seen.ended += 1
            seen.tokens += self._asked.tokens

    def _whole(self, body: bytes) -> bool:
        said = b"".join(part.partition(b'"')[0] for part in body.split(b'"content":"')[1:])
        return said.decode(errors="replace") == self._text and body.endswith(b"data: [DONE]\n\n")


async def measure(running: Cluster, asked: argparse.Namespace) -> dict[str, Any]:
    roles = (running.control, running.node)
    await asyncio.to_thread(running.wait_until_bound, POOLS, running.client_context())
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    streams = Streams(running, asked)
    memory: dict[str, dict[str, float | None]] = {role.name: {"idle": role.rss() / MB} for role in roles}
    meter = Meter(running.roles)
    peak, logs, shared = {role.name: 0 for role in roles}, {role.name: 0 for role in roles}, dict[str, int | None]()
    run = asyncio.create_task(streams.run())
    while not run.done():
        await asyncio.wait((run,), timeout=LOOK_EVERY_S)
        for role in roles:
            now = role.rss()
            if now > peak[role.name]:
                peak[role.name], logs[role.name] = now, streams.seen.body_bytes
        if not shared and streams.seen.open >= asked.streams:
            shared = {role.name: pss(role.pid) for role in roles}
    await run
    spent, cores = meter.seconds(), meter.cores()
    await asyncio.sleep(asked.after)
    for role in roles:
        whole = shared.get(role.name)
        memory[role.name] |= {
            "peak": peak[role.name] / MB, "after": role.rss() / MB, "pss": whole and whole / MB,
            "logs": logs[role.name] / MB if role is running.node else 0.0,
        }  # fmt: skip
    return _figures(streams.seen, memory, spent, asked) | {"cores": cores}


def _figures(
    seen: Seen, memory: dict[str, dict[str, float | None]], spent: dict[str, float], asked: argparse.Namespace
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "streams": asked.streams, "most_open": seen.most_open, "ended_whole": seen.ended, "tokens": seen.tokens,
        "errors": seen.errors.total(), "errors_by_kind": dict(seen.errors),
        "first_token_ms": spread(seen.first_s, scale=1e3), "memory_mb": {}, "cpu_us_per_token": {},
    }  # fmt: skip
    for name, sizes in memory.items():
        growth = (sizes["peak"] or 0) - (sizes["idle"] or 0)
        sizes["growth_without_logs"] = growth - (sizes["logs"] or 0)
        figures["memory_mb"][name] = {what: None if mb is None else round(mb, 1) for what, mb in sizes.items()}
        figures["memory_mb"][name]["growth_kb_per_stream"] = round(growth * 1_000 / asked.streams, 1)
        figures["cpu_us_per_token"][name] = round(spent[name] / max(1, seen.tokens) * 1e6, 1)
    return figures


# ---------------------------------------------------------------- starts


def starts(*, tls: bool) -> dict[str, float]:
    """Median of the seconds to a control's ready line, and of its resident megabytes then."""
    took, resident = [], []
    with tempfile.TemporaryDirectory(prefix="llorch-bench-") as folder:
        alone = Cluster(Path(folder), tls, pin(0))
        for number in range(1 + STARTS):
            seconds, size = _start(alone, f"control-{number}")
            if number:  # the first compiles what was never run
                took.append(seconds)
                resident.append(size / MB)
    return {
        "ready_s": round(statistics.median(took), 3), "ready_most_s": round(max(took), 3),
        "rss_mb": round(statistics.median(resident), 1),
    }  # fmt: skip


def _start(alone: Cluster, data: str) -> tuple[float, int]:
    words = alone.control_words(data)
    began = time.monotonic()
    role = Role(alone.folder, "control", words, alone.secrets_env(), cores=alone.cores, pause_s=0.002)
    try:
        role.ready()
        took_s = time.monotonic() - began
        return took_s, rss(role.pid)
    finally:
        role.end()


# ---------------------------------------------------------------- the program


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=2_000)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--interval-ms", type=float, default=500.0)
    parser.add_argument("--ramp", type=float, default=10.0, help="seconds")
    parser.add_argument("--after", type=float, default=5.0, help="seconds until memory is looked at for the last time")
    parser.add_argument("--tls", action="store_true", help="to clients and on the link")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    import uvloop

    asked = arguments()
    figures: dict[str, Any] = {"start": starts(tls=asked.tls)}
    with cluster(tls=asked.tls) as running:
        own = pin(1)
        if own is not None:
            os.sched_setaffinity(0, own)
        start(running, None, asked.interval_ms)
        figures |= uvloop.run(measure(running, asked))
    control, node = figures["memory_mb"]["control"], figures["memory_mb"]["node"]
    columns = ("idle", "peak", "after", "pss", "logs", "growth_without_logs", "growth_kb_per_stream")
    text = table(
        ("MB", *columns[:-2], "growth less logs", "KB a stream"),
        [(name, *(sizes[column] for column in columns)) for name, sizes in figures["memory_mb"].items()],
    )
    text += f"\nstreams: {figures['streams']}, open at once {figures['most_open']}, whole {figures['ended_whole']}; "
    text += f"first token p50 {figures['first_token_ms']['p50']} ms, p99 {figures['first_token_ms']['p99']} ms; "
    text += ", ".join(f"{name} {us} us of CPU a token" for name, us in figures["cpu_us_per_token"].items())
    text += f"; others on this machine took {figures['cores']['others']} cores"
    text += f"\na control starts in {figures['start']['ready_s']} s, and has {figures['start']['rss_mb']} MB then"
    text += "".join(f"\n{count} x {kind}" for kind, count in figures["errors_by_kind"].items())
    required = [
        Required("errors", figures["errors"], 0),
        Required("streams that were not open at once", figures["streams"] - figures["most_open"], 0),
        Required("control: RSS beyond idle", control["growth_without_logs"], MOST_GROWTH_MB, "MB"),
        Required("node: RSS beyond idle, without its logs", node["growth_without_logs"], MOST_GROWTH_MB, "MB"),
        Required("control: idle RSS", figures["start"]["rss_mb"], MOST_IDLE_MB, "MB"),
        Required("control: exec to ready", figures["start"]["ready_s"], MOST_START_S, "s"),
    ]
    return report("streams", vars(asked), figures, required, text, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
