"""`python -m tests.fuzz.requests --cases 100000`: requests made from `/openapi.json`, against a control and a node.

Both are real processes, with a simulated engine that answers and one that fails. Prints what was answered, and every
answer, log line or figure that breaks a rule of `oracles.py`, with the number of its case. Exit code 1: there was one.
A case depends on the seed and its number alone, its answer also on what the cases before have left.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import shutil
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
from tests.fuzz import hostile
from tests.fuzz.cases import CANARY, SPARE, Case, Cases, Credential
from tests.fuzz.oracles import judge, judge_log, secrets_in
from tests.fuzz.wire import Answer, Connection

AT_A_TIME = 32
PATIENCE_S = 1.5  # of a client: a task for a model that only a registration made up waits, and is no fault
LOOK_EVERY_S = 1.0
MAX_GROWTH_BYTES = 100 * 1024 * 1024
SHOWN = 40
ENOUGH_OF_EACH = 1_000  # cases of a route, one of which was answered well, or the generator misses it
NEVER_OK = frozenset(
    {
        "control GET /cacerts", "control POST /v2/nodes/csr",  # this control has no authority
        "control GET /v2/nodes/{node_id}/link",  # no case knows a lease, `hostile` does
        "control GET /v2/catalog/stage/{job}", "control GET /v2/catalog/verify/{job}",  # nor what jobs are called
        "node GET /v2/catalog/{model}/blob",  # nor has it a ticket
    }
)  # fmt: skip


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


async def fire(
    urls: Mapping[str, str], tokens: Mapping[Credential, str], numbers: Iterable[int], seed: int, findings: Findings
) -> None:
    """Send the cases with these numbers to the roles at `urls`, many at a time, and judge each answer."""
    hosts = {role: (str(urlsplit(url).hostname), int(urlsplit(url).port or 0)) for role, url in urls.items()}
    cases = Cases({role: await document(url) for role, url in urls.items()}, tokens, seed)
    todo, hidden = map(cases.case, numbers), tuple(tokens.values())
    async with asyncio.TaskGroup() as clients:
        for _ in range(AT_A_TIME):
            clients.create_task(send(todo, hosts, hidden, findings))
    if findings.count > ENOUGH_OF_EACH * len(cases.operations):
        for name in sorted({f"{one.role} {one.name}" for one in cases.operations} - set(findings.accepted) - NEVER_OK):
            findings.tell(f"{name} was never answered with success", "so nothing behind its checks was reached")


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
    roles: Mapping[str, Running],
    others: Iterable[Running],
    tokens: Mapping[Credential, str],
    numbers: Iterable[int],
    seed: int,
) -> tuple[Findings, list[Watched]]:
    """Send the cases with these numbers, play a hostile node beside them, and look at the processes while it lasts."""
    hidden, findings, heard = (*tokens.values(), CANARY), Findings(), hostile.Counted()
    watched = [Watched(one) for one in (*roles.values(), *others)]
    for process in watched:
        process.idle_bytes = process.resident()

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for process in watched:
                process.look(hidden, findings)

    harm = hostile.node(roles["control"].url, tokens[Credential.NODE], seed, heard)
    besides = [asyncio.create_task(look()), asyncio.create_task(harm)]
    try:
        await fire({role: one.url for role, one in roles.items()}, tokens, numbers, seed, findings)
    finally:
        for one in besides:
            if not one.cancel():
                findings.tell("what goes on beside the requests has ended", repr(one))
        await asyncio.gather(*besides, return_exceptions=True)
    print(f"hostile node: {heard}")
    for process in watched:
        process.look(hidden, findings)
        if process.most_bytes - process.idle_bytes > MAX_GROWTH_BYTES:
            size = f"from {process.idle_bytes >> 20} to {process.most_bytes >> 20} MiB"
            findings.tell(f"{process.running.name} grew", size)
    return findings, watched


async def start(llorch: Cluster, beside: str) -> tuple[dict[str, Running], list[Running], dict[Credential, str]]:
    """A control, its node `n0` with a pool that answers, one that breaks off and one to operate on, and a node `n1` of
    another control.
    """
    control = await llorch.start_control("--queue-timeout", "5s", "--rate-failures", "0")
    pools = [
        simulated("p0", "sim", 16, "--tokens", "3"),
        simulated("p1", "broken", 4, "--truncate-after", "1"),
        simulated(SPARE, "spare"),
    ]
    node = await llorch.start_node("n0", pools, "--rate-failures", "0", HF_ENDPOINT="http://127.0.0.1:1")
    other = await llorch.start_node("n1", [simulated("p0", "sim", 4, "--tokens", "3")], join=beside, wait=False)
    tokens = {
        Credential.CLIENT: llorch.tokens["LLORCH_API_TOKEN"],
        Credential.ADMIN: llorch.tokens["LLORCH_ADMIN_TOKEN"],
        Credential.NODE: llorch.tokens["LLORCH_NODE_TOKEN"],
        Credential.SERVICE: llorch.tokens["LLORCH_SERVICE_TOKEN"],
        Credential.WRONG: secrets.token_hex(16),
    }
    return {"control": control, "node": node}, [other], tokens


async def run(numbers: Iterable[int], seed: int, folder: Path) -> Findings:
    told = hostile.Counted()
    async with hostile.control(seed, told) as beside, cluster(folder) as llorch:
        roles, others, tokens = await start(llorch, beside)
        began = time.monotonic()
        findings, watched = await attack(roles, others, tokens, numbers, seed)
        seconds = time.monotonic() - began
        print(f"{findings.count} cases in {seconds:.0f} s")
        print("answers: " + ", ".join(f"{what} {count}" for what, count in sorted(findings.answers.items())))
        print("endings: " + ", ".join(f"{what} {count}" for what, count in sorted(findings.endings.items())))
        print(f"hostile control: {told}")
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
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of writing to a server that has hung up
    folder = Path(tempfile.mkdtemp(prefix="llorch-fuzz-"))
    findings = asyncio.run(run(range(given.first, given.first + given.cases), given.seed, folder))
    for what, where in sorted(findings.wrong.items())[:SHOWN]:
        print(f"WRONG, {len(where)} times: {what}\n    {', '.join(where[:5])}")
    print(f"{len(findings.wrong)} faults" + (f"; what was logged is in {folder}" if findings.wrong else ""))
    if not findings.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
