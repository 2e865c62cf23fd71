"""One handoff file: the JSON by which an engine, started by anyone, is offered to this node.

Owns the rules for its name and content, with a plain reason for every refusal, and its rendering. Pure: bytes in, a
Handoff or ValueError out. Never opens a file and never asks the engine.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from llorch.errors import LlorchError
from llorch.messages import POOL_ID_PATTERN, decode_object, model_id_ok

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_HANDOFF_BYTES = 64 * 1024
SUFFIX = ".json"
DEFAULT_REPLICA = "r0"
MAX_SLOTS = 65_536
MAX_CTX = 2**31 - 1
MAX_PID = 2**22  # the most that Linux gives out


@dataclass(frozen=True, slots=True)
class Handoff:
    """An engine that serves `model` at `url`. `slots` and `ctx` (of one slot) may be left for the engine to say.

    `engine_model`: what the engine calls the model, if not `model`, which is what clients name.
    """

    pool_id: str
    engine: str
    url: str
    model: str
    replica_id: str = DEFAULT_REPLICA
    engine_version: str | None = None
    slots: int | None = None
    ctx: int | None = None
    pid: int | None = None
    device_mask: str | None = None
    api_key_file: str | None = None
    engine_model: str | None = None

    @property
    def served_as(self) -> str:
        """The model's name in what the engine is asked."""
        return self.engine_model or self.model

    @property
    def file_name(self) -> str:
        return file_name(self.pool_id, self.replica_id)


def file_name(pool_id: str, replica_id: str) -> str:
    return f"{pool_id}-{replica_id}{SUFFIX}"


def render(handoff: Handoff) -> bytes:
    """The file's content; `parse` of it is `handoff`."""
    known = {name: value for name, value in asdict(handoff).items() if value is not None}
    return json.dumps(known, indent=1, ensure_ascii=False).encode() + b"\n"


def parse(name: str, raw: bytes, engine_cidrs: Sequence[Network] = ()) -> Handoff:
    """The handoff in `raw`, from a file called `name`. Raises ValueError with the reason, which quotes no value."""
    if len(raw) > MAX_HANDOFF_BYTES:
        raise ValueError(f"it is larger than {MAX_HANDOFF_BYTES} bytes")
    try:
        wire = decode_object(raw)
    except LlorchError as error:
        raise ValueError(error.message.replace("the body", "the file")) from None
    unknown = sorted(set(wire).difference(_FIELDS))
    if unknown:
        raise ValueError(f"it has unknown fields: {', '.join(map(_printable, unknown[:5]))}")
    given = {field: value for field, value in wire.items() if value is not None}
    missing = [field for field in ("pool_id", "engine", "url", "model") if field not in given]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for field, value in given.items():
        _FIELDS[field](field, value)
    slots, total = given.get("slots"), given.pop("slots_total", None)
    if slots is not None and total is not None and slots != total:
        raise ValueError("slots and slots_total differ")
    if slots is None and total is not None:
        given["slots"] = total
    handoff = Handoff(**{**given, "url": _url(given["url"], engine_cidrs)})
    if name != handoff.file_name:
        raise ValueError(f"its name does not match its content: it should be {handoff.file_name}")
    return handoff


# ---------------------------------------------------------------- one rule per field


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text[:64])


def _matching(pattern: str, meaning: str) -> Callable[[str, Any], None]:
    rule = re.compile(pattern)

    def check(field: str, value: Any) -> None:
        if not isinstance(value, str) or not rule.fullmatch(value):
            raise ValueError(f"{field} is not {meaning}")

    return check


def _whole(low: int, high: int) -> Callable[[str, Any], None]:
    def check(field: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{field} is not a whole number from {low} to {high}")

    return check


def _model(field: str, value: Any) -> None:
    if not isinstance(value, str) or not model_id_ok(value):
        raise ValueError(f"{field} is not a model id")


_ID = _matching(POOL_ID_PATTERN, "an id: letters, digits, `.`, `_` and `-`, at most 64")

_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "pool_id": _ID,
    "replica_id": _ID,
    "engine": _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "the name of an engine"),
    "engine_version": _matching(r"[\x20-\x7e]{0,128}", "a line of plain text"),
    "url": _matching(r"https?://[\x21-\x7e]{1,512}", "an http or https URL"),
    "model": _model,
    "slots": _whole(1, MAX_SLOTS),
    "slots_total": _whole(1, MAX_SLOTS),
    "ctx": _whole(1, MAX_CTX),
    "pid": _whole(1, MAX_PID),
    "device_mask": _matching(r"[A-Za-z0-9,:/._-]{0,256}", "a list of devices"),
    "engine_model": _matching(r"[\x21-\x7e]{1,256}", "the name of a model: at most 256 characters, no space"),
    "api_key_file": _matching(r"/[^\x00-\x1f\x7f]{1,4095}", "an absolute path"),
}


def _url(text: str, engine_cidrs: Sequence[Network]) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("url is not an http or https URL") from None
    if "@" in parts.netloc:
        raise ValueError("url must not carry a user or password")
    if parts.path not in ("", "/") or parts.query or parts.fragment or text.endswith(("?", "#")):
        raise ValueError("url is more than scheme://host:port")
    if port == 0 or not host:
        raise ValueError("url has no host and port to connect to")
    if not _allowed(host, engine_cidrs):
        raise ValueError("url is not loopback, nor in --engine-cidr")
    return text.rstrip("/")


def _allowed(host: str, engine_cidrs: Sequence[Network]) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name may lead anywhere, and elsewhere tomorrow
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or any(address in network for network in engine_cidrs)
