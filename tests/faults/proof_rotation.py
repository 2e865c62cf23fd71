"""Tokens and authorities are rotated again and again while clients send tasks without a pause: no request fails.

A token is rotated as a person would: the new one is made, clients move, the old one is revoked. An authority too: a new
one signs, nodes renew, clients fetch it, the old one is trusted no more. Nodes and control show certificates all along.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from llorch import pki, tls
from llorch.control.authority import Authority
from llorch.control.token_files import TokenFiles
from llorch.tls import JOIN_NAME
from llorch.tokens import Kind, Wish
from tests.cluster import Cluster, cluster, eventually, expected_text, simulated
from tests.faults.proof_parts import Verdict, spread

TOKENS = 6  # of a task


@dataclass(frozen=True)
class Size:
    clients: int
    tokens: int
    authorities: int


SMALL = Size(clients=3, tokens=20, authorities=2)
FULL = Size(clients=8, tokens=1_000, authorities=100)


@dataclass
class Load:
    """Clients that never pause. What they show and whom they trust is looked up for each request anew."""

    url: str
    token: str = ""
    trust: ssl.SSLContext = field(default_factory=lambda: tls.cluster_client_context(b"", check=False))
    done: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)  # requests under way, by token

    async def client(self, session: aiohttp.ClientSession) -> None:
        while True:
            token, began = self.token, time.monotonic()
            self.running[token] = self.running.get(token, 0) + 1
            try:
                async with session.post(
                    f"{self.url}/v2/tasks",
                    json={"model": "sim", "prompt": "go", "max_tokens": TOKENS},
                    headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
                    ssl=self.trust,
                    server_hostname=JOIN_NAME,
                ) as response:
                    answer = await response.json()
                    if response.status != 200 or answer.get("text") != expected_text(TOKENS):
                        self.failed.append(f"{response.status} {answer.get('error', answer)}")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self.failed.append(f"{type(error).__name__}: {error}")
            self.running[token] -= 1
            self.done += 1
            self.seconds.append(time.monotonic() - began)

    async def moved_from(self, token: str) -> None:
        await eventually(lambda: not self.running.get(token), what="clients use the new token")


async def prove(folder: Path, size: Size) -> Verdict:
    verdict = Verdict(f"{size.tokens} tokens and {size.authorities} authorities rotated under {size.clients} clients")
    async with cluster(folder) as llorch:
        data = folder / "control"
        await llorch.start_control("--tls", "on", "--heartbeat-interval", "300ms", "--offline-after", "30s")
        authority, _ = Authority.open(data, None, time.time())
        files = TokenFiles(data)
        nodes = ("a", "b")
        for name in nodes:
            await _join(llorch, name, files, authority)
        load = Load(llorch.url)
        load.trust = tls.cluster_client_context(authority.trust.bundle_pem)
        record, load.token = files.new(Wish(name="load"), time.time())
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as kept,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as single,
        ):
            await eventually(lambda: _nodes_ready(llorch, load, single, len(nodes)), within_s=20)
            clients = [
                asyncio.ensure_future(load.client(kept if number % 2 else single)) for number in range(size.clients)
            ]
            try:
                await asyncio.gather(
                    _rotate_tokens(files, load, record.id, size.tokens),
                    _rotate_authorities(authority, load, single, nodes, size.authorities),
                )
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        log = llorch.control.text() if llorch.control is not None else ""
        verdict.figure(f"{load.done} requests, each {spread(load.seconds)}")
        verdict.check(not load.failed, f"{len(load.failed)} of {load.done} requests failed {load.failed[:3]}")
        verdict.check(load.done >= 2 * size.tokens, f"there was load: {load.done} requests")
        live = [
            one for one in TokenFiles(data)._read().records if one.name == "load" and one.ended(time.time()) is None
        ]
        verdict.check(len(live) == 1, f"{len(live)} of {size.tokens + 1} tokens is in force at the end")
        verdict.check(authority.refresh() or len(authority.trust.bundle) == 1, "one authority is trusted at the end")
        renewed = log.count("certificate.issued")
        verdict.check(renewed >= 2 * size.authorities, f"nodes had {renewed} certificates issued")
        verdict.check("Traceback" not in log, "no traceback")
    return verdict


async def _join(llorch: Cluster, name: str, files: TokenFiles, authority: Authority) -> None:
    _, token = files.new(Wish(kind=Kind.JOIN, uses=1), time.time(), authority.trust.digest)
    held, llorch.tokens = llorch.tokens, {}
    try:
        await llorch.start_node(name, [simulated("p0", "sim", 4)], wait=False, LLORCH_JOIN_TOKEN=token)
    finally:
        llorch.tokens = held


async def _nodes_ready(llorch: Cluster, load: Load, session: aiohttp.ClientSession, count: int) -> bool:
    headers = {"Authorization": f"Bearer {load.token}"}
    async with session.get(
        f"{load.url}/v2/pools", headers=headers, ssl=load.trust, server_hostname=JOIN_NAME
    ) as response:
        pools: list[dict[str, Any]] = (await response.json())["pools"]
        return sum(bool(pool["bound"]) for pool in pools) == count


async def _rotate_tokens(files: TokenFiles, load: Load, first: str, count: int) -> None:
    old_id = first
    for _ in range(count):
        record, text = await asyncio.to_thread(files.new, Wish(name="load"), time.time())
        old, load.token = load.token, text
        await load.moved_from(old)
        await asyncio.to_thread(files.revoke, old_id, time.time())
        old_id = record.id


async def _rotate_authorities(
    authority: Authority, load: Load, session: aiohttp.ClientSession, nodes: tuple[str, ...], count: int
) -> None:
    for _ in range(count):
        await asyncio.to_thread(authority.rotate, time.time())
        newest = pki.pin_of(authority.trust.signer.cert)

        async def clients_know(newest: str = newest) -> bool:
            async with session.get(f"{load.url}/cacerts", ssl=load.trust, server_hostname=JOIN_NAME) as response:
                bundle = pki.read_certs(await response.read())
            if newest not in map(pki.pin_of, bundle):
                return False
            load.trust = tls.cluster_client_context(pki.pem_of(bundle))
            return True

        def nodes_have(newest: str = newest) -> bool:
            authority.refresh()
            held = [authority.trust.issued[node] for node in nodes]
            return all(one.authority == newest and one.confirmed for one in held)

        await eventually(clients_know, within_s=20, what="the new authority is shown")
        await eventually(nodes_have, within_s=20, what="nodes show what they were issued")
        await asyncio.to_thread(authority.finish, time.time())
