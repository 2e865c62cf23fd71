"""Who may do what at a control, which input it takes, and what every answer carries."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
from typing import Any

import pytest

from llorch.auth import Scope, TokenRing
from llorch.config_kinds import HostPort
from llorch.control import access, app
from llorch.control.strikes import Offence
from llorch.web import Gate, Route
from tests.component.control_harness import MODEL, TOKENS, a_control, bearer, eventually, lost_soon, pool, settings

TASK = "0" * 8 + "-0000-0000-0000-" + "0" * 12
WORDS = {"token": "x", "task_id": TASK, "node_id": "a", "model_id": "m", "path": "chat/completions"}
WORDS |= {"pool_id": "p0", "job": "j", "model": "m"}

# What each kind of credential may do. A route's scopes come from the route table itself.
MAY = {
    None: set(),
    "wrong": set(),
    "alice": {Scope.SUBMIT, Scope.READ},
    "admin": {Scope.SUBMIT, Scope.READ, Scope.METRICS, Scope.ADMIN},
    "node": {Scope.NODE},
    "service": set(),  # for the way from control to node; no credential here
}
KNOWN_NOWHERE = (None, "wrong", "service")


def headers_of(who: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {secrets.token_hex(16)}"} if who == "wrong" else bearer(who)


def url_of(route: Route) -> str:
    return re.sub(r"\{(\w+)(:[^}]*)?\}", lambda match: WORDS[match.group(1)], route.path)


@pytest.mark.parametrize("who", MAY)
async def test_every_route_lets_in_those_with_its_scope_and_nobody_else(
    who: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven by the route table: a new route is tested by being there."""
    monkeypatch.setattr(HostPort, "loopback", property(lambda _: False))  # /metrics asks for its scope
    async with a_control(tls="off-mesh") as control:
        for route in app.routes():
            assert route.scopes, f"{route.path} has no scope"
            allowed = Scope.OPEN in route.scopes or bool(MAY[who] & set(route.scopes))
            answer = await control.ask(route.method, url_of(route), who=None, headers=headers_of(who)).answer()
            got = (answer.status, answer.code if answer.status in (401, 403) else "")
            if allowed:
                assert answer.status not in (401, 403, 405), (route, got)
                assert answer.status != 404 or "no such route" not in answer.text, route
            elif who in KNOWN_NOWHERE:
                assert got == (401, "UNAUTHENTICATED"), (route, got)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            else:
                assert got == (403, "FORBIDDEN"), (route, got)
                assert answer.json["error"]["details"]["needs"] == [scope.value for scope in route.scopes]


def test_the_open_routes_are_those_of_the_contract_and_no_more() -> None:
    opened = {f"{route.method} {route.path}" for route in app.routes() if Scope.OPEN in route.scopes}
    assert opened == {"GET /livez", "GET /readyz", "GET /health", "GET /openapi.json", "GET /cacerts"}


async def test_metrics_are_open_on_a_loopback_listener_alone() -> None:
    async with a_control() as control:
        assert (await control.ask("GET", "/metrics", who=None).answer()).status == 200
    assert not HostPort("0.0.0.0", 1).loopback
    assert not HostPort("192.0.2.1", 1).loopback
    assert Gate(ring=lambda: TokenRing()).metrics_open is False


def test_a_cluster_of_llorch_dev_takes_tokens_of_any_length_and_another_does_not() -> None:
    short = dataclasses.replace(settings(), dev=True, api_token="short")
    assert TokenRing(access.static_tokens(short)).identify("short", 0) is not None
    with pytest.raises(ValueError, match="shorter than 32"):
        access.static_tokens(dataclasses.replace(short, dev=False))


@pytest.mark.parametrize("header", ["Authorization", "api-key", "x-api-key"])
async def test_a_token_comes_in_any_of_three_headers(header: str) -> None:
    value = f"bearer {TOKENS['alice']}" if header == "Authorization" else TOKENS["alice"]
    async with a_control() as control:
        assert (await control.ask("GET", "/v1/models", who=None, headers={header: value}).answer()).status == 200


async def test_refused_credentials_are_counted() -> None:
    async with a_control() as control:
        await control.ask("GET", "/v2/nodes", who=None).answer()
        await control.ask("GET", "/v2/nodes", who="node").answer()
        text = (await control.ask("GET", "/metrics").answer()).text
        assert sum(float(line.split()[-1]) for line in text.splitlines() if "auth_failures_total{" in line) == 2


async def test_a_route_or_method_that_is_not_there_has_the_one_error_shape() -> None:
    async with a_control() as control:
        for method, path, status, code in (
            ("GET", "/nothing", 404, "NOT_FOUND"),
            ("PUT", "/v2/tasks", 405, "METHOD_NOT_ALLOWED"),
            ("GET", "/v1/chat/completions", 404, "NOT_FOUND"),
        ):
            answer = await control.ask(method, path).answer()
            assert (answer.status, answer.code) in ((status, code), (405, "METHOD_NOT_ALLOWED"))
            assert answer.json["error"]["request_id"] == answer.headers["X-Request-Id"]


# ---------------------------------------------------------------- what every answer carries


@pytest.mark.parametrize("name", ["X-Request-Id", "X-Correlation-Id"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123_.:/+=@", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ('a"b', False), ("ä", False)],
)
async def test_a_request_id_is_kept_if_it_is_sane_and_made_if_not(name: str, given: str, kept: bool) -> None:
    async with a_control() as control:
        answer = await control.ask("GET", "/livez", headers={name: given}).answer()
        assert answer.headers["X-Request-Id"] == answer.headers["X-Correlation-Id"]
        assert (answer.headers["X-Request-Id"] == given) is kept
        assert re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", answer.headers["X-Request-Id"])


async def test_a_request_id_goes_along_to_the_node_and_into_the_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_soon(monkeypatch)
    async with a_control() as control:
        node = await control.join("a")
        asking = control.ask(
            "POST", "/v2/tasks", json={"model": MODEL, "prompt": "x"}, headers={"X-Request-Id": "mine", "X-Other": "y"}
        )
        attempt = (await node.asked()).begin()
        assert attempt.header["headers"]["x-request-id"] == "mine"
        assert "x-other" not in attempt.header["headers"]
        assert "authorization" not in attempt.header["headers"]
        await asking.has(b"started")
        assert asking.headers["X-Request-Id"] == "mine"
        await node.cut()
        assert (await asking.answer()).events[-1][1]["request_id"] == "mine"


async def test_the_openapi_document_lists_every_route_with_its_scopes() -> None:
    async with a_control() as control:
        document = await control.get("/openapi.json")
        listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
        routes = {(route.method, re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path)): route for route in app.routes()}
        assert listed == set(routes)
        for (method, path), route in routes.items():
            operation = document["paths"][path][method.lower()]
            assert operation["summary"]
            wanted = [] if route.scope is Scope.OPEN else [{"bearer": [scope.value]} for scope in route.scopes]
            assert operation["security"] == wanted


# ---------------------------------------------------------------- metrics

NAMES = (
    "nodes", "node_heartbeat_age_seconds", "heartbeat_rtt_seconds", "heartbeat_handling_seconds",
    "heartbeats_total", "registrations_total", "placement_seconds", "placements_total", "routing_seconds",
    "ttft_seconds", "task_seconds", "tasks_total", "tokens_total", "inflight", "queue_depth", "queue_eta_seconds",
    "queue_wait_seconds",
    "retries_total", "slots", "model_available", "model_ready", "gpu_utilization", "gpu_memory_bytes",
    "errors_total", "auth_failures_total",
)  # fmt: skip


async def test_metrics_have_their_stable_names_and_no_label_that_a_client_chose() -> None:
    prompt, made_up = "a prompt that nobody else should see", "no-such-model"
    gpu = {"index": 0, "uuid": "u", "name": "n", "utilization": 0.5, "vram_total_bytes": 8}
    async with a_control() as control:
        node = await control.join("a", pool("p0", slots=1), pool("p1", slots=1), catalog=[{"id": MODEL}])
        await node.beat(rtt_ms=3.0, gpus=[gpu], pools=[pool("p0", slots=1), pool("p1", slots=1)])
        asking = control.submit(prompt=prompt, session_id="session-of-alice")
        (await node.asked()).fail_early()
        attempt = (await node.asked()).begin().say("an output")
        await asking.has(b"output")
        other = control.submit(placement={"pin": f"a/{attempt.pool_id}"})
        await control.waiting(1)
        text = (await control.ask("GET", "/metrics").answer()).text
        assert 'llorch_queue_depth{model="m",priority="interactive"} 1.0' in text
        assert 'llorch_inflight{model="m"} 2.0' in text
        attempt.end()
        await asking.answer()
        (await node.asked()).begin().end()
        await other.answer()
        for count in range(3):
            assert (await control.whole(model=f"{made_up}-{count}").answer()).status == 404
        (await control.ask("GET", "/v2/nodes", who=None).answer())
        answer = await control.ask("GET", "/metrics").answer()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")}
        assert {f"llorch_{name}" for name in NAMES} - families - {"llorch_queue_depth"} == set()
        values = set(re.findall(r'="([^"]*)"', answer.text))
        assert values <= _expected_label_values(values), values
        for secret in (prompt, "an output", "session", "alice", made_up, attempt.task_id, *TOKENS.values()):
            assert secret not in answer.text
        assert await control.metric("llorch_tasks_total", model="m", outcome="done", node="a") == 2
        assert await control.metric("llorch_tokens_total", model="m", kind="output") == 1
        assert await control.metric("llorch_tasks_total", model="", outcome="failed", code="MODEL_NOT_FOUND") == 3


def _expected_label_values(seen: set[str]) -> set[str]:
    """Ids of nodes, pools and models, the fixed words, and bucket bounds."""
    fixed = {
        "", "m", "a", "p0", "p1", "0", "online", "offline", "registered", "draining", "unreachable", "free", "busy",
        "ok", "placed", "refused", "done", "failed", "canceled", "interactive", "input", "output", "cached", "total",
        "used", "foreign", "client", "node", "arriving", "quarantined", *Offence,
    }  # fmt: skip
    return fixed | {value for value in seen if re.fullmatch(r"[A-Z_]+|\+Inf|[0-9.e-]+", value)}


async def test_what_a_node_takes_with_it_when_it_goes_leaves_the_metrics_of_the_registry() -> None:
    async with a_control() as control:
        await control.join("a")
        assert await control.metric("llorch_slots", node="a", state="free") == 2
        assert await control.metric("llorch_nodes", state="online") == 1
        await control.ask("DELETE", "/v2/nodes/a", who="admin").answer()
        text = (await control.ask("GET", "/metrics").answer()).text
        assert 'llorch_slots{node="a"' not in text
        assert await control.metric("llorch_nodes", state="online") == 0


# ---------------------------------------------------------------- bad input

OPERATIONS = ("drain", "undrain", "load", "unload", "reload", "restart", "purge")
MAY_BE_EMPTY = ("empty", "blank")
BAD_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "not json": b"{",
    "not an object": b"[]",
    "a duplicate key": b'{"model": "m", "model": "m", "prompt": "x"}',
    "NaN": b'{"model": "m", "prompt": "x", "temperature": NaN}',
    "a lone surrogate": b'{"model": "m", "prompt": "\\ud800"}',
    "too deep": b'{"model": "m", "prompt": "x", "metadata": ' + b'{"a":' * 40 + b"1" + b"}" * 41,
    "far too deep": b"[" * 100_000,
    "a huge integer": b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 5_000 + b"}",
    "a byte order mark": b'\xef\xbb\xbf{"model": "m", "prompt": "x"}',
    "not utf-8": b'{"model": "m", "prompt": "\xff"}',
}


async def test_json_that_is_not_strict_is_a_400_on_every_route_that_takes_some() -> None:
    async with a_control() as control:
        node = await control.join("a")
        paths = [
            ("/v2/tasks", "alice"), ("/v2/placement", "alice"), ("/v1/chat/completions", "alice"),
            ("/v2/nodes/register", "node"), ("/v2/nodes/a/heartbeat", "node"), ("/callbacks/pool-ready", "node"),
            ("/v2/nodes/csr", "node"), ("/v2/tokens", "admin"), ("/v2/catalog/stage", "admin"),
            ("/v2/catalog/verify", "admin"), ("/v2/nodes/a/drain", "admin"), ("/v2/nodes/a/undrain", "admin"),
            *((f"/v2/nodes/a/pools/a/{kind}", "admin") for kind in OPERATIONS),
        ]  # fmt: skip
        taking = {route.path for route in app.routes() if route.body is not None}
        assert {re.sub(r"\{\w+\}", "a", path) for path in taking} <= {path for path, _ in paths}
        for path, who in paths:
            for name, raw in BAD_JSON.items():
                if name in MAY_BE_EMPTY and path.endswith(OPERATIONS):
                    continue  # a wish without words is one
                kind = {"Content-Type": "application/json"}
                answer = await control.ask("POST", path, who=who, data=raw, headers=kind).answer()
                assert (answer.status, answer.code) == (400, "INVALID_REQUEST"), (path, name, answer.text)
        assert node.opened == []
        assert control.control.dispatcher.tasks.running == 0
        assert list(control.control.dispatcher.tasks) == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"modle": "x"}, "modle"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"model": "../x"}, "model"),
        ({"model": "a" * 200}, "model"),
        ({"prompt": ["x"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"priority": "urgent"}, "priority"),
        ({"placement": {"pine": "a"}}, "placement.pine"),
        ({"placement": {"prefer": "a"}}, "placement.prefer"),
        ({"on_node_loss": "continue"}, "on_node_loss"),
        ({"detach": "yes"}, "detach"),
        ({"task_id": "nonsense"}, "task_id"),
    ],
)
async def test_a_bad_native_field_is_named_and_nothing_is_queued(change: dict[str, Any], param: str) -> None:
    async with a_control() as control:
        node = await control.join("a")
        for path in ("/v2/tasks", "/v2/placement"):
            status, answer = await control.post(path, {"model": MODEL, "prompt": "x"} | change)
            assert (status, answer["error"]["code"]) == (400, "INVALID_REQUEST")
            assert answer["error"]["param"] == param
        assert node.opened == []


async def test_a_native_body_has_one_input() -> None:
    async with a_control() as control:
        for body in ({"model": "m"}, {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
            assert (await control.post("/v2/tasks", body))[0] == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "model"), ({"model": ""}, "model"), ({"model": 1}, "model"), ({"model": "a b"}, "model"),
     ({"model": "m", "stream": "yes"}, "stream")],
)  # fmt: skip
async def test_a_v1_body_needs_a_model_and_a_sane_stream(body: dict[str, Any], param: str) -> None:
    async with a_control() as control:
        status, answer = await control.post("/v1/chat/completions", body)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "INVALID_REQUEST", param)


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"X-Llorch-Deadline-Ms": "soon"}, "X-Llorch-Deadline-Ms"),
        ({"X-Llorch-Deadline-Ms": "0"}, "X-Llorch-Deadline-Ms"),
        ({"X-Llorch-Deadline-Ms": "9" * 30}, "X-Llorch-Deadline-Ms"),
        ({"X-Llorch-On-Node-Loss": "continue"}, "X-Llorch-On-Node-Loss"),
    ],
)
async def test_a_bad_header_of_a_v1_call_is_named(headers: dict[str, str], param: str) -> None:
    async with a_control() as control:
        answer = await control.chat(headers=headers).answer()
        assert (answer.status, answer.json["error"]["param"]) == (400, param)


async def test_an_unknown_model_or_pin_is_a_404_with_a_hint_for_every_form() -> None:
    async with a_control() as control:
        await control.join("a")
        for asking in (control.submit(model="n"), control.whole(model="n"), control.chat(model="n")):
            answer = await asking.answer()
            assert (answer.status, answer.code, answer.json["error"]["param"]) == (404, "MODEL_NOT_FOUND", "model")
            assert answer.json["error"]["hint"]
            assert answer.json["error"]["type"] == "not_found_error"
        for asking, code in (
            (control.submit(placement={"pin": "b"}), "NODE_NOT_FOUND"),
            (control.chat(headers={"X-Llorch-Pin": "a/p9"}), "POOL_NOT_FOUND"),
        ):
            answer = await asking.answer()
            assert (answer.status, answer.code) == (404, code)


async def test_a_body_over_the_limit_is_a_413_stated_or_not() -> None:
    async with a_control(max_body=2048) as control:

        async def chunks() -> Any:
            for _ in range(4):
                yield b"x" * 1024

        for path in ("/v2/tasks", "/v1/chat/completions"):
            for data in (b"x" * 4096, chunks()):
                answer = await control.ask("POST", path, data=data).answer()
                assert (answer.status, answer.code) == (413, "PAYLOAD_TOO_LARGE")
        assert (await control.whole(prompt="x" * 1000).answer()).code == "MODEL_NOT_FOUND"


async def test_other_content_types_are_routed_by_a_header_or_refused() -> None:
    async with a_control() as control:
        node = await control.join("a")

        def post(kind: str, data: bytes, **headers: str) -> Any:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return control.ask("POST", "/v1/embeddings", data=data, headers={"Content-Type": kind} | named)

        answer = await post("multipart/form-data; boundary=x", b"--x").answer()
        assert (answer.status, answer.code) == (415, "UNSUPPORTED_MEDIA")
        answer = await post("audio/wav", b"RIFF", X_Llorch_Model="not a model").answer()
        assert (answer.status, answer.json["error"]["param"]) == (400, "X-Llorch-Model")
        asking = post("audio/wav", b"RIFF", X_Llorch_Model=MODEL)
        attempt = await node.asked()
        await eventually(lambda: attempt.body == b"RIFF")
        assert attempt.header["path"] == "/v1/embeddings"
        assert attempt.header["headers"]["content-type"] == "audio/wav"
        assert attempt.header["stream"] is False
        attempt.accept().head("application/json").data(b"{}").tail()
        assert (await asking.answer()).status == 200
        for kind in ("application/json; charset=utf-8", "application/vnd.x+json", "application/x-www-form-urlencoded"):
            body = json.dumps({"model": MODEL}).encode()
            asking = control.ask("POST", "/v1/embeddings", data=body, headers={"Content-Type": kind})
            attempt = await node.asked()
            attempt.accept().head("application/json").data(b"{}").tail()
            assert (await asking.answer()).status == 200


async def test_v1_bodies_reach_the_node_as_they_were_sent() -> None:
    async with a_control() as control:
        node = await control.join("a")
        raw = b'{ "model":"m" , "unknown": [1.50, {"x": null}], "stream" : false}'
        asking = control.ask("POST", "/v1/completions", data=raw, headers={"Content-Type": "application/json"})
        attempt = await node.asked()
        await eventually(lambda: attempt.body == raw)
        assert (attempt.header["path"], attempt.header["owner"]) == ("/v1/completions", "alice")
        attempt.accept().head("application/json").data(b"{}").tail()
        await asking.answer()


async def test_headers_that_no_request_could_carry_on_stay_here() -> None:
    async with a_control() as control:
        node = await control.join("a")
        asking = control.chat(headers={"traceparent": "ä", "openai-beta": "x" * 2_000, "anthropic-version": "1"})
        attempt = await node.asked()
        sent = attempt.header["headers"]
        assert (sent["anthropic-version"], "traceparent" in sent, "openai-beta" in sent) == ("1", False, False)
        attempt.accept().head().data(b"data: [DONE]\n\n").tail()
        await asking.answer()


async def test_a_body_that_is_broken_off_starts_nothing() -> None:
    async with a_control() as control:
        await control.join("a")
        reader, writer = await asyncio.open_connection("127.0.0.1", control.port)
        writer.write(
            f"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS['alice']}\r\n"
            'Content-Length: 100\r\n\r\n{"model"'.encode()
        )
        writer.close()
        await writer.wait_closed()
        assert await reader.read() == b""
        await control.idle()
        assert list(control.control.dispatcher.tasks) == []


async def test_models_are_listed_as_openai_does() -> None:
    async with a_control() as control:
        await control.join("a", pool("p0"), pool("p1", model=None, models=["org/other:q4"], ready=False))
        listed = await control.get("/v1/models")
        assert [entry["id"] for entry in listed["data"]] == ["m", "org/other:q4"]
        assert (await control.get("/v1/models/org/other:q4"))["object"] == "model"
        answer = await control.ask("GET", "/v1/models/none").answer()
        assert (answer.status, answer.code) == (404, "MODEL_NOT_FOUND")
