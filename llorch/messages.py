"""What crosses the wire as JSON, validated once at the border.

Owns the strict decoder (no duplicate keys, NaN, lone surrogates or depth over 32), the pydantic models of requests and
reports, and the rule for model ids. Unknown fields are ignored between roles, refused in a native task body.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from llorch.errors import Code, LlorchError, bounded, invalid

MAX_DEPTH = 32
MAX_VALUES = 300_000  # about: an embedding of as many tokens as OpenAI takes; each costs up to 250 bytes here
MAX_FIGURE = 1e12  # of any measured value: bytes have their own type, and nothing else comes near
MAX_ATTEMPT = 1_000  # of a task; it has three retries, three losses and three continuations
MAX_NUMBER_DIGITS = 400  # beyond this a JSON number means nothing and costs quadratic time
MODEL_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}"
MODEL_ID = re.compile(MODEL_ID_PATTERN)
NODE_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
POOL_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
TASK_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def model_id_ok(text: str) -> bool:
    return MODEL_ID.fullmatch(text) is not None and ".." not in text


# ---------------------------------------------------------------- strict JSON


class _Refused(ValueError):
    """A JSON text that is well-formed and still not accepted; its text is safe to show."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused("an object has the same key twice")
            seen.add(key)
    return out


def _constant(_name: str) -> Any:
    raise _Refused("NaN and Infinity are not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_DIGITS:
        raise _Refused("a number is too long")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_NUMBER_DIGITS else float("inf")
    if value in (float("inf"), float("-inf")):
        raise _Refused("a number is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
# A string is taken in one piece: character by character, one of 60 MB took 40 s and 7 GB. One without an end is taken
# to the end, once: sought again from each of its quotes it cost quadratic time.
_PIECE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])|(,)', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_shape(text: str) -> None:
    """Before parsing: the parser recurses, and a value costs many times what its text does. Raises INVALID_REQUEST."""
    depth = values = 0
    for match in _PIECE.finditer(text):
        kind = match.lastindex
        if kind is None:
            continue
        if kind == 2:
            depth -= 1
            continue
        values += 1
        if kind == 1:
            depth += 1
            if depth > MAX_DEPTH:
                raise invalid(f"the JSON is nested deeper than {MAX_DEPTH}")
        if values > MAX_VALUES:
            raise invalid(f"the JSON has more than {MAX_VALUES} values")


def _strings(value: object) -> bool:
    """True if every string in `value` can be written as UTF-8."""
    if isinstance(value, str):
        return _LONE_SURROGATE.search(value) is None
    if isinstance(value, dict):
        return all(_strings(key) and _strings(inner) for key, inner in value.items())
    return all(map(_strings, value)) if isinstance(value, list) else True


def decode_json(raw: bytes) -> Any:
    """The JSON value in `raw`, or LlorchError INVALID_REQUEST that says what is wrong and quotes nothing."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise invalid("the body is empty", hint="send a JSON object")
    # Few brackets can't be deep, and few commas beside them can't be many values, whatever is in strings.
    brackets = text.count("[") + text.count("{")
    if brackets > MAX_DEPTH or brackets + text.count(",") > MAX_VALUES:
        _check_shape(text)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not JSON (line {error.lineno}, column {error.colno}): {error.msg}") from None
    except _Refused as error:
        raise invalid(f"the JSON is not accepted: {error}") from None
    except RecursionError:
        raise invalid(f"the JSON is nested deeper than {MAX_DEPTH}") from None
    if "\\u" in text and not _strings(value):
        raise invalid("the JSON has a lone surrogate (\\ud800 to \\udfff) in a string")
    return value


def decode_object(raw: bytes) -> dict[str, Any]:
    value = decode_json(raw)
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object", hint='for example {"model": "...", "prompt": "Hello"}')
    return value


M = TypeVar("M", bound=BaseModel)
MAX_FAULTS = 1_000  # of one body, that are told apart
_FIELDS_HINT = "GET /openapi.json has every field and its range"
MAX_QUOTED_NAME_CHARS = 100  # of a field's name in an error


def parse(model: type[M], value: object) -> M:
    """`value` as `model`, or LlorchError INVALID_REQUEST naming the first bad field and counting the others."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MAX_FAULTS:  # each costs 700 bytes to look at
            raise invalid(f"{error.error_count()} fields are unknown or wrong", hint=_FIELDS_HINT) from None
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        first = faults[0]
        where = _where(first["loc"]) or None
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        allowed = ", ".join(sorted(model.model_fields)) if first["type"] == "extra_forbidden" else None
        text = f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"
        raise LlorchError(
            Code.INVALID_REQUEST,
            text,
            param=where,
            hint=f"known fields: {allowed}" if allowed else _FIELDS_HINT,
            details={"fields": [{"field": _where(fault["loc"]), "problem": fault["msg"]} for fault in faults[:20]]},
        ) from None


def _where(loc: tuple[int | str, ...]) -> str:
    """The path to a field; of a name that a peer made up, no more than a line can show."""
    return ".".join(str(part)[:MAX_QUOTED_NAME_CHARS] for part in loc)


# ---------------------------------------------------------------- models


class Wire(BaseModel):
    """Between roles: unknown fields are ignored, so that versions may differ."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), allow_inf_nan=False)


ShortText = Annotated[str, StringConstraints(max_length=256)]
NodeId = Annotated[str, StringConstraints(pattern=f"^{NODE_ID_PATTERN}$")]
PoolId = Annotated[str, StringConstraints(pattern=f"^{POOL_ID_PATTERN}$")]
ModelId = Annotated[str, StringConstraints(pattern=f"^{MODEL_ID_PATTERN}$")]
TaskId = Annotated[str, StringConstraints(pattern=f"^{TASK_ID.pattern}$")]
Digest = Annotated[str, StringConstraints(max_length=128)]  # a sha512 in hex; ours are sha256
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Figure = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE)]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$")]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]*$", max_length=8_192)]
Headers = Annotated[dict[HeaderName, HeaderValue], Field(max_length=64)]


class ReplicaReport(Wire):
    id: ShortText
    state: ShortText
    owned: bool = False
    slots_free: Count = 0
    breaker: ShortText | None = None


class PoolOperation(Wire):
    """What a pool was last asked to do, and how far that is."""

    kind: ShortText
    state: Literal["running", "done", "failed"] = "running"
    model: ShortText | None = None
    message: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    started_at: ShortText | None = None


class PoolReport(Wire):
    """`loading`: the model on its way, for which tasks are held already. `swappable`: a task for any of `models` may be
    sent now, and is held while the node loads it. `held`: why it takes no tasks."""

    pool_id: PoolId
    engine: ShortText | None = None
    engine_version: ShortText | None = None
    model: ShortText | None = None
    models: list[ShortText] | None = Field(default=None, max_length=256)
    state: ShortText | None = None
    ready: bool | None = None
    draining: bool | None = None
    slots_total: Annotated[int, Field(ge=0, le=65_536)] | None = None
    slots_free: Annotated[int, Field(ge=0, le=65_536)] | None = None
    ctx: Count | None = None
    modalities: list[ShortText] | None = Field(default=None, max_length=16)
    vram_total_bytes: Count | None = None
    vram_free_bytes: Count | None = None
    device_mask: ShortText | None = None
    prompt_tps: Figure | None = None
    decode_tps: Figure | None = None
    load_s: Figure | None = None
    kv_usage: Figure | None = None
    generation: Count | None = None
    loading: ShortText | None = None
    swappable: bool | None = None
    held: list[ShortText] | None = Field(default=None, max_length=16)
    operation: PoolOperation | None = None
    last_error: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    replicas: list[ReplicaReport] | None = Field(default=None, max_length=256)
    gone: bool = False


class Gpu(Wire):
    index: Count
    uuid: ShortText
    name: ShortText
    vram_total_bytes: Count = 0
    vram_used_bytes: Count = 0
    vram_foreign_bytes: Count = 0
    utilization: Figure | None = None
    temperature_c: Figure | None = None
    power_w: Figure | None = None
    driver: ShortText | None = None
    compute_capability: ShortText | None = None
    mig: bool = False
    gone: bool = False


class ModelReport(Wire):
    id: ShortText
    ref: Annotated[str, StringConstraints(max_length=4_096)] | None = None
    size_bytes: Count = 0
    sha256: Digest | None = None
    format: ShortText | None = None
    state: Literal["staged", "staging", "failed", "retired"] = "staged"
    progress: Figure | None = None
    error: Annotated[str, StringConstraints(max_length=1_000)] | None = None
    ctx_train: Count | None = None
    gone: bool = False


class TaskReport(Wire):
    task_id: TaskId
    attempt: Annotated[int, Field(ge=0, le=MAX_ATTEMPT)] = 1
    epoch: ShortText | None = None
    owner: ShortText = "default"
    path: ShortText = "native"
    key_digest: Digest | None = None
    body_digest: Digest | None = None
    model: ShortText | None = None
    pool_id: ShortText | None = None
    state: Literal["accepted", "running", "sealed"] = "running"
    offset: Count = 0
    tokens_in: Count = 0
    tokens_out: Count = 0
    cached_tokens: Count = 0
    finish_reason: ShortText | None = None
    code: ShortText | None = None
    ttft_ms: Figure | None = None
    decode_ms: Figure | None = None
    started_at: ShortText | None = None
    ended_at: ShortText | None = None
    gone: bool = False


class Capabilities(Wire):
    gpus: list[Gpu] = Field(default_factory=list, max_length=64)
    cpu_cores: Count | None = None
    ram_bytes: Count | None = None


def _pool_ids_as_reports(value: object) -> object:
    """`"pools": ["p0"]` is the short form of `[{"pool_id": "p0"}]`."""
    if isinstance(value, list):
        return [{"pool_id": item} if isinstance(item, str) else item for item in value]
    return value


class Register(Wire):
    node_id: NodeId
    boot_id: ShortText | None = None
    address: Annotated[str, StringConstraints(max_length=512)] | None = None
    version: ShortText | None = None
    zone: ShortText | None = None
    cost_weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    draining: bool = False
    pools: list[PoolReport] = Field(default_factory=list, max_length=256)
    capabilities: Capabilities = Field(default_factory=Capabilities)
    catalog: list[ModelReport] = Field(default_factory=list, max_length=4_096)
    tasks: list[TaskReport] = Field(default_factory=list, max_length=8_192)

    _pools = field_validator("pools", mode="before")(_pool_ids_as_reports)


class Heartbeat(Wire):
    lease_id: ShortText | None = None
    boot_id: ShortText | None = None
    seq: Count | None = None
    delta: bool = False
    timestamp: ShortText | None = None
    rtt_ms: Annotated[float, Field(ge=0, le=MAX_FIGURE)] | None = None
    draining: bool | None = None
    pools: list[PoolReport] | None = Field(default=None, max_length=256)
    gpus: list[Gpu] | None = Field(default=None, max_length=64)
    catalog: list[ModelReport] | None = Field(default=None, max_length=4_096)
    tasks: list[TaskReport] | None = Field(default=None, max_length=8_192)

    _pools = field_validator("pools", mode="before")(_pool_ids_as_reports)


class PoolReady(Wire):
    """POST /callbacks/pool-ready"""

    node_id: NodeId
    pool_id: PoolId


class CertificateRequest(Wire):
    """POST /v2/nodes/csr: a PKCS#10 request in PEM."""

    node_id: NodeId
    csr: Annotated[str, StringConstraints(max_length=16_384)]


class NewToken(Wire):
    """POST /v2/tokens. `join`: for a machine that is to become a node, else for a client."""

    join: bool = False
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    scopes: Annotated[list[str], Field(max_length=16)] | None = None
    expires_s: Annotated[float, Field(gt=0, le=3_153_600_000, allow_inf_nan=False)] | None = None
    models: Annotated[list[Annotated[str, StringConstraints(max_length=128)]], Field(max_length=1_000)] | None = None
    uses: Annotated[int, Field(ge=1, le=10_000)] | None = None
    node_id: NodeId | None = None


class Open(Wire):
    """OPEN: a task for a pool. Its body follows as BODY records, then the prefix."""

    task_id: TaskId
    attempt: Annotated[int, Field(ge=1, le=MAX_ATTEMPT)] = 1
    pool_id: PoolId
    model: ShortText | None = None
    path: Annotated[str, StringConstraints(max_length=256)] = "native"
    stream: bool = True
    detach: bool = False
    owner: ShortText = "service"
    epoch: ShortText | None = None
    key_digest: ShortText | None = None
    body_digest: ShortText | None = None
    deadline_ms: Count | None = None
    headers: Headers = Field(default_factory=dict)
    body_len: Count = 0
    prefix_len: Count = 0


class NodeCall(Wire):
    """OPEN with a method and no task: one of the node's own routes, asked over the link."""

    method: Literal["GET", "POST", "DELETE"]
    path: Annotated[str, StringConstraints(max_length=1_024)]
    headers: Headers = Field(default_factory=dict)
    body_len: Count = 0


class Attach(Wire):
    """ATTACH: read a log from `offset`. `attempt`: of that attempt, and of no other."""

    task_id: TaskId
    offset: Count = 0
    attempt: Count | None = None


class Head(Wire):
    """HEAD: how the answer begins. An interim status, or one without a body, begins none: the rest would be misread."""

    status: Annotated[int, Field(ge=200, le=599)] = 200
    headers: Headers = Field(default_factory=dict)

    @field_validator("status")
    @classmethod
    def _has_a_body(cls, status: int) -> int:
        if status in (204, 205, 304):
            raise ValueError("an answer with this status has no body")
        return status


class Timings(Wire):
    ttft_ms: Figure | None = None
    decode_ms: Figure | None = None
    prompt_tps: Figure | None = None
    decode_tps: Figure | None = None


class Tail(Wire):
    """TAIL: the log is sealed at `length` bytes. `status` stands only beside an `error` that came before any byte."""

    length: Count
    finish_reason: ShortText | None = None
    tokens_in: Count = 0
    tokens_out: Count = 0
    cached_tokens: Count = 0
    timings: Timings = Field(default_factory=Timings)
    sha256: Digest | None = None
    error: dict[str, Any] | None = None
    status: Annotated[int, Field(ge=100, le=599)] | None = None

    @field_validator("error")
    @classmethod
    def _small(cls, error: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if error is None else bounded(error)


# ---------------------------------------------------------------- the native task


class Closed(BaseModel):
    """From people: an unknown field is an error, for a typo must not be silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=True)


class PlacementWish(Closed):
    pin: ShortText | None = None
    prefer: list[ShortText] = Field(default_factory=list, max_length=64)
    avoid: list[ShortText] = Field(default_factory=list, max_length=64)
    allow_fallback: bool = True
    zone: ShortText | None = None


Unit = Annotated[float, Field(ge=0, le=1)]


class TaskBody(Closed):
    """POST /v2/tasks. Only `model` and one of `prompt`, `messages` are required."""

    task_id: TaskId | None = None
    model: ModelId
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=10_000)
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Unit | None = None
    repeat_penalty: Annotated[float, Field(ge=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=256)]] | None = Field(
        default=None, max_length=4
    )
    grammar: Annotated[str, StringConstraints(max_length=1_048_576)] | None = None
    json_schema: dict[str, Any] | None = None
    priority: Literal["interactive", "batch"] = "interactive"
    deadline_ms: Annotated[int, Field(ge=1, le=86_400_000)] | None = None
    session_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    placement: PlacementWish = Field(default_factory=PlacementWish)
    on_node_loss: Literal["fail", "continue"] = "fail"
    detach: bool = False
    metadata: dict[str, Any] | None = None

    @field_validator("model")
    @classmethod
    def _no_parent(cls, value: str) -> str:
        if ".." in value:
            raise ValueError("a model id has no `..`")
        return value

    @model_validator(mode="after")
    def _one_input(self) -> TaskBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of `prompt` and `messages`")
        return self
