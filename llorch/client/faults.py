"""What goes wrong on the client's own side; what a control answered is a `ServerError`.

    ClientFault             message, why, hint: the three lines a person sees
    ├── Unreachable         no connection, no TLS, or no llorch behind it
    ├── StreamBroken        the stream ended after output began, and could not be taken up again
    └── TimedOut            the caller's own limit has passed

Owns which fault an exception is; the words for one of a connection's are `llorch.reach`'s.
"""

from __future__ import annotations

from llorch import sse
from llorch.reach import why_unreachable

_AUTHORITY_HINT = (
    "for a cluster's own authority: llorch context add NAME --url URL --ca-pin SHA256 (`llorch certs status` there "
    "shows it); for another: --tls-ca FILE"
)


class ClientFault(Exception):
    def __init__(self, message: str, *, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.hint = hint


class Unreachable(ClientFault):
    pass


class StreamBroken(ClientFault):
    """`task_id` names the task whose output is cut off. `revoked`: because the token is good no more."""

    def __init__(
        self, message: str, *, task_id: str, why: str | None = None, hint: str | None = None, revoked: bool = False
    ) -> None:
        super().__init__(message, why=why, hint=hint)
        self.task_id = task_id
        self.revoked = revoked


class TimedOut(ClientFault):
    pass


def unreachable(url: str, error: Exception) -> Unreachable:
    """The fault for an exception of aiohttp's, or of the socket under it, at `url`."""
    if isinstance(error, sse.SseError):
        why, hint = "what it sent is no stream of events", "check the host and the port in --url"
    else:
        why, hint = why_unreachable(error, "--url, LLORCH_URL or the context", _AUTHORITY_HINT)
    return Unreachable(f"can't reach {url}", why=why, hint=hint)
