"""HTTP requests from a role's own `/openapi.json`: valid ones, nearly valid ones, and hostile ones.

Owns what is sent to a route: method, path, query, headers, credential, body, framing. A case is made of a seed and its
number alone, so that any case of a run can be made again. What an answer should be is `oracles.py`.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from tests.fuzz import seeds
from tests.fuzz.mutate import changed_json
from tests.fuzz.values import Pairs, anything, from_schema, text, write

CANARY = "a prompt that nobody logs 8f2e"  # in the content of tasks, and so in no log
TASK_IDS = tuple(f"00000000-0000-0000-0000-{number:012x}" for number in range(16))  # as the schemas' strings, too
NODE_IDS = ("fz-a", "fz-b", "fz-c", "n0")
POOLS = ("p0", "p1", "x")
SPARE = "p2"  # what drains, unloads and reloads pools is for this one, or no task would be served for long
MODELS = ("sim", "broken", "hostile", "hostile", "fz-m", "none", "demo")
REFS = ("demo", "demo", "demo", "sim", "hf:org/repo:Q4_K_M", "https://127.0.0.1:1/a.gguf", "file:/nowhere/a.gguf")
OPENAI = {
    "chat/completions": {"model": "sim", "messages": [{"role": "user", "content": CANARY}], "stream": True},
    "completions": {"model": "sim", "prompt": CANARY, "max_tokens": 3},
    "responses": {"model": "sim", "input": CANARY, "stream": False},
    "messages": {"model": "sim", "max_tokens": 3, "messages": [{"role": "user", "content": CANARY}]},
    "embeddings": {"model": "sim", "input": [CANARY]},
    "rerank": {"model": "sim", "query": CANARY, "documents": ["a"]},
    "audio/speech": {"model": "sim", "input": CANARY},
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "get")
TYPES = (
    "application/json", "application/json; charset=utf-16", "text/plain", "application/x-www-form-urlencoded",
    "multipart/form-data", "multipart/form-data; boundary=x", "application/vnd.api+json", "image/png", "", "/", ";;;=",
)  # fmt: skip
ACCEPTS = ("application/json", "text/event-stream", "*/*", "application/x-llorch-records", "text/html, */*;q=0.1", "")
NAMES = (
    "X-Request-Id", "X-Correlation-Id", "Idempotency-Key", "Last-Event-ID", "traceparent", "X-Llorch-Priority",
    "X-Llorch-Deadline-Ms", "X-Llorch-Pin", "X-Llorch-Session", "X-Llorch-Model", "X-Llorch-On-Node-Loss",
    "X-Llorch-Try", "X-Llorch-Attempt", "X-Llorch-Task", "X-Llorch-Path", "X-Llorch-Owner", "X-Llorch-Lease",
    "X-Forwarded-For", "Cookie", "Range", "If-None-Match", "Content-Encoding", "Upgrade", "Connection", "Expect",
    "X-Conversation-Id", "anthropic-version", "Origin", "X-HTTP-Method-Override", "Authorization", "api-key",
)  # fmt: skip
WORDS = (
    "1", "0", "-1", "99999999999999999999", "00000000001a", "batch", "interactive", "fail", "continue", "n0/p0", "sim",
    "native", "/v1/chat/completions", "/v1/x", "gzip", "llorch-records/1", "upgrade", "close", "keep-alive",
    "100-continue", "bytes=0-1", "null", "٣", "a" * 300, *TASK_IDS[:3],
)  # fmt: skip


class Credential(StrEnum):
    NONE = "none"
    WRONG = "wrong"
    CLIENT = "client"
    ADMIN = "admin"
    NODE = "node"
    SERVICE = "service"


SCOPES: Mapping[Credential, frozenset[str]] = {
    Credential.NONE: frozenset(),
    Credential.WRONG: frozenset(),
    Credential.CLIENT: frozenset({"submit", "read"}),
    Credential.ADMIN: frozenset({"submit", "read", "metrics", "admin"}),
    Credential.NODE: frozenset({"node"}),
    Credential.SERVICE: frozenset({"control", "metrics"}),
}
HERE: Mapping[str, frozenset[Credential]] = {  # whom a role knows at all
    "control": frozenset({Credential.CLIENT, Credential.ADMIN, Credential.NODE}),
    "node": frozenset({Credential.SERVICE}),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route of one role, as its document says. `scopes`: any of them will do; none: it is open."""

    role: str
    method: str
    path: str
    status: int
    returns: str
    scopes: frozenset[str]
    schema: Mapping[str, Any] | None
    parameters: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


def operations(role: str, document: Mapping[str, Any]) -> list[Operation]:
    found = []
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            status = next(word for word in described["responses"] if word != "default")
            content = described["responses"][status]["content"]
            body = described.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            found.append(
                Operation(
                    role,
                    method.upper(),
                    path,
                    int(status),
                    next(iter(content)),
                    frozenset(scope for option in described["security"] for scope in option["bearer"]),
                    body,
                    tuple(re.findall(r"\{(\w+)\}", path)),
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `plain`: it is well-formed HTTP for this very operation, so who may ask it is certain. `hostile`: a
    node answers it that makes up what it likes.
    """

    number: int
    operation: Operation
    credential: Credential
    method: str
    raw: bytes
    plain: bool
    well_formed: bool
    hang_up: bool = False
    request_id: str | None = None
    hostile: bool = False

    @property
    def allowed(self) -> bool:
        """On loopback, where these roles listen, metrics are open."""
        scopes = SCOPES[self.credential] if self.credential in HERE[self.operation.role] else frozenset()
        return self.operation.scopes <= {"metrics"} or bool(scopes & self.operation.scopes)


class Cases:
    """Cases for both roles. `tokens` has one for each credential but NONE."""

    def __init__(self, documents: Mapping[str, Mapping[str, Any]], tokens: Mapping[Credential, str], seed: int) -> None:
        self._documents = documents
        self._tokens = tokens
        self._seed = seed
        self.operations = [one for role, document in documents.items() for one in operations(role, document)]

    def case(self, number: int) -> Case:
        rng = random.Random(f"{self._seed}/{number}")
        operation = self.operations[number % len(self.operations)]  # every route as often as any other
        return _Making(rng, operation, self._documents[operation.role], self._tokens).case(number)


class _Making:
    """The parts of one case."""

    def __init__(
        self,
        rng: random.Random,
        operation: Operation,
        document: Mapping[str, Any],
        tokens: Mapping[Credential, str],
    ) -> None:
        self.rng, self.operation, self.document, self.tokens = rng, operation, document, tokens
        self.plain = self.well_formed = True

    def case(self, number: int) -> Case:
        rng, operation = self.rng, self.operation
        method = operation.method
        if rng.random() < 0.04:
            method = rng.choice(METHODS)
            self.plain = method == operation.method
            self.well_formed = method.isupper()  # aiohttp takes no other
        target = self._path() + self._query()
        credential = self._credential()
        headers = [("Host", "llorch"), *self._presented(credential)]
        request_id = None
        if rng.random() < 0.5:
            headers += self._headers()
        if rng.random() < 0.3:
            request_id = rng.choice(("fz-1", "a" * 128, "x/y:z"))
            headers = [pair for pair in headers if pair[0].lower() not in ("x-request-id", "x-correlation-id")]
            headers.append(("X-Request-Id", request_id))
        body = self._body() if method in ("POST", "PUT", "PATCH") or rng.random() < 0.05 else b""
        if body or method == "POST":
            headers.append(("Content-Type", "application/json" if rng.random() < 0.8 else rng.choice(TYPES)))
        raw, hang_up = self._framed(method, target, headers, body)
        return Case(
            number,
            operation,
            credential,
            method,
            raw,
            self.plain and self.well_formed,
            self.well_formed,
            hang_up,
            request_id,
            b"hostile" in body,
        )

    # ---- where to

    def _path(self) -> str:
        path = self.operation.path
        for name in self.operation.parameters:
            path = path.replace(f"{{{name}}}", self._parameter(name), 1)
        if self.rng.random() < 0.01:
            self.plain = False
            odd = (path + "/", "/" + path, path.upper(), path + "/..", path + "%", "http://x" + path, "*")
            path = self.rng.choice(odd)
            self.well_formed = self.well_formed and path != "*"
        return path

    def _parameter(self, name: str) -> str:
        rng = self.rng
        if rng.random() < 0.75:
            if name in ("task_id", "task"):
                return rng.choice(TASK_IDS)
            if name == "path":
                return rng.choice(tuple(OPENAI))
            path, spared = self.operation.path, rng.random() < 0.95
            ends = (self.operation.method == "DELETE" and path == "/v2/nodes/{node_id}") or path.endswith("_id}/drain")
            operates = self.operation.method == "POST" and not path.endswith("/infer")
            pools = (SPARE,) if operates and spared else POOLS
            known = {"node_id": NODE_IDS[:3] if ends and spared else NODE_IDS, "pool": pools, "pool_id": pools}
            known |= {"model_id": MODELS, "model": MODELS, "token": ("aaaaaaaa", "default")}
            return rng.choice((known | {"job": ("1", "aaaaaaaa", "stage")})[name])
        self.plain = False
        pick = rng.random()
        if pick < 0.7:
            return quote(text(rng).encode("utf-8", "surrogatepass"), safe="" if pick < 0.5 else "/")[:8_000] or "-"
        if pick < 0.8:
            return rng.choice(
                ("%", "%zz", "%C0%AF", "%ff%fe", "..", ".", "a//b", ";a=b", "a?b", "{task_id}", "%2f%2e%2e")
            )
        if pick < 0.83:
            self.well_formed = False
            return rng.choice(("a b", "a" * 9_000, "\xff\xfe", "\x00", "\x7f"))
        return rng.choice((*NODE_IDS, *TASK_IDS, "p0", "sim")) + rng.choice(("", "x", "%20", "%0a", "%00"))

    def _query(self) -> str:
        rng = self.rng
        if rng.random() < 0.75:
            return ""
        names = ("after", "attempt", "offset", "follow", "a", "", "%00", "token")
        pairs = [f"{rng.choice(names)}={self._value()}" for _ in range(rng.randrange(1, 4))]
        return "?" + "&".join(pairs)

    def _value(self) -> str:
        value = self.rng.choice(WORDS) if self.rng.random() < 0.6 else text(self.rng)
        return quote(value.encode("utf-8", "surrogatepass"))[:2_000]

    # ---- who

    def _credential(self) -> Credential:
        rng = self.rng
        if rng.random() < 0.25:
            return rng.choice(tuple(Credential))
        right = [
            one for one in HERE[self.operation.role] if not self.operation.scopes or SCOPES[one] & self.operation.scopes
        ]
        return rng.choice(sorted(right) or [Credential.NONE])

    def _presented(self, credential: Credential) -> list[tuple[str, str]]:
        rng = self.rng
        if credential is Credential.NONE:
            return []
        token = self.tokens[credential]
        if credential is Credential.WRONG:
            ring = rng.choice(list(self.tokens.values()))
            return [
                rng.choice(
                    (
                        ("Authorization", f"Bearer {token}"),
                        ("Authorization", f"Basic {token}"),
                        ("Authorization", token),
                        ("Authorization", f"Bearer {ring[:-1]}"),
                        ("Authorization", f"Bearer {ring}x"),
                        ("Authorization", f"Bearer {ring.upper()}Z"),
                        ("api-key", token),
                    )
                )
            ]
        name = rng.choice(("Authorization", "Authorization", "authorization", "api-key", "X-Api-Key"))
        return [(name, f"{rng.choice(('Bearer', 'bearer'))} {token}" if name.lower() == "authorization" else token)]

    # ---- with what

    def _headers(self) -> list[tuple[str, str]]:
        rng, out = self.rng, list[tuple[str, str]]()
        if rng.random() < 0.4:
            out.append(("Accept", rng.choice(ACCEPTS)))
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            name = rng.choice(NAMES)
            if name in ("Authorization", "api-key", "Connection", "Upgrade", "Expect"):
                self.plain = False  # who asks, or whether this is a request at all, is open now
            value = rng.choice(WORDS) if rng.random() < 0.7 else text(rng)[:300]
            out.append((name, re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", " ", value)))
        if self.operation.path.endswith("/link") and rng.random() < 0.7:
            lease = ("X-Llorch-Lease", rng.choice(WORDS))
            out += [("Connection", "Upgrade"), ("Upgrade", "llorch-records/1"), lease]
        return out

    def _body(self) -> bytes:
        rng = self.rng
        pick = rng.random()
        if pick < 0.08:
            return rng.choice((b"", b"{}", b"[]", b"null", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", b" ", b"NaN"))
        if pick < 0.14:
            return write(anything(rng))
        body = self._near()
        if pick < 0.4:
            body = changed_json(rng, body)
        if pick < 0.16:
            return body[: rng.randrange(len(body) + 1)]
        if pick < 0.18:
            return gzip.compress(body, mtime=0)
        return body[: 256 * 1024]

    def _near(self) -> bytes:
        """What the route takes, or nearly so."""
        rng, path = self.rng, self.operation.path
        if path == "/v1/{path}" or (path.endswith("/infer") and rng.random() < 0.5):
            return write({**rng.choice(tuple(OPENAI.values())), "model": rng.choice(("sim", "sim", *MODELS))})
        schema = self.operation.schema
        if path == "/v2/catalog/stage" and rng.random() < 0.6:
            ref = {"ref" if self.operation.role == "node" else "model": rng.choice(REFS)}
            return write(
                ref if self.operation.role == "node" else ref | {"nodes": rng.choice(("all", ["n0"], ["fz-a"]))}
            )
        if path == "/v2/catalog/verify" and rng.random() < 0.6:
            return write(rng.choice(({}, {"model": "demo"}, {"nodes": ["n0"]})))
        if path.endswith("/infer"):
            return write({"model": "sim", "prompt": CANARY, "max_tokens": rng.randrange(1, 5)})
        if schema is None:
            return rng.choice((seeds.TASK, b"{}", b""))
        value = from_schema(rng, schema, self.document, wild=rng.choice((0.0, 0.0, 0.02, 0.1, 0.3)))
        if isinstance(value, Pairs):
            value = self._sensible(dict(value))
        return write(value)

    def _sensible(self, value: dict[str, Any]) -> dict[str, Any]:
        """Often with what makes it more than well-formed: a model that is there, an address, one of the two inputs."""
        rng = self.rng
        if "prompt" in value or "messages" in value or "model" in value:
            if rng.random() < 0.8:
                value["model"] = rng.choice(("sim", "sim", "sim", *MODELS))
            if value.get("model") == "hostile":
                value.pop("task_id", None)  # nobody else is to read by its id what that node makes up
            if rng.random() < 0.8:
                value.pop("messages", None)
                value |= {"prompt": CANARY}
            if rng.random() < 0.9:
                value |= {"on_node_loss": "fail", "detach": rng.random() < 0.2}
                for name in ("placement", "deadline_ms", "grammar", "json_schema"):
                    if rng.random() < 0.7:
                        value.pop(name, None)
        elif "node_id" in value and rng.random() < 0.9:
            value["node_id"] = rng.choice(NODE_IDS[:3])
            if rng.random() < 0.8:
                value["address"] = rng.choice(
                    ("127.0.0.1:1", "10.255.0.1:9200", "a..b:80", "http://localhost:9", "[::1]:1")
                )
        return value

    # ---- how

    def _framed(self, method: str, target: str, headers: Sequence[tuple[str, str]], body: bytes) -> tuple[bytes, bool]:
        rng, lines, hang_up = self.rng, list(headers), False
        pick = rng.random()
        chunked = False
        if pick < 0.05:
            chunked = True
            lines.append(("Transfer-Encoding", "chunked"))
        elif pick < 0.06 and body:
            self.well_formed, hang_up = False, True
            lines.append(("Content-Length", str(len(body) + rng.choice((1, 100, 10**6)))))
        elif pick < 0.08:
            self.well_formed = False
            lines += self._smuggled(len(body))
        elif body or method == "POST":
            lines.append(("Content-Length", str(len(body))))
        head = f"{method} {target} HTTP/{'1.1' if rng.random() < 0.98 else '1.0'}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines) + "\r\n"
        if rng.random() < 0.005:
            self.well_formed = False
            head = rng.choice(
                (head.replace("\r\n", "\n"), head.replace(": ", " : "), head[:-2] + "X\r\n\r\n", " " + head)
            )
        return head.encode("utf-8", "surrogatepass") + (_chunks(rng, body) if chunked else body), hang_up

    def _smuggled(self, size: int) -> list[tuple[str, str]]:
        """Two ways to say where a request ends, or none that can be understood."""
        right = ("Content-Length", str(size))
        return self.rng.choice(
            (
                [right, ("Content-Length", str(size + 1))],
                [right, ("Transfer-Encoding", "chunked")],
                [("Content-Length", f"+{size}")],
                [("Content-Length", "-1")],
                [("Content-Length", "9" * 30)],
                [("Transfer-Encoding", "chunked, identity")],
                [("Transfer-Encoding", "xchunked")],
                [("Content-Length", f"{size}, {size}")],
                [right, ("X-Many", "a"), *(("X-Filler", "b" * 100) for _ in range(200))],
            )
        )


def _chunks(rng: random.Random, body: bytes) -> bytes:
    out, at = bytearray(), 0
    while at < len(body):
        size = rng.choice((1, 7, 64, 4_096, len(body)))
        piece = body[at : at + size]
        out += f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        at += len(piece)
    return bytes(out) + b"0\r\n\r\n"
