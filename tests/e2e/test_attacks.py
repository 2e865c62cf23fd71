"""Attacks on a real control: while each one runs its node stays, a client is served, and memory stays bounded.

Every test is named for a class of incidents. The attackers are connections of this process; the client that must be
served comes from another address than they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import secrets
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import aiohttp
import pytest

from llorch.listen import HEAD_TIMEOUT_S, REAP_EVERY_S
from llorch.web import BODY_TIMEOUT_S
from tests.certificates import certificate
from tests.cluster import Cluster, eventually
from tests.e2e.shared import kept, visiting
from tests.e2e.test_slow_readers import rss_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120, func_only=True),  # not while it waits for the machine
    pytest.mark.usefixtures("whole_machine"),
]

GROWTH_BYTES = 100 * 1024 * 1024  # of the control, over what it holds idle
SERVED_WITHIN_S = 5.0  # it takes 0.3 s, or 0.8 s beside four busy processes
ATTACKER, CLIENT = "127.0.0.3", "127.0.0.2"  # the node's is 127.0.0.1
MOST = 1_200  # connections that the control takes in all; 256 of them are for nodes alone


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    async def start(cluster: Cluster) -> None:
        flags = ("--heartbeat-interval", "1s", "--max-body", "16MiB")
        await cluster.start_control("--max-connections", str(MOST), *flags)
        await cluster.start_node("a")
        await cluster.complete()

    with kept(tmp_path_factory.mktemp("plain"), start) as running:
        yield running


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("secure")
    cert, key = certificate(folder / "tls")

    async def start(cluster: Cluster) -> None:
        cluster.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting(cert)))
        async with cluster.session:
            flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--heartbeat-interval", "1s")
            await cluster.start_control("--max-connections", str(MOST), *flags)
            await cluster.start_node("a", None, "--tls-ca", str(cert))
            await cluster.complete()

    with kept(folder, start) as running:
        yield running


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(cert))


class Attack:
    """Connections of an attacker, and what became of them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.port = int(cluster.url.rpartition(":")[2])
        self.mine = f"Host: x\r\nAuthorization: Bearer {cluster.token}\r\n"
        self.open: list[asyncio.StreamWriter] = []
        self.served_s: list[float] = []  # how long each task of somebody else took meanwhile
        self.failed = False  # one of them did

    async def connect(self, sent: str | bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(ATTACKER, 0))
        self.open.append(writer)
        writer.write(sent.encode("latin-1") if isinstance(sent, str) else sent)
        return reader, writer

    async def many(self, count: int, sent: str | bytes = b"") -> list[asyncio.StreamReader]:
        return [reader for reader, _ in [await self.connect(sent) for _ in range(count)]]

    async def outlast(self, count: int) -> None:
        """Go on until somebody else was served so many times more; each takes 60 ms, its pause included."""
        wanted = len(self.served_s) + count
        await eventually(lambda: self.failed or len(self.served_s) >= wanted, within_s=60, what=f"{count} times served")

    def close(self) -> None:
        for writer in self.open:
            writer.transport.abort()


async def answer(reader: asyncio.StreamReader, within_s: float = 60.0) -> bytes:
    """Everything that comes until the connection ends."""
    came = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(within_s):
            while piece := await reader.read(65_536):
                came += piece
    return came


def statuses(answers: Sequence[bytes]) -> set[bytes]:
    """The status of the first answer of each; empty where it was closed without one."""
    return {came[9:12] for came in answers}


@contextlib.asynccontextmanager
async def under(cluster: Cluster) -> AsyncIterator[Attack]:
    """The block is an attack. Meanwhile a client from elsewhere asks all the time, and the node beats."""
    assert cluster.control is not None
    pid, log = cluster.control.pid, cluster.control.text
    idle_bytes, peak_bytes = rss_bytes(pid), 0
    registered, before = log().count("node.registered"), len(log())
    tls = trusting(cluster.folder / "tls" / "cert.pem") if cluster.url.startswith("https") else True
    over = asyncio.Event()

    async def be_served() -> None:
        nonlocal peak_bytes
        connector = aiohttp.TCPConnector(local_addr=(CLIENT, 0), ssl=tls, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as cluster.session:
            while not over.is_set():
                started = time.monotonic()
                async with asyncio.timeout(SERVED_WITHIN_S):
                    assert (await cluster.complete(tokens=2))["state"] == "done"
                    node = await cluster.get("/v2/nodes/a")
                assert (node["state"], node["link"]) == ("online", True), node
                attack.served_s.append(time.monotonic() - started)
                peak_bytes = max(peak_bytes, rss_bytes(pid))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), 0.05)

    attack = Attack(cluster)
    client = asyncio.create_task(be_served())
    client.add_done_callback(lambda _: setattr(attack, "failed", not over.is_set()))
    try:
        yield attack
        await eventually(lambda: client.done() or len(attack.served_s) >= 2)
    finally:
        over.set()
        attack.close()
    try:
        await client
    except TimeoutError:
        raise AssertionError(f"not served within {SERVED_WITHIN_S} s:\n{log()[before:][-8000:]}") from None
    grew_bytes, served_s = peak_bytes - idle_bytes, attack.served_s
    print(f"grew by {grew_bytes / 1e6:.1f} MB, {len(served_s)} times served, {max(served_s):.2f} s the slowest")
    assert len(served_s) >= 2
    assert grew_bytes <= GROWTH_BYTES
    since = log()[before:]
    assert log().count("node.registered") == registered
    assert "Traceback" not in since
    assert " ERROR " not in since
    assert cluster.token not in log()


async def test_half_open_requests_are_gone_within_fifteen_seconds(plain: Cluster) -> None:
    get = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    stages = ["", "G", "GET /health HTTP/1.1\r\n", get[:-2], f"{get}GET /health HTTP/1.1\r\nHo"]
    async with visiting(plain), under(plain) as attack:
        readers = [reader for stage in stages for reader in await attack.many(10, stage)]
        started = time.monotonic()
        await asyncio.gather(*(answer(reader) for reader in readers))
        assert time.monotonic() - started <= 15.0
        assert len(readers) == 50


async def test_slow_loris_a_head_that_trickles_ends_like_one_that_stops(plain: Cluster) -> None:
    async with visiting(plain), under(plain) as attack:
        readers = await attack.many(200, "GET /health HTTP/1.1\r\nHost: x\r\n")
        ended = [asyncio.create_task(answer(reader)) for reader in readers]
        started = time.monotonic()
        while not all(task.done() for task in ended):
            assert time.monotonic() - started < HEAD_TIMEOUT_S + REAP_EVERY_S + 3
            for writer in attack.open:
                writer.write(b"X-a: b\r\n"[int(time.monotonic() * 5) % 8 :][:1])
            await asyncio.sleep(0.2)


async def test_slow_loris_a_body_that_trickles_is_408(plain: Cluster) -> None:
    async with visiting(plain), under(plain) as attack:
        head = f"POST /v2/tasks HTTP/1.1\r\n{attack.mine}Content-Length: 1000000\r\n\r\n"
        readers = await attack.many(100, head)
        ended = [asyncio.create_task(answer(reader)) for reader in readers]
        started = time.monotonic()
        while not all(task.done() for task in ended):
            assert time.monotonic() - started < BODY_TIMEOUT_S + 15
            for writer in attack.open:
                writer.write(b"x")
            await asyncio.sleep(0.5)
        assert statuses([task.result() for task in ended]) == {b"408"}


async def test_large_bodies_that_are_declared_and_never_sent_hold_nothing(plain: Cluster) -> None:
    async with visiting(plain), under(plain) as attack:
        length = f"Content-Length: {15 << 20}\r\n\r\n"
        strangers = await attack.many(100, f"POST /v2/tasks HTTP/1.1\r\nHost: x\r\n{length}")
        mine = await attack.many(100, f"POST /v1/chat/completions HTTP/1.1\r\n{attack.mine}{length}")
        assert statuses(await asyncio.gather(*map(answer, strangers))) <= {b"401", b"429"}
        assert statuses(await asyncio.gather(*map(answer, mine))) == {b"408"}


async def test_large_bodies_that_never_end_hold_no_more_than_two_of_them(plain: Cluster) -> None:
    body = b"x" * (15 << 20)
    async with visiting(plain), under(plain) as attack:
        head = f"POST /v2/tasks HTTP/1.1\r\n{attack.mine}Content-Length: {len(body) + 1}\r\n\r\n"
        readers = await attack.many(20, head)
        for writer in attack.open:
            writer.write(body)
        answers = [asyncio.create_task(answer(reader)) for reader in readers]
        await eventually(lambda: sum(task.done() for task in answers) >= 17, within_s=60)
        assert statuses([task.result() for task in answers if task.done()]) <= {b"429", b""}
        for task in answers:
            task.cancel()


async def test_header_flood_is_refused_at_its_bound(plain: Cluster) -> None:
    start = "GET /health HTTP/1.1\r\nHost: x\r\n"
    floods = ["X-a: b\r\n" * 10_000, f"X-a: {'b' * 1_000_000}", f"X-a: {'b' * 8_000}\r\n" * 100, "A" * 1_000_000]
    async with visiting(plain), under(plain) as attack:
        for _ in range(25):
            readers = [reader for flood in floods for reader in await attack.many(4, start + flood)]
            assert statuses(await asyncio.gather(*map(answer, readers))) <= {b"431", b""}


async def test_idle_connections_and_silent_ones_lock_out_neither_node_nor_client(plain: Cluster) -> None:
    async with visiting(plain), under(plain) as attack:
        for _ in range(2 * MOST):
            await attack.connect("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await attack.many(MOST)
        assert "connection.refused" in await eventually(plain.control.text)  # type: ignore[union-attr]
        await attack.outlast(50)


async def test_a_connection_flood_is_turned_away(plain: Cluster) -> None:
    async with visiting(plain), under(plain) as attack:
        until, count = time.monotonic() + 5.0, 0
        while time.monotonic() < until:
            await asyncio.gather(*(attack.connect() for _ in range(50)), return_exceptions=True)
            count += 50
            if count % 500 == 0:
                attack.close()
                attack.open.clear()
        assert count > MOST


async def test_pipelining_flood_waits_at_its_sender(plain: Cluster) -> None:
    flood = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50_000  # whose answers nobody reads
    async with visiting(plain), under(plain) as attack:
        for _ in range(50):
            _, writer = await attack.connect()
            writer.transport.set_write_buffer_limits(high=1 << 30)
            writer.write(flood)
        await attack.outlast(80)


async def test_ten_thousand_wrong_tokens_are_refused_cheaply_and_lock_out_nobody(plain: Cluster) -> None:
    refused: dict[int, int] = {}

    async def guess(count: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(ATTACKER, 0))) as session:
            for _ in range(count):
                headers = {"Authorization": f"Bearer {secrets.token_hex(16)}"}
                async with session.get(f"{plain.url}/v2/tasks", headers=headers) as response:
                    refused[response.status] = refused.get(response.status, 0) + 1
                    assert response.status == 401 or "Retry-After" in response.headers

    async with visiting(plain), under(plain) as attack:
        before = len(attack.cluster.control.text())  # type: ignore[union-attr]
        await asyncio.gather(*(guess(500) for _ in range(20)))
        written = len(attack.cluster.control.text()) - before  # type: ignore[union-attr]
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{plain.url}/v2/tasks", headers=plain.headers()) as ok,
        ):
            assert ok.status == 200  # from the attacker's own address
    assert sum(refused.values()) == 10_000
    assert refused.keys() == {401, 429}
    assert refused[401] <= 200
    assert written < 200_000


async def test_json_bombs_are_400_and_nothing_explodes(plain: Cluster) -> None:
    mega = 1 << 20
    bombs = [
        "[" * mega, '{"a":' * (mega // 5), '{"prompt":' + "9" * mega + "}", "[" + "1," * (mega // 2) + "1]",
        '{"a":1,' * 2 + '"b":"' + "\\u0000" * (mega // 6) + '"}', '{"' + '":0,"'.join(map(str, range(60_000))) + '":0}',
        '{"model":"sim","prompt":"x","metadata":' + '{"a":' * 20_000 + "0" + "}" * 20_001,
        '"' + "\\ud800" * 1_000 + '"', '{"a":[' + "[]," * mega + "0]}",
        '{"a":' + "[" * 30 + "]" * 30 + ',"b":' + "[" * 30 + "]" * 30 + ',"c":"' + "x, " * (4 * mega) + '"}',
    ]  # fmt: skip

    async def throw(session: aiohttp.ClientSession, path: str, bomb: str) -> int:
        headers = plain.headers() | {"Content-Type": "application/json"}
        async with session.post(plain.url + path, data=io.BytesIO(bomb.encode()), headers=headers) as response:
            await response.read()
            return response.status

    async with visiting(plain), under(plain), aiohttp.ClientSession() as session:
        for path in ("/v2/tasks", "/v1/chat/completions", "/v2/placement"):
            for _ in range(3):
                got = await asyncio.gather(*(throw(session, path, bomb) for bomb in bombs))
                assert set(got) == {400}


# ---------------------------------------------------------------- TLS


async def test_tls_handshakes_that_stop_half_way_are_gone_and_hold_little(secure: Cluster) -> None:
    hello = client_hello()
    async with visiting(secure), under(secure) as attack:
        started = time.monotonic()
        readers = [*await attack.many(100), *await attack.many(100, hello), *await attack.many(100, hello[:100])]
        await asyncio.gather(*(answer(reader) for reader in readers))
        assert time.monotonic() - started <= 15.0


async def test_a_flood_of_whole_tls_handshakes_is_survived(secure: Cluster) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def shake(attack: Attack, until: float) -> int:
        count = 0
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", attack.port, ssl=context, local_addr=(ATTACKER, 0)
                )
                count += 1
                writer.transport.abort()
        return count

    async with visiting(secure), under(secure) as attack:
        until = time.monotonic() + 8.0
        shaken = await asyncio.gather(*(shake(attack, until) for _ in range(40)))
        assert sum(shaken) > 200


async def test_garbage_on_a_tls_port_is_closed_and_floods_no_log(secure: Cluster) -> None:
    garbage = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x00" * 1_000, b"SSH-2.0-x\r\n"]
    async with visiting(secure), under(secure) as attack:
        before = len(secure.control.text())  # type: ignore[union-attr]
        for _ in range(20):
            readers = [reader for each in garbage for reader in await attack.many(5, each)]
            await asyncio.gather(*(answer(reader, 20) for reader in readers))
        assert len(secure.control.text()) - before < 100_000  # type: ignore[union-attr]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="renegotiation is asked for with openssl's client")
async def test_tls_renegotiation_is_refused(secure: Cluster) -> None:
    port = secure.url.rpartition(":")[2]
    async with visiting(secure), under(secure):
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-legacy_renegotiation"]
        done = await asyncio.to_thread(
            subprocess.run, argv, input="R\n" * 5, capture_output=True, text=True, timeout=30, check=False
        )
        assert "RENEGOTIATING" in done.stdout + done.stderr
        assert "no renegotiation" in done.stdout + done.stderr


def client_hello() -> bytes:
    """What a TLS client says first."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()
