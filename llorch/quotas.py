"""How much one principal may ask for, and how often an address may fail to say who it is.

Owns the rates of a role's clients: requests a second, answers at a time, tokens a minute; and of each address the
requests without a valid token. A valid token is never refused for what others at its address did. Nodes and controls
have no rates: their beats are what keeps a cluster together. Never blocks and never looks at a clock. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from llorch.auth import Principal, Scope
from llorch.errors import Code, LlorchError
from llorch.ratelimit import ROUNDING_S, Gcra, Rate, address_key

BURST_S = 2.0  # of a rate of requests: a client that starts a batch is no flood
BYTES_PER_TOKEN = 4  # of a prompt, as an estimate: English in most tokenizers
TOKENS_OUT = 512  # of an answer that has no bound, as an estimate
STREAMS_RETRY_MS = 1_000  # when one of its own answers ends nobody knows


class Limit(StrEnum):
    """What a refusal is counted as."""

    REQUESTS = "requests"
    STREAMS = "streams"
    TOKENS = "tokens"
    FAILURES = "failures"


@dataclass(frozen=True, slots=True)
class Rates:
    """None: no limit."""

    requests_per_s: float | None = None
    streams: int | None = None
    tokens_per_min: int | None = None
    failures_per_min: int | None = None


class Quotas:
    """`limited` hears of every refusal."""

    def __init__(self, rates: Rates | None = None, limited: Callable[[Limit], None] = lambda _limit: None) -> None:
        self._streams: dict[str, int] = {}  # of those that have any
        self._charged: dict[str, tuple[str, float]] = {}  # by task: whom, and how many tokens
        self._limited = limited
        self.adopt(rates or Rates())

    def adopt(self, rates: Rates) -> None:
        """Have other rates from now on. Who has waited for one that is changed starts anew; answers stay counted."""
        per_s, tokens, failures = rates.requests_per_s, rates.tokens_per_min, rates.failures_per_min
        self._requests = None if per_s is None else Gcra(Rate(per_s, max(1.0, per_s * BURST_S)))
        self._tokens = None if tokens is None else Gcra(Rate(tokens / 60, tokens))
        self._failures = None if failures is None else Gcra(Rate(failures / 60, failures))
        self._most_streams = rates.streams

    def request(self, principal: Principal, now: float) -> None:
        """Count a request. Raises RATE_LIMITED."""
        if self._requests is None or of_the_cluster(principal):
            return
        wait_s = self._requests.take(principal.name, now)
        if wait_s:
            raise self._refusal(Limit.REQUESTS, f"more than {self._requests.rate.per_s:g} requests a second", wait_s)

    def failed(self, address: str | None, now: float) -> None:
        """Count a request without a valid token. Raises RATE_LIMITED if there were too many from this address."""
        if self._failures is None:
            return
        wait_s = self._failures.take(address_key(address), now)
        if wait_s:
            raise self._refusal(Limit.FAILURES, "too many requests without a valid token from this address", wait_s)

    @contextmanager
    def stream(self, owner: str) -> Iterator[None]:
        """An answer is given for as long as the block runs. Raises RATE_LIMITED."""
        self.begin_stream(owner)
        try:
            yield
        finally:
            self.end_stream(owner)

    def begin_stream(self, owner: str) -> None:
        """As `stream`, until `end_stream` is called."""
        running = self._streams.get(owner, 0)
        if self._most_streams is not None and running >= self._most_streams:
            words = f"{running} answers at a time are as many as one principal may have"
            raise self._refusal(Limit.STREAMS, words, STREAMS_RETRY_MS / 1_000)
        self._streams[owner] = running + 1

    def end_stream(self, owner: str) -> None:
        if self._streams[owner] > 1:
            self._streams[owner] -= 1
        else:
            del self._streams[owner]

    # ---- tokens: an estimate when a task is taken in, settled when it has ended

    def charge(self, task_id: str, owner: str, body_bytes: int, max_tokens: int | None, now: float) -> None:
        """Take what a task may cost. Raises RATE_LIMITED until its owner has so many tokens left."""
        if self._tokens is None:
            return
        tokens = body_bytes / BYTES_PER_TOKEN + (TOKENS_OUT if max_tokens is None else max_tokens)
        wait_s = self._tokens.take(owner, now, tokens)
        if wait_s:
            raise self._refusal(Limit.TOKENS, f"more than {self._tokens.rate.burst:g} tokens a minute", wait_s)
        self._charged[task_id] = (owner, min(tokens, self._tokens.rate.burst))

    def settle(self, task_id: str, tokens: int | None, now: float) -> None:
        """What a task did cost; None: nobody knows, and the estimate stands. Only the first word counts."""
        owner, charged = self._charged.pop(task_id, ("", 0.0))
        if self._tokens is not None and owner and tokens is not None:
            self._tokens.settle(owner, now, tokens - charged)

    def _refusal(self, limit: Limit, words: str, wait_s: float) -> LlorchError:
        self._limited(limit)
        hint = "retry after the time given" if limit is not Limit.FAILURES else "present a valid token"
        return LlorchError(
            Code.RATE_LIMITED,
            words,
            hint=hint,
            retry_after_ms=math.ceil((wait_s - ROUNDING_S / 2) * 1_000),
            details={"limit": limit.value},
        )


def of_the_cluster(principal: Principal) -> bool:
    """Whether it is a node or a control."""
    return Scope.NODE in principal.scopes or Scope.CONTROL in principal.scopes
