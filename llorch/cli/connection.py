"""From a command's target to a client, within the time that the caller allows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llorch.cli.loading import loading

if TYPE_CHECKING:
    from llorch.cli.target import Target
    from llorch.client.api import LlorchClient


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[LlorchClient]:
    """A client for `target`. Raises TimedOut when the block takes longer than its --timeout."""
    with loading():
        from llorch.client.api import LlorchClient
        from llorch.client.faults import TimedOut
    try:
        async with (
            asyncio.timeout(target.timeout_s) as limit,
            LlorchClient(target.url, target.token, tls_ca=target.tls_ca, pinned=target.pinned) as client,
        ):
            yield client
    except TimeoutError:
        if target.timeout_s is None or not limit.expired():
            raise
        raise TimedOut(f"it took longer than --timeout, {target.timeout_s:g} s") from None
