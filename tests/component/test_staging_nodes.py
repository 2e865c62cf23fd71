"""Models from node to node: with a ticket and a credential of the cluster, and in no other way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import aiohttp
import pytest

from llorch import demo, listen, pki, tickets, tls, web
from llorch.config import ControlSettings, NodeSettings
from llorch.config_kinds import HostPort
from llorch.control import access as control_access
from llorch.errors import Code, LlorchError
from llorch.messages import NodeCall
from llorch.node.access import Access
from llorch.node.calls import LinkCalls
from llorch.node.catalog import Catalog
from llorch.node.certificate import Holding, NodeCertificate
from llorch.node.routes import routes
from llorch.node.staging import Stager, StagingLimits
from llorch.node.staging_job import Pace
from llorch.node.state import NODE, Node
from llorch.wishes import StageOrder, StageSource
from tests.cluster import eventually
from tests.gguf_files import small, write_large
from tests.standins.blob_server import blob_server
from tests.unit.node.test_catalog import split_model

SERVICE = "service-token-of-the-test-0123456789"


@dataclass
class Peer:
    """A node's catalog, stager and listener: all of a node that staging needs."""

    node_id: str
    node: Node
    stager: Stager
    access: Access
    url: str

    @property
    def catalog(self) -> Catalog:
        return self.stager.catalog

    def has(self, path: str | Path, model: str | None = None) -> str:
        """Put a model here; its digest."""
        self.catalog.find(f"file:{path}" if path != "demo" else "demo")
        self.catalog.digest_all()
        [digest] = {one.sha256 for one in self.catalog.report() if model in (None, one.id)}
        assert digest is not None
        return digest


@contextlib.asynccontextmanager
async def peer(
    folder: Path, node_id: str, settings: NodeSettings, certificate: NodeCertificate | None = None
) -> AsyncIterator[Peer]:
    access = Access(settings, certificate)
    async with Stager(Catalog(folder / node_id), node_id, StagingLimits(), access.peers()) as stager:
        nothing = cast(Any, None)
        node = Node(node_id, nothing, nothing, nothing, 1 << 20, 5.0, stager=stager)
        app = web.make_app(routes(), access.gate(lambda _: None), max_body_bytes=1 << 20)
        app[NODE] = node
        server = await listen.serve(app, "127.0.0.1", 0, tls=access.identities, shutdown_timeout_s=0.1)
        try:
            yield Peer(node_id, node, stager, access, server.url)
        finally:
            await server.close()


def plain(**more: Any) -> NodeSettings:
    return NodeSettings(service_token=SERVICE, **more)


def ticket(at: Peer, to: str, digest: str, model: str, *, key: str | None = None, **changed: Any) -> StageSource:
    fields = {"digest": digest, "source": at.node_id, "destination": to, "model": model}
    fields |= {"expires_at": time.time() + 60} | changed
    text = tickets.mint(key or tickets.key_of(SERVICE), **fields)
    return StageSource(node_id=at.node_id, url=at.url, ticket=text)


async def ensure(at: Peer, order: StageOrder) -> str:
    found = await at.stager.ensure(order, lambda _text: None)
    return str(found.path)


async def test_a_model_goes_from_one_node_to_another(tmp_path: Path) -> None:
    async with peer(tmp_path, "a", plain()) as a, peer(tmp_path, "b", plain()) as b:
        digest = a.has("demo")
        order = StageOrder(
            ref="demo", model="org/demo:q8", sha256=digest, sources=[ticket(a, "b", digest, "org/demo:q8")]
        )
        with pytest.raises(LlorchError):  # the ticket is for a name that a does not have
            await ensure(b, order)
        shutil.copy(demo.model_path(), tmp_path / "own.gguf")
        digest = a.has(tmp_path / "own.gguf", "own")
        order = StageOrder(ref="own", model="own", sha256=digest, sources=[ticket(a, "b", digest, "own")])
        path = await ensure(b, order)
        assert Path(path).read_bytes() == (tmp_path / "own.gguf").read_bytes()
        [report] = [one for one in b.catalog.report() if one.id == "own"]
        assert (report.state, report.sha256) == ("staged", digest)


async def test_all_parts_of_a_split_model_go_and_are_one_model(tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    parts = split_model(tmp_path / "split")
    async with peer(tmp_path, "a", plain()) as a, peer(tmp_path, "b", plain()) as b:
        digest = a.has(parts[0])
        order = StageOrder(ref="big", sha256=digest, sources=[ticket(a, "b", digest, "big")])
        path = Path(await ensure(b, order))
        [report] = b.catalog.report()
        assert (report.id, report.sha256, report.size_bytes) == ("big", digest, sum(p.stat().st_size for p in parts))
        assert [one.name for one in sorted(path.parent.iterdir())] == [part.name for part in parts]
        b.catalog.verify("big")
        (path.parent / parts[1].name).write_bytes(parts[1].read_bytes()[:-1] + b"x")
        with pytest.raises(LlorchError, match="has the digest"):
            b.catalog.verify("big")
        assert b.catalog.report()[0].state == "failed" and b.catalog.look("big") is None
        assert Path(await ensure(b, order)).parent.joinpath(parts[1].name).read_bytes() == parts[1].read_bytes()


async def test_after_the_nodes_its_own_origin_is_asked(tmp_path: Path) -> None:
    async with blob_server() as place, peer(tmp_path, "a", plain()) as a, peer(tmp_path, "b", plain()) as b:
        data = place.files["/m.gguf"] = small()
        sources = [ticket(a, "b", "ab" * 32, "m"), StageSource(node_id="gone", url="http://127.0.0.1:1", ticket="t")]
        path = await ensure(b, StageOrder(ref=f"{place.url}/m.gguf", sources=sources))
        assert Path(path).read_bytes() == data


async def test_what_opens_a_models_bytes_and_what_does_not(tmp_path: Path) -> None:
    shutil.copy(demo.model_path(), tmp_path / "own.gguf")
    data = (tmp_path / "own.gguf").read_bytes()
    async with peer(tmp_path, "a", plain()) as a, aiohttp.ClientSession() as session:
        digest = a.has(tmp_path / "own.gguf", "own")
        good = ticket(a, "b", digest, "own").ticket
        knock = tickets.knock_of(SERVICE)

        async def get(path: str = "own", text: str | None = good, token: str | None = knock, **headers: str) -> Any:
            shown = {"X-Llorch-Ticket": text} if text is not None else {}
            shown |= {"Authorization": f"Bearer {token}"} if token is not None else {}
            async with session.get(f"{a.url}/v2/catalog/{path}/blob", headers={**shown, **headers}) as response:
                return response.status, await response.read(), response.headers

        status, body, headers = await get()
        assert (status, body, headers["ETag"], headers["Accept-Ranges"]) == (200, data, f'"{digest}"', "bytes")
        status, body, headers = await get(Range="bytes=100-199")
        assert (status, body, headers["Content-Range"]) == (206, data[100:200], f"bytes 100-199/{len(data)}")
        status, body, _ = await get(Range="bytes=100-")
        assert (status, body) == (206, data[100:])
        assert (await get(Range=f"bytes={len(data)}-"))[0] == 416
        assert (await get(Range="bytes=100-", **{"If-Range": '"other"'}))[:2] == (200, data)
        assert (await get(token=SERVICE))[0] == 200
        for refused in (
            {"token": None}, {"token": secrets.token_hex(16)}, {"token": tickets.key_of(SERVICE)},
        ):  # fmt: skip
            assert (await get(**refused))[0] == 401, refused
        others = {
            "none": None, "not one": "v1.x.y", "another key": ticket(a, "b", digest, "own", key="k" * 64).ticket,
            "another source": ticket(a, "b", digest, "own", source="c").ticket,
            "another digest": ticket(a, "b", "0" * 64, "own").ticket,
            "another model": ticket(a, "b", digest, "demo").ticket,
            "expired": ticket(a, "b", digest, "own", expires_at=time.time() - 1).ticket,
        }  # fmt: skip
        for name, text in others.items():
            assert (await get(text=text))[0] == 403, name
        assert (await get("other"))[0] == 403  # and not 404: nobody learns what is here
        async with session.get(f"{a.url}/v2/catalog", headers={"Authorization": f"Bearer {knock}"}) as response:
            assert response.status == 403  # what opens bytes opens nothing else
        with (tmp_path / "own.gguf").open("ab") as file:
            file.write(b"x")
        assert (await get())[0] == 409


async def test_nodes_with_certificates_show_them_and_check_who_the_ticket_is_for(tmp_path: Path) -> None:
    everywhere = HostPort("0.0.0.0", 0)
    control = control_access.Access.open(
        ControlSettings(
            bind=everywhere, data_dir=str(tmp_path / "control"), api_token="t" * 32, node_token="n" * 32,
            service_token=SERVICE,
        )
    )  # fmt: skip
    authority = control.authority
    assert authority is not None

    def certificate(node_id: str) -> NodeCertificate:
        key = pki.make_key()
        chain = authority.issue_node(pki.make_request(key, node_id), node_id, time.time(), 86_400.0)
        holding = Holding.of(key, chain, authority.trust.bundle_pem, node_id)
        return NodeCertificate.take(str(tmp_path / node_id), node_id, holding, "")

    def settings() -> NodeSettings:
        return NodeSettings(bind=everywhere, join=("https://c:1",))

    key = authority.trust.ticket_key
    async with (
        peer(tmp_path, "a", settings(), certificate("a")) as a,
        peer(tmp_path, "b", settings(), certificate("b")) as b,
        peer(tmp_path, "c", settings(), certificate("c")) as c,
    ):
        shutil.copy(demo.model_path(), tmp_path / "own.gguf")
        digest = a.has(tmp_path / "own.gguf")
        order = StageOrder(ref="own", sha256=digest, sources=[ticket(a, "b", digest, "own", key=key)])
        with pytest.raises(LlorchError, match="not signed"):  # until a control has told the key
            await ensure(b, order)
        a.stager.peers.heard("https://c:1", key)
        with pytest.raises(LlorchError, match="given to another node") as failed:
            await ensure(c, order)
        assert failed.value.code is Code.FORBIDDEN
        assert Path(await ensure(b, order)).read_bytes() == (tmp_path / "own.gguf").read_bytes()
        with pytest.raises(LlorchError, match="listens without TLS"):
            far = order.sources[0].model_copy(update={"url": "http://gpu.example:9200"})
            await ensure(c, order.model_copy(update={"sources": [far]}))
        # Without a certificate of this cluster nobody comes as far as the ticket.
        context = tls.cluster_client_context(authority.trust.bundle_pem)
        assert context.verify_mode is ssl.CERT_REQUIRED
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await session.get(
                    f"{a.url}/v2/catalog/own/blob", ssl=context, server_hostname=tls.node_name("a"),
                    headers={"X-Llorch-Ticket": order.sources[0].ticket},
                )  # fmt: skip


async def test_the_catalogs_routes_take_any_id_over_http_and_over_links(tmp_path: Path) -> None:
    async with (
        blob_server() as place,
        peer(tmp_path, "a", plain()) as a,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {SERVICE}"}) as session,
    ):
        data = place.files["/m.gguf"] = small()
        calls = LinkCalls(a.node)

        async def http(method: str, path: str, body: Any = None) -> tuple[int, Any]:
            async with session.request(method, aiohttp.client.URL(a.url + path, encoded=True), json=body) as response:
                return response.status, await response.json()

        async def link(method: str, path: str, body: Any = None) -> tuple[int, Any]:
            raw = json.dumps(body).encode() if body is not None else b""
            answer = await calls(NodeCall(method=method, path=path), raw)
            return answer.status, json.loads(answer.body)

        for ask in (http, link):
            model = "org/repo:Q4_K@1"
            path = f"/v2/catalog/{quote(model, safe='')}"
            status, said = await ask("POST", "/v2/catalog/stage", {"ref": f"{place.url}/m.gguf", "model": model})
            assert (status, said["model"], said["state"]) == (202, model, "staging")
            await eventually(lambda: a.catalog.report()[0].state == "staged")
            status, said = await ask("GET", "/v2/catalog")
            assert (status, said["models"][0]["sha256"]) == (200, hashlib.sha256(data).hexdigest())
            digest = hashlib.sha256(data).hexdigest()
            assert await ask("POST", f"{path}/verify") == (
                200, {"model": model, "ok": True, "state": "staged", "sha256": digest}
            )  # fmt: skip
            assert await ask("POST", f"{path}/verify?wait=false") == (202, {"model": model, "state": "verifying"})
            await eventually(lambda: not a.stager._verifying)
            assert (await ask("POST", f"{path}/verify?wait=x"))[0] == 400
            assert await ask("DELETE", f"{path}?retire=true") == (200, {"model": model, "state": "retired"})
            assert a.catalog.report()[0].state == "retired"
            assert await ask("DELETE", path) == (200, {"model": model, "state": "removed"})
            status, said = await ask("DELETE", path)
            assert (status, said["error"]["code"]) == (404, "MODEL_NOT_FOUND")
            status, said = await ask("POST", "/v2/catalog/stage", {"ref": "file:/x/../y"})
            assert (status, said["error"]["code"]) == (400, "INVALID_REQUEST")
            status, said = await ask("POST", "/v2/catalog/stage", {"ref": f"{place.url}/none.gguf"})
            assert status == 202
            await eventually(lambda: a.catalog.report()[0].state == "failed")
            status, said = await ask("GET", "/v2/catalog")
            assert "no such file" in said["models"][0]["error"]
            assert (await ask("DELETE", "/v2/catalog/none"))[0] == 200
        assert list((tmp_path / "a" / "models").iterdir()) == []


class CountingPace(Pace):
    """How much has left a node, at so many bytes a second."""

    sent = 0

    async def __call__(self, count: int) -> None:
        await super().__call__(count)
        self.sent += count


async def start(folder: Path, order: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.standins.staging_process", str(folder), order,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


async def end(process: asyncio.subprocess.Process) -> dict[str, Any]:
    out, _ = await asyncio.wait_for(process.communicate(), 50)
    return dict(json.loads(out))


@pytest.mark.parametrize("size", [25_000_000, pytest.param(200_000_000, marks=pytest.mark.slow)])
async def test_three_nodes_get_a_model_and_one_that_is_killed_half_way_gets_hardly_a_byte_twice(
    tmp_path: Path, size: int
) -> None:
    write_large(tmp_path / "big.gguf", size)
    async with peer(tmp_path, "a", plain()) as a:
        pace = a.stager.pace = CountingPace(min(300_000_000, 3 * size))
        digest = await asyncio.to_thread(a.has, tmp_path / "big.gguf")
        order = StageOrder(
            ref="big", model="big", sha256=digest, size_bytes=size, sources=[ticket(a, "here", digest, "big")]
        )
        nodes = [tmp_path / name for name in ("b", "c", "d")]
        running = [await start(node, order.model_dump_json()) for node in nodes]
        partial = nodes[2] / "models" / "big" / "big.gguf.partial"
        await eventually(lambda: partial.exists() and partial.stat().st_size > size / 2, within_s=30)
        running[2].kill()
        await running[2].communicate()
        assert size / 2 < partial.stat().st_size < size
        running[2] = await start(nodes[2], "-")  # what it was told to do is remembered
        for node, process in zip(nodes, running, strict=True):
            found = await end(process)
            assert (found["sha256"], found["size_bytes"]) == (digest, size)
            with open(str(found["path"]), "rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest
            assert [path.name for path in (node / "models" / "big").iterdir()] == ["big.gguf"]
        again = pace.sent - 3 * size
        print(f"bytes sent again: {again}, {100 * again / size:.2f} % of the file")
        assert (
            0 <= again <= max(0.05 * size, 7_000_000)
        )  # what was on its way, in sockets and between them and the disk
