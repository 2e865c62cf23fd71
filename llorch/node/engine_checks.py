"""Whether engines work: probed until they generate a token, asked whether they are still there, watched while busy.

Owns when an engine is asked and what its answers mean in events; the questions themselves are `probing`, the judgement
of one that stands still is `watchdog`. Never starts or ends anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp

from llorch.node import pool_events as ev
from llorch.node import probing
from llorch.node.engine_start import EngineStart
from llorch.node.handoff import Handoff
from llorch.node.listeners import Holder, exposed
from llorch.node.pools import Pools
from llorch.node.watchdog import Watchdog
from llorch.tasks import Guard

CHECK_S = 5.0  # how often a ready engine is asked whether it is still there
CHECKS_LOST = 2  # in a row: one refused connection may be a full backlog
PROBE_FIRST_S, PROBE_MOST_S = 0.05, 0.5  # between two questions; a handoff is to be routable within 2 s
QUIET_S = 3.0  # an engine that isn't there yet is no news before this
NOT_THERE = "nothing listens at its url"
SHOWN_ADDRESSES = 3  # of an engine that listens where it should not
WATCHES_PER_STALL, WATCH_MOST_S = 12, 10.0  # how finely the time of a stall is seen

Key = tuple[str, str]  # pool id, replica id


class Checks:
    """`running`: the engines of ours by pool and replica; all others are their owners' to judge."""

    def __init__(
        self,
        pools: Pools,
        running: Mapping[Key, EngineStart],
        http: aiohttp.ClientSession,
        post: Callable[[ev.Event], None],
        *,
        clock: Callable[[], float],
        stall_timeout_s: float,
        heard_at: Callable[[str, str], float | None],
    ) -> None:
        self._pools = pools
        self._running = running
        self._http = http
        self._post = post
        self._clock = clock
        self._heard_at = heard_at
        self._stall_timeout_s = stall_timeout_s
        self._watchdog = Watchdog(stall_timeout_s)
        self._guard = Guard("checks")
        self._probes: dict[Key, asyncio.Task[None]] = {}
        self._missed: dict[Key, int] = {}
        self._counts: set[Key] = set()  # those that were heard to count something, since they became ready

    async def close(self) -> None:
        await self._guard.close()

    # ------------------------------------------------------------ probes

    def begin(self, probe: ev.Probe) -> None:
        key = (probe.pool_id, probe.replica_id)
        self.stop(key)
        self._forget(key)
        self._probes[key] = self._guard.spawn(self._probe(key, probe), f"probe.{key[0]}.{key[1]}")

    def stop(self, key: Key) -> None:
        if task := self._probes.pop(key, None):
            task.cancel()

    async def _probe(self, key: Key, probe: ev.Probe) -> None:
        """Ask until it works. An engine of ours has until its load timeout; another has as long as it is offered."""
        began, pause_s = self._clock(), PROBE_FIRST_S
        said: str | None = None
        while True:
            answer, reason = None, ""
            try:
                await self._is_its(key)
                answer = await probing.generates(self._http, probe.handoff)
            except probing.NotYet as error:
                reason = str(error)
            if reason != said and (where := await self._exposed(key)):  # its sockets changed only if its answers did
                reached = f"it listens on {', '.join(where)}: engines listen on loopback only"
                self._post(ev.ProbeFailed(*key, probe.probe, reached, gave_up=True))
                return
            if answer is not None:
                self._missed.pop(key, None)
                self._post(ev.ProbeOk(*key, probe.probe, slots=answer.slots, ctx=answer.ctx))
                await self._watch_one(key, probe.handoff)
                return
            said, waited_s = reason, self._clock() - began
            start = self._running.get(key)
            if start is not None and waited_s > start.load_timeout_s:
                late = f"it was not ready within {start.load_timeout_s:.0f} s: {reason}"
                self._post(ev.ProbeFailed(*key, probe.probe, late, gave_up=True))
                return
            if waited_s > QUIET_S:
                self._post(ev.ProbeFailed(*key, probe.probe, reason))
            await asyncio.sleep(pause_s)
            pause_s = min(PROBE_MOST_S, pause_s * 2)

    async def _is_its(self, key: Key) -> None:
        """Raises NotYet while the port of an engine of ours is not its own: nobody else is to see its key."""
        start = self._running.get(key)
        if start is not None and start.process is not None:
            whose = await start.process.port_holder()
            if whose not in (Holder.ITS, Holder.UNKNOWN):
                raise probing.NotYet(NOT_THERE if whose is Holder.NOBODY else "another program listens on its port")

    async def _exposed(self, key: Key) -> list[str]:
        """Where an engine of ours can be reached from other machines. Others' engines are their owners' to judge."""
        start = self._running.get(key)
        if start is None or start.pid is None:
            return []
        engine = start.plan.engine
        inner = engine is not None and engine.inner_ports_open
        port = start.process.port if start.process is not None and inner else None
        return (await asyncio.to_thread(exposed, start.pid, port))[:SHOWN_ADDRESSES]

    # ------------------------------------------------------------ ready ones

    def _ready(self) -> list[tuple[Key, Handoff]]:
        return [
            ((pool_id, replica_id), handoff)
            for pool_id, replica_id, state, handoff in self._pools.replicas()
            if state is ev.ReplicaState.READY and handoff is not None
        ]

    async def check(self) -> float:
        """Whether the ready engines are still there. The end of our own is seen at once; this is for the others."""
        await asyncio.gather(*(self._check_one(*each) for each in self._ready()))
        return CHECK_S

    async def _check_one(self, key: Key, handoff: Handoff) -> None:
        reason = await probing.lost(self._http, handoff)
        if reason is None:
            self._missed.pop(key, None)
            return
        self._missed[key] = self._missed.get(key, 0) + 1
        if self._missed[key] >= CHECKS_LOST:
            self._missed.pop(key)
            self._post(ev.EngineLost(*key, reason))

    async def watch(self) -> float:
        """Whether the busy ones go on: their counters move, or bytes come."""
        ready = self._ready()
        for key in self._counts.difference(key for key, _ in ready):
            self._forget(key)
        await asyncio.gather(*(self._watch_one(*each) for each in ready))
        return min(WATCH_MOST_S, self._stall_timeout_s / WATCHES_PER_STALL)

    async def _watch_one(self, key: Key, handoff: Handoff) -> None:
        """An idle one is asked until it has told what it counts: it may go deaf before it is asked while it is busy."""
        asked = self._pools.busy(*key) or key not in self._counts
        progress = await probing.progress(self._http, handoff) if asked else None
        if progress is not None:
            self._counts.add(key)
        stalled = self._watchdog.look(
            key,
            busy=self._pools.busy(*key) and (progress is None or progress.busy != 0),
            counters=progress.counters if progress is not None else None,
            answered=progress is not None,
            heard_at=self._heard_at(*key),
            now=self._clock(),
        )
        if stalled:
            reason = f"it has tasks, and made no token for {self._stall_timeout_s:.0f} s"
            self._post(ev.Stalled(*key, reason))

    def _forget(self, key: Key) -> None:
        """What is ready under this name next is another engine."""
        self._counts.discard(key)
        self._watchdog.forget(key)
