"""Every route of both roles against every kind of credential, through the listener and the gate that the roles use.

Generated from the route tables: what stands behind a route is replaced by an answer, so that a 200 means "let in".
`SCOPES` says for each route what the contract says; one that is missing there fails, as does one that is there no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web as aiohttp_web

from llorch import listen, pki, tickets, tls, web
from llorch.auth import Scope
from llorch.config import ControlSettings, NodeSettings
from llorch.config_kinds import HostPort
from llorch.control import access as control_access
from llorch.control import app
from llorch.node import access as node_access
from llorch.node.certificate import Holding, NodeCertificate
from llorch.node.routes import routes as node_routes
from llorch.tls import CONTROL_NAME, JOIN_NAME, node_name
from llorch.tokens import Kind, Wish
from llorch.web import Route

DAY = 86_400.0
OPEN, SUBMIT, READ, METRICS, ADMIN = Scope.OPEN, Scope.SUBMIT, Scope.READ, Scope.METRICS, Scope.ADMIN
NODE, JOIN, CONTROL = Scope.NODE, Scope.JOIN, Scope.CONTROL

POOL_OPERATIONS = ("drain", "undrain", "load", "unload", "reload", "restart", "purge")

SCOPES: dict[str, dict[str, set[Scope]]] = {
    "control": {
        "POST /v2/tasks": {SUBMIT}, "GET /v2/tasks": {SUBMIT}, "GET /v2/tasks/{task_id}": {SUBMIT},
        "GET /v2/tasks/{task_id}/events": {SUBMIT}, "GET /v2/tasks/{task_id}/placement": {SUBMIT},
        "POST /v2/tasks/{task_id}/cancel": {SUBMIT}, "DELETE /v2/tasks/{task_id}": {SUBMIT},
        "POST /v2/placement": {SUBMIT}, "GET /v1/models": {SUBMIT}, "GET /v1/models/{model_id:.+}": {SUBMIT},
        "POST /v1/{path:.+}": {SUBMIT},
        "POST /v2/nodes/register": {NODE}, "POST /v2/nodes/{node_id}/heartbeat": {NODE},
        "DELETE /v2/nodes/{node_id}": {NODE, ADMIN}, "GET /v2/nodes/{node_id}/link": {NODE},
        "POST /callbacks/pool-ready": {NODE}, "POST /v2/nodes/csr": {JOIN, NODE},
        "POST /v2/nodes/{node_id}/pardon": {ADMIN},
        "GET /v2/nodes": {READ}, "GET /v2/nodes/{node_id}": {READ}, "GET /v2/pools": {READ}, "GET /v2/catalog": {READ},
        "POST /v2/nodes/{node_id}/drain": {ADMIN}, "POST /v2/nodes/{node_id}/undrain": {ADMIN},
        **{f"POST /v2/nodes/{{node_id}}/pools/{{pool_id}}/{kind}": {ADMIN} for kind in POOL_OPERATIONS},
        "GET /v2/nodes/{node_id}/pools/{pool_id}/logs": {ADMIN},
        "POST /v2/catalog/stage": {ADMIN}, "GET /v2/catalog/stage": {READ}, "GET /v2/catalog/stage/{job}": {READ},
        "POST /v2/catalog/verify": {ADMIN}, "GET /v2/catalog/verify/{job}": {READ},
        "DELETE /v2/catalog/{node_id}/{model:.+}": {ADMIN},
        "GET /v2/tokens": {ADMIN}, "POST /v2/tokens": {ADMIN}, "DELETE /v2/tokens/{token}": {ADMIN},
        "GET /cacerts": {OPEN}, "GET /livez": {OPEN}, "GET /readyz": {OPEN}, "GET /health": {OPEN},
        "GET /openapi.json": {OPEN}, "GET /metrics": {METRICS},
    },
    "node": {
        "GET /livez": {OPEN}, "GET /readyz": {OPEN}, "GET /health": {OPEN}, "GET /openapi.json": {OPEN},
        "GET /metrics": {METRICS}, "GET /v2/pools": {CONTROL}, "GET /v2/pools/{pool}": {CONTROL},
        "POST /v2/drain": {CONTROL}, "POST /v2/undrain": {CONTROL}, "GET /v2/pools/{pool}/logs": {CONTROL},
        **{f"POST /v2/pools/{{pool}}/{kind}": {CONTROL} for kind in POOL_OPERATIONS},
        "GET /v2/pools/{pool}/health": {CONTROL}, "POST /v2/pools/{pool}/infer": {CONTROL},
        "GET /v2/tasks": {CONTROL}, "GET /v2/tasks/{task}": {CONTROL}, "DELETE /v2/tasks/{task}": {CONTROL},
        "GET /v2/tasks/{task}/log": {CONTROL}, "GET /v2/catalog": {CONTROL}, "POST /v2/catalog/stage": {CONTROL},
        "DELETE /v2/catalog/{model}": {CONTROL}, "POST /v2/catalog/{model}/verify": {CONTROL},
        "GET /v2/catalog/{model}/blob": {CONTROL, NODE},
    },
}  # fmt: skip

CLIENT_MAY = {SUBMIT, READ}
ADMIN_MAY = {SUBMIT, READ, METRICS, ADMIN}
CONTROL_MAY = {CONTROL, METRICS}


@dataclass(frozen=True)
class Shown:
    """One way to come. `may` is what it is good for; None: it stands for nobody (401)."""

    name: str
    may: set[Scope] | None
    token: str | None = None
    pair: tuple[bytes, bytes] | None = None


def table(role: str) -> tuple[Route, ...]:
    return app.routes() if role == "control" else node_routes()


def key_of(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.mark.parametrize("role", SCOPES)
def test_each_route_has_the_scopes_of_the_contract_and_none_is_without(role: str) -> None:
    assert {key_of(route): set(route.scopes) for route in table(role)} == SCOPES[role]


def _let_in(routes: tuple[Route, ...]) -> Iterator[Route]:
    for route in routes:

        async def handler(_request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
            return web.json_response({"let": "in"})

        yield dataclasses.replace(route, handler=handler)


@dataclass
class Ground:
    """A listener of one role, and everybody who may come to it."""

    role: str
    url: str
    session: aiohttp.ClientSession
    trusted: bytes
    mutual_name: str
    kinds: list[Shown]

    def _context(self, shown: Shown) -> ssl.SSLContext:
        context = tls.cluster_client_context(self.trusted, shown.pair)
        context.check_hostname = shown.pair is not None  # a node's other name is its address
        return context

    async def come(self, route: Route, shown: Shown) -> tuple[int, str]:
        path = re.sub(r"\{(\w+)(:[^}]*)?\}", "x", route.path)
        headers = {} if shown.token is None else {"Authorization": f"Bearer {shown.token}"}
        name = self.mutual_name if shown.pair is not None else JOIN_NAME
        async with self.session.request(
            route.method, self.url + path, headers=headers, ssl=self._context(shown), server_hostname=name
        ) as response:
            body = await response.json()
            return response.status, body.get("error", {}).get("code", "")


@contextlib.asynccontextmanager
async def ground(role: str, folder: Path) -> AsyncIterator[Ground]:
    fixed = {name: secrets.token_hex(16) for name in ("api", "admin", "node", "service")}
    data = str(folder / "control")
    everywhere = HostPort("0.0.0.0", 0)  # /metrics asks for its scope
    access = control_access.Access.open(
        ControlSettings(
            bind=everywhere, data_dir=data, api_token=f"a={fixed['api']}", admin_token=f"r={fixed['admin']}",
            node_token=fixed["node"], service_token=fixed["service"],
        )
    )  # fmt: skip
    assert access.authority is not None
    authority, now = access.authority, time.time()

    def pair(node_id: str, issued: float = now) -> tuple[bytes, bytes]:
        key = pki.make_key()
        chain = authority.issue_node(pki.make_request(key, node_id), node_id, issued, DAY, take_over=True)
        return chain, pki.key_pem(key)

    def made(**wish: object) -> str:
        return access.new_token(Wish(**wish))[1]  # type: ignore[arg-type]

    revoked = made(name="gone")
    access.revoke_token("gone")
    expired = access.files.new(Wish(life_s=1), now - 2)[1]
    access._make_ring()
    old = pair("old", now - 5)
    authority.revoke("old", now - 1)
    control_pair = authority.control_pair("desk", [], now, DAY)
    node_may: set[Scope] = {NODE}  # at a node: to come with a ticket for a model's bytes
    common = [
        Shown("nobody", None),
        Shown("a wrong token", None, secrets.token_hex(32)),
        Shown("a cut-off token", None, made(name="cut")[:-1]),
        Shown("a node's certificate", node_may, pair=pair("x")),
        Shown("another node's certificate", node_may, pair=pair("y")),
        Shown("a control's certificate", CONTROL_MAY if role == "node" else set(), pair=control_pair),
        Shown("a certificate with an admin's token", node_may, fixed["admin"], pair("z")),
    ]
    async with contextlib.AsyncExitStack() as exits:
        session = await exits.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        )
        if role == "control":
            kinds = [
                *common,
                Shown("an expired token", None, expired),
                Shown("a revoked token", None, revoked),
                Shown("a revoked node's certificate", None, pair=old),
                Shown("a fixed client token", CLIENT_MAY, fixed["api"]),
                Shown("a fixed admin token", ADMIN_MAY, fixed["admin"]),
                Shown("a fixed node token", {NODE}, fixed["node"]),
                Shown("the service token", None, fixed["service"]),
                Shown("a join token", {JOIN}, made(kind=Kind.JOIN, uses=1)),
                *(Shown(f"a token for {one}", ADMIN_MAY if one is ADMIN else {one}, made(scopes=frozenset({one})))
                  for one in (SUBMIT, READ, METRICS, ADMIN)),
            ]  # fmt: skip
            gate, identities, mutual = access.gate(lambda _: None), access.identities, CONTROL_NAME
        else:
            key = pki.make_key()
            chain = authority.issue_node(pki.make_request(key, "here"), "here", now, DAY)
            holding = Holding.of(key, chain, authority.trust.bundle_pem, "here")
            certificate = NodeCertificate.take(str(folder / "node"), "here", holding, "")
            settings = NodeSettings(bind=everywhere, join=("https://c:1",), service_token=fixed["service"])
            node = node_access.Access(settings, certificate)
            kinds = [
                *common,
                Shown("the service token", CONTROL_MAY, fixed["service"]),
                Shown("what nodes knock with", {NODE}, tickets.knock_of(fixed["service"])),
                Shown("the key of the tickets", None, tickets.key_of(fixed["service"])),
                Shown("the node's own token", None, fixed["node"]),
                Shown("a client's token", None, fixed["api"]),
                Shown("an admin's token", None, fixed["admin"]),
            ]
            gate, identities, mutual = node.gate(lambda _: None), node.identities, node_name("here")
        served = web.make_app(list(_let_in(table(role))), gate, max_body_bytes=1024)
        server = await listen.serve(served, "127.0.0.1", 0, tls=identities, shutdown_timeout_s=0.1)
        exits.push_async_callback(server.close)
        yield Ground(role, server.url, session, authority.trust.bundle_pem, mutual, kinds)


@pytest.mark.parametrize("role", SCOPES)
async def test_every_route_lets_in_whom_it_should_and_nobody_else(role: str, tmp_path: Path) -> None:
    seen = 0
    async with ground(role, tmp_path) as here:
        for route in table(role):
            wanted = SCOPES[role][key_of(route)]
            for shown in here.kinds:
                answer = await here.come(route, shown)
                seen += 1
                if OPEN in wanted:
                    # Whoever shows a certificate that is no good is told so, even where nothing is asked for.
                    expected = (401, "UNAUTHENTICATED") if shown.pair and shown.may is None else (200, "")
                elif shown.may is None:
                    expected = (401, "UNAUTHENTICATED")
                else:
                    expected = (200, "") if wanted & shown.may else (403, "FORBIDDEN")
                assert answer == expected, (key_of(route), shown.name)
    assert seen == len(table(role)) * len(here.kinds)


@pytest.mark.parametrize("role", SCOPES)
async def test_missing_and_wrong_and_ended_look_the_same(role: str, tmp_path: Path) -> None:
    async with ground(role, tmp_path) as here:
        answers = set()
        for shown in here.kinds:
            if shown.may is None and shown.pair is None:
                headers = {} if shown.token is None else {"Authorization": f"Bearer {shown.token}"}
                async with here.session.get(
                    f"{here.url}/v2/pools", headers=headers, ssl=here._context(shown), server_hostname=JOIN_NAME
                ) as response:
                    error = (await response.json())["error"]
                    del error["request_id"]
                    answers.add((response.status, str(error), response.headers["WWW-Authenticate"]))
        assert len(answers) == 1


async def test_a_table_with_a_route_that_asks_for_nothing_is_not_served() -> None:
    async def handler(_request: aiohttp_web.Request) -> aiohttp_web.StreamResponse:
        return web.json_response({})

    naked = Route("GET", "/naked", None, handler, "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope"):
        web.make_app([naked], web.Gate(ring=lambda: web.TokenRing()), max_body_bytes=1)
