"""Tickets: by which one node lets another fetch a model, because a control of the cluster said so.

    v1.<base64url of JSON: d digest, m model, s source, t destination, e expiry>.<base64url of its HMAC-SHA256>

Owns how a ticket is written and checked, and what is derived from a service token where a cluster has no certificates:
the key of its tickets, and the token by which a node may knock at another for a model and for nothing else. Never looks
at a clock: times are seconds since 1970. Pure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass

from llorch.errors import Code, LlorchError
from llorch.messages import decode_object

MAX_TICKET_CHARS = 2_048
MAX_LIFE_S = 7 * 86_400.0  # more than any staging takes; what claims to be good for longer is none of ours
_VERSION = "v1"


@dataclass(frozen=True, slots=True)
class Ticket:
    """`digest`: the model's, in hex. `source` and `destination`: ids of nodes. `expires_at`: seconds since 1970."""

    digest: str
    model: str
    source: str
    destination: str
    expires_at: float


def key_of(service_token: str) -> str:
    """What controls sign with, and nodes check with, where there are no certificates."""
    return _derived(service_token, b"llorch ticket 1")


def knock_of(service_token: str) -> str:
    """What a node presents to another where there are no certificates: good for models with a ticket, nothing else.

    From it nobody learns the service token, nor what tickets are signed with.
    """
    return _derived(service_token, b"llorch knock 1")


def mint(key: str, *, digest: str, source: str, destination: str, expires_at: float, model: str) -> str:
    fields = {"d": digest, "m": model, "s": source, "t": destination, "e": expires_at}
    body = _text(json.dumps(fields, separators=(",", ":"), sort_keys=True).encode())
    return f"{_VERSION}.{body}.{_text(_mac(key, body))}"


def check(
    keys: Iterable[str],
    ticket: str,
    *,
    model: str,
    digest: str | None,
    source: str,
    destination: str | None,
    now: float,
) -> Ticket:
    """The ticket, good for this model with this digest, here. `keys`: any of them may have signed it.

    `destination`: who asks, where that is known. Raises FORBIDDEN.
    """
    version, _, rest = ticket.partition(".")
    body, dot, mac = rest.partition(".")
    if len(ticket) > MAX_TICKET_CHARS or version != _VERSION or not dot:
        raise _refused("the ticket can't be read")
    shown = mac.encode("utf-8", "replace")  # as text, which has one form; what it decodes to has several
    # Every key is tried, and each comparison takes as long as the others.
    signed = [hmac.compare_digest(_text(_mac(key, body)).encode(), shown) for key in keys if key]
    if not any(signed):
        raise _refused("the ticket was not signed by a control of this cluster")
    found = _read(body)
    if found.expires_at <= now or found.expires_at > now + MAX_LIFE_S:
        raise _refused("the ticket has expired")
    if found.model != model or digest is None or not hmac.compare_digest(found.digest.encode(), digest.encode()):
        raise _refused("the ticket is for another model than the one here")
    if found.source != source:
        raise _refused("the ticket is for another node")
    if destination is not None and found.destination != destination:
        raise _refused("the ticket was given to another node")
    return found


def _read(body: str) -> Ticket:
    try:
        fields = decode_object(_bytes(body))
    except LlorchError:
        raise _refused("the ticket can't be read") from None
    texts = [fields.get(name) for name in ("d", "m", "s", "t")]
    expires = fields.get("e")
    if not all(isinstance(text, str) for text in texts) or not isinstance(expires, int | float):
        raise _refused("the ticket can't be read")
    digest, model, source, destination = map(str, texts)
    return Ticket(digest, model, source, destination, float(expires))


def _refused(why: str) -> LlorchError:
    return LlorchError(
        Code.FORBIDDEN, why, hint="stage it again: `llorch model stage MODEL --nodes NODE` gives a new ticket"
    )


def _derived(secret: str, purpose: bytes) -> str:
    return hmac.new(secret.encode(), purpose, hashlib.sha256).hexdigest()


def _mac(key: str, body: str) -> bytes:
    return hmac.new(key.encode(), f"{_VERSION}.{body}".encode("utf-8", "replace"), hashlib.sha256).digest()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
