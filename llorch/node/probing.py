"""Asks an engine whether it is there and whether it works.

Owns the two questions: `generates` (health, then one real token: a hung engine still answers its health check) and
`lost` (is it gone; a busy one is not). Decides nothing about pools and keeps nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from llorch.node.engine_answer import BROKEN, read_into, told_of_its_end
from llorch.node.engine_keys import read_key
from llorch.node.handoff import Handoff

HEALTH_TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 30.0  # an engine that others use too may let the one token wait
MAX_ANSWER_BYTES = 1024 * 1024
COMPLETIONS, EMBEDDINGS, HEALTH, PROPS = "/v1/completions", "/v1/embeddings", "/health", "/props"

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
    http: aiohttp.ClientSession, handoff: Handoff, path: str, timeout_s: float, body: Mapping[str, Any] | None = None
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
                await read_into(parts, response, MAX_ANSWER_BYTES)
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
    wish = {"model": handoff.model, "prompt": "Hi", "max_tokens": 1, "temperature": 0, "stream": False}
    status, raw = await _call(http, handoff, COMPLETIONS, TOKEN_TIMEOUT_S, wish)
    if status in (400, 404, 405, 501):  # perhaps a model for embeddings
        asked = {"model": handoff.model, "input": "Hi"}
        second, raw = await _call(http, handoff, EMBEDDINGS, TOKEN_TIMEOUT_S, asked)
        status = second if second == 200 else status
    if status in (401, 403):
        raise NotYet("it refuses the key in api_key_file")
    if status != 200:
        raise NotYet(f"{COMPLETIONS} answers HTTP {status}")
    if not isinstance(_object(raw), dict):
        raise NotYet(f"{COMPLETIONS} does not answer with JSON")
    return await _describe(http, handoff)


async def _describe(http: aiohttp.ClientSession, handoff: Handoff) -> Answer:
    """llama.cpp tells its slots and their context; others don't, and need not."""
    try:
        status, raw = await _call(http, handoff, PROPS, HEALTH_TIMEOUT_S)
    except NotYet:
        return Answer()
    props = _object(raw) if status == 200 else None
    if not isinstance(props, dict):
        return Answer()
    settings = props.get("default_generation_settings")
    return Answer(
        _count(props.get("total_slots")), _count(settings.get("n_ctx")) if isinstance(settings, dict) else None
    )


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
