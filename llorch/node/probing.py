"""Asks an engine whether it is there and whether it works.

Owns the three questions: `generates` (health, then one real token: a hung engine still answers its health check),
`lost` (is it gone; a busy one is not) and `progress` (does what it counts move). Decides nothing about pools and keeps
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from llorch.node.engine_answer import BROKEN, read_into, told_of_its_end
from llorch.node.engine_keys import read_key
from llorch.node.engines import progress as counters
from llorch.node.engines.progress import Progress
from llorch.node.handoff import Handoff

HEALTH_TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 30.0  # an engine that others use too may let the one token wait
MAX_ANSWER_BYTES = 1024 * 1024
MAX_METRICS_BYTES = 4 * 1024 * 1024  # vLLM's histograms come to some hundred KiB for each model and rank
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
HEALTH, PROPS, MODELS, METRICS = "/health", "/props", "/v1/models", "/metrics"
NOT_SO = frozenset({400, 404, 405, 501})  # it does not answer this kind of request, or not for this model

_BROKEN = (*BROKEN, ValueError)  # no proper HTTP


class NotYet(Exception):
    """The engine can't be used now; the text says why and quotes nothing of its answers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine that works says of itself, where it does."""

    slots: int | None = None
    ctx: int | None = None


def _headers(handoff: Handoff) -> dict[str, str]:
    if handoff.api_key_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {read_key(handoff.api_key_file)}"}
    except OSError as error:
        raise NotYet(f"its api_key_file can't be read: {error.strerror}") from None
    except ValueError:
        raise NotYet("its api_key_file holds no key") from None


async def _call(
    http: aiohttp.ClientSession,
    handoff: Handoff,
    path: str,
    timeout_s: float,
    body: Mapping[str, Any] | None = None,
    most_bytes: int = MAX_ANSWER_BYTES,
) -> tuple[int, bytes]:
    """Status and body of one request. Raises NotYet when there was no whole answer."""
    parts: list[bytes] = []
    try:
        async with (
            asyncio.timeout(timeout_s),
            http.request(
                "GET" if body is None else "POST",
                handoff.url + path,
                json=body,
                headers=_headers(handoff),
                allow_redirects=False,
            ) as response,
        ):
            with told_of_its_end(response):
                await read_into(parts, response, most_bytes)
            return response.status, b"".join(parts)
    except TimeoutError:
        raise NotYet(f"no answer to {path} within {timeout_s:.0f} s") from None
    except aiohttp.ClientConnectorError:
        raise NotYet("nothing listens at its url") from None
    except _BROKEN:
        raise NotYet(f"no proper answer to {path}") from None


async def generates(http: aiohttp.ClientSession, handoff: Handoff) -> Answer:
    """Returns once the engine has generated one token (or one embedding). Raises NotYet."""
    status, _ = await _call(http, handoff, HEALTH, HEALTH_TIMEOUT_S)
    if status == 503:
        raise NotYet("it is loading its model")
    if status not in (200, 204, 404):  # 404: it has no health check, so the token alone decides
        raise NotYet(f"{HEALTH} answers HTTP {status}")
    for path, wish in _wishes(handoff.served_as):
        status, raw = await _call(http, handoff, path, TOKEN_TIMEOUT_S, wish)
        if status not in NOT_SO:
            break
    if status in NOT_SO:
        raise NotYet(await _why_none(http, handoff, status))
    if status in (401, 403):
        raise NotYet("it refuses the key in api_key_file" if handoff.api_key_file else "it wants a key: api_key_file")
    if status != 200:
        raise NotYet(f"{path} answers HTTP {status}")
    if not isinstance(_object(raw), dict):
        raise NotYet(f"{path} does not answer with JSON")
    return await _describe(http, handoff)


def _wishes(model: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """One token, in the ways in which it may be asked for; engines that only chat, or only embed, refuse the others."""
    one = {"model": model, "max_tokens": 1, "temperature": 0, "stream": False}
    return (
        (COMPLETIONS, one | {"prompt": "Hi"}),
        (CHAT, one | {"messages": [{"role": "user", "content": "Hi"}]}),
        (EMBEDDINGS, {"model": model, "input": "Hi"}),
    )


async def _why_none(http: aiohttp.ClientSession, handoff: Handoff, status: int) -> str:
    """Why an engine gives no token in any way: mostly it calls its models otherwise."""
    with contextlib.suppress(NotYet):
        found, raw = await _call(http, handoff, MODELS, HEALTH_TIMEOUT_S)
        names = [one.get("id") for one in _models(raw)] if found == 200 else []
        if names and handoff.served_as not in names:
            return f"it has no model {handoff.served_as}: set the pool's engine_model to its name there"
    return f"it generates nothing: the last of its answers was HTTP {status}"


async def _describe(http: aiohttp.ClientSession, handoff: Handoff) -> Answer:
    """llama.cpp tells its slots and their context, vLLM and SGLang the context; others don't, and need not."""
    with contextlib.suppress(NotYet):
        status, raw = await _call(http, handoff, PROPS, HEALTH_TIMEOUT_S)
        props = _object(raw) if status == 200 else None
        if isinstance(props, dict):
            settings = props.get("default_generation_settings")
            ctx = settings.get("n_ctx") if isinstance(settings, dict) else None
            return Answer(_count(props.get("total_slots")), _count(ctx))
        status, raw = await _call(http, handoff, MODELS, HEALTH_TIMEOUT_S)
        mine = [one for one in _models(raw) if one.get("id") == handoff.served_as] if status == 200 else []
        return Answer(None, _count(mine[0].get("max_model_len")) if mine else None)
    return Answer()


def _models(raw: bytes) -> list[dict[str, Any]]:
    listed = _object(raw)
    models = listed.get("data") if isinstance(listed, dict) else None
    return [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []


def _object(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65_536 * 65_536 else None


async def lost(http: aiohttp.ClientSession, handoff: Handoff) -> str | None:
    """Why a ready engine must be taken for gone, or None. No answer in time is no reason: it may be busy."""
    try:
        async with (
            asyncio.timeout(HEALTH_TIMEOUT_S),
            http.get(handoff.url + HEALTH, headers=_headers(handoff), allow_redirects=False) as response,
        ):
            return f"{HEALTH} answers HTTP {response.status}" if response.status >= 500 else None
    except aiohttp.ClientConnectorError:
        return "nothing listens at its url any more"
    except (*_BROKEN, NotYet):
        return None


async def progress(http: aiohttp.ClientSession, handoff: Handoff) -> Progress | None:
    """What the engine counts. None if it did not answer, or counts nothing that is known."""
    try:
        status, raw = await _call(http, handoff, METRICS, HEALTH_TIMEOUT_S, most_bytes=MAX_METRICS_BYTES)
    except NotYet:
        return None
    return counters.read(handoff.engine, raw.decode("utf-8", "replace")) if status == 200 else None
