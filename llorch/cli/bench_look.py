"""The first look of `llorch bench` at an endpoint: whether it answers, by which model, and whether it counts tokens.

Owns the words for an endpoint that can't be measured: told before a load is sent, with what mends it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from llorch.cli.bench_answer import Exchange, code_of, message_of, read_answer
from llorch.cli.exits import Exit, of_code
from llorch.cli.output import Failure
from llorch.cli.submit import only_of
from llorch.client.text import one_line

if TYPE_CHECKING:
    from llorch.cli.bench_load import Endpoint
    from llorch.cli.bench_plan import Ask

FIRST_TOKENS = 4
_REFUSED = (400, 422)  # also of a field that a strict endpoint does not know
_EXITS = {
    400: Exit.USAGE, 401: Exit.AUTH, 403: Exit.AUTH, 404: Exit.NOT_FOUND, 413: Exit.USAGE, 422: Exit.USAGE,
    429: Exit.NO_CAPACITY, 503: Exit.NO_CAPACITY, 504: Exit.TIMEOUT,
}  # fmt: skip
_HINTS = {
    401: "give its key: --token-file FILE, or LLORCH_TOKEN",
    403: "give a key that may do this: --token-file FILE, or LLORCH_TOKEN",
    404: "is the URL right, with or without /v1, and the model: `-m MODEL`?",
    405: "is it an OpenAI-compatible endpoint, and the URL its base, with or without /v1?",
}


async def only_model(endpoint: Endpoint) -> str:
    """The one model there is. Raises Failure if there are several, or if the endpoint can't be asked."""
    seen = await endpoint.exchange(endpoint.request("GET", "/v1/models"))
    body = b"".join(seen.parts)
    if not seen.answered:
        raise failure(endpoint, seen)
    try:
        found = [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Failure(f"{endpoint.base} does not list its models", code=Exit.USAGE, hint="name one: -m MODEL") from None
    return only_of(found)


async def first_look(endpoint: Endpoint, ask: Ask, number: int) -> Ask:
    """`ask` as this endpoint takes it: without the wish for usage, if it refuses that. Raises Failure for one that does
    not answer a request like those that are to follow.
    """
    tokens = min(FIRST_TOKENS, ask.output_tokens)
    seen = await endpoint.exchange(endpoint.chat(ask, number, tokens))
    if seen.status in _REFUSED and seen.fault is None:
        plain = replace(ask, usage=False)
        again = await endpoint.exchange(endpoint.chat(plain, number, tokens))
        if again.answered:
            ask, seen = plain, again
    if not seen.answered:
        raise failure(endpoint, seen)
    error = read_answer(seen).error
    if error is not None:
        raise Failure(
            f"{endpoint.base} did not answer with a stream of chat completion chunks",
            why=one_line(error),
            hint="is it an OpenAI-compatible endpoint? POST /v1/chat/completions with stream: true",
        )
    return ask


def failure(endpoint: Endpoint, seen: Exchange) -> Failure:
    """Why nothing can be measured."""
    if seen.fault is not None and seen.status in (0, 200):
        late = seen.fault == "timeout"
        return Failure(
            f"{endpoint.base} did not answer" if seen.status == 0 else f"{endpoint.base} did not finish its answer",
            code=Exit.TIMEOUT if late else Exit.UNREACHABLE,
            why=seen.fault,
            hint="more time: --request-timeout" if late else _mend(endpoint, seen.fault),
        )
    body = b"".join(seen.parts)
    code, said = code_of(body), message_of(body)
    exit_code = of_code(code) if code is not None else Exit.FAILED
    if exit_code is Exit.FAILED:
        exit_code = _EXITS.get(seen.status, Exit.FAILED)
    moved = "it leads elsewhere: give the URL that it leads to" if 300 <= seen.status < 400 else None
    return Failure(
        f"{endpoint.base} answered {seen.status}{f' {one_line(code)}' if code else ''}",
        code=exit_code,
        why=one_line(said)[:500] if said else None,
        hint=_HINTS.get(seen.status, moved),
    )


def _mend(endpoint: Endpoint, fault: str) -> str:
    if "TLS" in fault:
        return "its authority: --tls-ca FILE; if it speaks no TLS: http://"
    if "HTTP" in fault or "cut" in fault:
        return "check the port; if it speaks TLS: https://"
    return f"check the host and the port, and that it runs: curl {endpoint.base}/v1/models"
