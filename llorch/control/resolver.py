"""Names of nodes: looked up when they register and at every dial, and only what their node may have is dialled.

A name is checked when its node registers, but may mean something else a moment later. So the control's session asks
here instead of the system, at each connection, and connects to nothing that was not checked then: an answer that the
rule of `addresses` refuses is left out, and if none is left the dial fails. The certificate is still the name's.
Owns the threads in which names are looked up: a name server that never answers holds up no other work of the control.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

from llorch.control.addresses import Network, check_address, check_ip, host_of
from llorch.errors import Code, LlorchError
from llorch.logs import Log

LOOKUPS = 4  # at a time; the system's resolver knows no other way than a thread each
LOOKUP_TIMEOUT_S = 5.0  # as long as connecting may take
MAX_ANSWERS = 16  # of one name that are looked at: a machine has a few addresses

Lookup = Callable[[str], Awaitable[Sequence[str]]]  # the numbers that a name means; raises OSError

log = Log("control.resolver")


class NodeResolver(AbstractResolver):
    """`peers_of(host)`: where those nodes registered from that advertise this host."""

    def __init__(
        self,
        networks: Sequence[Network],
        peers_of: Callable[[str], Iterable[str | None]],
        lookup: Lookup | None = None,
    ) -> None:
        self._networks = networks
        self._peers_of = peers_of
        self._lookup = lookup or self._ask_the_system
        self._threads = ThreadPoolExecutor(LOOKUPS, "lookup")

    async def check(self, address: str, peer: str | None) -> None:
        """For a registration: UNTRUSTED_ADDRESS unless all that `address` means may be dialled."""
        check_address(address, peer, self._networks)
        try:
            found = await self._numbers(host_of(address))
        except OSError:
            found = ()
        if not found:
            raise LlorchError(Code.UNTRUSTED_ADDRESS, "the advertised address does not resolve", param="address")
        for number in found:
            check_ip(number, peer, self._networks)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """For a dial: what `host` means now and its nodes may be reached at. Raises OSError if that is nothing."""
        found = await self._numbers(host)
        peers = set(self._peers_of(host.rstrip(".").lower()))
        allowed = [number for number in found if any(self._may(number, peer) for peer in peers)]
        if len(allowed) < len(found):
            log.warning("address.refused", host=host, refused=len(found) - len(allowed), of=len(found))
        if not allowed:
            raise OSError("the name means no address that its node may be reached at")
        return [
            ResolveResult(
                hostname=host,
                host=number,
                port=port,
                family=socket.AF_INET6 if ":" in number else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for number in allowed
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _may(self, number: str, peer: str | None) -> bool:
        try:
            check_ip(number, peer, self._networks)
        except LlorchError:
            return False
        return True

    async def _numbers(self, host: str) -> Sequence[str]:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                return (await self._lookup(host))[:MAX_ANSWERS]
        except TimeoutError:
            raise OSError("no name server answered in time") from None

    async def _ask_the_system(self, host: str) -> Sequence[str]:
        def ask() -> list[str]:
            try:
                return [str(target[0]) for *_, target in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
            except UnicodeError:  # a label that is too long
                raise OSError("no name that can be looked up") from None

        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)
