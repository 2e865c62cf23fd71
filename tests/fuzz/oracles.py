"""What every answer must be, whatever was asked: the rules that a fuzzed request's answer is judged by, and a log's.

Owns the list of server errors that a route may answer, each with its reason. All others are faults.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llorch import records, sse
from llorch.errors import MEANINGS, Code, LlorchError
from llorch.messages import decode_json
from tests.fuzz.cases import Case
from tests.fuzz.wire import Answer, Ending

# What a task may end with when the cluster, and not the request, is the reason.
_TASK_ENDS = frozenset(
    {
        Code.NODE_LOST,  # it was placed on a node that only its registration made up, or that was deregistered
        Code.ENGINE_FAILED,  # the scripted engine fails as it was told to
        Code.MODEL_NOT_AVAILABLE,  # catalogued by a registration and loadable nowhere, or the engine was not ready
        Code.NO_CAPACITY,  # every pool that has the model is gone or is fenced
        Code.DEADLINE_EXCEEDED,  # a deadline of a few milliseconds
        Code.QUEUE_TIMEOUT,
        Code.ENGINE_STALLED,
        Code.RECOVERING,  # it repeats a task whose node does not answer, so nobody knows what became of that
        Code.DRAINING,  # an operator drains what it asks for, and one of the cases was that operator
    }
)
_FORWARDED = frozenset(
    {
        Code.NODE_LOST,  # the node is one that only its registration made up, or one that answers as it likes
        Code.NO_CAPACITY,  # there are as many calls on its link as may be
    }
)
_POOL_OPERATIONS = ("drain", "undrain", "load", "unload", "reload", "restart", "purge")
INTENDED: Mapping[str, frozenset[Code]] = {
    "POST /v2/tasks": _TASK_ENDS,
    "POST /v1/{path}": _TASK_ENDS,
    "GET /v2/tasks/{task_id}/events": _TASK_ENDS,
    "POST /v2/tasks/{task_id}/cancel": frozenset({Code.NODE_LOST}),  # it runs on a node that can't be told now
    "DELETE /v2/tasks/{task_id}": frozenset({Code.NODE_LOST}),
    "POST /v2/nodes/register": frozenset({Code.NO_CAPACITY}),  # a thousand nodes are here
    "POST /v2/pools/{pool}/infer": _TASK_ENDS,
    "GET /v2/tasks/{task}/log": _TASK_ENDS,
    "POST /v2/nodes/{node_id}/drain": _FORWARDED,
    "POST /v2/nodes/{node_id}/undrain": _FORWARDED,
    "GET /v2/nodes/{node_id}/pools/{pool_id}/logs": _FORWARDED,
    **{f"POST /v2/nodes/{{node_id}}/pools/{{pool_id}}/{kind}": _FORWARDED for kind in _POOL_OPERATIONS},
    "DELETE /v2/catalog/{node_id}/{model}": _FORWARDED,
    "POST /v2/catalog/stage": frozenset(
        {Code.MODEL_NOT_AVAILABLE, Code.NO_CAPACITY}  # nobody has it who was named; no node is online
    ),
}
_TYPES = frozenset(meaning.type for meaning in MEANINGS.values())
# The hostile node is caught, and so it should be; and models are ordered that nobody has.
_OWED = re.compile(r"ERROR node\.quarantined node_id=fz-hostile |ERROR staging\.failed .* code=MODEL_NOT_AVAILABLE ")
_WRONG_IN_LOGS = re.compile(
    r"Traceback|request\.failed|loop\.failed|loop\.ended|call\.failed|library\.logged|Exception ignored|Error:"
)


def judge(case: Case, answer: Answer) -> list[str]:
    """What is wrong with the answer to a case."""
    if answer.ending is Ending.GARBLED:
        return ["an answer that is no HTTP"]
    if answer.ending in (Ending.NONE, Ending.LEFT) and not answer.status:
        # Who hangs up, or sends what is no HTTP, may be left without an answer; who waits in a queue left by itself.
        return ["no answer"] if case.well_formed and answer.ending is Ending.NONE else []
    wrong = [*_access(case, answer), *_ids(case, answer)]
    if case.hostile:
        return wrong  # what a node says to its client is the node's
    if answer.status >= 400:
        wrong += _error(case, answer)
    elif answer.ending is Ending.WHOLE:
        wrong += _success(case, answer)
    return wrong


def _access(case: Case, answer: Answer) -> Iterable[str]:
    if not case.plain:
        return
    unread = answer.status in (400, 414, 431) and answer.headers.get("x-request-id") != case.request_id
    if not case.allowed and answer.status not in (401, 403) and not unread:
        yield f"{answer.status} for who may not ask this"
    wants_ticket = case.operation.path.endswith("/blob")
    if case.allowed and answer.status in (401, 403) and not (wants_ticket and answer.status == 403):
        yield f"{answer.status} for who may ask this"


def _ids(case: Case, answer: Answer) -> Iterable[str]:
    given = answer.headers.get("x-request-id", "")
    if answer.status != 101 and (not given or given != answer.headers.get("x-correlation-id")):
        yield "no request id"
    # Refused by its framing, before its headers count for anything.
    unread = answer.status in (400, 414, 431) and len(given) == 16
    if case.well_formed and not unread and case.request_id and given != case.request_id:
        yield "another request id than was given"


def _error(case: Case, answer: Answer) -> Iterable[str]:
    if case.method == "HEAD" or answer.ending is not Ending.WHOLE:
        return
    if case.operation.name == "GET /readyz" and answer.status == 503:  # no error: it says that it drains
        return
    if not answer.headers.get("content-type", "").startswith("application/json"):
        yield f"an error as {answer.headers.get('content-type')}"
        return
    try:
        error = decode_json(answer.body)["error"]
    except (LlorchError, LookupError, TypeError):
        yield "an error that is none of ours"
        return
    yield from _shape(error, answer)
    code = error.get("code")
    if answer.status >= 500 and code not in INTENDED.get(f"{case.method} {case.operation.path}", frozenset()):
        yield f"{answer.status} {code}"


def _shape(error: Any, answer: Answer) -> Iterable[str]:
    if not isinstance(error, dict) or error.get("code") not in MEANINGS:
        yield "an error without a known code"
        return
    code = Code(error["code"])
    if answer.status != MEANINGS[code].status and not (code is Code.INVALID_REQUEST and answer.status < 500):
        yield f"{code} with status {answer.status}"
    if not error.get("message") or not isinstance(error.get("retriable"), bool) or error.get("type") not in _TYPES:
        yield "an error that lacks what all have"
    if error.get("request_id") != answer.headers.get("x-request-id"):
        yield "an error with another request id than its header's"
    if answer.status in (429, 503) and not answer.headers.get("retry-after", "").isdigit():
        yield f"{answer.status} without Retry-After"
    if answer.status == 401 and "www-authenticate" not in answer.headers:
        yield "401 without WWW-Authenticate"


def _success(case: Case, answer: Answer) -> Iterable[str]:
    operation, kind = case.operation, answer.headers.get("content-type", "").partition(";")[0]
    if case.plain and answer.status not in (operation.status, 200, 202, 204):
        yield f"{answer.status} where {operation.status} is declared"
    if case.method == "HEAD" or answer.status in (101, 204):
        return
    if kind == "application/json":
        try:
            decode_json(answer.body)
        except LlorchError as error:
            yield f"JSON that is none: {error.message}"
    elif kind == "text/event-stream":
        native = "/v1/" not in operation.path if operation.role == "control" else answer.body.startswith(b"id: ")
        if native:  # of the others nothing is known: they are the engine's own
            yield from _stream(answer.body)
    elif kind == records.CONTENT_TYPE:
        yield from _records(answer.body)
    elif kind != operation.returns:
        yield f"{kind} where {operation.returns} is declared"


def _stream(body: bytes) -> Iterable[str]:
    decoder = sse.Decoder()
    events = decoder.feed(body)
    ends = [event.event for event in events if event.event in ("end", "error")]
    if len(ends) != 1 or events[-1].event != ends[0]:
        yield f"a stream with {len(ends)} ends"
    for event in events:
        try:
            decode_json(event.data.encode())
        except LlorchError:
            yield "an event whose data is not JSON"


def _records(body: bytes) -> Iterable[str]:
    decoder = records.Decoder()
    try:
        kinds = [record.type for record in decoder.feed(body)]
    except records.RecordError:
        yield "records that can't be read"
        return
    if decoder.pending or not kinds or kinds[-1] not in (records.Type.TAIL, records.Type.REFUSE):
        yield "records without an end"


def secrets_in(text: bytes | str, secrets: Iterable[str]) -> list[str]:
    """Whether any of `secrets` is in `text`; says which by its number only."""
    shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [f"secret number {number} is in it" for number, secret in enumerate(secrets) if secret in shown]


def judge_log(text: str, secrets: Iterable[str]) -> list[str]:
    """What is wrong with the lines that a role has logged."""
    wrong = [
        f"logged: {line[:300]}"
        for line in text.splitlines()
        if _WRONG_IN_LOGS.search(line) or (" ERROR " in line and not _OWED.search(line))
    ]
    return wrong + [f"in the log: {found}" for found in secrets_in(text, secrets)]
