"""Models brought to nodes, on real processes: what is killed half-way gets hardly a byte twice, and what fails on one
node touches nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
import socket
import subprocess
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llorch import demo
from tests.certificates import certificate
from tests.cluster import Cluster, Running, eventually, expected_text, lasting_port, simulated
from tests.e2e import test_join as certified
from tests.e2e.shared import end_of, start
from tests.gguf_files import small, write_large
from tests.standins.blob_server import BlobServer, blob_server
from tests.standins.hub_server import hub_server

NODES = ("a", "b", "c")
WINDOW_BYTES = 128 * 1024  # of a meter: what it holds itself of a line that breaks
# Lost with a killed node, whatever the size: in its sockets, and between them and its disk.
ON_ITS_WAY_BYTES = 6_000_000
LINE = re.compile(r"([abc]): (staging|staged|waiting|offline|failed)\b.*")
MOVING = re.compile(r"[abc]: staging \d+%( [\d.]+[BKM]/[\d.]+M( [\d.]+[BKM]/s)?)?( from a)?")


class Meter:
    """Stands before a listener and counts what that sends. A client's end is the other side's end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self.sent = 0
        self.url = ""

    async def __aenter__(self) -> Meter:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        passing = list(self._passing)
        for one in passing:
            one.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._connection(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near = writer.get_extra_info("socket")
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WINDOW_BYTES)
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW_BYTES)
        far.setblocking(False)
        writers = [writer]
        try:
            with suppress(OSError):
                await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self._port))
                far_reader, far_writer = await asyncio.open_connection(sock=far)
                writers.append(far_writer)
                ways = {
                    asyncio.ensure_future(self._way(reader, far_writer, counted=False)),
                    asyncio.ensure_future(self._way(far_reader, writer, counted=True)),
                }
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for one in writers:
                one.close()
            far.close()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        writer.transport.set_write_buffer_limits(high=WINDOW_BYTES)
        with suppress(OSError):
            while data := await reader.read(WINDOW_BYTES):
                if counted:
                    self.sent += len(data)
                writer.write(data)
                await writer.drain()


@dataclass
class Place:
    """Nodes that can fetch from one another, an origin, and a meter before each of them."""

    llorch: Cluster
    web: BlobServer
    origin: Meter
    port: int = 0  # of the control
    meters: dict[str, Meter] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    async def start(
        self,
        name: str,
        *argv: str,
        pools: tuple[dict[str, Any], ...] = (),
        address: bool = True,
        wait: bool = True,
        **env: str,
    ) -> Running:
        where = ["--address", self.meters[name].url] if address else []
        bind = ["--bind", f"127.0.0.1:{self.ports[name]}"]
        return await self.llorch.start_node(name, pools, *bind, *where, *argv, wait=wait, **env)

    def kill(self, name: str) -> None:
        running = self.llorch.control if name == "control" else self.llorch.nodes[name]
        assert running is not None
        running.kill()

    async def admin(self, *words: str, within_s: float = 50.0) -> tuple[int, str, str]:
        return await end_of(await self.begin(*words), within_s=within_s)

    async def begin(self, *words: str) -> Process:
        return await start(self.llorch, *words, LLORCH_TOKEN=self.llorch.tokens["LLORCH_ADMIN_TOKEN"])

    def ref(self, name: str) -> str:
        return f"{self.origin.url}/{name}"

    def put(self, name: str, size: int) -> str:
        """A file of so many bytes at the origin; its digest."""
        path = self.llorch.folder / name
        write_large(path, size)
        self.web.files[f"/{name}"] = path
        return sha256(path)

    def folder(self, node: str, model: str) -> Path:
        return self.llorch.folder / node / "models" / model

    def partial(self, node: str, model: str) -> int:
        """How many bytes of a model are there so far."""
        try:
            return (self.folder(node, model) / f"{model}.gguf.partial").stat().st_size
        except OSError:
            return 0

    def digest(self, node: str, model: str) -> str:
        folder = self.folder(node, model)
        assert [path.name for path in folder.iterdir()] == [f"{model}.gguf"]
        return sha256(folder / f"{model}.gguf")

    @property
    def sent(self) -> int:
        return self.origin.sent + sum(meter.sent for meter in self.meters.values())


@asynccontextmanager
async def place(llorch: Cluster) -> AsyncIterator[Place]:
    async with blob_server() as web, AsyncExitStack() as exits:
        made = Place(llorch, web, await exits.enter_async_context(Meter(int(web.url.rpartition(":")[2]))))
        for name in NODES:
            made.ports[name] = lasting_port()
            made.meters[name] = await exits.enter_async_context(Meter(made.ports[name]))
        made.port = lasting_port()
        await llorch.start_control(port=made.port)
        yield made


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(err: str) -> dict[str, list[str]]:
    """What the command said of each node, line by line: nothing else is there, and nothing that moves."""
    assert "\r" not in err and "\x1b" not in err
    said: dict[str, list[str]] = {}
    for line in err.splitlines():
        found = LINE.fullmatch(line)
        assert found is not None, line
        said.setdefault(found[1], []).append(line)
    return said


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("size", "fetches", "killed"),
    [
        pytest.param(16_000_000, "c", "c", id="small", marks=pytest.mark.slow),
        pytest.param(200_000_000, "c", "c", id="it fetches from a node", marks=pytest.mark.slow),
        pytest.param(200_000_000, "a", "a", id="it fetches from outside", marks=pytest.mark.slow),
        pytest.param(200_000_000, "c", "a", id="it is fetched from", marks=pytest.mark.slow),
        pytest.param(200_000_000, "c", "control", id="it is the control", marks=pytest.mark.slow),
    ],
)
async def test_what_is_killed_half_way_and_started_again_costs_hardly_a_byte_twice(
    llorch: Cluster, size: int, fetches: str, killed: str
) -> None:
    """One node fetches from outside, the others from it; `fetches` is the slow one. What is sent, by whomever, is
    counted on the line.
    """
    rate = ("--stage-rate", str(max(8_000_000, size // 8)))
    async with place(llorch) as there:
        digest = there.put("big.gguf", size)
        await asyncio.gather(*(there.start(name, *(rate if name == fetches else ())) for name in NODES))
        staging = await there.begin("model", "stage", there.ref("big.gguf"), "--nodes", "all")
        await eventually(lambda: there.partial(fetches, "big") > size / 2, within_s=60.0)
        there.kill(killed)
        kept = there.partial(fetches, "big")
        assert size / 2 < kept < size
        if killed == "control":
            await llorch.start_control(port=there.port)
        else:
            await there.start(killed, *(rate if killed == fetches else ()))
        code, out, err = await end_of(staging, within_s=90.0)
        assert code == 0, err
        said = progress(err)
        assert said.keys() == set(NODES) and all(lines[-1].endswith(digest[:12]) for lines in said.values())
        assert all(MOVING.fullmatch(line) for lines in said.values() for line in lines if ": staging " in line)
        assert any(MOVING.fullmatch(line) for line in said[fetches])
        assert [row.split()[:2] for row in out.splitlines()[1:]] == [[name, "staged"] for name in NODES]
        assert {there.digest(name, "big") for name in NODES} == {digest}
        again = there.sent - 3 * size
        print(
            f"{size} bytes to three nodes, {killed} killed at {kept}: the origin sent {there.origin.sent}, nodes "
            f"{[meter.sent for meter in there.meters.values()]}; again {again}, {100 * again / size:.2f} % of the file"
        )
        assert 0 <= again <= max(0.05 * size, ON_ITS_WAY_BYTES)
        assert there.origin.sent <= 1.05 * size + ON_ITS_WAY_BYTES, "it came over the outer line once"


@pytest.mark.slow
async def test_a_model_of_the_hub_is_asked_for_by_one_node_and_comes_to_all(llorch: Cluster) -> None:
    pytest.importorskip("huggingface_hub")
    data = small(3_000_000)
    async with place(llorch) as there, hub_server(there.web) as hub:
        hub.repos["org/tale"], hub.token = {"tale-Q4_K_M.gguf": data, "README.md": b"words"}, secrets.token_hex(16)
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}
        await asyncio.gather(*(there.start(name, **env) for name in NODES))
        code, _, err = await there.admin("model", "stage", "hf:org/tale:Q4_K_M", "--nodes", "all")
        assert code == 0, err
        assert progress(err).keys() == set(NODES)
        staged = [llorch.folder / name / "models" for name in NODES]
        digests = {sha256(path) for folder in staged for path in folder.rglob("*.gguf")}
        assert digests == {hashlib.sha256(data).hexdigest()}
        assert there.web.sent == len(data), "one node fetched it from outside, and nobody else"
        assert not any(hub.token in running.text() for running in llorch.nodes.values())
        catalog = await llorch.get("/v2/catalog")
        assert catalog["models"]["org/tale:Q4_K_M"]["nodes"] == list(NODES)


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_nodes_with_certificates_give_a_model_to_one_that_is_killed_half_way(llorch: Cluster) -> None:
    """Joined by token; who fetches shows its certificate and a ticket, and goes on with them by itself."""
    size = 8_000_000
    cert, key = certificate(llorch.folder)
    await certified.start_control(llorch)
    argv: dict[str, list[str]] = {}

    async def begin(name: str) -> Running:
        env, words = {}, argv.get(name, [])
        if not words:
            port = lasting_port()
            env, words = await certified.join_command(llorch)
            words += certified.node_words(llorch, name)
            words[words.index("--bind") + 1] = f"127.0.0.1:{port}"
            words += ["--address", f"https://127.0.0.1:{port}", "--tls-cert", str(cert), "--tls-key", str(key)]
            argv[name] = words = [*words, *(["--stage-rate", "4MB"] if name == "c" else [])]
        llorch.nodes[name] = await llorch.start(name, words, LLORCH_ORPHAN_GRACE="0s", **env).ready()
        return llorch.nodes[name]

    async with blob_server() as web:
        path = llorch.folder / "big.gguf"
        write_large(path, size)
        web.files["/big.gguf"], digest = path, sha256(path)
        for name in NODES:
            await begin(name)
        async with certified.client_of(llorch):
            for name in NODES:
                await llorch.bound(name, 1)
            trusting = {"LLORCH_TLS_CA": str(llorch.folder / "ca.pem")}
            staging = await start(llorch, "model", "stage", f"{web.url}/big.gguf", "--nodes", "all", **trusting)
            partial = llorch.folder / "c" / "models" / "big" / "big.gguf.partial"
            await eventually(lambda: partial.stat().st_size > size / 2, within_s=40.0)
            llorch.nodes["c"].kill()
            kept = partial.stat().st_size
            await begin("c")
            code, _, err = await end_of(staging, within_s=40.0)
        assert code == 0, err
        assert progress(err).keys() == set(NODES)
        assert {sha256(llorch.folder / name / "models" / "big" / "big.gguf") for name in NODES} == {digest}
        asked = [
            int(offset)
            for name in NODES
            for offset in re.findall(r"blob\.asked .*?offset=(\d+)", llorch.nodes[name].text())
        ]
        assert sorted(asked) == [0, 0, kept]
        assert web.sent == size, "one node fetched it from outside, and nobody else"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=10).returncode != 0:
        pytest.skip("no disk of its own can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True, timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_a_disk_that_becomes_full_keeps_what_came_and_the_pools_beside_it_serve_on(llorch: Cluster) -> None:
    size, beside = 12_000_000, 14_000_000
    with small_disk(llorch.folder / "b", 24_000_000):
        async with place(llorch) as there:
            digest = there.put("big.gguf", size)
            await there.start("a")
            argv = ("--stage-rate", "6MB", "--stage-headroom", "0")
            await there.start("b", *argv, pools=(simulated(),))
            staging = await there.begin("model", "stage", there.ref("big.gguf"))
            await eventually(lambda: there.partial("b", "big") > 3_000_000, within_s=20.0)
            ballast = llorch.folder / "b" / "somebody-elses"
            with suppress(OSError):
                ballast.write_bytes(bytes(beside))
            answers = 0
            while staging.returncode is None:
                task = await llorch.complete(tokens=4)
                assert (task["node_id"], task["text"]) == ("b", expected_text(4))
                answers += 1
            code, _, err = await end_of(staging)
            assert code == 1
            assert "why: INSUFFICIENT_STORAGE\n" in err and "became full; what is here already is kept" in err
            assert "hint: " in err
            assert answers > 1
            kept = there.partial("b", "big")
            assert 3_000_000 < kept < size
            assert there.digest("a", "big") == digest, "only the full one failed"
            ballast.unlink()
            sent = there.sent
            code, _, err = await there.admin("model", "stage", there.ref("big.gguf"))
            assert code == 0, err
            assert there.digest("b", "big") == digest
            assert there.sent - sent <= size - kept + 65_536, "nothing of what was kept is sent again"
            assert (await llorch.complete(tokens=4))["text"] == expected_text(4)


@pytest.mark.slow
async def test_a_model_that_does_not_fit_is_refused_before_its_first_byte_with_the_numbers(llorch: Cluster) -> None:
    async with place(llorch) as there:
        path = llorch.folder / "big.gguf"
        path.write_bytes(small())
        os.truncate(path, shutil.disk_usage(llorch.folder).free + 1_000_000_000)  # a hole, not bytes
        there.web.files["/big.gguf"] = path
        await there.start("a", pools=(simulated(),))
        code, _, err = await there.admin("model", "stage", there.ref("big.gguf"))
        assert code == 1 and "why: INSUFFICIENT_STORAGE\n" in err
        assert re.search(
            r"a: big needs [\d.]+ GiB more, and [\d.]+ GiB are free, of which 2\.0 GiB are to stay so", err
        ), err
        assert there.partial("a", "big") == 0
        assert (await llorch.complete(tokens=4))["text"] == expected_text(4)


@pytest.mark.slow
async def test_an_origin_that_sends_something_else_to_the_second_node_is_found_out(llorch: Cluster) -> None:
    """The first one has no address, so the second asks the origin, too; it is told what the first one has."""
    async with place(llorch) as there:
        digest = there.put("big.gguf", 3_000_000)
        await there.start("a", address=False)
        code, _, err = await there.admin("model", "stage", there.ref("big.gguf"), "--nodes", "a")
        assert code == 0, err
        there.web.files["/big.gguf"] = small(3_000_000)
        await there.start("b", pools=(simulated(),), address=False)
        code, _, err = await there.admin("model", "stage", there.ref("big.gguf"))
        assert code == 1 and "why: DIGEST_MISMATCH\n" in err and f"{digest[:12]}... was meant" in err, err
        assert there.digest("a", "big") == digest
        assert list(there.folder("b", "big").iterdir()) == [], "nothing of it is kept"
        assert (await llorch.complete(tokens=4))["text"] == expected_text(4)
        there.web.files["/big.gguf"] = llorch.folder / "big.gguf"
        code, _, err = await there.admin("model", "stage", there.ref("big.gguf"))
        assert code == 0, err
        assert there.digest("b", "big") == digest


@pytest.mark.slow
@pytest.mark.llama
@pytest.mark.timeout(90)
async def test_a_model_that_was_staged_is_served_and_is_not_removed_while_it_is(llorch: Cluster) -> None:
    async with place(llorch) as there:
        there.web.files["/tale.gguf"] = Path(demo.model_path())
        pool = {"id": "p0", "engine": "llamacpp", "model": "demo", "ctx": 512, "slots": 2}
        await asyncio.gather(there.start("a"), there.start("b", pools=(pool,)))
        code, _, err = await there.admin("model", "stage", there.ref("tale.gguf"))
        assert code == 0, err
        code, _, err = await there.admin("pool", "reload", "b/p0", "tale")
        assert code == 0, err
        task = await llorch.complete("tale", 4)
        assert task["text"] and task["node_id"] == "b"
        code, _, err = await there.admin("model", "rm", "tale", "--nodes", "b")
        assert code == 1 and "why: CONFLICT\n" in err and "a pool of this node has tale" in err, err
        assert (await llorch.complete("tale", 4))["text"]
        code, _, err = await there.admin("model", "rm", "tale", "--nodes", "a")
        assert code == 0, err
        assert not there.folder("a", "tale").exists()
        code, _, err = await there.admin("pool", "reload", "b/p0", "demo")
        assert code == 0, err
        code, _, err = await there.admin("model", "rm", "tale", "--nodes", "all")
        assert code == 0, err
        assert not there.folder("b", "tale").exists()
