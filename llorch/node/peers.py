"""Other nodes: what this one shows them to fetch a model, and by what it knows that they may fetch one here.

With certificates of the cluster: they show one another theirs, and controls tell each node at its registration the key
by which tickets are checked. Without: both follow from the service token, which itself goes nowhere. Owns those keys.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llorch import tickets
from llorch.config_kinds import plain_http_abroad
from llorch.errors import Code, LlorchError
from llorch.tls import node_name

if TYPE_CHECKING:
    from llorch.node.certificate import NodeCertificate

MAX_CONTROLS = 16  # whose keys are kept; a node has two or three


@dataclass(frozen=True, slots=True)
class Knock:
    """How a request to another node is made."""

    headers: dict[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | None = None
    server_name: str | None = None


class Peers:
    """`service_tokens` are those of the settings, the first of which controls present; `context` is for TLS by hand."""

    def __init__(
        self,
        certificate: NodeCertificate | None = None,
        service_tokens: Callable[[], Sequence[str]] = tuple,
        context: Callable[[], ssl.SSLContext | None] = lambda: None,
    ) -> None:
        self._certificate = certificate
        self._service_tokens = service_tokens
        self._context = context
        self._told: dict[str, str] = {}

    def heard(self, control: str, ticket_key: object) -> None:
        """What a control at this URL says its tickets are signed with, if it says so."""
        if isinstance(ticket_key, str) and 32 <= len(ticket_key) <= 128 and self._certificate is not None:
            self._told.pop(control, None)
            self._told[control] = ticket_key
            if len(self._told) > MAX_CONTROLS:
                del self._told[next(iter(self._told))]

    def keys(self) -> tuple[str, ...]:
        """What a ticket may be signed with. None: nobody fetches anything here."""
        if self._certificate is not None:
            return tuple(dict.fromkeys(self._told.values()))
        return tuple(tickets.key_of(token) for token in self._service_tokens())

    def knock(self, node_id: str, url: str, ticket: str) -> Knock:
        """Raises LlorchError where there is nothing to show."""
        headers = {"X-Llorch-Ticket": ticket}
        if self._certificate is not None and url.startswith("https:"):
            return Knock(headers, self._certificate.outgoing, node_name(node_id))
        first = next(iter(self._service_tokens()), None)
        if first is None and plain_http_abroad(url):
            raise LlorchError(
                Code.MODEL_NOT_AVAILABLE,
                f"{node_id} listens without TLS, and this node has nothing that it would let in",
                hint="give both the --service-token of their control",
            )
        if first is not None:
            headers["Authorization"] = f"Bearer {tickets.knock_of(first)}"
        return Knock(headers, self._context() if url.startswith("https:") else None)
