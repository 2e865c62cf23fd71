"""`python -m tests.fuzz.requests --cases 100000`: requests made from `/openapi.json`, against a control and a node.

Both are real processes, with a simulated engine that answers and one that fails. Prints what was answered, and every
answer, log line or figure that breaks a rule of `oracles.py`, with the number of its case. Exit code 1: there was one.
A case depends on the seed and its number alone, its answer also on what the cases before have left.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from tests.cluster import Cluster, Running, cluster, simulated
from tests.fuzz.cases import CANARY, Case, Cases, Credential
from tests.fuzz.oracles import judge, judge_log, secrets_in
from tests.fuzz.wire import Answer, Connection

AT_A_TIME = 32
PATIENCE_S = 1.5  # of a client: a task for a model that only a registration made up waits, and is no fault
LOOK_EVERY_S = 1.0
MAX_GROWTH_BYTES = 100 * 1024 * 1024
SHOWN = 40


@dataclass(slots=True)
class Findings:
    """What was answered, and what was wrong."""

    answers: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)  # operation → answers below 400
    endings: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)  # what → where, the first few
    count: int = 0

    def add(self, case: Case, answer: Answer, wrong: Iterable[str]) -> None:
        self.count += 1
        self.endings[answer.ending] += 1
        self.answers[f"{case.operation.role} {answer.status}"] += 1
        if 0 < answer.status < 400:
            self.accepted[f"{case.operation.role} {case.operation.name}"] += 1
        for what in wrong:
            self.tell(f"{case.operation.name}: {what}", f"case {case.number} ({case.credential})")

    def tell(self, what: str, where: str) -> None:
        self.wrong.setdefault(what, []).append(where)


async def send(
    cases: Iterator[Case], hosts: Mapping[str, tuple[str, int]], hidden: tuple[str, ...], findings: Findings
) -> None:
    """One client: takes cases until there are no more."""
    connections = {role: Connection(*where) for role, where in hosts.items()}
    try:
        for case in cases:
            answer = await connections[case.operation.role].ask(
                case.raw,
                head_only=case.method == "HEAD",
                within_s=PATIENCE_S,
                close_after=not case.well_formed,
                hang_up=case.hang_up,
            )
            told = [
                f"in the answer: {found}" for found in secrets_in(repr(answer.headers).encode() + answer.body, hidden)
            ]
            findings.add(case, answer, [*judge(case, answer), *told])
    finally:
        for connection in connections.values():
            connection.close()


async def document(url: str) -> dict[str, object]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/openapi.json") as answer:
        return dict(await answer.json())


@dataclass(slots=True)
class Watched:
    """One process: what it has logged since the last look, and its memory."""

    running: Running
    idle_bytes: int = 0
    most_bytes: int = 0
    read: int = 0

    def look(self, hidden: tuple[str, ...], findings: Findings) -> None:
        if self.running.process.poll() is not None:
            findings.tell(f"{self.running.name} ended", f"exit code {self.running.process.returncode}")
            return
        self.most_bytes = max(self.most_bytes, self.resident())
        with self.running.log.open("rb") as log:
            log.seek(self.read)
            news = log.read()
        whole = news.rpartition(b"\n")[0]
        self.read += len(whole) + bool(whole)
        for wrong in judge_log(whole.decode("utf-8", "replace"), hidden):
            findings.tell(f"{self.running.name}: {wrong}", f"after {findings.count} cases")

    def resident(self) -> int:
        for line in Path(f"/proc/{self.running.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


async def attack(
    roles: Mapping[str, Running], tokens: Mapping[Credential, str], numbers: Iterable[int], seed: int
) -> tuple[Findings, list[Watched]]:
    """Send the cases with these numbers, many at a time, and look at the processes while it lasts."""
    hosts = {role: (str(urlsplit(one.url).hostname), int(urlsplit(one.url).port or 0)) for role, one in roles.items()}
    cases = Cases({role: await document(one.url) for role, one in roles.items()}, tokens, seed)
    hidden, findings = tuple(tokens.values()), Findings()
    watched = [Watched(one) for one in roles.values()]
    for one in watched:
        one.idle_bytes = one.resident()
    todo = map(cases.case, numbers)

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for one in watched:
                one.look((*hidden, CANARY), findings)

    looking = asyncio.create_task(look())
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(AT_A_TIME):
                clients.create_task(send(todo, hosts, hidden, findings))
    finally:
        looking.cancel()
    for one in watched:
        one.look((*hidden, CANARY), findings)
        if one.most_bytes - one.idle_bytes > MAX_GROWTH_BYTES:
            findings.tell(f"{one.running.name} grew", f"from {one.idle_bytes >> 20} to {one.most_bytes >> 20} MiB")
    unanswered = {f"{one.role} {one.name}" for one in cases.operations} - set(findings.accepted)
    for name in sorted(unanswered - {"control GET /v2/nodes/{node_id}/link"}):
        if findings.count > 200 * len(cases.operations):
            findings.tell(f"{name} was never answered with success", "so nothing behind its checks was reached")
    return findings, watched


async def start(llorch: Cluster) -> tuple[dict[str, Running], dict[Credential, str]]:
    """A control and a node `n0` with a pool that answers and one that breaks off."""
    control = await llorch.start_control("--queue-timeout", "5s")
    pools = [simulated("p0", "sim", 16, "--tokens", "3"), simulated("p1", "broken", 4, "--truncate-after", "1")]
    node = await llorch.start_node("n0", pools)
    tokens = {
        Credential.CLIENT: llorch.tokens["LLORCH_API_TOKEN"],
        Credential.ADMIN: llorch.tokens["LLORCH_ADMIN_TOKEN"],
        Credential.NODE: llorch.tokens["LLORCH_NODE_TOKEN"],
        Credential.SERVICE: llorch.tokens["LLORCH_SERVICE_TOKEN"],
        Credential.WRONG: secrets.token_hex(16),
    }
    return {"control": control, "node": node}, tokens


async def run(numbers: Iterable[int], seed: int, folder: Path) -> Findings:
    async with cluster(folder) as llorch:
        roles, tokens = await start(llorch)
        began = time.monotonic()
        findings, watched = await attack(roles, tokens, numbers, seed)
        seconds = time.monotonic() - began
        print(f"{findings.count} cases in {seconds:.0f} s; what is logged is in {folder}")
        print("answers: " + ", ".join(f"{what} {count}" for what, count in sorted(findings.answers.items())))
        print("endings: " + ", ".join(f"{what} {count}" for what, count in sorted(findings.endings.items())))
        for one in watched:
            print(f"{one.running.name}: {one.idle_bytes >> 20} MiB idle, {one.most_bytes >> 20} MiB at most")
        return findings


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.requests", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    given = parsed(argv)
    folder = Path(tempfile.mkdtemp(prefix="llorch-fuzz-"))
    findings = asyncio.run(run(range(given.first, given.first + given.cases), given.seed, folder))
    for what, where in sorted(findings.wrong.items())[:SHOWN]:
        print(f"WRONG, {len(where)} times: {what}\n    {', '.join(where[:5])}")
    print(f"{len(findings.wrong)} faults")
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
